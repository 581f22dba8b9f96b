"""Measures what a plan depends on, in a few seconds: links under load, the native all-reduce, and codecs.

Machines are shared and clocks are noisy. So latencies are the least of several tries, bandwidths and codec times
medians, each try begins on all ranks together and lasts until the slowest rank is through, and codecs are timed on all
ranks at the same moment, as in training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from efficient_dl.comm.codec_timing import codec_speed, copy_seconds, now, packet_cost
from efficient_dl.comm.handshake import gather_json
from efficient_dl.comm.measurements import CodecSpeed, Line, Measurements, NodeLink, PacketCost, merged
from efficient_dl.comm.process_group import ProcessGroupTransport
from efficient_dl.comm.sampling import Spread
from efficient_dl.comm.topology import Topology, machine, own_cores
from efficient_dl.comm.transport import Transport

_SMALL_BYTES = 1024
_FIRST_BYTES = 128 << 10  # for a first impression of the bandwidth
_LARGEST_BYTES = 16 << 20  # of what one rank sends in a try
_TRY_SECONDS = 0.15  # what the large messages of a try should take
_TRIES = 5
_GLANCE_TRIES, _GLANCE_SECONDS = 3, 0.03  # of a look during a run (look.py)
_TOLD_TRIES = 15
SAMPLE_NUMEL = 1 << 21  # 8 MiB of float32: beyond the caches of a core
_LINK_TRIES, _LINK_SECONDS = 3, 0.08  # of each pair of nodes
_MOST_SHIFTS = 7  # of pairs of nodes: with more than 8 nodes a sample
AUTO_RATES = (4.0, 2.0)  # bits a value that "auto" chooses among, beside the floor and lossless


def codecs_for(floor_bits: float, family: str = "bits") -> tuple[str, ...]:
    """The codecs to measure and choose among. family: "bits" or "grid", what a number of bits means in this run.

    Rates within a tenth of the floor are left out: they would gain too little to be told apart from it.
    """
    rates = [rate for rate in AUTO_RATES if rate > 1.1 * floor_bits]
    return ("lossless", *(f"{family}:{rate}" for rate in (*rates, float(floor_bits))))


def probe(
    transport: Transport,
    native: Callable[[Tensor], object],
    topology: Topology,
    codecs: Sequence[str],
    sample: Tensor,
    segments: Sequence[int],
    backward_seconds: float = 0.0,
    control: ProcessGroupTransport | None = None,
    kernel: str = "auto",
    native_one_way: bool = False,
    ready: Sequence[float] = (),
    feeds_back: bool = False,
    bucket_copies: int = 0,
) -> Measurements:
    """Measures on all ranks, which call it together; all get the same numbers.

    transport: what will carry compressed bytes. native: torch's all-reduce of a tensor, in place.
    topology: which ranks share a node. control: makes the groups inside of nodes and between them, where nodes have
        several ranks each; without it these are not measured.
    sample: 1-D gradient, or what resembles one, as `sample_gradient` returns it; segments: its parameters' numels.
    backward_seconds: this rank's; the slowest one's counts. ready: shares of it, one a parameter, after which gradients
        are there on this rank, in the same order on all; the largest count.
    feeds_back: whether what lossy packets leave out will go with the next ones. bucket_copies: how often a step copies
        each gradient between itself and a bucket.

    Raises TransportError if a rank is gone or silent for longer than the transport's time-out.
    """
    packet = packet_cost(codecs[-1], sample, kernel, feeds_back)
    speeds = [
        codec_speed(codec, sample, segments, transport.world_size, packet, kernel, feeds_back)
        for codec in codecs
    ]
    own: dict[str, Any] = {
        "packet": [packet.encode_seconds, packet.decode_seconds, packet.num_bytes],
        "codecs": [
            [one.codec, one.encode_seconds, one.decode_seconds, one.bytes_per_value] for one in speeds
        ],
        "backward": backward_seconds,
        "copy": copy_seconds(sample, bucket_copies),
        "ready": list(ready),
        "machine": machine(),
        "cores": own_cores(),
        "threads": torch.get_num_threads(),
        "gpu": transport.device.type == "cuda",
    }
    everyone = gather_json(own, transport)
    ranks_per_node = tuple(map(len, topology.nodes))
    between = inside = None
    several = topology.flat_reason() is None and len(topology.nodes) > 1
    if several and control is not None:
        between = _measured_among(control, topology.peers_of(control.rank), transport)
        inside = _measured_among(control, topology.node_of(control.rank), transport)
    return Measurements(
        ranks_per_node,
        native=native_line(native, transport, sample.dtype, native_one_way),
        exchange=exchange_line(transport, transport),
        told_seconds=_told_seconds(transport),
        between=between,
        inside=inside,
        links=_node_links(transport, topology),
        codecs=merged([[CodecSpeed(*one) for one in theirs["codecs"]] for theirs in everyone]),
        backward_seconds=max(theirs["backward"] for theirs in everyone),
        # A codec beside backward needs a core that backward leaves idle; on a GPU both want the same processors.
        contended=any(theirs["gpu"] for theirs in everyone) or _has_full_machine(everyone),
        packet=PacketCost(*map(max, zip(*(theirs["packet"] for theirs in everyone), strict=True))),
        ready=tuple(map(max, zip(*(theirs["ready"] for theirs in everyone), strict=True))),
        feeds_back=feeds_back,
        copy_seconds=max(theirs["copy"] for theirs in everyone),
    )


def _has_full_machine(everyone: Sequence[Mapping[str, Any]]) -> bool:
    """Whether backward leaves a rank, or all ranks of a machine together, none of the cores that they may use."""
    if any(len(theirs["cores"]) <= theirs["threads"] for theirs in everyone):
        return True
    machines = {theirs["machine"] for theirs in everyone}
    for one in machines:
        ranks = [theirs for theirs in everyone if theirs["machine"] == one]
        cores = {core for rank in ranks for core in rank["cores"]}
        if len(cores) <= sum(rank["threads"] for rank in ranks):
            return True
    return False


def sample_gradient(parameters: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Values that stand for all gradients, at most 8 MiB of float32, and how many of them are of each parameter.

    They are blocks from all over the model's gradients, the last parameter first. Where there is none, or one of
    exactly zero, as before the first step of a network whose residual branches end in norms that begin at zero, they
    are normal, from the same numbers on every rank: with the spread of an average gradient, or without any with one of
    its own for each parameter.
    """
    generator = torch.Generator().manual_seed(0)
    found = [float(p.grad.float().square().mean().sqrt()) for p in parameters if _has_values(p.grad)]
    spreads = [spread for spread in found if math.isfinite(spread)]
    parts: list[Tensor] = []
    sample = Spread(sum(p.numel() for p in parameters), SAMPLE_NUMEL)
    for parameter in reversed(list(parameters)):
        gradient = parameter.grad
        if _has_values(gradient):
            part = sample.take(gradient.detach().reshape(-1))
            if part is not None:
                parts.append(part.to(parameter.dtype))
        elif numel := sample.numel_of(parameter.numel()):
            spread = statistics.median(spreads) if spreads else parameter.numel() ** -0.5
            drawn = torch.randn(numel, generator=generator) * spread
            parts.append(drawn.to(parameter.dtype).to(parameter.device))
    return torch.cat(parts).contiguous(), [part.numel() for part in parts]


def _has_values(gradient: Tensor | None) -> TypeGuard[Tensor]:
    return gradient is not None and gradient.layout == torch.strided and bool(gradient.any())


def _timed(action: Callable[[], object], transport: Transport, tries: int = _TRIES) -> list[float]:
    """Seconds of each try on the slowest rank; equal on all ranks, which begin each try together."""
    own: list[float] = []
    action()
    for _ in range(tries):
        _together(transport)
        start = now(transport.device)
        action()
        own.append(now(transport.device) - start)
    return [max(column) for column in zip(*gather_json(own, transport), strict=True)]


def _together(transport: Transport) -> None:
    transport.gather(torch.zeros(1, dtype=torch.uint8, device=transport.device)).wait()


def _line(send: Callable[[int], Callable[[], object]], everyone: Transport, glance: bool = False) -> Line:
    """send(n): an action in which this rank sends n bytes. Latency from small messages, bandwidth from large ones.

    glance: fewer and shorter tries.
    """
    tries, try_seconds = (_GLANCE_TRIES, _GLANCE_SECONDS) if glance else (_TRIES, _TRY_SECONDS)
    latency = min(_timed(send(_SMALL_BYTES), everyone, tries))
    first = statistics.median(_timed(send(_FIRST_BYTES), everyone, tries=1 if glance else 3))
    if first >= try_seconds:
        return Line(latency, _slope(_FIRST_BYTES, first, latency))
    num_bytes = _large(_slope(_FIRST_BYTES, first, latency), try_seconds)
    seconds = statistics.median(_timed(send(num_bytes), everyone, tries))
    return Line(latency, _slope(num_bytes, seconds, latency))


def _large(bytes_per_second: float, seconds: float) -> int:
    return int(min(max(bytes_per_second * seconds, _FIRST_BYTES), _LARGEST_BYTES)) // 64 * 64


def _slope(num_bytes: int, seconds: float, latency: float) -> float:
    """Bytes per second; where noise has made the latency as long as the transfer, a twentieth of that counts."""
    return (num_bytes - _SMALL_BYTES) / max(seconds - latency, 0.05 * seconds, 1e-9)


def exchange_line(transport: Transport, everyone: Transport, glance: bool = False) -> Line:
    """Our exchange among the ranks of a transport, while all other such groups among `everyone` do the same."""
    peers = max(transport.world_size - 1, 1)

    def send(num_bytes: int) -> Callable[[], object]:
        message = torch.zeros(num_bytes // peers, dtype=torch.uint8, device=transport.device)
        return lambda: transport.exchange([message] * transport.world_size).wait()

    return _line(send, everyone, glance)


def _told_seconds(transport: Transport) -> float:
    """What an exchange of small messages takes longer because their sizes are told first."""
    message = torch.zeros(_SMALL_BYTES, dtype=torch.uint8, device=transport.device)
    outgoing, sizes = [message] * transport.world_size, [_SMALL_BYTES] * transport.world_size
    told = _timed(lambda: transport.exchange(outgoing).wait(), transport, _TOLD_TRIES)
    known = _timed(lambda: transport.exchange(outgoing, sizes).wait(), transport, _TOLD_TRIES)
    return max(min(told) - min(known), 0.0)


def native_line(
    native: Callable[[Tensor], object],
    transport: Transport,
    dtype: torch.dtype,
    one_way: bool = False,
    glance: bool = False,
) -> Line:
    """Torch's own collective of a tensor, in place; one_way: of which this rank sends half of an all-reduce's bytes."""
    ranks, ways = max(transport.world_size, 2), 1 if one_way else 2

    def send(num_bytes: int) -> Callable[[], object]:
        values_a_rank = num_bytes // (ways * (ranks - 1) * dtype.itemsize)
        x = torch.zeros(max(values_a_rank, 1) * ranks, dtype=dtype, device=transport.device)
        return lambda: native(x)

    return _line(send, transport, glance)


def _measured_among(control: ProcessGroupTransport, members: Sequence[int], everyone: Transport) -> Line:
    """Our exchange among some ranks, while all other such groups do the same."""
    group = control.subgroup(members)
    try:
        line = exchange_line(group, everyone)
        _together(everyone)  # no rank gives up the group while another one is still inside
        return line
    finally:
        group.close()


def _node_links(transport: Transport, topology: Topology) -> tuple[NodeLink, ...]:
    """One way at a time, between the first ranks of the nodes: no node sends while it receives.

    In the rounds of a shift k every node sends to the one k further. These pairs form rings; a ring's pairs take two
    turns, or three where their number is odd.
    """
    nodes = len(topology.nodes)
    shifts = list(range(1, nodes))
    if len(shifts) > _MOST_SHIFTS:
        shifts = [1 + round(k * (nodes - 2) / (_MOST_SHIFTS - 1)) for k in range(_MOST_SHIFTS)]
    leaders = [ranks[0] for ranks in topology.nodes]
    links = [
        link
        for shift in shifts
        for pairs in link_turns(nodes, shift)
        for link in _one_way(transport, leaders, pairs)
    ]
    return tuple(sorted(links, key=lambda link: (link.source, link.target)))


def link_turns(nodes: int, shift: int) -> list[list[tuple[int, int]]]:
    """All pairs (node, node + shift), in turns in which no node occurs twice."""
    turns: list[list[tuple[int, int]]] = [[], [], []]
    seen: set[int] = set()
    for start in range(nodes):
        ring: list[int] = []
        node = start
        while node not in seen:
            seen.add(node)
            ring.append(node)
            node = (node + shift) % nodes
        for position, source in enumerate(ring):
            last_of_odd = len(ring) % 2 == 1 and position == len(ring) - 1
            turns[2 if last_of_odd else position % 2].append((source, (source + shift) % nodes))
    return [turn for turn in turns if turn]


def _one_way(
    transport: Transport, leaders: Sequence[int], pairs: Sequence[tuple[int, int]]
) -> list[NodeLink]:
    targets = {leaders[source]: leaders[target] for source, target in pairs}

    def tries(num_bytes: int) -> list[list[float]]:
        """Seconds of each try, by rank."""
        outgoing = [torch.empty(0, dtype=torch.uint8, device=transport.device)] * transport.world_size
        if transport.rank in targets:
            message = torch.zeros(num_bytes, dtype=torch.uint8, device=transport.device)
            outgoing[targets[transport.rank]] = message
        seconds: list[float] = []
        for _ in range(_LINK_TRIES):
            _together(transport)
            start = now(transport.device)
            transport.exchange(outgoing).wait()
            seconds.append(now(transport.device) - start)
        return gather_json(seconds, transport)

    small, first = tries(_SMALL_BYTES), tries(_FIRST_BYTES)
    latencies = [min(small[leaders[target]]) for _, target in pairs]
    speeds = [
        _slope(_FIRST_BYTES, statistics.median(first[leaders[target]]), latency)
        for (_, target), latency in zip(pairs, latencies, strict=True)
    ]
    if (num_bytes := _large(min(speeds), _LINK_SECONDS)) > _FIRST_BYTES:
        large = tries(num_bytes)
        speeds = [
            _slope(num_bytes, statistics.median(large[leaders[target]]), latency)
            for (_, target), latency in zip(pairs, latencies, strict=True)
        ]
    return [
        NodeLink(source, target, latency, speed)
        for (source, target), latency, speed in zip(pairs, latencies, speeds, strict=True)
    ]
