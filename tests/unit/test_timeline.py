"""The timeline shows every rank's partitions over the steps in which they were there."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from efficient_dl.coordinator import (
    Assignment,
    Decision,
    Entry,
    History,
    PartitionCosts,
    PartitionState,
    RankFacts,
    ScheduleOptions,
    schedule,
)
from efficient_dl.coordinator.timeline import Bar, bars, draw_timeline, stages, timeline_table

NAMES = ("embedding..blocks.0", "blocks.1", "output")
STATISTICS = [
    {"step": step, "partition": 1, "lead": lead, "waiting_seconds": 0.01 * lead}
    for step, lead in ((5, 1.0), (10, 2.0), (20, 4.0))
]


def entry(
    step: int, until: int, *ranks: tuple[int, ...], frozen: tuple[int, ...] = (), world_size: int = 2
) -> Entry:
    training = tuple(bool(place) and k not in frozen for k, place in enumerate(ranks))
    return Entry(
        step, world_size, "pipelined", NAMES, Decision(Assignment(ranks), training, until, "because")
    )


def history() -> History:
    """Two stages alike, one that ended early because two ranks came, one with a frozen partition, and the end."""
    return History(
        [
            entry(0, 10, (0,), (0,), (1,)),
            entry(10, 20, (0,), (0,), (1,)),
            entry(20, 30, (0,), (0,), (1,)),
            entry(24, 34, (0,), (1, 2), (3,), frozen=(0,), world_size=4),
            entry(34, 34, (), (), (), world_size=4),
        ]
    )


def test_a_stage_ends_where_the_next_decision_is() -> None:
    assert [span[:2] for span in stages(history())] == [(0, 10), (10, 20), (20, 24), (24, 34)]


def test_there_is_a_bar_for_each_rank_and_partition() -> None:
    drawn = bars(history())
    assert drawn[:3] == [
        Bar(0, 10, 0, 0, True, 0, 2),
        Bar(0, 10, 0, 1, True, 1, 2),
        Bar(0, 10, 1, 2, True, 0, 1),
    ]
    assert drawn[-4:] == [
        Bar(24, 34, rank, partition, partition > 0, 0, 1) for rank, partition in enumerate((0, 1, 1, 2))
    ]


@pytest.mark.parametrize("statistics", [[], STATISTICS])
def test_the_picture_is_svg_with_all_names(tmp_path: Path, statistics: list[Any]) -> None:
    picture = draw_timeline(history(), tmp_path / "timeline.svg", statistics).read_text()
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert all(name in picture for name in NAMES)
    assert ("lead (steps)" in picture) == bool(statistics)


def test_an_empty_history_is_an_empty_picture_and_table(tmp_path: Path) -> None:
    assert draw_timeline(History(), tmp_path / "empty.svg").stat().st_size > 0
    assert timeline_table(History()).row_count == 0


def test_the_table_joins_equal_stages_and_shows_means() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(timeline_table(history(), STATISTICS))
    text = capture.get()
    assert "0–24" in text and "24–34" in text and "10–20" not in text
    assert "(0)" in text and "1–2" in text
    assert "lead 2.33" in text and "waiting 0.0233" in text


def test_entries_are_never_put_before_earlier_ones() -> None:
    with pytest.raises(ValueError, match="cannot follow"):
        history().append(entry(33, 40, (0,), (0,), (0,)))


def test_decisions_of_the_scheduler_can_be_drawn(tmp_path: Path) -> None:
    costs = [PartitionCosts(name, 1.0, 2.0) for name in NAMES]
    options = ScheduleOptions("sequential", 4, 10, 30)
    decided = History()
    for step, done in ((0, 0), (10, 1), (20, 2)):
        states = [PartitionState(10 * (k < done)) for k in range(3)]
        decision = schedule(costs, [RankFacts()] * 2, states, options, step)
        decided.append(Entry(step, 2, options.kind, NAMES, decision))
    assert [(bar.partition, bar.training) for bar in bars(decided) if bar.rank == 0] == [
        *[(0, True)],
        *[(0, False), (1, True)],
        *[(0, False), (1, False), (2, True)],
    ]
    assert draw_timeline(decided, tmp_path / "sequential.svg").exists()
