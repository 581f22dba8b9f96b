"""How much a packet errs: sums of squares by parameter, and relative to what was encoded."""

from __future__ import annotations

import math

from torch import Tensor

from efficient_dl.comm.sections import Section

_SMALLEST_SQUARE, _LARGEST_SQUARE = 1e-20, 1e30  # between them float32 sums of squares are sound


def squares(x: Tensor, section: Section) -> list[float]:
    """The sum of squares of each of a section's segments. x: float32, its values."""
    return [float(part.dot(part)) for part in x.split_with_sizes(section.segments)]


def relative(error: Tensor, signal: Tensor) -> float:
    """‖error‖ / ‖signal‖; 0 without a signal, or with one that is not finite."""
    square = float(signal.dot(signal))
    if not _SMALLEST_SQUARE < square < _LARGEST_SQUARE:
        largest = float(signal.abs().amax()) if signal.numel() else 0.0
        if not 0 < largest < math.inf:
            return 0.0
        error, signal = error.double() / largest, signal.double() / largest
        square = float(signal.dot(signal))
    return math.sqrt(float(error.dot(error)) / square)
