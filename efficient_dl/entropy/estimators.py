"""Entropy of quantized numbers, under the step rules that decide whether it falls or rises in training.

Finely quantized, H ≈ h − log2(step) with h the differential entropy (Cover & Thomas 2006, theorem 8.3.1), so a claim
about H is a claim about the step. All functions are made of operations that never wait for a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RULES = ("range", "frozen", "rms", "exponent")
RMS_SPAN = 8.0  # the rms rule's range is ±4 rms, about what a Gaussian tensor of 2^16 values has
MAX_SHAPES = 256  # numbers of values whose positions are kept: batches of text have no end of them
NUM_BINS = 2**13  # symbols beyond ± half as many are counted in the outermost two


def range_step(low: Tensor, high: Tensor, bits: int = 8) -> Tensor:
    """The step of a quantizer over the whole range: (high − low) / (2^bits − 1)."""
    return (high - low) / (2**bits - 1)


def rms_step(rms: Tensor, bits: int = 8) -> Tensor:
    """A step in proportion to the root mean square: RMS_SPAN · rms / (2^bits − 1)."""
    return RMS_SPAN * rms / (2**bits - 1)


def entropy_bits(counts: Tensor, population: int | None = None) -> Tensor:
    """Bits a symbol of the distributions with these counts: float32 (...).

    counts: (..., symbols), non-negative. population: of how many values the counted ones are a random sample; then the
    sample's mean error, (symbols seen − 1) / 2n nats, is added in the share that was not looked at. Source: Shannon
    1948; Miller 1955 for the error.
    """
    counts = counts.float()
    n = counts.sum(-1)
    nats = n.log() - torch.special.xlogy(counts, counts).sum(-1) / n
    if population is not None:
        seen = torch.count_nonzero(counts, -1)
        nats = nats + (seen - 1) * (1 / n - 1 / population).clamp(min=0) / 2
    return torch.where(n > 0, nats.clamp(min=0) / math.log(2), math.nan)


def quantized_entropy(
    x: Tensor, step: Tensor, population: int | None = None, offset: Tensor | None = None
) -> Tensor:
    """Entropy of round((x − offset) / step) in bits a value, float32 of step's shape.

    x: any shape and floating dtype. step, offset: 0-dim, or (k,) for k quantizers at once; NaN for a step that is not a
    positive finite number. NaNs in x count as symbol 0. At most NUM_BINS symbols are told apart.
    """
    values = x.float().reshape(1, -1)
    if offset is not None:
        values = values - offset.reshape(-1, 1)
    half = NUM_BINS // 2
    scaled = (values / step.reshape(-1, 1)).nan_to_num(0.0, half, -half)
    symbols = scaled.round_().clamp_(-half, half - 1).long() + half
    counts = values.new_zeros((len(symbols), NUM_BINS))
    counts.scatter_add_(1, symbols, values.new_ones(()).expand_as(symbols))
    usable = (step > 0) & step.isfinite()
    return torch.where(usable, entropy_bits(counts, population).reshape(step.shape), math.nan)


def range_entropy(x: Tensor, bits: int = 8) -> Tensor:
    """Bits a value of x under a quantizer over its range, which has 2^bits levels."""
    low, high = (one.float() for one in x.aminmax())
    return quantized_entropy(x, range_step(low, high, bits), offset=low)


def frozen_entropy(x: Tensor, initial: Tensor, bits: int = 8) -> Tensor:
    """Bits a value of x under the step of `range_step` for what x was at the beginning."""
    low, high = (one.float() for one in initial.aminmax())
    return quantized_entropy(x, range_step(low, high, bits))


def rms_entropy(x: Tensor, bits: int = 8) -> Tensor:
    """Bits a value of x under a step in proportion to its rms."""
    return quantized_entropy(x, rms_step(x.float().square().mean().sqrt(), bits))


def exponent_entropy(x: Tensor, population: int | None = None) -> Tensor:
    """Entropy of the 8 exponent bits of x as bfloat16, in bits a value, 0-dim float32."""
    exponents = (x.flatten().to(torch.bfloat16).view(torch.int16).long() >> 7) & 0xFF
    ones = torch.ones(len(exponents), device=x.device)
    return entropy_bits(torch.zeros(256, device=x.device).scatter_add_(0, exponents, ones), population)


def unchanged_share(before: Tensor, after: Tensor) -> Tensor:
    """The share of values that are the same number in both, 0-dim float32; a NaN never is."""
    return (before == after).float().mean()


class Sampler:
    """Draws the same random positions of a tensor every time: one in each of `size` equal parts of it.

    Positions follow from the seed and the number of values alone; torch's generators are not touched.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self._seed = seed
        self._positions: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """A copy of x's values at the positions, 1-dim; all values, in order, of a tensor of at most `size`."""
        flat = x.detach().reshape(-1)
        if len(flat) <= self.size:
            return flat.clone()
        return flat[self._of(len(flat), x.device)]

    def _of(self, numel: int, device: torch.device) -> Tensor:
        if (numel, device) not in self._positions:
            if len(self._positions) >= MAX_SHAPES:
                self._positions.clear()
            generator = torch.Generator().manual_seed(self._seed)
            part = numel / self.size
            draws = torch.rand(self.size, generator=generator, dtype=torch.float64)
            positions = ((torch.arange(self.size) + draws) * part).long().clamp(max=numel - 1)
            self._positions[numel, device] = positions.to(device)
        return self._positions[numel, device]
