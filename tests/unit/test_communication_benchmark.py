"""benchmarks.communication: what a cell's seconds come to, and that no cell is measured twice."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.communication import main, measured_cells, median_upper95, rows_of
from benchmarks.communication_cell import AUTO, COMPUTE, NATIVE, Cell, Measured
from benchmarks.rows import RowFile

CELL = Cell(
    {
        COMPUTE: Measured([1.0, 1.0, 1.0]),
        NATIVE: Measured([3.0, 2.0, 4.0], 600.0),
        "2.0": Measured([1.5, 1.0, 2.0], 60.0),
        AUTO: Measured([1.2, 1.6, 4.0], 60.0, "why"),
    },
    exposed={"none": 2.0, "2.0": 0.25},
)


def test_the_rows_of_a_cell() -> None:
    found = {(row.system, row.metric): row.value for row in rows_of("case", CELL)}
    assert found[COMPUTE, "step_seconds"] == 1.0
    assert found[NATIVE, "exposed_seconds"] == 2.0 and found["2.0", "exposed_seconds"] == 0.5
    assert found["2.0", "exposed_shorter"] == 4.0
    assert found["2.0", "nic_bytes_per_step"] == 20.0
    assert found["2.0", "step_over_native"] == 0.5  # of steps of one round, not of medians
    assert found[AUTO, "step_over_native"] == 0.8
    assert found[AUTO, "step_over_best_fixed"] == pytest.approx(1.6 / 1.5)
    assert found[NATIVE, "predicted_over_measured"] == 1.0
    assert found["2.0", "predicted_over_measured"] == pytest.approx(1.25 / 1.5)
    assert (AUTO, "predicted_over_measured") not in found  # it is one of the others
    assert Cell.from_json(CELL.to_json()) == CELL


def test_the_upper_end_is_above_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    tries = [[draw.lognormvariate(0.0, 1.0) for _ in range(20)] for _ in range(2000)]
    assert sum(median_upper95(one) >= 1.0 for one in tries) / len(tries) >= 0.965  # one side of 95 %
    assert all(median_upper95(one) >= statistics.median(one) for one in tries)


def test_a_cell_that_is_there_is_not_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    file = RowFile(out)
    for row in rows_of("gpt-micro, 2 hosts, unshaped", CELL):
        file.add(row)
    assert measured_cells(out) == {"gpt-micro, 2 hosts, unshaped": set(CELL.systems)}
    before = out.read_text()
    app = typer.Typer()
    app.command()(main)
    options = ["--models", "gpt-micro", "--hosts", "2", "--rates", "none", "--systems", "2.0,auto"]
    result = CliRunner().invoke(app, ["--out", str(out), *options])
    assert result.exit_code == 0 and "gpt-micro, 2 hosts, unshaped: measured already" in result.output
    assert out.read_text() == before
    assert measured_cells(None) == measured_cells(tmp_path / "none") == {}
