"""The steps that quantizers choose from, 32 an octave: the block quantizer's relative ones and the grid quantizer's."""

from __future__ import annotations

from typing import Final

FIRST_STEP_INDEX: Final = -192
LAST_STEP_INDEX: Final = 128
NO_SAMPLE_BIAS: Final = 65

FINEST_GRID_STEP: Final = -4000  # 2^-125
COARSEST_GRID_STEP: Final = 3168  # 2^99


def grid_step(index: int) -> float:
    """The grid quantizer's step of this index: 2^(index / 32), rounded to 12 fraction bits."""
    octave, place = divmod(index, 32)
    return 2.0**octave * round(2.0 ** (place / 32) * 4096) / 4096


def _relative_step(index: int) -> float:
    # Rounded to 12 fraction bits, so that no platform's pow can make a difference.
    if index >= 0:
        return round(2.0 ** (index / 32) * 4096) / 4096
    return round(2.0 ** (index / 32 + 6) * 4096) / 4096 / 64


STEPS: Final = tuple(_relative_step(j) for j in range(FIRST_STEP_INDEX, LAST_STEP_INDEX + 1))


def index_without_sample(bits_q16: int) -> int:
    """The step index for a tensor whose sample holds nothing to measure."""
    return max(FIRST_STEP_INDEX, min(LAST_STEP_INDEX, NO_SAMPLE_BIAS - (32 * bits_q16 >> 16)))
