"""The compressed all-reduce on in-memory ranks: what it computes, bit by bit, and what it counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_dl.comm import BucketLayout, Compressor, Plan, Transport, all_reduce, summary
from tests.unit.ranks import on_ranks

NAMES, NUMELS = ["weight", "bias", "head"], [1500, 70, 1000]
WORLD_SIZES = [2, 3, 4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def contributions(world_size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(world_size)
    spread = torch.logspace(-3, 0, sum(NUMELS))
    return [(torch.randn(sum(NUMELS), generator=generator) * spread).to(dtype) for _ in range(world_size)]


def reduce(
    values: list[Tensor], bits: str | float, op: Any = "avg"
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Every rank's result and its meter's summary."""
    layout = BucketLayout.of(NAMES, NUMELS, len(values))

    def rank(transport: Transport) -> tuple[Tensor, dict[str, Any]]:
        x = values[transport.rank].clone()
        compressor = Compressor(Plan.of(bits), NAMES, kernel="reference")
        all_reduce(x, layout, compressor, transport, op)
        compressor.meter.stepped(0.0)
        return x, summary(compressor.meter.state_dict())

    results = on_ranks(len(values), rank)
    return [x for x, _ in results], [stats for _, stats in results]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("bits", ["identity", "lossless", 2.0])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_ends_bitwise_equal(world_size: int, bits: str | float) -> None:
    results, _ = reduce(contributions(world_size), bits)
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_identity_is_the_float32_sum_in_rank_order(world_size: int, dtype: torch.dtype) -> None:
    values = contributions(world_size, dtype)
    total = values[0].float()
    for value in values[1:]:
        total = total + value.float()
    averages, _ = reduce(values, "identity")
    sums, _ = reduce(values, "identity", op="sum")
    assert same_bits(averages[0], (total / world_size).to(dtype))
    assert same_bits(sums[0], total.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_lossless_gives_the_bits_of_identity(world_size: int, dtype: torch.dtype) -> None:
    values = contributions(world_size, dtype)
    for value in values:
        value[:4] = torch.tensor([-0.0, 1e-45, 1e-7, float("inf")]).to(dtype)
    assert same_bits(reduce(values, "lossless")[0][0], reduce(values, "identity")[0][0])


def test_minus_zero_survives_a_lossless_sum() -> None:
    values = [torch.full((sum(NUMELS),), -0.0) for _ in range(3)]
    assert same_bits(reduce(values, "lossless")[0][0], values[0])


def test_more_bits_come_closer_to_the_exact_average() -> None:
    values = contributions(3)
    exact = torch.stack(values).mean(0)
    errors = [float((reduce(values, bits)[0][0] - exact).norm() / exact.norm()) for bits in (4.0, 2.0)]
    assert 0 < 2 * errors[0] < errors[1] < 0.5


def test_the_owner_takes_part_unquantized() -> None:
    """Rank 1 sends zeros: what rank 0 owns is then its own contribution, rounded once, not twice."""
    values = [contributions(2)[0], torch.zeros(sum(NUMELS))]
    layout = BucketLayout.of(NAMES, NUMELS, 2)
    shard = layout.shards[0]
    codec = Compressor(Plan.of(2.0), NAMES, kernel="reference").codec
    halved = values[0][: shard.stop] / 2
    once = torch.empty_like(halved)
    codec.decode(codec.encode(halved, shard.side), once, side=shard.side)
    assert same_bits(reduce(values, 2.0)[0][0][: shard.stop], once)


@pytest.mark.parametrize("bits", ["identity", "lossless", 2.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("source", [0, 1, 2])
def test_a_non_finite_value_reaches_every_rank(bits: str | float, bad: float, source: int) -> None:
    values = contributions(3)
    values[source][700] = bad
    results, _ = reduce(values, bits)
    assert all(not torch.isfinite(result[700]) for result in results)
    assert all(torch.isfinite(result[-1000:]).all() for result in results)


def test_a_half_precision_sum_that_overflows_is_not_finite() -> None:
    values = [torch.full((sum(NUMELS),), 60000.0, dtype=torch.float16) for _ in range(2)]
    assert not torch.isfinite(reduce(values, 2.0, op="sum")[0][0]).any()
    assert torch.isfinite(reduce(values, 2.0)[0][0]).all()


@pytest.mark.parametrize("bits", ["identity", 2.0])
def test_one_rank_leaves_the_tensor_alone(bits: str | float) -> None:
    (value,) = contributions(1)
    (result,), (stats,) = reduce([value], bits)
    assert same_bits(result, value)
    assert stats["wire_bytes"] == stats["values_sent"] == 0
    assert stats["ratio"] == 1.0


def test_a_tensor_smaller_than_the_world_is_reduced() -> None:
    layout = BucketLayout.of(["a"], [3], 4)

    def rank(transport: Transport) -> Tensor:
        x = torch.full((3,), float(transport.rank))
        all_reduce(x, layout, Compressor(Plan.of("lossless"), ["a"], "reference"), transport)
        return x

    assert all(result.tolist() == [1.5] * 3 for result in on_ranks(4, rank))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_identity_sends_exactly_what_it_is_compared_with(world_size: int) -> None:
    _, stats = reduce(contributions(world_size), "identity")
    numel = sum(NUMELS)
    for rank in stats:
        assert rank["wire_bytes"] == rank["raw_bytes"]
        assert rank["ratio"] == 1.0
    # Up: everything but the own shard; down: the own shard to everyone. A header and a size each time.
    sent = sum(rank["wire_bytes"] for rank in stats)
    packets = 2 * world_size * (world_size - 1)
    assert sent == 2 * 4 * numel * (world_size - 1) + packets * (32 + 8)
    assert sum(rank["values_sent"] for rank in stats) == 2 * numel * (world_size - 1)


class Counting:
    """A transport that notes the bytes of every message to another rank."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.sent_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def exchange(self, outgoing: list[Tensor], sizes: Sequence[int] | None = None) -> Any:
        others = [message.numel() for peer, message in enumerate(outgoing) if peer != self._transport.rank]
        self.sent_bytes += sum(others) + 8 * len(others) * (sizes is None)
        return self._transport.exchange(outgoing, sizes)

    def gather(self, packet: Tensor, sizes: Sequence[int] | None = None) -> Any:
        self.sent_bytes += (packet.numel() + 8 * (sizes is None)) * (self._transport.world_size - 1)
        return self._transport.gather(packet, sizes)


@pytest.mark.parametrize("overrides", [{}, {"bias": "none", "head": 4.0}, {"weight": "lossless"}])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_counted_bytes_are_those_of_the_messages(world_size: int, overrides: dict[str, Any]) -> None:
    def rank(transport: Transport) -> tuple[int, dict[str, Any]]:
        counting = Counting(transport)
        compressor = Compressor(Plan.of(2.0, overrides=overrides), NAMES, "reference")
        x = contributions(world_size)[transport.rank]
        all_reduce(x, BucketLayout.of(NAMES, NUMELS, world_size), compressor, counting)
        return counting.sent_bytes, summary(compressor.meter.state_dict())

    for sent_bytes, stats in on_ranks(world_size, rank):
        assert stats["wire_bytes"] == sent_bytes


def test_parameters_rows_add_up_to_the_packets() -> None:
    _, stats = reduce(contributions(3), 2.0)
    for rank in stats:
        rows = rank["parameters"].values()
        assert sum(row["values_sent"] for row in rows) == rank["values_sent"]
        apportioned = sum(row["wire_bytes_apportioned"] for row in rows)
        assert apportioned == pytest.approx(rank["wire_bytes"] - 4 * 8)


def test_the_relative_error_is_measured_for_lossy_codecs_only() -> None:
    assert 0.1 < reduce(contributions(2), 2.0)[1][0]["relative_error"] < 0.5
    assert reduce(contributions(2), "lossless")[1][0]["relative_error"] == 0.0
