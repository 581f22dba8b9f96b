"""What the cases of the codec benchmark share: their tensors, their settings, and how they report speeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from benchmarks.codec_tensors import MOMENTS, Trained
from benchmarks.codec_timing import System, Timing
from benchmarks.rows import Row, RowFile
from efficient_dl.codec import Codec, make_codec

BENCH = "codec"
OURS = "efficient_dl"
MIB = 2**20
MIN_WIDTH = 160  # columns of the tables, which are unreadable when folded
SPEED_COLUMNS = ("encode GB/s", "median", "decode GB/s", "median", "encode ×", "decode ×")


@dataclass
class Run:
    """One run of the benchmark.

    rounds: turns of each system (`measure` says when there are fewer or more).
    timing_bytes: tensors are timed at this size (25 MiB is the size of DDP's buckets).
    moments: of the trainings. big: also the 256 MiB tensor on a CPU.
    """

    trained: Trained
    file: RowFile
    rounds: int
    timing_bytes: int
    moments: tuple[str, ...] = MOMENTS
    big: bool = False
    quick: bool = False
    console: Console = field(default_factory=lambda: Console(width=max(Console().width, MIN_WIDTH)))
    _said: set[str] = field(default_factory=set)

    def row(self, case: str, system: str, metric: str, value: float, unit: str, higher: bool) -> None:
        """Appends one measurement."""
        self.file.add(Row(BENCH, case, system, metric, value, unit, higher))

    def say(self, sentence: str) -> None:
        """Prints what is left out and why, once."""
        if sentence not in self._said:
            self._said.add(sentence)
            self.console.print(f"\n{sentence}", style="yellow", highlight=False)

    def speeds(
        self,
        case: str,
        num_bytes: int,
        timings: Mapping[str, tuple[Timing, Timing]],
        systems: Sequence[System],
        ours: str = OURS,
    ) -> dict[str, list[str]]:
        """Adds each system's speeds, and ours over each of theirs; returns the cells of SPEED_COLUMNS by system.

        num_bytes: of the uncompressed tensor, which all speeds count.
        """
        cells: dict[str, list[str]] = {}
        for system in systems:
            row, factors = list[str](), list[str]()
            for i, direction in enumerate(("encode", "decode")):
                timing = timings[system.name][i]
                best, median = timing.speed(num_bytes), timing.median_speed(num_bytes)
                self.row(case, system.name, f"{direction}_gb_per_s", best, "GB/s, best", True)
                self.row(case, system.name, f"{direction}_gb_per_s_median", median, "GB/s, median", True)
                row += [f"{best:.2f}", f"{median:.2f}"]
                if ours not in timings or system.name == ours:
                    factors.append("")
                    continue
                factor = timing.best / timings[ours][i].best
                self.row(case, ours, f"{direction}_speed over {system.name}", factor, "×", True)
                factors.append(f"{factor:.2f}")
            cells[system.name] = row + factors
        return cells


def our_codec(spec: str, kernel: str = "auto") -> Codec:
    """The codec without checksum, as the peers have none."""
    return make_codec(spec, checksum=False, kernel=kernel)


def speed_table(title: str, *columns: str) -> Table:
    """An empty table: the tensor, the system, the given columns, then SPEED_COLUMNS."""
    table = Table(
        title=title, caption="×: our best time against the system's; GB/s of the uncompressed tensor"
    )
    table.add_column("tensor")
    table.add_column("system")
    for name in (*columns, *SPEED_COLUMNS):
        table.add_column(name, justify="right")
    return table
