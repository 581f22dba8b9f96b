"""What the command line prints: errors on stderr, progress and results on stdout."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from efficient_dl.training.run_folder import Summary


def print_error(text: str) -> None:
    """An error in a panel on a terminal, and as plain lines elsewhere, so that logs can be searched."""
    if sys.stderr.isatty():
        title, _, body = text.partition(": ") if ": " in text.splitlines()[0] else ("Error", "", text)
        Console(stderr=True).print(
            Panel(Text(body), title=Text(title), border_style="red", title_align="left")
        )
    else:
        print(text, file=sys.stderr, flush=True)


class Progress(Protocol):
    """Shows how far a run is."""

    def start(self, label: str, done: int, total: int) -> None: ...
    def advance(self, step: int) -> None: ...
    def row(self, row: Mapping[str, object]) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Shows nothing: every rank but the first."""

    def start(self, label: str, done: int, total: int) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def row(self, row: Mapping[str, object]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def stop(self) -> None:
        pass


class Lines(Silent):
    """One plain line a row of metrics, for logs."""

    def __init__(self) -> None:
        self._label = ""

    def start(self, label: str, done: int, total: int) -> None:
        self._label = label
        self.note(f"from step {done} to {total}")

    def row(self, row: Mapping[str, object]) -> None:
        self.note(row_text(row))

    def note(self, text: str) -> None:
        print(f"[{self._label}] {text}" if self._label else text, flush=True)


class Bar:
    """A progress bar with the latest row of metrics beside it, for terminals."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[row]}"),
        )
        self._bars = Bars(*columns, console=Console(soft_wrap=True))
        self._task = None

    def start(self, label: str, done: int, total: int) -> None:
        self._bars.start()
        self._task = self._bars.add_task(label, completed=done, total=total, row="")

    def advance(self, step: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=step)

    def row(self, row: Mapping[str, object]) -> None:
        if self._task is not None:
            self._bars.update(self._task, row=row_text({key: row[key] for key in row if key != "step"}))

    def note(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        self._bars.stop()


def progress_for(rank: int) -> Progress:
    """A bar on rank 0's terminal, lines where its output is a file, nothing on other ranks."""
    if rank != 0:
        return Silent()
    return Bar() if sys.stdout.isatty() else Lines()


_SHOWN = ("step", "loss", "val_loss", "val_accuracy", "wire_bytes_per_step", "step_seconds")


def row_text(row: Mapping[str, object]) -> str:
    """A row of metrics in one short line."""
    words = []
    for key in _SHOWN:
        value = row.get(key)
        if value is None:
            continue
        if key == "wire_bytes_per_step":
            words.append(f"{byte_text(float(value))}/step")  # type: ignore[arg-type]  # a number by its name
        elif key == "step_seconds":
            words.append(f"{float(value) * 1000:.0f} ms")  # type: ignore[arg-type]
        else:
            words.append(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(words)


def result_text(summary: Summary, path: Path) -> str:
    """What a run came to in one line. path: where the summary lies."""
    return "  ".join(
        (
            f"done: val_loss {summary.val_loss:.4f}",
            f"{byte_text(summary.wire_bytes_per_step)}/step",
            f"{summary.bits_per_value:.2f} bits/value",
            f"ratio {summary.ratio:.2f}",
            f"{summary.step_seconds_median * 1000:.0f} ms/step",
            str(path),
        )
    )


def byte_text(count: float) -> str:
    """A number of bytes with its unit: 812 B, 3.20 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
