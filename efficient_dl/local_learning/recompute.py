"""Modules that forget their activations and run again in the backward pass, whole or a part of the batch at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from efficient_dl.errors import ConfigError

Forward = Callable[[Tensor], Tensor]


def checkpointed(module: nn.Module) -> nn.Module:
    """Make the module save its input alone and run again during backward; changed in place and returned.

    The results are the same bits: dropout draws the same numbers again, and batch norm does not count a batch twice.
    Keys, parameters and hooks stay what they were. One tensor in, one tensor out. `plain` undoes it.
    """
    return _replaced(module, functools.partial(_run_checkpointed, module))


def chunked(module: nn.Module, num_chunks: int) -> nn.Module:
    """Make the module take its batch in parts, each checkpointed; changed in place and returned.

    So only one part's activations exist at once, in backward too. The output is the same up to the kernels' rounding
    for other batch sizes, gradients up to the order of a sum, for every module that treats samples apart; dropout draws
    other numbers. Batch norm does not treat them apart: ConfigError, unless it is in eval mode. A batch smaller than
    num_chunks has fewer parts.
    """
    if num_chunks < 1:
        raise ConfigError(
            "a batch has at least one part", expected="num_chunks from 1 on", found=str(num_chunks)
        )
    _refuse_batch_statistics(module)
    return _replaced(module, functools.partial(_run_chunked, module, num_chunks))


def plain(module: nn.Module) -> nn.Module:
    """Undo `checkpointed` and `chunked`; a module without them stays as it is."""
    if runs_again(module):
        del module.__dict__["forward"]
    return module


def runs_again(module: nn.Module) -> bool:
    """Whether it is `checkpointed` or `chunked`."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func in (_run_checkpointed, _run_chunked)


def run_once(module: nn.Module, x: Tensor) -> Tensor:
    """What the module itself does, without forgetting."""
    forward: Forward = functools.partial(type(module).forward, module)
    return forward(x)


def treats_samples_apart(module: nn.Module) -> bool:
    """Whether no part of it takes statistics over the batch, in training."""
    return not any(isinstance(part, _BatchNorm) for part in module.modules())


def _run_checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    forward = functools.partial(run_once, module)
    if not torch.is_grad_enabled():
        return forward(x)
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    contexts = functools.partial(_contexts, norms)
    return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)


def _run_chunked(module: nn.Module, num_chunks: int, x: Tensor) -> Tensor:
    _refuse_batch_statistics(module)
    parts = x.tensor_split(max(1, min(num_chunks, len(x))))
    return torch.cat([_run_checkpointed(module, part) for part in parts])


def _replaced(module: nn.Module, forward: Forward) -> nn.Module:
    if "forward" in module.__dict__:
        raise ConfigError(
            "the module's forward has been replaced already",
            found=repr(module.__dict__["forward"]),
            fix="call recompute.plain(module) first",
        )
    # On the object: a module around it would change every parameter's name.
    module.__dict__["forward"] = forward
    return module


def _contexts(
    norms: Sequence[_BatchNorm],
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), _RunningStatisticsKept(norms)


class _RunningStatisticsKept(contextlib.AbstractContextManager[None]):
    """Later passes over a batch must leave the running mean and variance as the first one made them.

    There is one later pass for each backward pass, two with window 2. The statistics are neither exchanged nor copied
    back: autograd watches them. With a momentum of 0 they keep their value.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self._norms = norms
        self._before: list[list[tuple[float | None, Tensor | None]]] = []

    def __enter__(self) -> None:
        self._before.append([(norm.momentum, norm.num_batches_tracked) for norm in self._norms])
        for norm in self._norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, count) in zip(self._norms, self._before.pop(), strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _refuse_batch_statistics(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and part.training:
            raise ConfigError(
                "a batch cannot be taken in parts here: batch norm computes its statistics over all of it",
                found=f"{type(part).__name__} at {name or 'the module itself'}, in training mode",
                fix="take recompute.checkpointed(module), or group norm in the place of batch norm",
            )
