"""What was decided so far, in order: for logs, checkpoints and the timeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from efficient_dl.coordinator.assignment import Assignment, Decision
from efficient_dl.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """A decision, and what it was decided for. partitions: their names. kind: of the schedule."""

    step: int
    world_size: int
    kind: str
    partitions: tuple[str, ...]
    decision: Decision

    def to_row(self) -> dict[str, Any]:
        """As JSON has it; the keys of decisions.jsonl."""
        return {
            "step": self.step,
            "until_step": self.decision.until_step,
            "world_size": self.world_size,
            "kind": self.kind,
            "partitions": list(self.partitions),
            "ranks": [list(ranks) for ranks in self.decision.assignment.ranks],
            "training": list(self.decision.training),
            "reason": self.decision.reason,
            "fingerprint": self.decision.fingerprint(),
        }

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Entry:
        """Raises CheckpointError if the row is not one that `to_row` made, or was changed since."""
        try:
            decision = Decision(
                Assignment(tuple(tuple(ranks) for ranks in row["ranks"])),
                tuple(row["training"]),
                row["until_step"],
                row["reason"],
            )
            entry = Entry(row["step"], row["world_size"], row["kind"], tuple(row["partitions"]), decision)
            found = row["fingerprint"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                "this is not a row of a history of decisions", found=f"{type(error).__name__}: {error}"
            ) from error
        if found != decision.fingerprint():
            raise CheckpointError(
                "a decision was changed after it was made",
                expected=f"fingerprint {decision.fingerprint()}",
                found=str(found),
                where=f"the decision of step {entry.step}",
            )
        return entry


class History:
    """Decisions by step; entries are only ever added."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries: list[Entry] = []
        for entry in entries:
            self.append(entry)

    def append(self, entry: Entry) -> None:
        """Raises ValueError if the entry is of an earlier step than the last one."""
        if self._entries and entry.step < self._entries[-1].step:
            raise ValueError(
                f"a decision of step {entry.step} cannot follow one of step {self._entries[-1].step}"
            )
        self._entries.append(entry)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __getitem__(self, index: int) -> Entry:
        return self._entries[index]

    def to_rows(self, since: int = 0) -> list[dict[str, Any]]:
        """The entries from number `since` on, as JSON has them, for decisions.jsonl and for checkpoints."""
        return [entry.to_row() for entry in self._entries[since:]]

    @staticmethod
    def from_rows(rows: Iterable[Mapping[str, Any]]) -> History:
        """Raises CheckpointError if a row is damaged."""
        return History(Entry.from_row(row) for row in rows)
