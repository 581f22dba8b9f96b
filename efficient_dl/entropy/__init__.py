"""How many bits a network's numbers are worth while it trains: estimators, and an observer for any training script."""

from efficient_dl.entropy.estimators import (
    RULES,
    Sampler,
    entropy_bits,
    exponent_entropy,
    frozen_entropy,
    quantized_entropy,
    range_entropy,
    range_step,
    rms_entropy,
    rms_step,
)
from efficient_dl.entropy.observer import KINDS, EntropyObserver, Row

__all__ = [
    "KINDS",
    "RULES",
    "EntropyObserver",
    "Row",
    "Sampler",
    "entropy_bits",
    "exponent_entropy",
    "frozen_entropy",
    "quantized_entropy",
    "range_entropy",
    "range_step",
    "rms_entropy",
    "rms_step",
]
