"""Less memory for activations: pieces that forget theirs and compute them again, whole or a part of the batch each."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.measure import measure
from efficient_dl.local_learning.pieces import Piece

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
    forward = module.__dict__.get("forward")
    if isinstance(forward, functools.partial) and forward.func in (_run_checkpointed, _run_chunked):
        del module.__dict__["forward"]
    return module


@dataclass(frozen=True)
class Thrift:
    """What to do with which piece.

    num_chunks: by name; 1 for `checkpointed`, more for `chunked`. peak_bytes: what the pieces then save at most,
    predicted. extra_seconds: of forward passes that run again, a micro-batch.
    """

    num_chunks: dict[str, int]
    peak_bytes: int
    extra_seconds: float


def choose_thrift(
    costs: Sequence[PartitionCosts],
    input_bytes: int,
    goal_bytes: int,
    may_chunk: Callable[[str], bool] = lambda name: False,
    max_chunks: int = 16,
) -> Thrift:
    """The pieces of a chain to checkpoint, and to chunk, so that at most goal_bytes are saved for backward at once.

    costs: of the pieces in order, measured. input_bytes: of what goes into the first. may_chunk: whether a piece treats
    samples apart (treats_samples_apart). The model: a piece saves its activation_bytes; one that is checkpointed saves
    its input, and, while its backward pass runs, one part's activations. Pieces are taken in the order of bytes saved a
    second of repeated work; then, while one repeated piece alone is above the goal, its parts are doubled.
    Raises ConfigError, with the least that can be reached, if the goal cannot.
    """
    entering = [input_bytes, *(one.output_bytes for one in costs)]
    saved = {one.name: one.activation_bytes - entering[position] for position, one in enumerate(costs)}
    by_gain = sorted(costs, key=lambda one: -saved[one.name] / max(one.forward_seconds, 1e-9))
    chosen: dict[str, int] = {}

    def peak() -> int:
        kept = sum(
            entering[position] if one.name in chosen else one.activation_bytes
            for position, one in enumerate(costs)
        )
        again = [math.ceil(one.activation_bytes / chosen[one.name]) for one in costs if one.name in chosen]
        return kept + max(again, default=0)

    best, best_peak = dict(chosen), peak()
    for one in by_gain:
        if best_peak <= goal_bytes or saved[one.name] <= 0:
            break
        chosen[one.name] = 1
        while may_chunk(one.name) and chosen[one.name] < max_chunks and peak() > goal_bytes:
            before = peak()
            chosen[one.name] *= 2
            if peak() == before:  # another piece sets the peak
                chosen[one.name] //= 2
                break
        if peak() < best_peak:
            best, best_peak = dict(chosen), peak()
    if best_peak > goal_bytes:
        raise ConfigError(
            "no choice of checkpointed pieces needs so little memory",
            expected=f"{goal_bytes:,} bytes saved for backward",
            found=f"{best_peak:,} with {', '.join(best) or 'none'} checkpointed",
            fix="take smaller micro-batches or more partitions, or a larger goal",
        )
    seconds = sum(one.forward_seconds for one in costs if one.name in best)
    return Thrift(best, best_peak, seconds)


def economize(model: nn.Module, pieces: Sequence[Piece], example: Tensor, goal_bytes: int) -> Thrift:
    """Checkpoint and chunk the pieces of a chain, in place, so that at most goal_bytes are saved at once.

    pieces: consecutive ones of the model, pieces_of(model) or a partition's. example: a batch of what goes into the
    first of them, on which they are measured; none of them is frugal yet. Bytes that two pieces share, such as the
    output of one that is the next one's input, count twice in the prediction. Raises ConfigError as choose_thrift does.
    """
    costs = [
        PartitionCosts(
            name=piece.name,
            forward_seconds=one.forward_seconds,
            activation_bytes=sum(one.saved.values()),
            output_bytes=one.output_bytes,
        )
        for piece, one in zip(pieces, measure(model, pieces, example), strict=True)
    ]
    modules = {piece.name: piece.module for piece in pieces}
    input_bytes = example.numel() * example.element_size()
    choice = choose_thrift(costs, input_bytes, goal_bytes, lambda name: treats_samples_apart(modules[name]))
    for name, num_chunks in choice.num_chunks.items():
        checkpointed(modules[name]) if num_chunks == 1 else chunked(modules[name], num_chunks)
    return choice


def treats_samples_apart(module: nn.Module) -> bool:
    """Whether no part of it takes statistics over the batch, in training."""
    return not any(isinstance(part, _BatchNorm) for part in module.modules())


def _run_checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    forward: Forward = functools.partial(type(module).forward, module)
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
            fix="call thrift.plain(module) first",
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
                fix="take thrift.checkpointed(module), or group norm in the place of batch norm",
            )
