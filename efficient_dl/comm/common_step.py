"""One step size for all packets of a model: reverse water-filling over its tensors, at a rate that holds on average.

The least squared error for a number of bits spends none on values below one common step, and on all others what the
same step takes: tensors of a larger rms get more bits (Cover and Thomas, section 10.3). A step found for each packet
alone gives every packet the same rate instead, whatever it holds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from efficient_dl.codec import PacketStats
from efficient_dl.codec.steps import COARSEST_GRID_STEP, FINEST_GRID_STEP, grid_step
from efficient_dl.comm.transport import Transport

EVERY_STEP_UNTIL, THEN_EVERY = 16, 4  # steps between agreements: a rate drifts slowly once training runs
FEWEST_VALUES = 4096  # below that symbols are too few for a rate, and packets mostly headers
_OCTAVE = 1 << 16  # of positions; also one bit of rates
_STEPS_AN_OCTAVE = 32
_PLACE = _OCTAVE // _STEPS_AN_OCTAVE
_COARSER, _FINER = 2 * _OCTAVE, _OCTAVE  # the largest corrections
_SMALLEST_STEP, _LARGEST_STEP = 2.0**-120, 2.0**98


@dataclass
class _Direction:
    """Contributions on their way to the owners, or results on their way back: averages have another spread.

    position: log2 of the step, in units of 2^-16; None as long as packets search for their own. values, bits, places:
    of the packets since the last agreement; places are the sum of values × the indices of the steps that were found.
    """

    position: int | None = None
    values: int = 0
    bits: int = 0
    places: int = 0


class CommonStep:
    """The step of every "grid:RATE" packet of a model, the same on all ranks, for contributions and for results.

    rate: bits a value, headers and tables not counted, as `make_codec("grid:RATE")` understands it.

    In the first training step every packet searches for its own. Then all ranks add up what they encoded (`agree`),
    begin with the geometric mean, and from there correct log2 of the step by 3/4 of the bits that were missed (a bit is
    an octave at high rates); in integers, so that no processor comes to another step. A training step with a value that
    is not finite teaches nothing. Positions are for gradients before a loss scale. With fewer than `FEWEST_VALUES`
    values between two agreements packets keep their own steps.
    """

    def __init__(self, rate: float) -> None:
        self._target = round(rate * _OCTAVE)
        self._directions = (_Direction(), _Direction())
        self._nonfinite = 0
        self._scale = 1.0
        self._lock = threading.Lock()

    def begin(self, loss_scale: float) -> None:
        """Starts a step whose gradients are scaled by loss_scale."""
        self._scale = loss_scale

    def step(self, result: bool) -> float | None:
        """The step of this training step's packets; None: each searches for its own."""
        position = self._directions[result].position
        if position is None:
            return None
        step = grid_step((position + _PLACE // 2) // _PLACE) * self._scale
        return min(max(step, _SMALLEST_STEP), _LARGEST_STEP)

    def count(self, stats: PacketStats, result: bool) -> None:
        """Notes a packet; from any thread."""
        with self._lock:
            direction = self._directions[result]
            direction.values += stats.numel
            direction.bits += round(8 * stats.packet_bytes - stats.header_bits)
            self._nonfinite += stats.nonfinite_blocks
            if direction.position is None and stats.step_size > 0:
                place = round(_STEPS_AN_OCTAVE * math.log2(stats.step_size / self._scale))
                direction.places += stats.numel * place

    def is_due(self, steps: int) -> bool:
        """Whether the ranks agree after so many steps."""
        return steps <= EVERY_STEP_UNTIL or steps % THEN_EVERY == 0

    def agree(self, transport: Transport) -> int:
        """Adds up all ranks' counts and sets the next steps; every rank calls it. Returns the bytes that it sent."""
        with self._lock:
            counts = [n for one in self._directions for n in (one.values, one.bits, one.places)]
            counts.append(self._nonfinite)
            self._forget()
        packet = torch.tensor(counts, dtype=torch.int64).view(torch.uint8).to(transport.device)
        work = transport.gather(packet)
        total = torch.stack([message.cpu().view(torch.int64) for message in work.wait()]).sum(0)
        self.agreed([int(count) for count in total])
        return work.sent_bytes

    def agreed(self, total: Sequence[int]) -> None:
        """Sets the next steps after the sums of all ranks' counts."""
        if total[-1] > 0:
            return
        for direction, first in zip(self._directions, (0, 3), strict=True):
            values, bits, places = total[first : first + 3]
            if values < FEWEST_VALUES:
                continue
            if direction.position is None:
                position = places * _PLACE // values
            else:
                missed = bits * _OCTAVE // values - self._target
                change = 3 * missed * _OCTAVE // (4 * min(self._target, _OCTAVE))
                position = direction.position + min(max(change, -_FINER), _COARSER)
            direction.position = min(max(position, FINEST_GRID_STEP * _PLACE), COARSEST_GRID_STEP * _PLACE)

    def state_dict(self) -> dict[str, Any]:
        """The positions, and what was counted since the last agreement."""
        with self._lock:
            return {
                "directions": [vars(one).copy() for one in self._directions],
                "nonfinite": self._nonfinite,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict` at the same rate."""
        with self._lock:
            self._directions = tuple(_Direction(**one) for one in state["directions"])
            self._nonfinite = state["nonfinite"]

    def load_positions(self, state: Mapping[str, Any]) -> None:
        """Takes the steps alone, which are the same on all ranks: for another number of ranks."""
        self.load_state_dict(state)
        self._forget()

    def _forget(self) -> None:
        self._nonfinite = 0
        for one in self._directions:
            one.values = one.bits = one.places = 0
