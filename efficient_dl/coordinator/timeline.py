"""Draws which partition trained where, when: as a picture (SVG), and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from efficient_dl.coordinator.history import Entry, History
from efficient_dl.coordinator.wording import indices_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATISTICS = {"lead": "lead (steps)", "waiting_seconds": "waiting (s a step)"}
COLORS = {True: "bold", False: "dim"}


@dataclass(frozen=True)
class Bar:
    """Partition `partition` on rank `rank` in steps start … end − 1, in one of `lanes` lanes side by side."""

    start: int
    end: int
    rank: int
    partition: int
    training: bool
    lane: int
    lanes: int


def stages(history: History) -> list[tuple[int, int, Entry]]:
    """(first step, step after the last, entry) of each stage that took place; a later decision may end it early."""
    entries = list(history)
    ends = [entry.step for entry in entries[1:]] + [entries[-1].decision.until_step] if entries else []
    spans = [
        (entry.step, min(end, entry.decision.until_step), entry)
        for entry, end in zip(entries, ends, strict=True)
    ]
    return [span for span in spans if span[1] > span[0]]


def bars(history: History) -> list[Bar]:
    """All bars of the picture, in the order of steps, ranks and partitions."""
    drawn: list[Bar] = []
    for start, end, entry in stages(history):
        for rank in range(entry.world_size):
            held = entry.decision.assignment.of_rank(rank)
            drawn += [
                Bar(start, end, rank, index, entry.decision.training[index], lane, len(held))
                for lane, index in enumerate(held)
            ]
    return drawn


def draw_timeline(history: History, path: Path, statistics: Iterable[Mapping[str, Any]] = ()) -> Path:
    """Writes an SVG: a row a rank, steps to the right, a color a partition; pale and hatched where it is frozen.

    statistics: rows with "step", "partition" and any of "lead" (steps by which the partition's producer is ahead) and
    "waiting_seconds" (for its input, in a step); each that occurs is drawn below, over the same steps.
    """
    from matplotlib import rc_context
    from matplotlib.figure import (
        Figure,
    )  # not pyplot: it is slow to import and would choose the process's backend

    drawn, rows = bars(history), list(statistics)
    shown = [key for key in STATISTICS if any(key in row for row in rows)]
    num_ranks = max((bar.rank for bar in drawn), default=0) + 1
    heights = [min(12.0, 0.8 + 0.45 * num_ranks), *[1.8] * len(shown)]
    with rc_context({"svg.hashsalt": "efficient_dl", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, sum(heights) + 0.8), layout="constrained")
        grid = figure.subplots(len(heights), 1, height_ratios=heights, sharex=True, squeeze=False)
        axes: list[Axes] = [grid[index][0] for index in range(len(heights))]
        _draw_bars(axes[0], drawn, [entry.step for _, _, entry in stages(history)], num_ranks)
        for axis, key in zip(axes[1:], shown, strict=True):
            _draw_statistic(axis, rows, key)
        axes[-1].set_xlabel("steps")
        names = history[-1].partitions if len(history) else ()
        _draw_legend(axes[0], names)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path


def timeline_table(history: History, statistics: Iterable[Mapping[str, Any]] = ()) -> Table:
    """A row for each stretch of equal decisions: which ranks hold which partition; frozen ones in parentheses.

    statistics: as for `draw_timeline`; their means over the stretch follow the ranks.
    """
    rows = list(statistics)
    names = history[-1].partitions if len(history) else ()
    table = Table(title="Which partition is on which ranks (frozen in parentheses)")
    table.add_column("steps")
    for index, name in enumerate(names):
        table.add_column(f"{index} {name}")
    for start, end, entry in _stretches(history):
        cells = [
            _cell(
                entry,
                index,
                [row for row in rows if row["partition"] == index and start < row["step"] <= end],
            )
            for index in range(len(names))
        ]
        table.add_row(f"{start}–{end}", *cells)
    return table


def _stretches(history: History) -> list[tuple[int, int, Entry]]:
    joined: list[tuple[int, int, Entry]] = []
    for start, end, entry in stages(history):
        before = joined[-1] if joined else None
        if (
            before
            and before[1] == start
            and before[2].world_size == entry.world_size
            and before[2].decision.assignment == entry.decision.assignment
            and before[2].decision.training == entry.decision.training
        ):
            joined[-1] = (before[0], end, entry)
        else:
            joined.append((start, end, entry))
    return joined


def _cell(entry: Entry, index: int, rows: Sequence[Mapping[str, Any]]) -> Text:
    ranks = entry.decision.assignment.ranks[index]
    if not ranks:
        return Text("–", style="dim")
    training = entry.decision.training[index]
    place = indices_text(ranks)
    text = Text(place if training else f"({place})", style=COLORS[training])
    for key, label in STATISTICS.items():
        values = [float(row[key]) for row in rows if row.get(key) is not None]
        if values:
            text.append(f"\n{label.split()[0]} {sum(values) / len(values):.3g}", style="dim")
    return text


def _draw_bars(axis: Axes, drawn: Sequence[Bar], boundaries: Sequence[int], num_ranks: int) -> None:
    from matplotlib.ticker import MaxNLocator

    for bar in drawn:
        height = 0.84 / bar.lanes
        axis.barh(
            bar.rank - 0.42 + height * (bar.lane + 0.5),
            bar.end - bar.start,
            height,
            left=bar.start,
            color=_color(bar.partition),
            alpha=1.0 if bar.training else 0.3,
            hatch=None if bar.training else "///",
            edgecolor="white",
            linewidth=0.5,
        )
    for step in boundaries:
        axis.axvline(step, color="0.6", linewidth=0.5, zorder=0)
    axis.set(ylabel="rank", ylim=(num_ranks - 0.5, -0.5), title="Which partition trained where, when")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_legend(axis: Axes, names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=_color(index), label=f"{index} {name}") for index, name in enumerate(names)]
    patches.append(Patch(facecolor="0.8", hatch="///", edgecolor="white", label="frozen"))
    axis.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")


def _draw_statistic(axis: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    for partition in sorted({row["partition"] for row in rows}):
        points = [
            (row["step"], row[key])
            for row in rows
            if row["partition"] == partition and row.get(key) is not None
        ]
        if points:
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, color=_color(partition), marker=".", linewidth=1)
    axis.set_ylabel(STATISTICS[key])


def _color(partition: int) -> str:
    return f"C{partition % 10}"
