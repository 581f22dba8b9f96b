"""Engines whose plans change, and one whose weights tell what of its gradients has arrived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficient_dl.comm.look import Allowance
from efficient_dl.comm.measurements import Measurements
from efficient_dl.integrations.deepspeed import compress_engine
from efficient_dl.integrations.plan_watch import ReplanOptions
from tests.distributed.deepspeed_ranks import CONFIG, SLOW
from tests.distributed.measured_links import measuring

NEVER = ReplanOptions(allowance=Allowance(share=0.0, looks=0.0))


def started(engine: Any, links: Measurements, options: Any = NEVER, **more: Any) -> Any:
    with measuring(links):
        return compress_engine(engine, "auto", **{"check_every": 1, "replan": options, **more})


def row(after: int, bits: str) -> dict[str, Any]:
    return {"step": after, "bits": bits, "hierarchy": False, "reason": "a test"}


class Constant(nn.Module):
    """Gradients that are always the same, the inputs; `rare` has one in every third step only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3001))
        self.rare = nn.Parameter(torch.zeros(2000))

    def forward(self, x: Tensor, is_third: bool) -> Tensor:
        loss = (self.weight * x[:3001]).sum()
        return loss + (self.rare * x[3001:]).sum() if is_third else loss


class Sums:
    """An engine with plain SGD, a rate of 1, and what its weights should be."""

    def __init__(self, rank: int, case: dict[str, Any], plans: Sequence[dict[str, Any]], **more: Any) -> None:
        import deepspeed

        net = Constant()
        case = {
            "zero_optimization": {"reduce_bucket_size": 16000, **case["zero"]},
            "gradient_clipping": 0.0,
            **case,
        }
        del case["zero"]
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        self.engine: Any = deepspeed.initialize(model=net, optimizer=optimizer, config={**CONFIG, **case})[0]
        self.compression = started(self.engine, SLOW, **more)
        self.compression.replay(plans, 100)
        inputs = [torch.randn(5001, generator=torch.Generator().manual_seed(one)) for one in range(2)]
        self.rank = rank
        self.input = inputs[rank].to(net.weight.dtype)
        self.mean = torch.stack(inputs).mean(0)
        self.exact = torch.zeros(5001)

    def step(self, poisoned: bool = False, between: Callable[[], None] = lambda: None) -> float:
        """Returns how far the weights are from what they should be, in gradients. poisoned: rank 0's are infinite."""
        engine, steps = self.engine, self.engine.global_steps
        is_third = steps % 3 == 0
        passes = engine.gradient_accumulation_steps()
        for turn in range(passes):
            factor = torch.inf if poisoned and self.rank == 0 else 1.0
            engine.backward(engine(self.input, is_third) * factor)
            engine.step()
            if turn < passes - 1:
                between()
        assert engine.global_steps == steps + 1
        if not poisoned:
            self.exact[:3001] -= self.mean[:3001]
            self.exact[3001:] -= self.mean[3001:] * is_third
        whole = torch.cat([p.detach().float() for p in engine.module.parameters()])
        return float((whole - self.exact).norm() / self.mean.norm())
