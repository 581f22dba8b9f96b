"""One training step on each engine that `efficient_dl.compress` knows: the same loop for all.

An engine is a function of (model, optimizer settings, system, seed) that wraps the model and returns a `Run`. The
system is "native" (the engine untouched), one of our `bits`, or, for DDP, one of torch's hooks (`peers.PEERS`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from benchmarks.peers import PEERS, POWERSGD_BUCKET_MB, register_peer
from efficient_dl.config import OptimizerConfig

NATIVE = "native"


@dataclass
class Run:
    """A wrapped model in training.

    step(loss): backward, and the optimizer's step, with its gradients set to none. set_lr: for the next step.
    stats: what our meter counted on all ranks, a collective call; {} for systems that are not ours.
    """

    forward: Callable[[Tensor], Tensor]
    step: Callable[[Tensor], None]
    set_lr: Callable[[float], None]
    stats: Callable[[], dict[str, Any]]
    close: Callable[[], None]


def torch_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """One plain torch optimizer over all parameters; matrices alone decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def ddp(model: nn.Module, config: OptimizerConfig, system: str, seed: int) -> Run:
    """DistributedDataParallel."""
    arguments: dict[str, Any] = (
        {"bucket_cap_mb": POWERSGD_BUCKET_MB} if system.startswith("PowerSGD ") else {}
    )
    wrapped = DistributedDataParallel(model, **arguments)
    optimizer = torch_optimizer(model, config)
    if system in PEERS:
        register_peer(wrapped, system, seed)
        return _run(wrapped, optimizer, None)
    return _run(wrapped, optimizer, None if system == NATIVE else edl.compress(wrapped, optimizer, system))


def fsdp2(model: nn.Module, config: OptimizerConfig, system: str, seed: int) -> Run:
    """fully_shard on every block and on the model. Weights travel losslessly, or with "identity" as they are."""
    for block in _blocks(model):
        fully_shard(block)
    fully_shard(model)
    optimizer = torch_optimizer(model, config)
    if system == NATIVE:
        return _run(model, optimizer, None)
    weights = "identity" if system == "identity" else "lossless"
    return _run(model, optimizer, edl.compress(model, optimizer, system, weights=weights))


def zero2(model: nn.Module, config: OptimizerConfig, system: str, seed: int) -> Run:
    """DeepSpeed's ZeRO stage 2."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own data loader would use it
        "gradient_clipping": 0.0,  # its default is 1.0, the other engines clip nothing
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch_optimizer(model, config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    compression = None if system == NATIVE else edl.compress(engine, bits=system)
    # ZeRO's own optimizer, which has the groups of the one it was given.
    groups: list[dict[str, Any]] = engine.optimizer.param_groups  # pyright: ignore
    return Run(engine, step, _lr_setter(groups), *_closing(compression))


ENGINES: dict[str, Callable[[nn.Module, OptimizerConfig, str, int], Run]] = {
    "DDP": ddp,
    "FSDP2": fsdp2,
    "ZeRO-2": zero2,
}


def missing(engine: str) -> str | None:
    """Why this machine cannot run an engine; None if it can."""
    if engine == "ZeRO-2" and importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed: pip install 'efficient_dl[deepspeed]'"
    return None


def _run(model: nn.Module, optimizer: torch.optim.Optimizer, compression: Any) -> Run:
    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Run(model, step, _lr_setter(optimizer.param_groups), *_closing(compression))


def _closing(compression: Any) -> tuple[Callable[[], dict[str, Any]], Callable[[], None]]:
    if compression is None:
        return dict, lambda: None
    return lambda: compression.stats(all_ranks=True), compression.close


def _lr_setter(groups: list[dict[str, Any]]) -> Callable[[float], None]:
    def set_lr(lr: float) -> None:
        for group in groups:
            group["lr"] = lr

    return set_lr


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that repeat: a GPT's blocks, a ResNet's."""
    return [module for module in model.modules() if type(module).__name__ in ("Block", "BasicBlock")]
