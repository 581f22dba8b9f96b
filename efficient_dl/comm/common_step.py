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
from enum import IntEnum
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
_COARSER, _FINER = 8 * _OCTAVE, _OCTAVE  # the largest corrections
_FINE_ENOUGH = 13  # bits of the largest integer: where most values are zeros, more buy nothing
_CLAMPED = 32767  # the largest integer that a packet can hold: what was larger has lost its size
_UNCLAMP = 6 * _OCTAVE
_SMALLEST_STEP, _LARGEST_STEP = 2.0**-120, 2.0**98


class Leg(IntEnum):
    """Which part of a reduction's way a packet makes; values of each have a spread, and so a step, of their own.

    GROUP: what the ranks of a group came to, on its way to another group (see `GroupedReduction`).
    """

    CONTRIBUTION = 0
    RESULT = 1
    GROUP = 2


@dataclass
class _Direction:
    """The packets of one leg.

    position: log2 of the step, in units of 2^-16; None as long as packets search for their own. values, bits: of the
    packets since the last agreement. placed, places: the values of those that found a step of their own, and the sum of
    values × the indices of these steps. peak: the largest escaped integer. before: the position that the last agreement
    left because integers were clamped at it.
    """

    position: int | None = None
    values: int = 0
    bits: int = 0
    placed: int = 0
    places: int = 0
    peak: int = 0
    before: int | None = None


class CommonStep:
    """The step of every "grid:RATE" packet of a model, the same on all ranks, one for each `Leg`.

    rate: bits a value, headers and tables not counted, as `make_codec("grid:RATE")` understands it.
    legs: the first so many occur; the same on all ranks.

    In the first training step every packet searches for its own. Then all ranks add up what they encoded (`agree`),
    begin with the geometric mean, and from there correct log2 of the step by 3/4 of the bits that were missed (a bit is
    an octave at high rates); in integers, so that no processor comes to another step. Bits that zeros leave over are
    not spent on ever finer steps: the largest integer of any rank keeps to 13 bits, far from the packets' clamp. A
    training step with a value that is not finite teaches nothing. Positions are for gradients before a loss scale. With
    fewer than `FEWEST_VALUES` values between two agreements packets keep their own steps.
    """

    def __init__(self, rate: float, legs: int = 2) -> None:
        self._target = round(rate * _OCTAVE)
        self._directions = tuple(_Direction() for _ in range(legs))
        self._nonfinite = 0
        self._scale = 1.0
        self._lock = threading.Lock()

    def begin(self, loss_scale: float) -> None:
        """Starts a step whose gradients are scaled by loss_scale."""
        self._scale = loss_scale

    def has_legs(self, count: int) -> None:
        """From now on the first so many legs occur; all ranks call it between the same two agreements."""
        added = range(len(self._directions), count)
        self._directions = (*self._directions, *(_Direction() for _ in added))

    def step(self, leg: Leg) -> float | None:
        """The step of this training step's packets; None: each searches for its own."""
        position = self._directions[leg].position
        if position is None:
            return None
        step = grid_step((position + _PLACE // 2) // _PLACE) * self._scale
        return min(max(step, _SMALLEST_STEP), _LARGEST_STEP)

    def count(self, stats: PacketStats, leg: Leg) -> None:
        """Notes a packet; from any thread."""
        with self._lock:
            direction = self._directions[leg]
            direction.values += stats.numel
            direction.bits += round(8 * stats.packet_bytes - stats.header_bits)
            self._nonfinite += stats.nonfinite_blocks
            direction.peak = max(direction.peak, stats.largest_escape)
            is_of_zeros = stats.order0_bits == 0
            if direction.position is None and stats.step_size > 0 and not is_of_zeros:
                place = round(_STEPS_AN_OCTAVE * math.log2(stats.step_size / self._scale))
                direction.placed += stats.numel
                direction.places += stats.numel * place

    def is_due(self, steps: int) -> bool:
        """Whether the ranks agree after so many steps."""
        return steps <= EVERY_STEP_UNTIL or steps % THEN_EVERY == 0

    def agree(self, transport: Transport) -> int:
        """Adds up all ranks' counts and sets the next steps; every rank calls it. Returns the bytes that it sent."""
        with self._lock:
            counts = [n for d in self._directions for n in (d.values, d.bits, d.placed, d.places)]
            counts += [self._nonfinite, *(direction.peak for direction in self._directions)]
            self._forget()
        packet = torch.tensor(counts, dtype=torch.int64).view(torch.uint8).to(transport.device)
        work = transport.gather(packet)
        ranks = torch.stack([message.cpu().view(torch.int64) for message in work.wait()])
        legs = len(self._directions)
        sums, largest = ranks.sum(0)[:-legs], ranks.amax(0)[-legs:]
        self.agreed([int(count) for count in sums], [int(peak) for peak in largest])
        return work.sent_bytes

    def agreed(self, total: Sequence[int], peaks: Sequence[int]) -> None:
        """Sets the next steps.

        total: the sums of all ranks' values, bits, placed and places, for one leg after the other, and of their blocks
        that are not finite. peaks: the largest integers of any rank, of each leg.
        """
        if total[-1] > 0:
            return
        for number, (direction, peak) in enumerate(zip(self._directions, peaks, strict=True)):
            values, bits, placed, places = total[4 * number : 4 * number + 4]
            if values < FEWEST_VALUES or (direction.position is None and not placed):
                continue
            if direction.position is None:
                position = places * _PLACE // placed
            elif direction.before is not None and peak < _CLAMPED >> _UNCLAMP // _OCTAVE:
                position, direction.before = direction.before, None  # it was a spike, which is over
            else:
                is_clamped = peak >= _CLAMPED
                direction.before = direction.position if is_clamped else None
                finest = _UNCLAMP if is_clamped else (peak.bit_length() - _FINE_ENOUGH) * _OCTAVE
                position = direction.position + max(self._change(bits * _OCTAVE // values), finest)
            direction.position = min(max(position, FINEST_GRID_STEP * _PLACE), COARSEST_GRID_STEP * _PLACE)

    def _change(self, rate: int) -> int:
        """Of a position, after a rate in units of 2^-16 bit a value.

        A bit is at most an octave above one bit, where it counts as one; below, where zeros outnumber all others, a
        part of the rate is about the same part of an octave.
        """
        knee = max(self._target, _OCTAVE)
        high = max(rate - knee, 0)
        low = (min(rate, knee) - self._target) * _OCTAVE // min(self._target, _OCTAVE)
        return min(max(3 * (high + low) // 4, -_FINER), _COARSER)

    def state_dict(self) -> dict[str, Any]:
        """The positions, and what was counted since the last agreement."""
        with self._lock:
            return {
                "directions": [vars(one).copy() for one in self._directions],
                "nonfinite": self._nonfinite,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict` at the same rate; a leg that did not occur there begins anew."""
        saved = [_Direction(**one) for one in state["directions"]]
        with self._lock:
            self._directions = (*saved, *self._directions[len(saved) :])[: len(self._directions)]
            self._nonfinite = state["nonfinite"]

    def load_positions(self, state: Mapping[str, Any]) -> None:
        """Takes the steps alone, which are the same on all ranks: for another number of ranks."""
        self.load_state_dict(state)
        self._forget()

    def _forget(self) -> None:
        self._nonfinite = 0
        for one in self._directions:
            one.values = one.bits = one.placed = one.places = one.peak = 0
