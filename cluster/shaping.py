"""Rates and delays as people write them, and the queueing disciplines that enforce them."""

from __future__ import annotations

import re

from cluster.errors import EmulationError

_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)bit", re.IGNORECASE)
_DELAY = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)", re.IGNORECASE)
_BITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

_MTU_BYTES = 1500
# Short messages pass unshaped up to the burst, so it is small; but smaller than one 64 KiB packet at 1 Gbit/s, the
# kernel cuts packets up and a saturated link was measured at 75 % of its rate instead of 96 %.
_BURST_SECONDS = 0.001
_QUEUE_SECONDS = 0.016  # 2 MB at 1 Gbit/s, a common switch port
_MIN_BURST_BYTES = 16 * 1024
_MIN_QUEUE_BYTES = 256 * 1024  # a few of the 64 KiB packets that TCP hands down


def parse_rate(text: str) -> int | None:
    """Bits per second of a rate like "100mbit" or "2.5gbit"; None of "none". Raises EmulationError."""
    if text.lower() == "none":
        return None
    found = _RATE.fullmatch(text)
    bits = round(float(found[1]) * _BITS[found[2].lower()]) if found else 0
    if bits <= 0:
        raise EmulationError(
            f"no rate: {text!r}; write it like 100mbit, 1gbit, 2.5gbit, or none for no limit"
        )
    return bits


def parse_delay(text: str) -> float:
    """Seconds of a delay like "200us", "5ms" or "0.1s". Raises EmulationError."""
    found = _DELAY.fullmatch(text)
    if not found:
        raise EmulationError(f"no delay: {text!r}; write it like 200us, 5ms or 0.1s")
    return float(found[1]) * _SECONDS[found[2].lower()]


def qdisc_arguments(rate_bits: int | None, delay_seconds: float = 0.0) -> list[list[str]]:
    """What follows `tc qdisc add dev DEVICE`, in order: netem for the delay, tbf for the rate, below it if both."""
    arguments: list[list[str]] = []
    if delay_seconds > 0:
        in_flight = 1000 + int((rate_bits or 10**10) * delay_seconds / 8 / _MTU_BYTES)
        delay = ["netem", "delay", f"{round(delay_seconds * 1e6)}us", "limit", str(in_flight)]
        arguments.append(["root", "handle", "1:", *delay])
    if rate_bits is not None:
        parent = ["parent", "1:1"] if arguments else ["root"]
        burst_bytes = max(_MIN_BURST_BYTES, int(rate_bits / 8 * _BURST_SECONDS))
        queue_bytes = max(_MIN_QUEUE_BYTES, int(rate_bits / 8 * _QUEUE_SECONDS))
        shaper = ["tbf", "rate", f"{rate_bits}bit", "burst", str(burst_bytes), "limit", str(queue_bytes)]
        arguments.append([*parent, "handle", "10:", *shaper])
    return arguments
