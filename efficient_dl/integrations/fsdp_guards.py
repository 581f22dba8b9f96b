"""Alarms and the kill switch of a sharded model, over all of its process groups."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from efficient_dl.comm import (
    Alarm,
    Compressor,
    KillSwitch,
    OnAlarm,
    ProcessGroupTransport,
    Watch,
    gather_json,
)
from efficient_dl.errors import RanksDiverged

_log = logging.getLogger(__name__)


class Guards:
    """What a rank's watches find, and what all ranks do about it together.

    compressors: to `watch` at first, by what they encode; those with the plan "none" are left out. controls: transports
    on all of the model's groups, in one order on all ranks. shadow: the meters' seconds are no real transfers'.
    """

    def __init__(
        self,
        compressors: Mapping[str, Compressor],
        controls: Sequence[ProcessGroupTransport],
        max_relative_error: float | None,
        on_alarm: OnAlarm,
        shadow: bool,
    ) -> None:
        self.switch = KillSwitch()
        self._controls = list(controls)
        self._max_relative_error, self._shadow = max_relative_error, shadow
        self._disables = on_alarm == "disable" and not shadow
        self._watches: dict[str, Watch] = {}
        self._alarms: dict[str, list[dict[str, Any]]] = {}  # of earlier watches
        self.watch(compressors)

    def watch(self, compressors: Mapping[str, Compressor], plans: Mapping[str, str] | None = None) -> None:
        """Watches these from now on, instead of those before.

        plans: a name for what is in force, by what is encoded, where a run has several; see `Watch`.
        """
        plans = plans or {}
        self._alarms = self._alarms_by_watch()
        self._watches = {
            what: Watch(
                compressor.meter,
                self._max_relative_error,
                times=False,
                exact=compressor.exact,
                escapes_are_usual=compressor.plan.codec.startswith("grid:"),
                what=what,
                plan=plans.get(what, ""),
            )
            for what, compressor in compressors.items()
        }
        device = self._controls[0].device
        is_timed = not self._shadow and all(one.is_timed(device) for one in compressors.values())
        if any(compressor.plan.codec != "identity" for compressor in compressors.values()) and is_timed:
            # Together, because they share the line and the seconds that are waited for.
            meters = [compressor.meter for compressor in compressors.values()]
            label = ", ".join(f"{what}: {plan}" for what, plan in plans.items())
            self._watches["times"] = Watch(meters, None, times=True, exact=True, plan=label)
        for what, watch in self._watches.items():
            watch.load_state_dict(self._alarms.get(what, []))

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """All alarms so far, with what they are about."""
        found = self._alarms_by_watch()
        return [{"about": what, **alarm} for what, alarms in found.items() for alarm in alarms]

    def _alarms_by_watch(self) -> dict[str, list[dict[str, Any]]]:
        found = self._alarms | {what: watch.state_dict() for what, watch in self._watches.items()}
        return {what: alarms for what, alarms in found.items() if alarms}

    def stepped(self, compressors: Collection[str]) -> None:
        """Looks at this rank's errors after a backward pass in which these compressors took part."""
        for what in compressors:
            for alarm in self._watches[what].stepped() if what in self._watches else ():
                self._log_alarm(alarm)
                if self._disables:
                    self.wish(alarm.text)

    def wish(self, reason: str) -> None:
        """This rank wants compression to end with the next `agree`."""
        if self.switch.off is None:
            self.switch.wish = self.switch.wish or reason
            _log.warning("compression ends with the next comparison of parameters: %s", reason)

    def agree(self, step: int, failure: RanksDiverged | None = None, told: Any = None) -> list[Any]:
        """Ends compression if any rank wished it (`is_off`); all ranks call it, and come to the same.

        failure: what this rank has found in a comparison; then all ranks raise RanksDiverged, those of other groups,
        too, which would wait in vain otherwise. told: what else the ranks tell each other on this way, as JSON holds
        it. Returns all ranks', by global rank.
        """
        own = {
            "wish": self.switch.wish,
            "notes": {what: watch.notes() for what, watch in self._watches.items()},
            "failure": None if failure is None else [failure.problem, failure.details],
            "told": told,
        }
        everyone = self.everyone(own)
        if failure is not None:
            raise failure
        for rank, one in everyone.items():
            if one["failure"] is not None:
                problem, details = one["failure"]
                raise RanksDiverged(f"rank {rank} says: {problem}", **details)
        heard = [one["told"] for one in everyone.values()]
        if self.is_off:
            return heard
        wishes = [f"rank {rank}: {one['wish']}" for rank, one in everyone.items() if one["wish"] is not None]
        for what, watch in self._watches.items():
            for alarm in watch.judge([one["notes"][what] for one in everyone.values()]):
                self._log_alarm(alarm)
                if self._disables:
                    wishes.append(alarm.text)
        if wishes:
            self.switch.end("; ".join(wishes), step)
        return heard

    @property
    def is_off(self) -> bool:
        """Whether compression has ended."""
        return self.switch.off is not None

    def everyone(self, value: Any) -> dict[int, Any]:
        """Every rank's value by global rank, the same on all ranks that any of the groups joins; all call it."""
        known = {str(dist.get_rank()): value}
        # Once around all groups joins a mesh; once more for each group joins whatever else they make together.
        for _ in self._controls:
            for control in self._controls:
                for theirs in gather_json(known, control):
                    known |= theirs
        return {rank: known[str(rank)] for rank in sorted(map(int, known))}

    def state_dict(self) -> dict[str, Any]:
        """The kill switch, and the alarms, which are not raised again."""
        return {"switch": self.switch.state_dict(), "alarms": self._alarms_by_watch()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`."""
        self.switch.load_state_dict(state["switch"])
        self._alarms = {what: list(alarms) for what, alarms in state["alarms"].items()}
        for what, watch in self._watches.items():
            watch.load_state_dict(self._alarms.get(what, []))

    def _log_alarm(self, alarm: Alarm) -> None:
        _log.warning("rank %d, step %d: %s", dist.get_rank(), alarm.step, alarm.text)
