"""The way up of an all-reduce, without the way down: every rank gets the sums of the values it owns, and no others."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_dl.comm.buffers import BufferPool
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.layout import BucketLayout
from efficient_dl.comm.meter import Tally
from efficient_dl.comm.transport import Transport


def sum_at_owners(
    parts: Sequence[Tensor], layouts: Sequence[BucketLayout], compressor: Compressor, transport: Transport
) -> Tensor:
    """Returns the sum over all ranks of their part for this rank, in the parts' dtype, and waits for it.

    parts: one a rank, 1-D, contiguous, all of one dtype (float32, bfloat16 or float16); the i-th goes to rank i. Not
        changed. A part without values sends nothing but its size.
    layouts: of each part, with one shard: `BucketLayout.of(names, numels, 1)`. Equal on all ranks.

    A value is rounded once: the owner decodes the others' packets and adds them up in float32, in rank order, its own
    values unquantized, and rounds the sum to the parts' dtype. A lossless codec gives the identity codec's bits.
    A non-finite value reaches the owner.
    """
    rank, device = transport.rank, parts[0].device
    tallies = [Tally(layout) for layout in layouts]
    rooms = [
        compressor.buffers.take(compressor.max_bytes(layout.shards[0], part.dtype), device)
        for part, layout in zip(parts, layouts, strict=True)
    ]
    outgoing = [
        compressor.encode(part, room, layout.shards[0], tally, copies=1)
        if owner != rank and part.numel()
        else room[:0]
        for owner, (part, room, layout, tally) in enumerate(zip(parts, rooms, layouts, tallies, strict=True))
    ]
    start = time.perf_counter()
    work = transport.exchange(outgoing)
    incoming = work.wait()
    own, layout, tally = parts[rank], layouts[rank], tallies[rank]
    tally.totals.transport_seconds += time.perf_counter() - start
    tally.announced(work.sent_bytes - sum(map(len, outgoing)))
    compressor.buffers.give(rooms)
    result = _sum(own, incoming, rank, layout, tally, compressor)
    for counted in tallies:
        compressor.meter.add(counted)
    return result


def _sum(
    own: Tensor, incoming: list[Tensor], rank: int, layout: BucketLayout, tally: Tally, compressor: Compressor
) -> Tensor:
    pool: BufferPool = compressor.buffers
    room = pool.take(4 * own.numel(), own.device)
    total = room[: 4 * own.numel()].view(torch.float32)
    for source, packet in enumerate(incoming if own.numel() else []):
        if source != rank:
            compressor.decode(packet, total, layout.shards[0], tally, accumulate=source > 0)
        elif source == 0:
            total.copy_(own)
        else:
            total.add_(own)
    result = total.to(own.dtype, copy=True)
    pool.give([room])
    return result
