"""The table of faults is what the committed rows say, and stands in the documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fault_cases import LAUNCHERS
from benchmarks.fault_table import place, read, short_table, table
from benchmarks.faults import DOCUMENT, README, RESULTS


def row(case: str, metric: str, value: float, system: str = "mpirun") -> str:
    return json.dumps(
        {"case": case, "system": system, "metric": metric, "value": value, "env": {"load": 1.0}}
    )


def test_the_newest_rows_of_a_fault_count(tmp_path: Path) -> None:
    title = LAUNCHERS["mpirun"][1]["worker-killed"].title
    lines = [
        row(f"{title}: did this", "seconds_to_recover", 9.0),
        row(f"{title}: did this", "lost_steps", 7),
        row(f"{title}: does: that", "seconds_to_recover", 5.25),
        row(f"{title}: does: that", "seconds_to_end", 2.0),
        row(f"{title}: does: that", "same_weights", 1),
    ]
    (tmp_path / "rows").write_text("\n".join(lines) + "\n")
    seen = read(tmp_path / "rows")
    line = table(seen).splitlines()[-1]
    assert "| does: that | 5.2 (ends after 2.0) |  | bit for bit |" in line
    assert short_table(seen).splitlines()[-1] == f"| {title} | — | — | 5 s,  * |"


def test_titles_can_be_told_from_what_was_seen() -> None:
    for _, cases in LAUNCHERS.values():
        assert not [case.title for case in cases.values() if ": " in case.title or "|" in case.title]
        assert len({case.title for case in cases.values()}) == len(cases)


def test_a_text_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="begin"):
        place("no marks", "a table")


@pytest.mark.parametrize(("file", "made"), [(DOCUMENT, table), (README, short_table)])
def test_the_documents_have_the_table_of_the_committed_rows(file: Path, made: Callable[..., str]) -> None:
    text = file.read_text()
    assert place(text, made(read(RESULTS))) == text, "python -m benchmarks.faults --table"
