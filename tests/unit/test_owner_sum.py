"""Sums at their owners on in-memory ranks: what they are, bit by bit, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_dl.comm import BucketLayout, Compressor, Plan, Residuals, Transport, sum_at_owners, summary
from tests.unit.ranks import on_ranks

# For each owner the pieces it owns: one of them owns a part of "weight" and a bias, one nothing.
PIECES = [[("weight", 700)], [("weight", 811), ("bias", 70)], []]
NAMES = ["weight", "bias"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def contributions(dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """By rank, then by owner."""
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randn(sum(n for _, n in owned), generator=generator).to(dtype) for owned in PIECES]
        for _ in PIECES
    ]


def at_owners(values: list[list[Tensor]], bits: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    layouts = [BucketLayout.of([name for name, _ in owned], [n for _, n in owned], 1) for owned in PIECES]

    def rank(transport: Transport) -> tuple[Tensor, dict[str, Any]]:
        compressor = Compressor(Plan.of(bits), NAMES)
        result = sum_at_owners(values[transport.rank], layouts, compressor, transport)
        return result, summary(compressor.meter.state_dict())

    results = on_ranks(len(values), rank)
    return [x for x, _ in results], [stats for _, stats in results]


@pytest.mark.parametrize("bits", ["identity", "lossless"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_codecs_give_the_float32_sum_in_rank_order(dtype: torch.dtype, bits: str) -> None:
    values = contributions(dtype)
    for owner, result in enumerate(at_owners(values, bits)[0]):
        total = values[0][owner].float() + values[1][owner].float() + values[2][owner].float()
        assert result.dtype == dtype and torch.equal(result, total.to(dtype))


def test_contributions_are_not_changed() -> None:
    values = contributions()
    at_owners(values, 2.0)
    assert all(
        torch.equal(a, b)
        for x, y in zip(values, contributions(), strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_two_bits_are_near_the_sum() -> None:
    values = contributions()
    for owner, result in enumerate(at_owners(values, 2.0)[0]):
        total = values[0][owner] + values[1][owner] + values[2][owner]
        assert (result - total).norm() <= 0.35 * total.norm()


def test_a_value_is_sent_once_and_nothing_without_values() -> None:
    _, stats = at_owners(contributions(), "identity")
    assert [s["values_sent"] for s in stats] == [881, 700, 1581]
    assert [s["parameters"]["bias"]["values_sent"] for s in stats] == [70, 0, 70]
    sizes = 2 * 8
    assert stats[1]["wire_bytes"] - sizes < 4 * 700 + 64
    assert all(s["ratio"] == 1.0 for s in stats)


@pytest.mark.parametrize("bits", ["lossless", 2.0])
@pytest.mark.parametrize("sender", [0, 1])
def test_a_non_finite_value_reaches_the_owner(sender: int, bits: Any) -> None:
    values = contributions()
    values[sender][0][5] = torch.inf
    assert not at_owners(values, bits)[0][0][5].isfinite()


def test_what_was_not_sent_to_the_owners_is_in_the_residuals() -> None:
    """Two owners share "weight": what one of them lacks lies behind what the other lacks."""
    numels = {"weight": 700 + 811, "bias": 70}
    layouts = [
        BucketLayout.of([name for name, _ in owned], [n for _, n in owned], 1).beginning_at(begins)
        for owned, begins in zip(PIECES, [[0], [700, 0], []], strict=True)
    ]

    def rank(transport: Transport) -> tuple[Tensor, list[Tensor]]:
        residuals = Residuals(numels, torch.device("cpu"))
        compressor = Compressor(Plan.of(0.5, error_feedback=True), NAMES, residuals=residuals)
        total = torch.zeros(sum(n for _, n in PIECES[transport.rank]))
        for _ in range(4):
            compressor.begin_step()
            total += sum_at_owners(contributions()[transport.rank], layouts, compressor, transport)
            compressor.commit_step()
        kept = residuals.state_dict()["parameters"]
        own = [kept.get(name, torch.zeros(numel)) for name, numel in numels.items()]
        return total, [own[0][:700], torch.cat([own[0][700:], own[1]])]

    results = on_ranks(3, rank)
    values = contributions()
    for owner in (0, 1):
        sent = results[owner][0] + sum(kept[owner] for _, kept in results)
        torch.testing.assert_close(sent, 4 * sum(one[owner] for one in values), rtol=1e-4, atol=1e-4)
        assert all(kept[owner].norm() > 0 for rank, (_, kept) in enumerate(results) if rank != owner)
