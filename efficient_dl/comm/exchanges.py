"""More collectives over compressed tensors, for lists and dicts of them: each is one call, and waits.

Tensors are float32, bfloat16 or float16; `broadcast`, `all_gather` and `all_to_all` also take the two float8 types.
With an exact codec every bit arrives; with a lossy one every rank, the sender too, ends with what the packet decodes
to. All ranks call the same function with the same arguments but values. A dead or silent rank is a `TransportError`.

    compressor = Compressor(Plan.of("lossless"), ["tensor"])            # or every tensor's name, for a row in its meter
    transport = ProcessGroupTransport(dist.new_group())                 # a group that nothing else uses meanwhile
    broadcast(model.state_dict(), compressor, transport)                # needs a Compressor of these names
    parts = all_gather(x, compressor, transport)                        # a list: any shape on any rank
    print(summary(compressor.meter.state_dict())["ratio"])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from efficient_dl.codec import make_codec
from efficient_dl.comm.collectives import Op, all_reduce
from efficient_dl.comm.compressor import Compressor
from efficient_dl.comm.layout import BucketLayout
from efficient_dl.comm.meter import Tally
from efficient_dl.comm.transport import Transport
from efficient_dl.errors import ConfigError, CorruptPacket, UnsupportedTensor

_DAMAGED = "the header of rank {}'s tensor is damaged"
_SUMMABLE = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*_SUMMABLE, torch.float8_e4m3fn, torch.float8_e5m2)


def all_reduce_coalesced(
    tensors: Mapping[str, Tensor], compressor: Compressor, transport: Transport, op: Op = "avg"
) -> None:
    """Replaces every tensor by its sum or average over all ranks: one `all_reduce` for all tensors of a dtype.

    Raises ConfigError for a name that the compressor does not know, UnsupportedTensor for other dtypes.
    """
    for name, x in tensors.items():
        _check(name, x, compressor, transport, _SUMMABLE)
    for bucket in _by_dtype(tensors):
        flat = torch.cat([x.detach().reshape(-1) for x in bucket.values()])
        layout = _layout(bucket, transport.world_size)
        all_reduce(flat, layout, compressor, transport, op)
        _put_back(flat, bucket)


def broadcast(
    tensors: Mapping[str, Tensor], compressor: Compressor, transport: Transport, root: int = 0
) -> None:
    """Replaces every rank's tensors by rank root's: one message for all tensors of a dtype.

    The root encodes once and cuts the packet into one piece for each other rank, which then pass their pieces on: the
    root sends its packet once, not once to each, and with many ranks a broadcast takes the time of two packets.
    """
    for name, x in tensors.items():
        _check(name, x, compressor, transport, _DTYPES)
    if not 0 <= root < transport.world_size:
        raise ConfigError(
            f"there is no rank {root} to broadcast from", expected=f"0 … {transport.world_size - 1}"
        )
    if transport.world_size == 1:
        return
    for bucket in _by_dtype(tensors):
        _broadcast(bucket, compressor, transport, root)


def all_gather(x: Tensor, compressor: Compressor, transport: Transport, name: str = "tensor") -> list[Tensor]:
    """Returns every rank's x, by rank, of whatever shape and dtype each has; the own one as the others decode it.

    name: x's row in the compressor's meter. With one rank nothing is encoded or quantized.
    """
    _check(name, x, compressor, transport, _DTYPES)
    if transport.world_size == 1:
        return [x.detach().clone()]
    tally = Tally(BucketLayout.of([name], [x.numel()], 1))
    message = _pack(x, compressor, tally, copies=transport.world_size - 1)
    messages = tally.receive(transport.gather(message), message.numel() * (transport.world_size - 1))
    gathered = [
        _unpack(received, name, compressor, tally, sender)
        for received, sender in zip(messages, transport.ranks, strict=True)
    ]
    compressor.meter.add(tally)
    return gathered


def all_to_all(
    tensors: Sequence[Tensor], compressor: Compressor, transport: Transport, name: str = "tensor"
) -> list[Tensor]:
    """Sends tensors[i] to rank i; returns what came from every rank. Shapes and dtypes are free; [rank] is a copy.

    What a rank sends to itself is neither encoded nor quantized.
    """
    if len(tensors) != transport.world_size:
        raise ConfigError(
            "all_to_all needs one tensor for each rank",
            expected=str(transport.world_size),
            found=str(len(tensors)),
        )
    for x in tensors:
        _check(name, x, compressor, transport, _DTYPES)
    tally = Tally(BucketLayout.of([name], [0], 1))
    nothing = torch.empty(0, dtype=torch.uint8, device=transport.device)
    outgoing = [
        nothing if target == transport.rank else _pack(x, compressor, tally, copies=1)
        for target, x in enumerate(tensors)
    ]
    incoming = tally.receive(transport.exchange(outgoing), sum(map(len, outgoing)))
    received = [
        tensors[source].detach().clone()
        if source == transport.rank
        else _unpack(message, name, compressor, tally, transport.ranks[source])
        for source, message in enumerate(incoming)
    ]
    compressor.meter.add(tally)
    return received


def _broadcast(bucket: Mapping[str, Tensor], compressor: Compressor, transport: Transport, root: int) -> None:
    rank, peers = transport.rank, [r for r in range(transport.world_size) if r != root]
    layout = _layout(bucket, 1)
    (shard,) = layout.shards
    flat = torch.cat([x.detach().reshape(-1) for x in bucket.values()])
    tally = Tally(layout)
    nothing = torch.empty(0, dtype=torch.uint8, device=transport.device)
    packet = nothing
    outgoing = [nothing] * transport.world_size
    if rank == root:
        room = torch.empty(compressor.max_bytes(shard, flat.dtype), dtype=torch.uint8, device=flat.device)
        packet = compressor.encode(flat, room, shard, tally, copies=1)
        for peer, piece in zip(peers, packet.tensor_split(len(peers)), strict=True):
            outgoing[peer] = piece
    pieces = tally.receive(transport.exchange(outgoing), sum(map(len, outgoing)))
    if len(peers) == 1:
        packet = packet if rank == root else pieces[root]
    else:
        piece = nothing if rank == root else pieces[root].clone()  # valid only until the next transfer
        onward = [
            nothing if rank == root or peer in (root, rank) else piece for peer in range(transport.world_size)
        ]
        received = tally.receive(transport.exchange(onward), sum(map(len, onward)))
        if rank != root:
            received[rank] = piece
            packet = torch.cat([received[peer] for peer in peers])
            _relayed(tally, layout, compressor, piece, packet, flat, copies=len(peers) - 1)
    compressor.decode(packet, flat, shard, tally, sender=transport.ranks[root])
    _put_back(flat, bucket)
    compressor.meter.add(tally)


def _relayed(
    tally: Tally,
    layout: BucketLayout,
    compressor: Compressor,
    piece: Tensor,
    packet: Tensor,
    x: Tensor,
    copies: int,
) -> None:
    """Counts the pieces of a packet that were passed on, and the same share of what identity would have sent."""
    share = piece.numel() / packet.numel()
    raw_bytes = make_codec("identity").max_bytes(x.numel(), x.dtype)
    tally.totals.wire_bytes += piece.numel() * copies
    tally.totals.raw_bytes += round(share * raw_bytes) * copies
    tally.totals.values_sent += round(share * x.numel()) * copies
    for row, numel in zip(tally.parameters, layout.numels, strict=True):
        row.values_sent += round(share * numel) * copies
        row.wire_bytes += piece.numel() * copies * (numel / max(x.numel(), 1))


def _pack(x: Tensor, compressor: Compressor, tally: Tally, copies: int) -> Tensor:
    """A message that says its own shape: [number of axes, dtype, *shape] as int64, then the packet."""
    (shard,) = BucketLayout.of([tally.layout.names[0]], [x.numel()], 1).shards
    room = torch.empty(compressor.max_bytes(shard, x.dtype), dtype=torch.uint8, device=x.device)
    packet = compressor.encode(x.detach().reshape(-1), room, shard, tally, copies)
    header = torch.tensor([x.dim(), _DTYPES.index(x.dtype), *x.shape]).view(torch.uint8)
    tally.announced(header.numel() * copies)  # the identity codec would need it as well
    return torch.cat([header.to(x.device), packet])


def _unpack(message: Tensor, name: str, compressor: Compressor, tally: Tally, sender: int) -> Tensor:
    axes, code = _numbers(message, 0, 2, sender)
    if not (0 <= axes <= message.numel() // 8 - 2 and 0 <= code < len(_DTYPES)):
        raise CorruptPacket(_DAMAGED.format(sender), found=f"{axes} axes, dtype {code}")
    shape = _numbers(message, 2, axes, sender)
    if min(shape, default=0) < 0 or math.prod(shape) >= 2**31:
        raise CorruptPacket(_DAMAGED.format(sender), found=f"the shape {shape}")
    out = torch.empty(shape, dtype=_DTYPES[code], device=message.device)
    (shard,) = BucketLayout.of([name], [out.numel()], 1).shards
    compressor.decode(message[8 * (2 + axes) :].clone(), out.view(-1), shard, tally, sender=sender)
    return out


def _numbers(message: Tensor, position: int, count: int, sender: int) -> list[int]:
    part = message[8 * position : 8 * (position + count)].cpu().clone()
    if part.numel() != 8 * count:
        raise CorruptPacket(
            f"the header of rank {sender}'s tensor is cut off", found=f"{message.numel()} bytes"
        )
    return [int(number) for number in part.view(torch.int64)]


def _by_dtype(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each dtype, by name, so that ranks may have collected them in any order."""
    used = {x.dtype for x in tensors.values()}
    return [
        {name: tensors[name] for name in sorted(tensors) if tensors[name].dtype == dtype}
        for dtype in _DTYPES
        if dtype in used
    ]


def _layout(bucket: Mapping[str, Tensor], num_shards: int) -> BucketLayout:
    return BucketLayout.of(list(bucket), [x.numel() for x in bucket.values()], num_shards)


def _put_back(flat: Tensor, bucket: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        parts = flat.split_with_sizes([x.numel() for x in bucket.values()])
        for x, part in zip(bucket.values(), parts, strict=True):
            x.copy_(part.view(x.shape))


def _check(
    name: str, x: Tensor, compressor: Compressor, transport: Transport, dtypes: Sequence[torch.dtype]
) -> None:
    if name not in compressor.meter.parameters:
        raise ConfigError(
            f"the compressor does not know a tensor {name!r}",
            expected="one of the names it was made with",
            fix=f"Compressor(plan, [{name!r}, ...])",
        )
    if x.dtype not in dtypes or x.layout != torch.strided or x.device.type != transport.device.type:
        raise UnsupportedTensor(
            f"tensor {name!r} cannot be sent compressed",
            expected=f"dense {', '.join(str(d).removeprefix('torch.') for d in dtypes)} on {transport.device.type}",
            found=f"{x.layout}, {x.dtype} on {x.device.type}",
        )
