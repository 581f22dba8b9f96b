"""Entropy estimators against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efficient_dl.codec.entropy import order0_bits
from efficient_dl.entropy import (
    Sampler,
    entropy_bits,
    exponent_entropy,
    frozen_entropy,
    quantized_entropy,
    range_entropy,
    range_step,
    rms_entropy,
)

GAUSSIAN_BITS = 0.5 * math.log2(2 * math.pi * math.e)  # differential entropy of N(0, 1)
scales = st.floats(1e-6, 1e6)
seeds = st.integers(0, 2**31)


def normal(n: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed))


@given(scales, seeds)
@settings(max_examples=20, deadline=None)
def test_a_gaussian_has_its_differential_entropy_minus_the_log_of_the_step(scale: float, seed: int) -> None:
    x = normal(100_000, seed, scale)
    step = torch.tensor(scale / 16)
    assert float(quantized_entropy(x, step)) == pytest.approx(GAUSSIAN_BITS + 4, abs=0.02)
    assert float(rms_entropy(x)) == pytest.approx(GAUSSIAN_BITS + math.log2(255 / 8), abs=0.02)
    low, high = x.aminmax()
    expected = GAUSSIAN_BITS + math.log2(scale / float(range_step(low, high)))
    assert float(range_entropy(x)) == pytest.approx(expected, abs=0.02)


@given(st.integers(2, 8), scales, st.floats(-10, 10), seeds)
@settings(max_examples=20, deadline=None)
def test_a_uniform_tensor_fills_all_levels_of_its_range(
    bits: int, width: float, shift: float, seed: int
) -> None:
    x = width * (torch.rand(100_000, generator=torch.Generator().manual_seed(seed)) + shift)
    levels = 2**bits - 1  # and one more, of which the outermost two are half as wide as the others
    expected = math.log2(levels) + 1 / levels
    assert float(range_entropy(x, bits)) == pytest.approx(expected, abs=0.01)


@given(st.floats(0.3, 12.0), seeds)
@settings(max_examples=20, deadline=None)
def test_scale_moves_the_frozen_rule_by_its_logarithm_and_the_others_not_at_all(
    factor: float, seed: int
) -> None:
    x = normal(50_000, seed)
    grown = factor * x
    moved = float(frozen_entropy(grown, x)) - float(frozen_entropy(x, x))
    assert moved == pytest.approx(math.log2(factor), abs=0.04)
    assert float(range_entropy(grown)) == pytest.approx(float(range_entropy(x)), abs=0.01)
    assert float(rms_entropy(grown)) == pytest.approx(float(rms_entropy(x)), abs=0.01)


def test_exponents_of_a_gaussian_have_the_entropy_of_its_octaves() -> None:
    def within(a: float, b: float) -> float:
        return math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))

    octaves = [within(2.0**k, 2.0 ** (k + 1)) for k in range(-60, 4)]
    expected = -sum(p * math.log2(p) for p in octaves if p > 0)
    assert float(exponent_entropy(normal(200_000, 0))) == pytest.approx(expected, abs=0.02)


def test_exponents_are_those_of_bfloat16() -> None:
    x = torch.tensor([1.0, -1.5, 2.0, 3.9999999, 0.0, float("inf")])  # 3.9999999 rounds up to 4
    counts = torch.tensor([2, 1, 1, 1, 1])  # exponents 0; 1; 2; of zero; of infinity
    assert float(exponent_entropy(x)) == pytest.approx(order0_bits(counts) / 6, abs=1e-6)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50))
def test_entropy_of_counts_is_the_codec_s(counts: list[int]) -> None:
    found = float(entropy_bits(torch.tensor(counts)))
    if sum(counts) == 0:
        assert not math.isfinite(found) or found == 0
    else:
        assert found == pytest.approx(order0_bits(torch.tensor(counts)) / sum(counts), abs=1e-4)


def test_a_sample_s_entropy_is_corrected_by_its_mean_error() -> None:
    x = normal(1_000_000, 3)
    step = torch.tensor(1 / 32)
    whole = float(quantized_entropy(x, step))
    samples = [Sampler(2048, seed)(x) for seed in range(20)]
    plain = sum(float(quantized_entropy(one, step)) for one in samples) / 20
    corrected = sum(float(quantized_entropy(one, step, population=len(x))) for one in samples) / 20
    assert whole - plain > 0.05
    assert abs(whole - corrected) < 0.02


@pytest.mark.parametrize("step", [0.0, -1.0, math.inf, math.nan])
def test_a_step_that_is_none_gives_nan(step: float) -> None:
    assert math.isnan(float(quantized_entropy(torch.ones(4), torch.tensor(step))))


def test_values_that_are_not_finite_do_not_break_the_count() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e30, 0.0])
    assert float(quantized_entropy(x, torch.tensor(1.0))) == pytest.approx(
        order0_bits(torch.tensor([2, 2, 1])) / 5
    )


def test_a_sample_is_the_same_every_time_and_spread_over_the_tensor() -> None:
    x = torch.arange(100_003.0)
    before = torch.get_rng_state()
    sample = Sampler(1000)(x)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(sample, Sampler(1000)(x))
    assert len(sample) == 1000 and bool((sample.diff() > 0).all())
    assert float(sample.diff().max()) < 2.1 * 100_003 / 1000
    assert torch.equal(Sampler(1000)(x[:500]), x[:500])
