"""The all-reduce in two levels on in-memory ranks: what it computes, bit by bit, and what it counts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efficient_dl.comm import (
    BucketLayout,
    Compressor,
    HierarchicalReducer,
    Levels,
    LoopbackHub,
    Plan,
    Residuals,
    all_reduce,
    hierarchical_all_reduce,
    summary,
)
from tests.unit.ranks import on_ranks

T = TypeVar("T")
NAMES, NUMELS = ["weight", "bias", "head"], [1500, 70, 1000]
SHAPES = [(2, 2), (3, 1), (1, 3), (2, 1), (2, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_nodes(
    num_nodes: int, local_size: int, function: Callable[[int, Levels], T], timeout: float = 30.0
) -> list[T]:
    """Calls function(rank, levels) on every rank of every node at once; returns the values by rank."""
    inside = [[LoopbackHub(local_size, timeout) for _ in range(2)] for _ in range(num_nodes)]
    across = [[LoopbackHub(num_nodes, timeout) for _ in range(2)] for _ in range(local_size)]

    def levels(rank: int) -> Levels:
        node, local = divmod(rank, local_size)
        scatter, spread = (hub.transport(local) for hub in inside[node])
        exchange, gather = (hub.transport(node) for hub in across[local])
        return Levels(scatter, exchange, gather, spread)

    world_size = num_nodes * local_size
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(function, rank, levels(rank)) for rank in range(world_size)]
        return [future.result() for future in futures]


def contributions(
    world_size: int, dtype: torch.dtype = torch.float32, numel: int = sum(NUMELS)
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(world_size)
    spread = torch.logspace(-3, 0, numel)
    return [(torch.randn(numel, generator=generator) * spread).to(dtype) for _ in range(world_size)]


def reduce(
    shape: tuple[int, int],
    values: list[Tensor],
    bits: str | float,
    op: Any = "avg",
    numels: list[int] | None = None,
    plan: Plan | None = None,
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Every rank's result and its meter's summary."""
    numels = NUMELS if numels is None else numels
    names = [str(i) for i in range(len(numels))] if len(numels) != len(NAMES) else NAMES
    layout = BucketLayout.of(names, numels, len(values))

    def run(rank: int, levels: Levels) -> tuple[Tensor, dict[str, Any]]:
        x = values[rank].clone()
        compressor = Compressor(plan or Plan.of(bits), names, kernel="reference")
        hierarchical_all_reduce(x, layout, compressor, levels, op)
        compressor.meter.stepped(0.0)
        return x, summary(compressor.meter.state_dict())

    results = on_nodes(*shape, run)
    return [x for x, _ in results], [stats for _, stats in results]


def expected(shape: tuple[int, int], values: list[Tensor], op: str = "avg") -> Tensor:
    """Sums in float32, ranks in order inside a node, then nodes in order; rounded to the dtype once a level."""
    (num_nodes, local_size), dtype = shape, values[0].dtype

    def total(parts: list[Tensor]) -> Tensor:
        result = parts[0].float()
        for part in parts[1:]:
            result = result + part.float()
        return (result / len(parts) if op == "avg" else result).to(dtype)

    nodes = [total(values[node * local_size : (node + 1) * local_size]) for node in range(num_nodes)]
    return total(nodes)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("bits", ["identity", "lossless", 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_ends_bitwise_equal(shape: tuple[int, int], bits: str | float) -> None:
    results, _ = reduce(shape, contributions(shape[0] * shape[1]), bits)
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("op", ["avg", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_identity_is_the_sum_of_the_nodes_sums(shape: tuple[int, int], dtype: torch.dtype, op: str) -> None:
    values = contributions(shape[0] * shape[1], dtype)
    assert same_bits(reduce(shape, values, "identity", op)[0][0], expected(shape, values, op))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lossless_gives_the_bits_of_identity(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = contributions(shape[0] * shape[1], dtype)
    for value in values:
        value[:4] = torch.tensor([-0.0, 1e-45, 1e-7, float("inf")]).to(dtype)
    assert same_bits(reduce(shape, values, "lossless")[0][0], reduce(shape, values, "identity")[0][0])


@pytest.mark.parametrize("bits", ["lossless", 2.0])
def test_with_one_rank_a_node_it_is_the_flat_reduction(bits: str | float) -> None:
    values = contributions(3)
    layout = BucketLayout.of(NAMES, NUMELS, 3)

    def flat(transport: Any) -> Tensor:
        x = values[transport.rank].clone()
        all_reduce(x, layout, Compressor(Plan.of(bits), NAMES, "reference"), transport)
        return x

    assert same_bits(reduce((3, 1), values, bits)[0][0], on_ranks(3, flat)[0])


def test_on_one_node_nothing_is_quantized_and_nothing_leaves() -> None:
    values = contributions(3)
    results, stats = reduce((1, 3), values, 2.0)
    assert same_bits(results[0], expected((1, 3), values))
    assert all(row["wire_bytes"] == 0 and row["ratio"] == 1.0 for row in stats)
    assert all(row["local_bytes"] > 0 for row in stats)


@pytest.mark.parametrize("bits", ["identity", "lossless", 2.0])
@pytest.mark.parametrize("source", [0, 1, 2, 3])
def test_a_non_finite_value_reaches_every_rank(bits: str | float, source: int) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        values = contributions(4)
        values[source][700] = bad
        results, _ = reduce((2, 2), values, bits)
        assert all(not torch.isfinite(result[700]) for result in results)
        assert all(torch.isfinite(result[-1000:]).all() for result in results)


def test_the_average_of_large_half_precision_values_does_not_overflow_on_the_way() -> None:
    values = [torch.full((sum(NUMELS),), 60000.0, dtype=torch.float16) for _ in range(4)]
    assert same_bits(reduce((2, 2), values, "lossless")[0][0], values[0])
    assert torch.isfinite(reduce((2, 2), values, 2.0)[0][0]).all()
    assert not torch.isfinite(reduce((2, 2), values, 2.0, op="sum")[0][0]).any()


def test_what_leaves_the_node_and_what_stays_are_counted_apart() -> None:
    """Out of a node go the other nodes' parts of its shard and its own part to each; raw shards stay inside."""
    numel = sum(NUMELS)
    _, stats = reduce((2, 2), contributions(4), "identity")
    packets = 4 * 2  # up and down, on every rank
    assert sum(row["wire_bytes"] for row in stats) == 2 * 4 * numel + packets * (32 + 8)
    assert sum(row["values_sent"] for row in stats) == 2 * numel
    assert sum(row["local_bytes"] for row in stats) == 2 * 2 * 4 * numel
    assert all(row["ratio"] == 1.0 for row in stats)


def test_the_ratio_is_that_of_what_leaves_the_node() -> None:
    _, lossy = reduce((2, 2), contributions(4), 2.0)
    _, identity = reduce((2, 2), contributions(4), "identity")
    for row, yardstick in zip(lossy, identity, strict=True):
        assert row["raw_bytes"] == yardstick["wire_bytes"]
        assert row["ratio"] == row["raw_bytes"] / row["wire_bytes"] > 4
        assert row["local_bytes"] == yardstick["local_bytes"]


def test_overrides_of_single_parameters_hold_between_the_nodes() -> None:
    plan = Plan.of(2.0, overrides={"bias": "none", "head": "lossless"})
    values = contributions(4)
    results, _ = reduce((2, 2), values, 2.0, plan=plan)
    exact = expected((2, 2), values)
    assert all(same_bits(results[0], other) for other in results[1:])
    assert same_bits(results[0][1500:], exact[1500:])
    assert not same_bits(results[0][:1500], exact[:1500])


@settings(max_examples=25, deadline=None)
@given(
    numels=st.lists(st.integers(0, 700), min_size=1, max_size=4).filter(sum),
    shape=st.sampled_from([(1, 2), (2, 2), (2, 3), (3, 2)]),
    dtype=st.sampled_from(DTYPES),
)
def test_buckets_of_any_sizes_are_reduced(
    numels: list[int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    values = contributions(shape[0] * shape[1], dtype, sum(numels))
    results, _ = reduce(shape, values, "lossless", numels=numels)
    assert all(same_bits(result, expected(shape, values)) for result in results)
    lossy, _ = reduce(shape, values, 3.0, numels=numels)
    assert all(same_bits(lossy[0], other) for other in lossy[1:])


@pytest.mark.parametrize("numel", [1, 2, 3])
def test_a_bucket_with_fewer_values_than_ranks_is_reduced(numel: int) -> None:
    values = [torch.full((numel,), float(rank)) for rank in range(6)]
    for result in reduce((2, 3), values, "lossless", numels=[numel])[0]:
        assert result.tolist() == [2.5] * numel


@pytest.mark.parametrize("bits", ["lossless", 2.0])
def test_overlapped_buckets_get_the_bits_of_one_after_the_other(bits: str | float) -> None:
    values = [contributions(4, numel=numel) for numel in (3000, 10, 517, 2048)]

    def layout(number: int) -> BucketLayout:
        return BucketLayout.of([str(number)], [values[number][0].numel()], 4)

    def overlapped(rank: int, levels: Levels) -> list[Tensor]:
        buckets = [bucket[rank].clone() for bucket in values]
        reducer = HierarchicalReducer(Compressor(Plan.of(bits), list("0123"), "reference"), levels)
        done = [reducer.submit(x, layout(number)) for number, x in enumerate(buckets)]
        for future in done:
            future.result(timeout=120)
        reducer.close()
        return buckets

    results = on_nodes(2, 2, overlapped)
    for number, bucket in enumerate(values):
        alone = reduce((2, 2), bucket, bits, numels=[bucket[0].numel()])[0][0]
        assert all(same_bits(result[number], alone) for result in results)


def test_residuals_are_kept_where_the_values_lie_in_their_parameters() -> None:
    """Every rank keeps what its own packets left out: of its shard alone, at the shard's place in the parameter.

    Kept as one rank's: their mean over all ranks is what the average lacks, so that they can go on in another world.
    """
    values = contributions(4)
    layout = BucketLayout.of(NAMES, NUMELS, 4)
    plan = Plan.of(1.0, error_feedback=True)

    def run(rank: int, levels: Levels) -> tuple[Tensor, dict[str, Tensor]]:
        x = values[rank].clone()
        residuals = Residuals(dict(zip(NAMES, NUMELS, strict=True)), torch.device("cpu"))
        compressor = Compressor(plan, NAMES, "reference", residuals)
        compressor.begin_step()
        hierarchical_all_reduce(x, layout, compressor, levels)
        compressor.commit_step()
        return x, residuals.state_dict()["parameters"]

    halves = BucketLayout.of(NAMES, NUMELS, 2).shards
    results = on_nodes(2, 2, run)
    lacking = torch.zeros(sum(NUMELS))
    for rank, (_, kept) in enumerate(results):
        inside = torch.zeros(sum(NUMELS), dtype=torch.bool)
        shard = halves[rank % 2]
        inside[shard.start : shard.stop] = True
        flat = torch.cat([kept.get(name, torch.zeros(n)) for name, n in zip(NAMES, NUMELS, strict=True)])
        assert flat[~inside].count_nonzero() == 0
        assert flat[inside].count_nonzero() > 0.5 * shard.numel
        lacking += flat / 4
    torch.testing.assert_close(results[0][0] + lacking, expected((2, 2), values), rtol=1e-4, atol=1e-5)


def test_divisors_scale_what_travels_between_the_nodes_and_leave_an_exact_result() -> None:
    values = contributions(4)
    layout = BucketLayout.of(NAMES, NUMELS, 4)
    divisors = 2.0 ** torch.arange(sum(NUMELS)).remainder(7)

    def run(rank: int, levels: Levels) -> Tensor:
        x = values[rank].clone()
        reducer = HierarchicalReducer(Compressor(Plan.of("lossless"), NAMES, "reference"), levels)
        reducer.submit(x, layout, divisors=divisors).result(timeout=120)
        reducer.close()
        return x

    assert all(same_bits(x, expected((2, 2), values)) for x in on_nodes(2, 2, run))
