"""The kill switch: compression ends on all ranks after the same step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from efficient_dl.comm.handshake import gather_json
from efficient_dl.comm.transport import Transport

_log = logging.getLogger(__name__)


class KillSwitch:
    """Wishes of single ranks, which all ranks follow together.

    A wish travels as a note of a `check_equal` that all ranks make anyway; only if there is one, one more message
    gives its reason.

    wish: this rank's reason, until the others know of it. off: {"step", "reason"} once compression has ended.
    """

    def __init__(self) -> None:
        self.wish: str | None = None
        self.off: dict[str, Any] | None = None

    def agree(self, wished: Sequence[bool], transport: Transport, step: int) -> None:
        """Ends compression if any rank wished it; on all ranks with the same arguments.

        wished: by rank. step: the optimizer step before it, for reports.
        """
        if self.off is not None or not any(wished):
            return
        wishes: list[str | None] = gather_json(self.wish, transport)
        reason = "; ".join(f"rank {rank}: {wish}" for rank, wish in enumerate(wishes) if wish is not None)
        self.end(reason, step)

    def end(self, reason: str, step: int) -> None:
        """Ends compression for a reason that all ranks see at the same step."""
        self.wish, self.off = None, {"step": step, "reason": reason}
        _log.warning("compression is off after step %d, torch's own collectives take over. %s", step, reason)

    def state_dict(self) -> dict[str, Any]:
        """Whether it is off, since when and why, and what this rank still wishes."""
        return {"off": self.off, "wish": self.wish}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`."""
        self.off, self.wish = state["off"], state["wish"]
        if self.off is not None:
            _log.warning(
                "compression stays off, as it was after step %d: %s", self.off["step"], self.off["reason"]
            )
