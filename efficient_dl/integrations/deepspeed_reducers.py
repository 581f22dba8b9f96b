"""Sums for DeepSpeed's methods: by our collectives, or by DeepSpeed's own with ours beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import BucketLayout, Compressor, ProcessGroupTransport, all_reduce, sum_at_owners
from efficient_dl.comm.meter import Tally
from efficient_dl.comm.shadow import ShadowReduction
from efficient_dl.comm.transport import Transport, telling_peers

Piece = tuple[str, int, int]  # a parameter's name, how many of its values, how many lie before them
T = TypeVar("T")

_SIZE_MESSAGE_BYTES = 8  # as `ProcessGroupTransport` sends one with each packet


class Reducer(Protocol):
    """What DeepSpeed's methods need: sums, waited for, in whatever scale DeepSpeed has given the values.

    rank: of this process. steps: what residuals and a common step size are told (see `Steps`).
    """

    rank: int
    steps: Steps

    def all_reduce(self, x: Tensor, pieces: Sequence[Piece]) -> None:
        """Replaces x, 1-D and contiguous, by its sum over all ranks."""
        ...

    def sum_slices(
        self,
        flat: Tensor,
        numels: Sequence[int],
        owners: Sequence[int],
        pieces: Sequence[Sequence[Piece]],
        root: int | None,
    ) -> Tensor:
        """Returns the sums of this rank's slices of a flat bucket, one behind the other.

        numels, owners, pieces: of each slice. root: the one owner, where DeepSpeed itself would use a reduce.
        """
        ...


class Steps:
    """Tells the compressor where a backward pass begins, and what became of its optimizer step.

    loss_scale: of the gradients to come. A backward pass begins with the first sum after `ended` or `passed`, or with a
    piece that was summed up before. exposed_seconds: spent in sums since the last step. sample: called with this rank's
    own values, before they are summed up, and their pieces.
    """

    def __init__(
        self,
        compressor: Compressor,
        loss_scale: Callable[[], float],
        transport: Transport,
        sample: Callable[[Tensor, Sequence[Piece]], None],
    ) -> None:
        self.exposed_seconds = 0.0
        self._compressor = compressor
        self._transport = transport
        self._loss_scale = loss_scale
        self._sample = sample
        self._seen: set[tuple[str, int]] = set()

    @property
    def is_summing(self) -> bool:
        """Whether something has been summed up in a backward pass that is not over."""
        return bool(self._seen)

    def summing(self, x: Tensor, pieces: Sequence[Piece]) -> None:
        """x, the values of these pieces, is about to be summed up; what waits to be drained is added to it."""
        keys = {(name, offset) for name, _, offset in pieces}
        if not self._seen or keys & self._seen:
            self._seen.clear()
            self._compressor.begin_step(self._loss_scale())
        self._seen |= keys
        self._sample(x, pieces)
        residuals = self._compressor.residuals
        if residuals is not None and residuals.waits(name for name, _, _ in pieces):
            residuals.drain_shard(_layout(pieces, 1).shards[0], x)

    def passed(self) -> None:
        """A backward pass is over, of several before one optimizer step: its parameters may not be those of the next.

        Else a parameter whose slices are summed up one by one could lie on both sides of where the next one begins.
        """
        self._seen.clear()

    def ended(self, applied: bool) -> None:
        """The optimizer has stepped, or skipped its step."""
        self._seen.clear()
        if applied:
            self._compressor.commit_step()
        else:
            self._compressor.discard_step()
        with telling_peers(self._transport):
            self._compressor.end_step(self.exposed_seconds)
        self.exposed_seconds = 0.0

    def timed(self, collective: Callable[[], T], abort: Callable[[], None]) -> T:
        """Runs a collective, counts its seconds, and on an error breaks the connections."""
        start = time.perf_counter()
        try:
            return collective()
        except BaseException:
            abort()  # the peers learn of it now, not after a time-out
            raise
        finally:
            self.exposed_seconds += time.perf_counter() - start


class CompressedReducer:
    """Our collectives. Residuals that wait are added to what exact packets carry, as other plans have none that do."""

    def __init__(self, compressor: Compressor, transport: ProcessGroupTransport, steps: Steps) -> None:
        self.rank = transport.rank
        self.steps = steps
        self._compressor = compressor
        self._transport = transport

    def all_reduce(self, x: Tensor, pieces: Sequence[Piece]) -> None:
        """See `Reducer.all_reduce`."""
        self.steps.summing(x, pieces)
        layout = _layout(pieces, self._transport.world_size)
        self.steps.timed(
            lambda: all_reduce(x, layout, self._compressor, self._transport, op="sum"), self._transport.abort
        )

    def sum_slices(
        self,
        flat: Tensor,
        numels: Sequence[int],
        owners: Sequence[int],
        pieces: Sequence[Sequence[Piece]],
        root: int | None,
    ) -> Tensor:
        """See `Reducer.sum_slices`; the sums are made at their owners, and travel once."""
        self.steps.summing(flat, [piece for part in pieces for piece in part])
        parts, layouts = _by_owner(flat, numels, owners, pieces, self._transport.world_size)
        return self.steps.timed(
            lambda: sum_at_owners(parts, layouts, self._compressor, self._transport), self._transport.abort
        )


class NativeReducer:
    """The collectives that DeepSpeed calls in these places, for steps of which values are looked at or drained.

    group: DeepSpeed's data-parallel group, which carries them.
    """

    def __init__(self, group: dist.ProcessGroup, steps: Steps) -> None:
        self.rank = group.rank()
        self.steps = steps
        self._group = group

    def all_reduce(self, x: Tensor, pieces: Sequence[Piece]) -> None:
        """See `Reducer.all_reduce`."""
        self.steps.summing(x, pieces)
        _sum_natively(x, None, self._group)

    def sum_slices(
        self,
        flat: Tensor,
        numels: Sequence[int],
        owners: Sequence[int],
        pieces: Sequence[Sequence[Piece]],
        root: int | None,
    ) -> Tensor:
        """See `Reducer.sum_slices`."""
        self.steps.summing(flat, [piece for part in pieces for piece in part])
        _sum_natively(flat, root, self._group)
        return _by_owner(flat, numels, owners, pieces, self._group.size())[0][self.rank]


class ShadowReducer:
    """The collectives that DeepSpeed calls in these places; what ours would have sent is only counted.

    group: DeepSpeed's data-parallel group, which carries them.
    """

    def __init__(self, compressor: Compressor, group: dist.ProcessGroup, steps: Steps) -> None:
        self.rank = group.rank()
        self.steps = steps
        self._compressor = compressor
        self._group = group

    def all_reduce(self, x: Tensor, pieces: Sequence[Piece]) -> None:
        """See `Reducer.all_reduce`."""
        self.steps.summing(x, pieces)
        layout = _layout(pieces, self._group.size())
        watched = ShadowReduction(x, layout, self._compressor, self.rank, op="sum")
        watched.wait = lambda: None
        watched.encode()
        self.steps.timed(lambda: _sum_natively(x, None, self._group), lambda: None)
        watched.encode_result()

    def sum_slices(
        self,
        flat: Tensor,
        numels: Sequence[int],
        owners: Sequence[int],
        pieces: Sequence[Sequence[Piece]],
        root: int | None,
    ) -> Tensor:
        """See `Reducer.sum_slices`."""
        self.steps.summing(flat, [piece for part in pieces for piece in part])
        size = self._group.size()
        for owner, (part, layout) in enumerate(
            zip(*_by_owner(flat, numels, owners, pieces, size), strict=True)
        ):
            if owner != self.rank:
                self._count(part, layout)
        self.steps.timed(lambda: _sum_natively(flat, root, self._group), lambda: None)
        return _by_owner(flat, numels, owners, pieces, size)[0][self.rank]

    def _count(self, part: Tensor, layout: BucketLayout) -> None:
        """What a packet to its owner takes; decoding it stands for decoding one from there."""
        tally, shard, compressor = Tally(layout), layout.shards[0], self._compressor
        if part.numel():
            room = compressor.buffers.take(compressor.max_bytes(shard, part.dtype), part.device)
            out = compressor.buffers.take(4 * part.numel(), part.device)
            message = compressor.encode(part, room, shard, tally, copies=1)
            compressor.decode(message, out[: 4 * part.numel()].view(torch.float32), shard, tally)
            compressor.buffers.give([room, out])
        if not compressor.bounded:
            tally.announced(_SIZE_MESSAGE_BYTES)
        compressor.meter.add(tally)


def _sum_natively(x: Tensor, root: int | None, group: dist.ProcessGroup) -> None:
    """Replaces x by its sum over all ranks. root: the rank that needs it, where DeepSpeed would use a reduce."""
    if root is None:
        dist.all_reduce(x, group=group)
    else:
        dist.reduce(x, dist.get_global_rank(group, root), group=group)


def _by_owner(
    flat: Tensor,
    numels: Sequence[int],
    owners: Sequence[int],
    pieces: Sequence[Sequence[Piece]],
    world_size: int,
) -> tuple[list[Tensor], list[BucketLayout]]:
    """Each rank's slices, one behind the other, and how they lie in their parameters."""
    slices = flat.split(list(numels))
    parts: list[Tensor] = []
    layouts: list[BucketLayout] = []
    for rank in range(world_size):
        owned = [index for index, owner in enumerate(owners) if owner == rank]
        parts.append(torch.cat([slices[index] for index in owned]) if owned else flat.new_empty(0))
        layouts.append(_layout([piece for index in owned for piece in pieces[index]], 1))
    return parts, layouts


def _layout(pieces: Sequence[Piece], num_shards: int) -> BucketLayout:
    layout = BucketLayout.of([name for name, _, _ in pieces], [numel for _, numel, _ in pieces], num_shards)
    return layout.beginning_at([offset for _, _, offset in pieces])
