"""Which pieces of a chain to run again in the backward pass, so that it fits into a memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.measure import measure
from efficient_dl.local_learning.pieces import Piece
from efficient_dl.local_learning.recompute import checkpointed, chunked, treats_samples_apart


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
