"""What was measured before a run: links, codecs and backward, as numbers that go into JSON and come back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from efficient_dl.errors import ConfigError

_VERSION = 2


@dataclass(frozen=True)
class Line:
    """A way for bytes: seconds = latency_seconds + bytes sent by one rank / bytes_per_second."""

    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class NodeLink:
    """From one node to another, while every node sends to one and receives from one: numbers of nodes, not ranks."""

    source: int
    target: int
    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class CodecSpeed:
    """A codec on gradients of the model's own shapes, on the slowest rank.

    codec: as `make_codec` takes it. encode_seconds, decode_seconds: of one value; decoding adds to what is there.
    bytes_per_value: of its packets. What a packet takes whatever its length is not in these (see `PacketCost`).
    """

    codec: str
    encode_seconds: float
    decode_seconds: float
    bytes_per_value: float


@dataclass(frozen=True)
class PacketCost:
    """What every packet costs beside its values: its header and tables, the message of its size, calls."""

    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_bytes: float = 0.0


@dataclass(frozen=True)
class Measurements:
    """Everything that `plan_for` wants to know about where a model trains. Seconds, bytes, values.

    ranks_per_node: as many entries as nodes.
    native: torch's own all-reduce; bytes are those of a ring, 2 (n − 1) / n of the tensor's.
    exchange: our transport, every rank sending to all others at once.
    between, inside: where nodes have several ranks each, the same among the ranks of one position on their nodes, all
        positions at once, and among the ranks of a node; else None.
    links: of each pair of nodes, both directions loaded. For the reader: the lines above are what is planned with.
    codecs: those that may be chosen, from the exact ones to the fewest bits.
    packet: of all of them; that of the one with the fewest bits.
    backward_seconds: of a step without communication, forward pass included; 0.0 if nobody has measured it.
    told_seconds: what our exchange takes longer because nobody knows messages' sizes before they come.
    ready: of each parameter that is planned for, in the model's order, the share of backward_seconds after which its
        gradient is there, on the rank where it comes last; () if nobody has measured it.
    feeds_back: whether encoding what is lossy includes error feedback.
    copy_seconds: what a step takes to copy one value into its bucket and back, natively, too; 0.0 if it has none.
    contended: whether codecs and backward take processor time from each other.
    assumed: what was not measured but given, one phrase; "" if nothing was.
    """

    ranks_per_node: tuple[int, ...]
    native: Line
    exchange: Line
    between: Line | None
    inside: Line | None
    links: tuple[NodeLink, ...]
    codecs: tuple[CodecSpeed, ...]
    backward_seconds: float
    contended: bool
    packet: PacketCost = PacketCost()
    assumed: str = ""
    ready: tuple[float, ...] = ()
    told_seconds: float = 0.0
    feeds_back: bool = False
    copy_seconds: float = 0.0

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return sum(self.ranks_per_node)

    @property
    def slowest_link(self) -> float:
        """Bytes per second of the slowest link between two nodes, or of the exchange where there is one node."""
        return min((link.bytes_per_second for link in self.links), default=self.exchange.bytes_per_second)

    def with_faster_links(self, factor: float) -> Measurements:
        """The same with so many times the bandwidth everywhere but inside of nodes."""

        def faster(line: Line) -> Line:
            return replace(line, bytes_per_second=factor * line.bytes_per_second)

        return replace(
            self,
            native=faster(self.native),
            exchange=faster(self.exchange),
            between=self.between and faster(self.between),
            links=tuple(
                replace(link, bytes_per_second=factor * link.bytes_per_second) for link in self.links
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it; floats to the last bit."""
        return {"version": _VERSION, **json.loads(json.dumps(asdict(self)))}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Measurements:
        """Undoes `to_json`. Raises ConfigError for anything else."""
        found = dict(values)
        try:
            if found.pop("version") != _VERSION:
                raise ValueError(f"version {values['version']}")
            for name in ("native", "exchange", "between", "inside"):
                found[name] = Line(**found[name]) if found[name] is not None else None
            found["ranks_per_node"] = tuple(found["ranks_per_node"])
            found["links"] = tuple(NodeLink(**link) for link in found["links"])
            found["codecs"] = tuple(CodecSpeed(**codec) for codec in found["codecs"])
            found["packet"] = PacketCost(**found["packet"])
            found["ready"] = tuple(found.get("ready", ()))  # what older runs have recorded has none
            return Measurements(**found)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                "these are no measurements of this version",
                expected=f"what `edl probe --json FILE` of version {_VERSION} writes",
                found=str(error),
                fix="measure again: edl probe --json FILE",
            ) from error


def assumed_network(
    local: Measurements, bytes_per_second: float, nodes: int, ranks_per_node: int, latency_seconds: float
) -> Measurements:
    """Codecs and backward as measured somewhere, on a network as somebody imagines it.

    bytes_per_second: of every node's link, each way; of it the share `GLOO_EFFICIENCY` is reached. latency_seconds: of
    one message. Ranks of one node share its link. A ring's neighbours are counted in the order of the nodes, so that
    each node sends to one other; its latency is that of its 2 (n − 1) rounds.
    """
    world_size = nodes * ranks_per_node
    link = GLOO_EFFICIENCY * bytes_per_second
    away = world_size - ranks_per_node
    shared = link * (world_size - 1) / (ranks_per_node * away) if away else link
    several = nodes > 1 and ranks_per_node > 1
    memory = local.inside or Line(latency_seconds=1e-4, bytes_per_second=MEMORY_BYTES_PER_SECOND)
    return replace(
        local,
        ranks_per_node=(ranks_per_node,) * nodes,
        native=Line(2 * (world_size - 1) * latency_seconds, link),
        exchange=Line((world_size - 1) * latency_seconds, shared),
        between=Line((nodes - 1) * latency_seconds, link / ranks_per_node) if several else None,
        inside=memory if several else None,
        links=tuple(
            NodeLink(source, target, latency_seconds, link)
            for source in range(min(nodes, 2))
            for target in range(min(nodes, 2))
            if source != target
        ),
        assumed=f"{nodes} hosts with {ranks_per_node} ranks each and links of {8 * bytes_per_second / 1e6:g} Mbit/s, "
        f"of which {100 * GLOO_EFFICIENCY:g} % is reached",
    )


def extrapolated(two: Measurements, nodes: int, contention: float = 1.0) -> Measurements:
    """What was measured between two nodes of one rank each, on paper for so many of them, on links as fast.

    A message takes as long as between two, and our exchange waits for n − 1 of them, native for the 2 (n − 1) rounds of
    a ring, where two ranks have 2. contention: how many times as long all that processors do takes as it took there,
    because ranks share cores: 1.0 where they do not. Bandwidths stay.
    """
    rounds = (nodes - 1) * contention
    packet = two.packet
    return replace(
        two,
        ranks_per_node=(1,) * nodes,
        native=replace(two.native, latency_seconds=two.native.latency_seconds * rounds),
        exchange=replace(two.exchange, latency_seconds=two.exchange.latency_seconds * rounds),
        between=None,
        inside=None,
        codecs=tuple(
            replace(
                one,
                encode_seconds=one.encode_seconds * contention,
                decode_seconds=one.decode_seconds * contention,
            )
            for one in two.codecs
        ),
        packet=replace(
            packet,
            encode_seconds=packet.encode_seconds * contention,
            decode_seconds=packet.decode_seconds * contention,
        ),
        copy_seconds=two.copy_seconds * contention,
        assumed=f"{nodes} hosts, from what was measured between two",
    )


GLOO_EFFICIENCY = 0.94  # benchmarks/results/exchange.jsonl: pairwise rounds of 10 MiB, 92 to 94 % of the line
MEMORY_BYTES_PER_SECOND = (
    1e9  # between two processes of a node over the loopback interface; a guess on the low side
)


def merged(codecs: Sequence[Sequence[CodecSpeed]]) -> tuple[CodecSpeed, ...]:
    """Every codec's slowest rank, and its longest packets; the ranks' lists name the same codecs in the same order."""
    return tuple(
        CodecSpeed(
            of_one[0].codec,
            max(one.encode_seconds for one in of_one),
            max(one.decode_seconds for one in of_one),
            max(one.bytes_per_value for one in of_one),
        )
        for of_one in zip(*codecs, strict=True)
    )
