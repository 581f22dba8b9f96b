"""The rate of every packet: fixed, or controlled during the run by a bound on error or on bytes.

A packet says how it was made, so every rank controls its own rates: nothing has to be agreed on. They are part of the
compressor's state. A step size for all packets, which ranks agree on, is in common_step.py.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from efficient_dl.comm.plan import MAX_RATE, MIN_RATE, Plan

_STEPS_A_BIT = 32  # rates are multiples of 1/32 bit, so that there are few codecs
_MARGIN = 0.06  # bits above what should just do
_COARSER = 0.75  # of the rate, from one try to the next
_LARGEST_CHANGE = 1.3  # of the rate from one step to the next, under a budget


class Rates:
    """What `plan` decides about the rate of "bits:RATE" or "grid:RATE", with its state.

    With max_error a packet's rate is what its parameters' last packets needed; `raised` and `settled` follow the
    error. One bit more halves it; below 2 bits it takes more, and another try or two (Sullivan 1996).
    With bytes_per_step all packets have one rate, which `stepped` corrects by what was sent.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._first = self._rate = plan.first_rate
        self._by_name: dict[str, float] = {}
        self._lock = threading.Lock()

    def codec(self, codec: str, names: Sequence[str]) -> str:
        """The codec of the next packet of these parameters, for which the plan's default would be `codec`."""
        if not self._plan.varies_rates:
            return codec
        if self._plan.bytes_per_step is not None:
            return _named(codec, self._rate)
        with self._lock:
            rate = max((self._by_name.get(name, self._first) for name in names), default=self._first)
        return _named(codec, rate)

    def raised(self, codec: str, error: float) -> str | None:
        """The codec to try next if a packet's error is above the bound; None if it is not, or nothing is left."""
        bound, rate = self._plan.max_error, _rate(codec)
        if bound is None or not error > bound or rate >= MAX_RATE:
            return None
        return _named(codec, rate + math.log2(error / bound) + _MARGIN)

    def settled(self, codec: str, names: Sequence[str], error: float) -> None:
        """Notes what packet went out, so that the next one starts from there, a little lower if there is room."""
        bound = self._plan.max_error
        if bound is None or error == 0:
            return
        room = min(math.log2(bound / error) - _MARGIN, 0.5)
        with self._lock:
            for name in names:
                self._by_name[name] = max(MIN_RATE, _rate(codec) - max(room, 0.0))

    def stepped(self, controlled_bytes: int, other_bytes: int) -> bool:
        """Corrects the rate after a step; whether the lowest rate is still above the budget.

        controlled_bytes: sent in packets whose rate is ours. other_bytes: all else that was sent.
        """
        budget = self._plan.bytes_per_step
        if budget is None or controlled_bytes + other_bytes == 0:
            return False
        if controlled_bytes == 0:
            return other_bytes > budget
        missed = self._rate <= MIN_RATE and controlled_bytes + other_bytes > budget
        wanted = max(budget - other_bytes, 0) / controlled_bytes
        change = min(max(wanted, 1 / _LARGEST_CHANGE), _LARGEST_CHANGE)
        self._rate = min(max(self._rate * change, MIN_RATE), MAX_RATE)
        return missed

    def state_dict(self) -> dict[str, Any]:
        """The rates, exactly."""
        with self._lock:
            return {"rate": self._rate, "parameters": dict(self._by_name)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict` under the same plan."""
        with self._lock:
            self._rate, self._by_name = state["rate"], dict(state["parameters"])

    def load_mean(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continues from several ranks' states: the mean rate, and each parameter's highest."""
        with self._lock:
            self._rate = sum(state["rate"] for state in states) / len(states)
            self._by_name = {}
            for state in states:
                for name, rate in state["parameters"].items():
                    self._by_name[name] = max(rate, self._by_name.get(name, MIN_RATE))


def coarser(codec: str) -> str | None:
    """The codec to try for a bounded packet that has lost blocks; None if there is none."""
    rate = _rate(codec)
    return None if rate <= MIN_RATE else _named(codec, _COARSER * rate)


def _named(codec: str, rate: float) -> str:
    family = codec.partition(":")[0]
    steps = math.ceil(min(max(rate, MIN_RATE), MAX_RATE) * _STEPS_A_BIT - 1e-9)
    return f"{family}:{min(steps / _STEPS_A_BIT, MAX_RATE)}"


def _rate(codec: str) -> float:
    return float(codec.partition(":")[2])
