"""Messages whose size follows from the plan: what they send, what they cut, and that nobody waits to be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efficient_dl.codec import PacketStats, Side, make_codec
from efficient_dl.comm import (
    AllGather,
    BucketLayout,
    ChunkLayout,
    Compressor,
    Levels,
    OverlappedReducer,
    OwnPacket,
    Plan,
    Residuals,
    Transport,
    all_gather_chunks,
    all_reduce,
    grouped_all_reduce,
    hierarchical_all_reduce,
    reduce_scatter_chunks,
    sum_at_owners,
    summary,
)
from efficient_dl.comm.capacity import packet_capacity
from efficient_dl.errors import CheckpointError, ConfigError, CorruptPacket, PlanMismatch, TransportError
from tests.unit.ranks import on_ranks
from tests.unit.test_hierarchy import on_nodes

NAMES, NUMELS = ["weight", "bias", "head"], [60_000, 70, 9_000]
LAYOUT = BucketLayout.of(NAMES, NUMELS, 1)
WORLD_SIZES = [2, 3, 4]
MIXED = {"bias": "none", "head": 4.0}


def plan(bits: str | float = 2.0, **wishes: Any) -> Plan:
    return Plan.of(bits, messages="bounded", **wishes)


def values(rank: int, numel: int = sum(NUMELS), dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(numel, generator=generator) * torch.logspace(-3, 0, numel)).to(dtype)


class Told:
    """A transport that notes which transfers were told their sizes, and what they sent."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.was_told: list[bool] = []
        self.sent_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def exchange(self, outgoing: list[Tensor], sizes: Sequence[int] | None = None) -> Any:
        return self._noted(self._transport.exchange(outgoing, sizes), sizes)

    def gather(self, packet: Tensor, sizes: Sequence[int] | None = None) -> Any:
        return self._noted(self._transport.gather(packet, sizes), sizes)

    def _noted(self, work: Any, sizes: Sequence[int] | None) -> Any:
        self.was_told.append(sizes is not None)
        self.sent_bytes += work.sent_bytes
        return work


def reduce_all(transport: Told, compressor: Compressor, x: Tensor) -> None:
    layout = BucketLayout.of(NAMES, NUMELS, transport.world_size)
    all_reduce(x, layout, compressor, transport)  # pyright: ignore[reportArgumentType]


def scatter(transport: Told, compressor: Compressor, x: Tensor) -> None:
    layout = chunk_layout(transport.world_size)
    buffer = padded(x, layout)
    out = torch.empty(layout.chunk_numel, dtype=x.dtype)
    reduce_scatter_chunks(buffer, out, layout, compressor, transport)  # pyright: ignore[reportArgumentType]
    x.zero_()[: out.numel()] = out


def gather(transport: Told, compressor: Compressor, x: Tensor) -> None:
    layout = chunk_layout(transport.world_size)
    buffer = padded(x, layout)
    all_gather_chunks(buffer, layout, compressor, transport)  # pyright: ignore[reportArgumentType]
    x.copy_(torch.cat(list(layout.parameters(buffer).values())))


def to_owners(transport: Told, compressor: Compressor, x: Tensor) -> None:
    """Of two ranks the second owns two parameters; of four the last owns nothing."""
    owned = [[0], [1, 2]] if transport.world_size == 2 else [[0], [1], [2], []][: transport.world_size]
    names, numels = [[NAMES[i] for i in one] for one in owned], [[NUMELS[i] for i in one] for one in owned]
    parts = list(x.split_with_sizes([sum(one) for one in numels]))
    layouts = [BucketLayout.of(*one, 1) for one in zip(names, numels, strict=True)]
    total = sum_at_owners(parts, layouts, compressor, transport)  # pyright: ignore[reportArgumentType]
    x.zero_()[: total.numel()] = total


def chunk_layout(world_size: int) -> ChunkLayout:
    return ChunkLayout.of(NAMES, NUMELS, [-(-numel // world_size) for numel in NUMELS], world_size)


def padded(x: Tensor, layout: ChunkLayout) -> Tensor:
    world_size = len(layout.pieces)
    parts = [
        torch.cat([part, part.new_zeros(world_size * (stop - start) - part.numel())]).view(world_size, -1)
        for part, (start, stop) in zip(x.split_with_sizes(NUMELS), layout.slots, strict=True)
    ]
    return torch.cat(parts, dim=1).reshape(-1)


COLLECTIVES = {"all-reduce": reduce_all, "reduce-scatter": scatter, "all-gather": gather}
COLLECTIVES_WITH_OWNERS = COLLECTIVES | {"sum at owners": to_owners}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, MIXED], ids=["one codec", "three codecs"])
@pytest.mark.parametrize("collective", COLLECTIVES_WITH_OWNERS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_no_size_travels_and_every_byte_follows_from_the_plan(
    world_size: int, collective: str, overrides: dict[str, Any], dtype: torch.dtype
) -> None:
    """Zeros, gradients, and spikes that no packet has room for all take the same bytes."""

    def rank(transport: Transport) -> list[int]:
        sent: list[int] = []
        for content in ("zeros", "gradients", "spikes"):
            x = values(transport.rank, dtype=dtype)
            if content == "zeros":
                x.zero_()
            elif content == "spikes":
                x[::300] *= 1e6
            told = Told(transport)
            compressor = Compressor(plan(overrides=overrides), NAMES)
            COLLECTIVES_WITH_OWNERS[collective](told, compressor, x)
            assert told.was_told and all(told.was_told)
            assert compressor.meter.totals.wire_bytes == told.sent_bytes
            sent.append(told.sent_bytes)
        return sent

    for sent in on_ranks(world_size, rank):
        assert len(set(sent)) == 1


@pytest.mark.parametrize("overrides", [{}, MIXED], ids=["one codec", "three codecs"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_ends_bitwise_equal_and_as_close_as_with_exact_messages(
    world_size: int, overrides: dict[str, Any]
) -> None:
    def rank(transport: Transport) -> list[Tensor]:
        results: list[Tensor] = []
        for messages in ("bounded", "exact"):
            x = values(transport.rank)
            reduce_all(
                Told(transport), Compressor(Plan.of(2.0, overrides=overrides, messages=messages), NAMES), x
            )
            results.append(x)
        return results

    results = on_ranks(world_size, rank)
    exact = torch.stack([values(rank) for rank in range(world_size)]).mean(0)
    for bounded, _ in results:
        assert torch.equal(bounded, results[0][0])
    errors = [float((x - exact).norm() / exact.norm()) for x in results[0]]
    assert errors[0] < 1.05 * errors[1]


@pytest.mark.parametrize("reduce", [grouped_all_reduce, hierarchical_all_reduce])
@pytest.mark.parametrize("shape", [(2, 2), (2, 3), (3, 2)])
def test_groups_and_nodes_pass_bounded_packets_on(shape: tuple[int, int], reduce: Any) -> None:
    world_size = math.prod(shape)
    layout = BucketLayout.of(NAMES, NUMELS, world_size)

    def run(rank: int, levels: Levels) -> tuple[Tensor, list[bool]]:
        told = [Told(one) for one in (levels.scatter, levels.exchange, levels.gather, levels.spread)]
        compressor, x = Compressor(plan(overrides=MIXED), NAMES), values(rank)
        reduce(x, layout, compressor, Levels(*told))  # pyright: ignore[reportArgumentType]
        if reduce is hierarchical_all_reduce:
            told = told[1:3]  # inside of a node nothing is compressed
        assert compressor.meter.totals.wire_bytes == sum(one.sent_bytes for one in told)
        return x, [was for one in told for was in one.was_told]

    results = on_nodes(*shape, run)
    exact = torch.stack([values(rank) for rank in range(world_size)]).mean(0)
    for x, was_told in results:
        assert torch.equal(x, results[0][0])
        assert len(was_told) >= 2 and all(was_told)
    assert float((results[0][0] - exact).norm() / exact.norm()) < 0.5


@settings(max_examples=60, deadline=None)
@given(
    numels=st.lists(st.integers(0, 3000), min_size=1, max_size=4),
    bits=st.sampled_from([0.1, 0.5, 2.0, 3.7, 7.0]),
    seed=st.integers(0, 2**16),
    spikes=st.booleans(),
)
def test_any_shard_fits_its_capacity_and_comes_back(
    numels: list[int], bits: float, seed: int, spikes: bool
) -> None:
    side, codec = Side(tuple(numels)), make_codec(f"bits:{bits}")
    numel = sum(numels)
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    if spikes:
        x[::97] *= 1e9
    capacity = packet_capacity(codec, numel, x.dtype, side)
    room, stats, out = torch.zeros(capacity, dtype=torch.uint8), PacketStats(), torch.empty(numel)
    codec.encode_into(x, room, side, stats, capacity=capacity)
    codec.decode(room, out, side=side)
    assert stats.packet_bytes <= capacity
    assert torch.isfinite(out).all()
    if stats.dropped_blocks == 0 and numel >= 64 and bits >= 2:
        assert float((out - x).norm()) < 0.8 * float(x.norm())


@pytest.mark.parametrize("spread", ["normal", "laplace"])
@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0, 4.0, 7.0])
@pytest.mark.parametrize("numel", [64, 1000, 4096, 70_000, 600_000])
def test_packets_of_usual_values_lose_no_block(numel: int, bits: float, spread: str) -> None:
    codec, side, stats = make_codec(f"bits:{bits}"), Side((numel,)), PacketStats()
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    if spread == "laplace":
        x = x.sign() * x.square()
    capacity = packet_capacity(codec, numel, x.dtype, side)
    room = torch.zeros(capacity, dtype=torch.uint8)
    codec.encode_into(x, room, side, stats, capacity=capacity)
    assert stats.dropped_blocks == 0
    assert capacity <= 1.04 * numel * bits / 8 + 1100 + numel / 64


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rather_than_to_lose_blocks_all_get_fewer_bits(world_size: int, feedback: bool) -> None:
    """The sample by which a step is chosen is cheaper than the rest: what it promises does not fit."""
    x = torch.randn(256 * 3200, generator=torch.Generator().manual_seed(1))
    x.view(-1, 256)[:: 50 // world_size, 1:] = 0.0  # a shard's blocks are sampled at such a stride
    names, layout = ["weight"], BucketLayout.of(["weight"], [x.numel()], world_size)
    codec, side, stats = make_codec("bits:1.0"), layout.shards[0].side, PacketStats()
    room = torch.zeros(packet_capacity(codec, side.segments[0], x.dtype, side), dtype=torch.uint8)
    codec.encode_into(x[: side.segments[0]], room, side, stats, capacity=room.numel())
    assert stats.dropped_blocks > 0

    def rank(transport: Transport) -> tuple[float, float, int]:
        residuals = Residuals({"weight": x.numel()}, torch.device("cpu")) if feedback else None
        compressor = Compressor(plan(1.0, error_feedback=feedback), names, residuals=residuals)
        total, errors = torch.zeros_like(x), []
        for steps in range(1, 9):
            compressor.begin_step()
            gradient = x.clone()
            all_reduce(gradient, layout, compressor, transport)
            total += gradient
            compressor.commit_step()
            compressor.end_step(0.0)
            errors.append(float((total / steps - x).norm() / x.norm()))
        return errors[0], errors[-1], compressor.meter.totals.dropped_blocks

    for first, last, dropped in on_ranks(world_size, rank):
        assert dropped == 0
        assert first < 0.9
        if feedback:
            assert last < 0.5 * first


def test_a_rank_that_sends_another_length_is_found() -> None:
    def rank(transport: Transport) -> str:
        bits = 2.0 if transport.rank else 3.0  # in use the handshake finds this first
        with pytest.raises((TransportError, CorruptPacket)) as raised:
            reduce_all(Told(transport), Compressor(plan(bits), NAMES), values(0))
        return str(raised.value)

    texts = on_ranks(2, rank)
    assert any("another size" in text or "do not fit" in text for text in texts)


@pytest.mark.parametrize(
    ("wishes", "found"),
    [
        ({"bits": "lossless"}, "bits=lossless"),
        ({"bits": "int8"}, "bits=int8"),
        ({"bits": 2.0, "scale": "global"}, "scale='global'"),
        ({"max_error": 0.1}, "max_error"),
        ({"bytes_per_step": 10**6, "values_per_step": 10**6}, "bytes_per_step"),
        ({"bits": 2.0, "overrides": {"*.bias": "lossless"}}, r"overrides: \*.bias"),
    ],
)
def test_what_has_no_size_beforehand_is_refused(wishes: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        Plan.of(**wishes, messages="bounded")


def test_an_unknown_kind_of_message_is_refused() -> None:
    with pytest.raises(ConfigError, match="exact, bounded"):
        Plan.of(2.0, messages="short")  # pyright: ignore[reportArgumentType]


def test_a_checkpoint_knows_its_messages() -> None:
    state = Compressor(plan(), NAMES).state_dict()
    with pytest.raises(PlanMismatch, match="messages"):
        Compressor(Plan.of(2.0), NAMES).load_state_dict(state)
    exact = Compressor(Plan.of(2.0), NAMES).state_dict()
    del exact["plan"]["messages"]  # as it was before there were others
    Compressor(Plan.of(2.0), NAMES).load_state_dict(exact)
    with pytest.raises(PlanMismatch, match="messages"):
        Compressor(plan(), NAMES).load_state_dict(exact)
    with pytest.raises(CheckpointError):
        Compressor(plan(), NAMES).load_state_dict(state | {"version": 0})


def test_overlapped_buckets_get_the_bits_of_one_after_the_other() -> None:
    def rank(transport: Transport) -> tuple[Tensor, Tensor]:
        layout = BucketLayout.of(NAMES, NUMELS, transport.world_size)
        first, second = values(transport.rank), values(transport.rank + 10)
        alone = [first.clone(), second.clone()]
        for x in alone:
            all_reduce(x, layout, Compressor(plan(), NAMES), transport)
        reducer = OverlappedReducer(Compressor(plan(), NAMES), transport.sibling(), transport.sibling())
        for future in [reducer.submit(first, layout), reducer.submit(second, layout)]:
            future.result(30)
        reducer.close()
        return torch.stack([first, second]), torch.stack(alone)

    for overlapped, alone in on_ranks(2, rank):
        assert torch.equal(overlapped, alone)


def test_the_own_packet_is_used_again_though_it_is_bounded() -> None:
    def rank(transport: Transport) -> int:
        layout, packet = chunk_layout(2), OwnPacket()
        compressor = Compressor(plan(), NAMES)
        for _ in range(3):
            buffer = padded(values(0), layout)
            job = AllGather(buffer, layout, compressor, transport.rank, packet)
            job.encode()
            job.gather_and_decode(transport)
        return int(summary(compressor.meter.state_dict())["encoded_values"])

    shards = chunk_layout(2).bucket.shards
    assert on_ranks(2, rank) == [shard.numel for shard in shards]


def test_bits_a_value_are_what_was_asked_for_and_a_little_more() -> None:
    def rank(transport: Transport) -> float:
        numel = 2**20
        layout = BucketLayout.of(["weight"], [numel], transport.world_size)
        compressor = Compressor(plan(), ["weight"])
        all_reduce(values(transport.rank, numel), layout, compressor, transport)
        compressor.end_step(0.0)
        return float(summary(compressor.meter.state_dict())["bits_per_value"])

    for bits in on_ranks(2, rank):
        assert math.isclose(bits, 2 * 33 / 32 + 8 * 1024 / 2**19, rel_tol=1e-3)
