"""DistributedDataParallel, FSDP2 and HSDP, as the checks of rules.py train with them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from tests.distributed.rules import RULES, Observed, verdicts

WIDTHS = (20, 61, 50, 7)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(a, b, dtype=dtype) for a, b in itertools.pairwise(WIDTHS)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def batch(number: int, rank: int) -> Tensor:
    return torch.randn(8, WIDTHS[0], generator=torch.Generator().manual_seed(100 * number + rank))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).float() - 1).square().mean()


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """In rank order."""
    total = tensors[0].clone()
    for one in tensors[1:]:
        total += one
    return total / len(tensors)


def local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


class TorchJob:
    """A wrapped network with SGD, and for some checks a GradScaler."""

    def __init__(
        self, rig: TorchRig, model: nn.Module, bits: Any, half: bool, scaled: bool, **options: Any
    ) -> None:
        self.rig, self.model, self.half = rig, model, half
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        self.compression: Any = None
        if bits is not None:
            if scaled:
                options["scaler"] = self.scaler
            self.compression = edl.compress(model, self.optimizer, bits, **options)

    @property
    def compressors(self) -> Sequence[Any]:
        return self.all_compressors[:2]

    @property
    def all_compressors(self) -> Sequence[Any]:
        made = getattr(self.compression, "_compressors", None)
        return [self.compression._compressor] if made is None else list(made.values())

    def step(self, number: int, poisoned: bool = False) -> None:
        self.optimizer.zero_grad()
        x = batch(number, self.rig.rank).to(self.rig.input_dtype(self.half))
        loss = loss_of(self.model, x)
        if poisoned and self.rig.rank == self.rig.size - 1:
            loss = loss * float("inf")
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def backward(self, number: int, at_input: Callable[[], None]) -> None:
        x = batch(number, self.rig.rank).requires_grad_()
        x.register_hook(lambda _: at_input())
        loss_of(self.model, x).backward()

    def _named(self) -> dict[str, nn.Parameter]:
        return {name.removeprefix("module."): p for name, p in self.model.named_parameters()}

    def parameters(self) -> dict[str, Tensor]:
        return {name: full(p).detach().clone() for name, p in self._named().items()}

    def gradients(self) -> dict[str, Tensor]:
        return {name: full(p.grad).clone() for name, p in self._named().items() if p.grad is not None}

    def loss_scale(self) -> float:
        return float(self.scaler.get_scale())

    def residuals(self) -> dict[str, Tensor]:
        state = self.compression.state_dict()
        kept = [state[key]["residuals"] for key in ("compressor", "gradients", "replicas") if key in state]
        # Those of one parameter on both axes of a mesh, one behind the other.
        found: dict[str, Tensor] = {}
        for values in (one["parameters"] for one in kept if one is not None):
            for name, value in values.items():
                found[name] = torch.cat([found[name], value]) if name in found else value.clone()
        return found

    def diverge(self) -> str:
        return self.rig.diverge(self)

    def save(self) -> Any:
        weights = {name: local(p).detach().clone() for name, p in self._named().items()}
        return (
            weights,
            copy.deepcopy(self.optimizer.state_dict()),
            copy.deepcopy(self.compression.state_dict()),
        )

    def load(self, saved: Any) -> None:
        weights, optimizer, compression = saved
        with torch.no_grad():
            for name, p in self._named().items():
                local(p).copy_(weights[name])
        self.optimizer.load_state_dict(optimizer)
        self.compression.load_state_dict(compression)

    def close(self) -> None:
        if self.compression is not None:
            self.compression.close()


class TorchRig:
    """What the three have in common."""

    rules = RULES
    all_bounded: Mapping[str, Any] = {"messages": "bounded"}
    wrap: Callable[[bool], nn.Module]
    damaged = "2.bias"

    def __init__(self, rank: int) -> None:
        self.rank, self.size = rank, dist.get_world_size()
        self.seen: dict[Any, Observed] = {}

    def job(
        self, bits: Any, half: bool = False, scaled: bool = False, fed_back: bool = False, **options: Any
    ) -> TorchJob:
        if fed_back:
            options["error_feedback"] = True
        return TorchJob(self, self.wrap(half), bits, half, scaled, **self.options_for(bits, options))

    def local_gradients(self, number: int) -> dict[str, Tensor]:
        found: list[dict[str, Tensor]] = []
        for rank in range(self.size):
            model = network()
            loss_of(model, batch(number, rank)).backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return {name: self.averaged([one[name] for one in found]) for name in found[0]}

    def averaged(self, gradients: Sequence[Tensor]) -> Tensor:
        return mean(gradients)

    def options_for(self, bits: Any, options: dict[str, Any]) -> dict[str, Any]:
        return options

    def input_dtype(self, half: bool) -> torch.dtype:
        return torch.bfloat16 if half else torch.float32

    def diverge(self, job: TorchJob) -> str:
        """The last rank's own copy, or shard, gets another bit."""
        if self.rank == self.size - 1:
            with torch.no_grad():
                local(job.model.get_parameter(self.damaged)).view(-1)[0] += 1.0
        return self.damaged.removeprefix("module.")


class DdpRig(TorchRig):
    damaged = "module.2.bias"

    def wrap(self, half: bool) -> nn.Module:
        return DistributedDataParallel(network(self.input_dtype(half)), bucket_cap_mb=0.01)

    def options_for(self, bits: Any, options: dict[str, Any]) -> dict[str, Any]:
        return (
            options if "error_feedback" in options else {"scale": "local", "error_feedback": False, **options}
        )


class FsdpRig(TorchRig):
    all_bounded: Mapping[str, Any] = {"messages": "bounded", "weights": "identity"}

    def mesh(self) -> Any:
        return None

    def wrap(self, half: bool) -> nn.Module:
        model, mesh = network(), self.mesh()
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16 if half else None
        )
        options: dict[str, Any] = {"mesh": mesh, **({"mp_policy": policy} if half else {})}
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, **options)
        return fully_shard(model, **options)

    def options_for(self, bits: Any, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "weights": "identity"} if bits == "identity" else options

    def diverge(self, job: TorchJob) -> str:
        """No other rank has this one's shard: the last rank decodes weights to others than it was sent."""
        weights = job.compression._compressors["weights"]
        decode = weights.decode

        def wrongly(message: Tensor, out: Tensor, *arguments: Any, **options: Any) -> None:
            decode(message, out, *arguments, **options)
            out[:1] += 1.0

        if self.rank == self.size - 1:
            weights.decode = wrongly
        return "0.weight"


class HsdpRig(FsdpRig):
    """Replicas of two shards."""

    diverge = TorchRig.diverge

    def mesh(self) -> Any:
        return init_device_mesh("cpu", (self.size // 2, 2), mesh_dim_names=("replicas", "shards"))

    def averaged(self, gradients: Sequence[Tensor]) -> Tensor:
        """Inside each replica first."""
        return mean([mean(gradients[first : first + 2]) for first in range(0, self.size, 2)])


RIGS: dict[str, Callable[[int], Any]] = {"DDP": DdpRig, "FSDP2": FsdpRig, "HSDP": HsdpRig}


def rules_of(rank: int, integration: str) -> dict[str, str]:
    found = verdicts(RIGS[integration](rank))
    assert found.keys() == RULES.keys()
    return found
