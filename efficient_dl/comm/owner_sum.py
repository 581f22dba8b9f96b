"""The way up of an all-reduce, without the way down: every rank gets the sums of the values it owns, and no others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    own, layout, tally = parts[rank], layouts[rank], tallies[rank]
    sizes = compressor.message_sizes([layout.shards[0]] * len(parts), own.dtype)
    if sizes is not None and not own.numel():
        sizes = [0] * len(parts)
    incoming = tally.receive(transport.exchange(outgoing, sizes), sum(map(len, outgoing)))
    compressor.buffers.give(rooms)
    room = compressor.buffers.take(4 * own.numel(), device)
    total = room[: 4 * own.numel()].view(torch.float32)
    if own.numel():
        compressor.sum(own, incoming, rank, layout.shards[0], tally, total, transport.ranks)
    result = total.to(own.dtype, copy=True)
    compressor.buffers.give([room])
    for counted in tallies:
        compressor.meter.add(counted)
    return result
