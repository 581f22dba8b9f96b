"""Alarms and the kill switch of a model whose ranks make one process group."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from efficient_dl.comm import Alarm, Compressor, KillSwitch, ProcessGroupTransport, Watch, check_equal

_log = logging.getLogger(__name__)


class GroupGuards:
    """What a rank's watch finds, and what all ranks do about it together, when they compare their parameters.

    control: on all ranks. max_relative_error, on_alarm, shadow: as `compress` takes them.
    """

    def __init__(
        self,
        control: ProcessGroupTransport,
        max_relative_error: float | None,
        on_alarm: str,
        shadow: bool,
    ) -> None:
        self._control, self._limit, self._shadow = control, max_relative_error, shadow
        self._disables = on_alarm == "disable" and not shadow
        self._switch = KillSwitch()
        self._watch: Watch | None = None
        self._alarms: list[dict[str, Any]] = []  # of earlier watches

    def watch(self, compressor: Compressor, plan: str = "") -> None:
        """Watches a compressor from now on, instead of what was watched. plan: see `Watch`."""
        codec = compressor.plan.codec
        self._alarms = self.alarms
        self._watch = Watch(
            compressor.meter,
            self._limit,
            times=not self._shadow and codec != "identity" and compressor.is_timed(self._control.device),
            exact=compressor.exact,
            escapes_are_usual=codec.startswith("grid:"),
            plan=plan,
        )
        self._watch.load_state_dict(self._alarms)

    def rest(self) -> None:
        """Nothing is compressed from now on, and nothing watched."""
        self._alarms, self._watch = self.alarms, None

    @property
    def off(self) -> dict[str, Any] | None:
        """{"step", "reason"} once compression has ended."""
        return self._switch.off

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """All alarms so far."""
        return self._watch.state_dict() if self._watch else self._alarms

    def wish(self, reason: str) -> None:
        """This rank wants compression to end with the next `agree`."""
        if self.off is None:
            self._switch.wish = self._switch.wish or reason
            _log.warning("compression ends with the next comparison of parameters: %s", reason)

    def stepped(self) -> None:
        """Looks at this rank's errors after a step."""
        if self._watch is not None and self.off is None:
            for alarm in self._watch.stepped():
                self._log_alarm(alarm)
                if self._disables:
                    self.wish(alarm.text)

    def notes(self) -> list[int]:
        """This rank's part of what `agree` looks at: as many integers on every rank."""
        return [int(self._switch.wish is not None), *(self._watch.notes() if self._watch else ())]

    def compare(
        self, parameters: Mapping[str, Tensor], step: int, told: Sequence[int] = ()
    ) -> list[list[int]]:
        """Compares parameters, bit by bit, and agrees on what follows; all ranks call it together.

        told: what else the ranks tell each other on this way, as many integers on every rank. Returns all ranks', by
        rank. Raises RanksDiverged.
        """
        everyone = check_equal(parameters, self._control, step, [*told, *self.notes()])
        self.agree([theirs[len(told) :] for theirs in everyone], step)
        return [theirs[: len(told)] for theirs in everyone]

    def agree(self, notes: Sequence[Sequence[int]], step: int) -> None:
        """Ends compression if any rank wished it, or an alarm on all ranks does; all ranks call it together.

        notes: all ranks', by rank. step: the optimizer step before it.
        """
        self._switch.agree([bool(theirs[0]) for theirs in notes], self._control, step)
        if self._watch is not None and self.off is None:
            for alarm in self._watch.judge([list(theirs[1:]) for theirs in notes]):
                self._log_alarm(alarm)
                if self._disables:
                    self._switch.end(alarm.text, step)

    def state_dict(self) -> dict[str, Any]:
        """The kill switch, and the alarms, which are not raised again."""
        return {"switch": self._switch.state_dict(), "alarms": self.alarms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`; other keys are ignored."""
        self._switch.load_state_dict(state["switch"])
        self._alarms = list(state["alarms"])
        if self._watch is not None:
            self._watch.load_state_dict(self._alarms)

    def _log_alarm(self, alarm: Alarm) -> None:
        _log.warning("rank %d, step %d: %s", self._control.rank, alarm.step, alarm.text)
