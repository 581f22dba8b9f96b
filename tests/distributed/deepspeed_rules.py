"""DeepSpeed's ZeRO stages, as the checks of rules.py train with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.integrations.deepspeed import compress_engine
from tests.distributed.deepspeed_ranks import BF16, FP16, Net, engine_of, start_deepspeed
from tests.distributed.rules import BESIDE_BACKWARD, RULES, Observed, verdicts

STAGES = (0, 1, 2)


def batch(number: int, rank: int) -> Tensor:
    return torch.randn(16, 48, generator=torch.Generator().manual_seed(1000 * number + rank))


def loss_of(model: Any, x: Tensor) -> Tensor:
    return (model(x).float() - 1).square().mean()


# DeepSpeed reads its sums at once, so nothing of ours can run beside backward: docs/engines.md.
DEEPSPEED_RULES = {name: check for name, check in RULES.items() if name != BESIDE_BACKWARD}


class EngineJob:
    """An engine with SGD; its own loss scaler where it trains in float16."""

    def __init__(self, rig: StageRig, case: dict[str, Any], bits: Any, **options: Any) -> None:
        self.rig, self.engine = rig, engine_of(case)
        self.dtype = next(self.engine.module.parameters()).dtype
        self.compression: Any = None
        try:
            if bits is not None:
                self.compression = compress_engine(self.engine, bits, **options)
        except BaseException:
            self.engine.destroy()
            raise

    @property
    def compressors(self) -> Sequence[Any]:
        return [self.compression._compressor]

    all_compressors = compressors

    def step(self, number: int, poisoned: bool = False) -> None:
        loss = loss_of(self.engine, batch(number, self.rig.rank).to(self.dtype))
        if poisoned and self.rig.rank == self.rig.size - 1:
            loss = loss * float("inf")
        self.engine.backward(loss)
        self.engine.step()

    def backward(self, number: int, at_input: Callable[[], None]) -> None:
        self.engine.backward(loss_of(self.engine, batch(number, self.rig.rank)))

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.engine.module.named_parameters()}

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        named = self.engine.module.named_parameters()
        return {name: safe_get_full_grad(p).clone() for name, p in named if p.requires_grad}

    def loss_scale(self) -> float:
        return float(self.engine.optimizer.loss_scale)

    def residuals(self) -> dict[str, Tensor]:
        kept = self.compression.state_dict()["compressor"]["residuals"]
        return {} if kept is None else {name: values.clone() for name, values in kept["parameters"].items()}

    def diverge(self) -> str:
        if self.rig.rank == self.rig.size - 1:
            with torch.no_grad():
                self.engine.module.last.bias[3] += 1.0
        return "last.bias"

    def save(self) -> Any:
        self.engine.save_checkpoint(str(self.rig.folder))
        return self.rig.folder

    def load(self, saved: Any) -> None:
        self.engine.load_checkpoint(str(saved))

    def close(self) -> None:
        if self.compression is not None:
            self.compression.close()
        self.engine.destroy()


class StageRig:
    """One ZeRO stage. Sums are read as soon as they are asked for: nothing runs beside backward."""

    rules = DEEPSPEED_RULES
    all_bounded: Mapping[str, Any] = {"messages": "bounded"}

    def __init__(self, rank: int, stage: int, folder: Path) -> None:
        self.rank, self.size = rank, dist.get_world_size()
        self.seen: dict[Any, Observed] = {}
        self.folder = folder / f"rules of stage {stage} on {self.size}"
        self.stage = stage

    def job(
        self, bits: Any, half: bool = False, scaled: bool = False, fed_back: bool = False, **options: Any
    ) -> EngineJob:
        case: dict[str, Any] = {"zero": {"stage": self.stage}, "sgd": True}
        if half:
            case["bf16"] = BF16
        if scaled:
            case["fp16"] = FP16
        own = {"error_feedback": True} if fed_back else {"scale": "local", "error_feedback": False}
        return EngineJob(self, case, bits, **own, **options)

    def local_gradients(self, number: int) -> dict[str, Tensor]:
        """As DeepSpeed averages: it multiplies sums in stage 0, and divides what is summed up in 1 and 2."""
        total: dict[str, Tensor] = {}
        for rank in range(self.size):
            torch.manual_seed(7)
            net = Net()
            loss_of(net, batch(number, rank)).backward()
            for name, p in net.named_parameters():
                if p.grad is not None:
                    part = p.grad / self.size if self.stage else p.grad
                    total[name] = total[name] + part if rank else part.clone()
        return {name: values if self.stage else values * (1.0 / self.size) for name, values in total.items()}


def rules_of_stages(rank: int, folder: Path) -> dict[int, dict[str, str]]:
    """Every stage's verdicts. The last check of each breaks the group that DeepSpeed keeps: the next makes its own."""
    from deepspeed.utils import groups

    found: dict[int, dict[str, str]] = {}
    for stage in STAGES:
        found[stage] = verdicts(StageRig(rank, stage, folder))
        assert found[stage].keys() == DEEPSPEED_RULES.keys()
        groups._WORLD_GROUP = None
    return found


def with_rules(
    rank: int, function: Callable[..., dict[str, Any]], folder: Path, *arguments: Any
) -> dict[str, Any]:
    """The function's results and the stages' verdicts, by the same processes: DeepSpeed takes seconds to import."""
    start_deepspeed(rank)
    verdicts_of_stages = rules_of_stages(rank, folder)
    return {**function(rank, folder, *arguments), "rules": verdicts_of_stages}
