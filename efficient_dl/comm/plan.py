"""What a run decided to do with its gradients, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass

import xxhash

from efficient_dl.codec import make_codec
from efficient_dl.errors import ConfigError

AUTO_BITS = 2.0


@dataclass(frozen=True)
class Plan:
    """One decision, equal on all ranks.

    bits: what the user asked for: "none", "identity", "lossless", "auto" or a number of bits a value.
    codec: what that means, as `make_codec` takes it; "none" leaves the native collective alone.
    reason: one sentence for logs and reports.
    """

    bits: str
    codec: str
    reason: str

    @staticmethod
    def of(bits: str | float) -> Plan:
        """Decides from the user's wish alone. Raises ConfigError for an unknown name or an impossible rate."""
        wish = f"{float(bits)}" if isinstance(bits, (int, float)) or _is_number(bits) else bits
        if wish == "none":
            return Plan(wish, "none", "the native collective, as asked for")
        if wish == "auto":
            reason = f"auto is {AUTO_BITS} bits a value: the links are not measured yet"
            return Plan(wish, _codec(f"bits:{AUTO_BITS}"), reason)
        if wish in ("identity", "lossless"):
            return Plan(wish, _codec(wish), "as asked for")
        if _is_number(wish):
            return Plan(wish, _codec(f"bits:{wish}"), "as asked for")
        raise ConfigError(
            f"unknown compression {bits!r}",
            expected="none, identity, lossless, auto, or a number of bits a value such as 2.0",
            fix='use bits="auto"',
        )

    def fingerprint(self) -> str:
        """Eight hexadecimal digits, equal for plans that do the same, whatever their reasons."""
        return f"{xxhash.xxh3_64_intdigest(self.codec.encode()) & 0xFFFFFFFF:08x}"


def _codec(spec: str) -> str:
    return make_codec(spec, kernel="reference").name  # validates; which kernel will run is not decided here


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
