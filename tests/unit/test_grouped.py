"""The all-reduce in groups on in-memory ranks: what it computes, bit by bit, how much it errs, and what it counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efficient_dl.comm import (
    BucketLayout,
    Compressor,
    GroupedReducer,
    Levels,
    LoopbackHub,
    Plan,
    Residuals,
    Topology,
    all_reduce,
    grouped_all_reduce,
    summary,
)
from efficient_dl.comm.common_step import Leg
from efficient_dl.errors import ConfigError
from tests.unit.ranks import on_ranks
from tests.unit.test_hierarchy import (
    DTYPES,
    NAMES,
    NUMELS,
    contributions,
    expected,
    on_nodes,
    same_bits,
)

SHAPES = [(2, 2), (3, 2), (2, 3), (4, 2), (2, 4)]  # groups × ranks of each: 4, 6 and 8 ranks


def reduce(
    shape: tuple[int, int],
    values: list[Tensor],
    bits: str | float,
    op: Any = "avg",
    numels: list[int] | None = None,
    plan: Plan | None = None,
    sampled: bool = False,
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Every rank's result and its meter's summary. sampled: of a step in which errors are measured."""
    numels = NUMELS if numels is None else numels
    names = [str(i) for i in range(len(numels))] if len(numels) != len(NAMES) else NAMES
    layout = BucketLayout.of(names, numels, len(values))

    def run(rank: int, levels: Levels) -> tuple[Tensor, dict[str, Any]]:
        x = values[rank].clone()
        compressor = Compressor(plan or Plan.of(bits), names)
        if not sampled:
            compressor.meter.stepped(0.0)
        grouped_all_reduce(x, layout, compressor, levels, op)
        compressor.meter.stepped(0.0)
        return x, summary(compressor.meter.state_dict())

    results = on_nodes(*shape, run)
    return [x for x, _ in results], [stats for _, stats in results]


@pytest.mark.parametrize("bits", ["identity", "lossless", 2.0, "grid:1.0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_ends_bitwise_equal(shape: tuple[int, int], bits: str | float) -> None:
    results, _ = reduce(shape, contributions(shape[0] * shape[1]), bits)
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("op", ["avg", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lossless_gives_the_bits_of_identity_the_sum_of_the_groups_sums(
    shape: tuple[int, int], dtype: torch.dtype, op: str
) -> None:
    values = contributions(shape[0] * shape[1], dtype)
    for value in values:
        value[:3] = torch.tensor([-0.0, 1e-45, 1e-7]).to(dtype)
    identity = reduce(shape, values, "identity", op)[0][0]
    assert same_bits(identity, expected(shape, values, op))
    assert same_bits(reduce(shape, values, "lossless", op)[0][0], identity)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    bits=st.sampled_from([1.0, 2.0, 4.0]),
    seed=st.integers(0, 2**16),
    shared=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_value_errs_by_three_roundings_at_most(
    shape: tuple[int, int], bits: float, seed: int, shared: float
) -> None:
    """The bound of `GroupedReduction`, with the relative error that this codec has on these very values."""
    (num_groups, size), numel = shape, 4096
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(numel, generator=generator)
    noise = [torch.randn(numel, generator=generator) for _ in range(num_groups * size)]
    values = [shared * common + (1 - shared) * one for one in noise]
    got, stats = reduce(shape, values, bits, numels=[numel], sampled=True)
    errors = [row["relative_error"] for row in stats]
    e = 1.5 * max(errors)  # of single packets; measured over a rank's
    groups = [torch.stack(values[k * size : (k + 1) * size]).mean(0) for k in range(num_groups)]
    exact = torch.stack(values).mean(0)
    first = e * sum(float(v.norm()) for v in values) / len(values)
    second = e * (sum(float(m.norm()) for m in groups) / num_groups + first)
    third = e * (float(exact.norm()) + first + second)
    assert 0 < float((got[0] - exact).norm()) <= first + second + third


@pytest.mark.parametrize("bits", ["identity", "lossless", 2.0])
@pytest.mark.parametrize("source", [0, 1, 2, 3])
def test_a_non_finite_value_reaches_every_rank(bits: str | float, source: int) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        values = contributions(4)
        values[source][700] = bad
        results, _ = reduce((2, 2), values, bits)
        assert all(not torch.isfinite(result[700]) for result in results)
        assert all(torch.isfinite(result[-1000:]).all() for result in results)


@settings(max_examples=20, deadline=None)
@given(
    numels=st.lists(st.integers(0, 700), min_size=1, max_size=4).filter(sum),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
)
def test_buckets_of_any_sizes_are_reduced(
    numels: list[int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    values = contributions(shape[0] * shape[1], dtype, sum(numels))
    results, stats = reduce(shape, values, "lossless", numels=numels)
    assert all(same_bits(result, expected(shape, values)) for result in results)
    identity = reduce(shape, values, "identity", numels=numels)[1]
    assert sum(row["raw_bytes"] for row in identity) == sum(row["wire_bytes"] for row in identity)
    assert [row["values_sent"] for row in stats] == [row["values_sent"] for row in identity]
    lossy, _ = reduce(shape, values, 3.0, numels=numels)
    assert all(same_bits(lossy[0], other) for other in lossy[1:])


def test_it_sends_the_values_of_a_flat_reduction_in_fewer_packets() -> None:
    """Of 8 ranks in groups of 4: 3 + 1 packets up and 1 + 3 · 2 down, where flat it is 7 and 7; 8 messages, not 14."""
    numels = [8 * 2048]
    values = contributions(8, numel=numels[0])
    layout = BucketLayout.of(["0"], numels, 8)

    def flat(transport: Any) -> dict[str, Any]:
        compressor = Compressor(Plan.of("identity"), ["0"])
        all_reduce(values[transport.rank].clone(), layout, compressor, transport)
        return summary(compressor.meter.state_dict())

    alone, grouped = on_ranks(8, flat)[0], reduce((2, 4), values, "identity", numels=numels)[1][0]
    assert grouped["values_sent"] == alone["values_sent"] == 2 * 7 * 2048
    assert alone["wire_bytes"] == 2 * 7 * (4 * 2048 + 32 + 8)
    directory = 3 * 16  # of two packets, in each of three bundles; identity packets are multiples of 16 long
    assert grouped["wire_bytes"] == 2 * 7 * 4 * 2048 + (3 + 1 + 1 + 3 * 2) * 32 + 8 * 8 + directory
    assert grouped["ratio"] == alone["ratio"] == 1.0
    assert grouped["local_bytes"] == 0


def test_overrides_of_single_parameters_hold_in_and_between_groups() -> None:
    plan = Plan.of(2.0, overrides={"bias": "none", "head": "lossless"})
    values = contributions(4)
    results, _ = reduce((2, 2), values, 2.0, plan=plan)
    exact = expected((2, 2), values)
    assert all(same_bits(results[0], other) for other in results[1:])
    assert same_bits(results[0][1500:], exact[1500:])
    assert not same_bits(results[0][:1500], exact[:1500])


@pytest.mark.parametrize("bits", ["lossless", 2.0])
def test_overlapped_buckets_get_the_bits_of_one_after_the_other(bits: str | float) -> None:
    values = [contributions(4, numel=numel) for numel in (3000, 10, 517, 2048)]

    def layout(number: int) -> BucketLayout:
        return BucketLayout.of([str(number)], [values[number][0].numel()], 4)

    def overlapped(rank: int, levels: Levels) -> list[Tensor]:
        buckets = [bucket[rank].clone() for bucket in values]
        reducer = GroupedReducer(Compressor(Plan.of(bits), list("0123")), levels)
        done = [reducer.submit(x, layout(number)) for number, x in enumerate(buckets)]
        for future in done:
            future.result(timeout=120)
        reducer.close()
        return buckets

    results = on_nodes(2, 2, overlapped)
    for number, bucket in enumerate(values):
        alone = reduce((2, 2), bucket, bits, numels=[bucket[0].numel()])[0][0]
        assert all(same_bits(result[number], alone) for result in results)


def test_divisors_scale_what_travels_and_leave_an_exact_result() -> None:
    values = contributions(4)
    layout = BucketLayout.of(NAMES, NUMELS, 4)
    divisors = 2.0 ** torch.arange(sum(NUMELS)).remainder(7)

    def run(rank: int, levels: Levels) -> Tensor:
        x = values[rank].clone()
        reducer = GroupedReducer(Compressor(Plan.of("lossless"), NAMES), levels)
        reducer.submit(x, layout, divisors=divisors).result(timeout=120)
        reducer.close()
        return x

    assert all(same_bits(x, expected((2, 2), values)) for x in on_nodes(2, 2, run))


@pytest.mark.parametrize("bits", [1.0, "grid:1.0"])
@pytest.mark.parametrize("shape", [(2, 2), (3, 2)])
def test_the_mean_of_all_residuals_is_what_the_average_lacks(
    shape: tuple[int, int], bits: str | float
) -> None:
    """Every rank has left out something of every value once, so that a flat reduction can take it along."""
    world_size = shape[0] * shape[1]
    values = contributions(world_size)
    layout = BucketLayout.of(NAMES, NUMELS, world_size)
    plan = Plan.of(bits, error_feedback=True)

    def run(rank: int, levels: Levels) -> tuple[Tensor, Tensor]:
        x = values[rank].clone()
        residuals = Residuals(dict(zip(NAMES, NUMELS, strict=True)), torch.device("cpu"))
        compressor = Compressor(plan, NAMES, residuals=residuals)
        compressor.expect_groups()
        compressor.begin_step()
        grouped_all_reduce(x, layout, compressor, levels)
        compressor.commit_step()
        kept = residuals.state_dict()["parameters"]
        return x, torch.cat([kept[name] for name in NAMES])

    results = on_nodes(*shape, run)
    lacking = torch.stack([kept for _, kept in results]).mean(0)
    torch.testing.assert_close(results[0][0] + lacking, expected(shape, values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [1.0, "grid:1.0"])
def test_a_restored_state_goes_on_bit_for_bit(bits: str | float) -> None:
    steps = [contributions(4, numel=3000 + k)[:4] for k in range(5)]
    layout = BucketLayout.of(["0"], [3000], 4)
    plan = Plan.of(bits, error_feedback=True, scale="global" if bits == "grid:1.0" else "local")

    def compressor() -> Compressor:
        made = Compressor(plan, ["0"], residuals=Residuals({"0": 3000}, torch.device("cpu")))
        made.expect_groups()
        return made

    def run(restarts: bool) -> list[list[Tensor]]:
        everyone = LoopbackHub(4, 30.0)

        def rank_of(rank: int, levels: Levels) -> list[Tensor]:
            own, results = compressor(), []
            for number, values in enumerate(steps):
                if restarts and number == 2:
                    state = own.state_dict()
                    own = compressor()
                    own.load_state_dict(state)
                own.begin_step()
                x = values[rank][:3000].clone()
                grouped_all_reduce(x, layout, own, levels)
                own.end_step(0.0)
                own.agree(everyone.transport(rank))
                own.commit_step()
                results.append(x)
            return results

        return on_nodes(2, 2, rank_of)

    plain, restarted = run(False), run(True)
    for a, b in zip(plain, restarted, strict=True):
        assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def test_sums_of_groups_have_a_common_step_of_their_own() -> None:
    """Averages of noise are smaller than contributions and larger than the result: one step would fit only one."""
    layout = BucketLayout.of(["0"], [8192], 16)

    def run(rank: int, levels: Levels) -> list[float]:
        generator = torch.Generator().manual_seed(rank)
        own = Compressor(Plan.of(2.0, scale="global"), ["0"])
        own.expect_groups()
        assert own.common_step is not None
        own.begin_step()
        grouped_all_reduce(torch.randn(8192, generator=generator), layout, own, levels)
        own.end_step(0.0)
        with own.common_step._lock:
            found = [d.places / d.placed for d in own.common_step._directions]
        return found

    contribution, result, group = on_nodes(4, 4, run)[0]
    octaves = [(contribution - group) / 32, (group - result) / 32]
    assert octaves == pytest.approx([1.0, 1.0], abs=0.4)
    assert (Leg.CONTRIBUTION, Leg.RESULT, Leg.GROUP) == (0, 1, 2)


def test_groups_divide_the_ranks_evenly_or_are_not_made() -> None:
    assert Topology.in_groups(8, 4).nodes == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert Topology.in_groups(8).local_size == 2
    assert Topology.in_groups(10_000).local_size == 100
    assert Topology.in_groups(7).flat_reason() == "7 ranks cannot be divided into groups"
    with pytest.raises(ConfigError):
        Topology.in_groups(8, 3)
