"""A run notices on shaped links that its plan no longer pays, and chooses a hierarchy where workers share a link."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.emulate import EmulatedNetwork
from efficient_dl.training.run_folder import RunFolder

pytestmark = [pytest.mark.netns, pytest.mark.slow]

EDL = [sys.executable, "-m", "efficient_dl.cli", "train", "--model", "mlp-mini", "--data", "digits"]
ENVIRONMENT = {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}


def settings(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


@contextmanager
def slowed(network: EmulatedNetwork, out: Path, after_step: int, rate: str) -> Iterator[None]:
    """Gives all links another rate once a run has logged a step."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not ended.wait(0.1):
            if any(row["step"] >= after_step for row in RunFolder(out, writes=False).rows()):
                network.set_rate(rate)
                return

    ended = threading.Event()
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.timeout(300)
def test_a_run_on_a_link_that_becomes_slow_begins_to_compress(tmp_path: Path) -> None:
    """Native at first. What it notices is that its steps take longer; what it decides on are two short looks."""
    out = tmp_path / "run"
    words = settings("compression.check_every=20", "train.log_every=20", "train.eval_every=0")
    with EmulatedNetwork(hosts=2, rate="none") as network, slowed(network, out, 100, "10mbit"):
        run = network.run(
            [*EDL, "--bits", "auto", "--steps", "260", "--out", str(out), *words],
            environment=ENVIRONMENT,
            quiet=True,
            timeout_seconds=240,
        )
    assert run.exit_code == 0, run.output
    plan: dict[str, Any] = json.loads((out / "plan.json").read_text())
    assert plan["decision"]["bits"] == "none"
    rows = RunFolder(out, writes=False).rows()
    (change,) = [row for row in rows if row.get("event") == "plan"]
    assert change["step"] > 100 and change["bits"] in ("4.0", "2.0")
    assert change["reason"].startswith("switched from native: ")
    sent = {row["step"]: row["wire_bytes_per_step"] for row in rows if "wire_bytes_per_step" in row}
    assert sent[260] < sent[100] / 4
    assert json.loads((out / "summary.json").read_text())["bits"] == float(change["bits"])


@pytest.mark.timeout(300)
def test_two_workers_behind_one_slow_link_reduce_between_hosts_if_nobody_says_otherwise(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    with EmulatedNetwork(hosts=2, rate="20mbit") as network:
        before = network.tx_bytes(0)
        run = network.run(
            [*EDL, "--steps", "3", "--out", str(out)],
            workers_per_host=2,
            environment=ENVIRONMENT,
            quiet=True,
            timeout_seconds=240,
        )
        assert network.tx_bytes(0) > before
    assert run.exit_code == 0, run.output
    plan = json.loads((out / "plan.json").read_text())
    assert plan["measurements"]["ranks_per_node"] == [2, 2]
    assert plan["measurements"]["between"] and plan["measurements"]["inside"]
    assert plan["decision"]["hierarchy"] is True
    assert plan["decision"]["bits"] != "none"
