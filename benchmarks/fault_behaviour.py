"""What `benchmarks.faults` does to a running job, and what must come of it, whichever launcher started it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from cluster.errors import EmulationError
from cluster.faults import HurtJob, environment_of, pids, wait_until

STEPS = 120
CHECKPOINT_EVERY = 10
FAULT_STEP = 33
MODULE = "benchmarks.faulty_rank"
REPOSITORY = Path(__file__).parents[1]
START_SECONDS = 300.0
END_SECONDS = 300.0
_START = re.compile(r"from step (\d+) to \d+")


@dataclass(frozen=True)
class Outcome:
    """behaviour: in words, with exit codes. recovery_seconds: from the fault to the first finished step after it.

    lost_steps: trained before the fault, and once more after it. end_seconds: from the fault to the job's end, where
    only the same command brings it back, or nothing.
    """

    behaviour: str
    recovery_seconds: float | None = None
    lost_steps: int | None = None
    end_seconds: float | None = None


Fault: TypeAlias = Callable[[Any, Path], Outcome]  # of a job (a HurtJob) and its run's folder
Hurt: TypeAlias = Callable[[Any], object]


def train_words(out: Path) -> list[str]:
    """The command that all jobs run."""
    settings = {
        "train.checkpoint_every": CHECKPOINT_EVERY,
        "train.log_every": 1,
        "train.eval_every": 0,
        "train.eval_batches": 2,
        "model.dropout": 0.2,
    }
    words = ["train", "--model", "mlp-nano", "--data", "digits", "--bits", "2.0", "--steps", str(STEPS)]
    return [*words, "--out", str(out), *(word for k, v in settings.items() for word in ("--set", f"{k}={v}"))]


class Metrics:
    """A run's metrics.jsonl as it grows. A restarted run writes a new file."""

    def __init__(self, out: Path) -> None:
        self._path = out / "metrics.jsonl"

    def steps(self) -> list[int]:
        """Of all complete rows."""
        try:
            lines = self._path.read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def last(self) -> int:
        """The last step that was logged, 0 before the first."""
        return max(self.steps(), default=0)

    def file(self) -> int:
        """Which file it is."""
        return self._path.stat().st_ino


class Restart:
    """Waits for a job's next start, and for its first step. Made when the fault happens."""

    def __init__(self, job: HurtJob, metrics: Metrics) -> None:
        self._job, self._metrics = job, metrics
        self._begin = time.monotonic()
        self._starts = self._all_starts()
        self._last = metrics.last()

    def ended(self) -> float:
        """The seconds from the fault until now, when the job has ended by itself and was not yet started again."""
        self._last = max(self._last, self._metrics.last())
        return time.monotonic() - self._begin

    def awaited(self) -> tuple[float, int]:
        """The seconds from the fault to a step of the restarted run, and how many steps were trained in vain."""
        wait_until(self._has_started, END_SECONDS, lambda: f"a restart; {self._job.output()}")
        before, now = self._starts, self._all_starts()
        resumed = [step for old, new in zip(before, now, strict=True) for step in new[len(old) :]][-1]
        wait_until(
            lambda: self._metrics.last() > resumed,
            START_SECONDS,
            lambda: f"a step after {resumed}; {self._job.output()}",
        )
        return time.monotonic() - self._begin, self._last - resumed

    def _has_started(self) -> bool:
        """The lines come after the new file of metrics."""
        if sum(map(len, self._all_starts())) > sum(map(len, self._starts)):
            return True
        self._last = max(self._last, self._metrics.last())
        return False

    def _all_starts(self) -> list[list[int]]:
        """By output, the steps from which runs have gone on: what rank 0 prints, wherever it is."""
        return [[int(step) for step in _START.findall(text)] for text in self._job.output()]


def running(job: HurtJob, out: Path) -> Metrics:
    """Waits until the job has passed the step at which faults happen."""
    metrics = Metrics(out)
    wait_until(
        lambda: metrics.last() >= FAULT_STEP, START_SECONDS, lambda: f"step {FAULT_STEP}; {job.output()}"
    )
    return metrics


def happened(job: HurtJob, out: Path) -> Metrics:
    """Waits until a fault inside a rank has happened."""
    wait_until((out.parent / "fault").exists, START_SECONDS, lambda: f"the fault; {job.output()}")
    return Metrics(out)


def restarted_after(hurt: Hurt, hosts: tuple[int, ...] = (0, 1), afterwards: Hurt | None = None) -> Fault:
    """The launcher starts all workers again, which go on from the last checkpoint.

    hosts: that are left to end with 0. afterwards: what is done to the job when it trains again.
    """

    def fault(job: HurtJob, out: Path) -> Outcome:
        metrics = running(job, out)
        restart = Restart(job, metrics)
        hurt(job)
        seconds, lost = restart.awaited()
        codes = job.wait(END_SECONDS, hosts)
        if any(codes):
            raise EmulationError(f"the job ended with {codes}; {job.output()}")
        if afterwards is not None:
            afterwards(job)
            wait_until(lambda: not job.left(), END_SECONDS, lambda: f"the rest to end: {job.left()}")
        workers = "all workers" if len(hosts) == 2 else "the worker of the host that is left"
        return Outcome(f"{workers} restarted from the last checkpoint; exit code 0", seconds, lost)

    return fault


def inside_restarted(words: str) -> Fault:
    """A fault inside a rank: all end, and are restarted. words: that one of them must print."""

    def fault(job: HurtJob, out: Path) -> Outcome:
        metrics = happened(job, out)
        seconds, lost = Restart(job, metrics).awaited()
        codes = job.wait(END_SECONDS)
        if any(codes) or not any(words in text for text in job.output()):
            raise EmulationError(f"the job ended with {codes}, without {words!r}; {job.output()}")
        return Outcome(
            f"`{words}`; all workers restarted from the last checkpoint; exit code 0", seconds, lost
        )

    return fault


def again_after(
    hurt: Hurt | None,
    how: str = "the job ends",
    words: str = "",
    mend: Hurt | None = None,
) -> Fault:
    """The job ends in time, with an exit code that says so, and the same command goes on.

    hurt: None for a fault inside a rank. how: it must be said that the job ends. words: that a rank must print.
    mend: what is done once the job has left nothing on the first host, so that nothing stays on the other one.
    """

    def fault(job: HurtJob, out: Path) -> Outcome:
        metrics = running(job, out) if hurt else happened(job, out)
        restart = Restart(job, metrics)
        if hurt:
            hurt(job)
        codes = job.wait(END_SECONDS)

        def left() -> list[int]:
            return pids(job.network.namespace(0)) if mend else job.left()

        wait_until(lambda: not left(), END_SECONDS, lambda: f"all to end: {left()}; {job.output()}")
        ended = restart.ended()
        if not any(codes) or not any(words in text for text in job.output()):
            raise EmulationError(f"the job ended with {codes}, without {words!r}; {job.output()}")
        if mend:
            mend(job)
            wait_until(lambda: not job.left(), END_SECONDS, lambda: f"the rest to end: {job.left()}")
        job.begin()
        seconds, lost = restart.awaited()
        if any(job.wait(END_SECONDS)):
            raise EmulationError(f"the second job failed; {job.output()}")
        said = f"`{words}`; " if words else ""
        return Outcome(f"{said}{how}, exit {_said(codes)}; the same command goes on", seconds, lost, ended)

    return fault


def ends_after(hurt: Hurt, how: str) -> Fault:
    """The job ends for good. how: it must be said."""

    def fault(job: HurtJob, out: Path) -> Outcome:
        running(job, out)
        begin = time.monotonic()
        hurt(job)
        codes = job.wait(END_SECONDS)
        wait_until(lambda: not job.left(), END_SECONDS, lambda: f"all to end: {job.left()}; {job.output()}")
        if not any(codes):
            raise EmulationError(f"the job ended with {codes}; {job.output()}")
        return Outcome(f"{how}, exit {_said(codes)}", None, None, time.monotonic() - begin)

    return fault


def link_cut_for(cut_seconds: float) -> Fault:
    """A link is dead for some seconds: training waits, and goes on."""

    def fault(job: HurtJob, out: Path) -> Outcome:
        metrics = running(job, out)
        file, begin = metrics.file(), time.monotonic()
        job.cut(1)
        time.sleep(cut_seconds)
        last = metrics.last()
        job.restore(1)
        wait_until(
            lambda: metrics.last() > last,
            END_SECONDS,
            lambda: f"a step after the link is back; {job.output()}",
        )
        return _undisturbed(job, metrics, file, time.monotonic() - begin, "training waits for the link")

    return fault


def slowed(job: HurtJob, out: Path) -> Outcome:
    """A rank is slow for some steps: the others wait for it, and nothing else happens."""
    metrics = happened(job, out)
    file, begin = metrics.file(), time.monotonic()
    last = metrics.last()
    wait_until(lambda: metrics.last() > last, END_SECONDS, lambda: f"a slow step; {job.output()}")
    return _undisturbed(job, metrics, file, time.monotonic() - begin, "all ranks wait for it")


def _undisturbed(job: HurtJob, metrics: Metrics, file: int, waited: float, how: str) -> Outcome:
    codes = job.wait(END_SECONDS)
    if any(codes) or metrics.file() != file:
        raise EmulationError(f"the job ended with {codes}, or was started again; {job.output()}")
    return Outcome(f"{how}, and goes on; exit code 0", waited, 0)


def refused(words: str) -> Fault:
    """The job ends before its first step, and is not started again. words: that one of its ranks must print."""

    def fault(job: HurtJob, out: Path) -> Outcome:
        begin = time.monotonic()
        codes = job.wait(END_SECONDS)
        starts = sum(text.count(words) for text in job.output())
        if not all(codes) or starts != 1 or Metrics(out).last():
            raise EmulationError(f"{codes}, {words!r} {starts} times; {job.output()}")
        return Outcome(f"`{words}`, exit {_said(codes)}", None, None, time.monotonic() - begin)

    return fault


def same_port(job: HurtJob, out: Path) -> Outcome:
    """A second job is given the first one's address and port, without a launcher: it is refused, the first goes on."""
    metrics = running(job, out)
    file = metrics.file()
    theirs = environment_of(job.rank(0))
    address = theirs["MASTER_ADDR"]
    if address in job.network.names:
        address = job.network.address(job.network.names.index(address))
    mine = {"MASTER_ADDR": address, "MASTER_PORT": theirs["MASTER_PORT"], "WORLD_SIZE": "2"}
    mine |= {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-m", "efficient_dl.cli", *train_words(out.with_name("second"))]
    second = [
        subprocess.Popen(
            ["ip", "netns", "exec", job.network.namespace(host), *words],
            env={**os.environ, **mine, "RANK": str(host), "LOCAL_RANK": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    printed = [process.communicate(timeout=END_SECONDS)[1] for process in second]
    refusals = [process.returncode for process in second]
    codes = job.wait(END_SECONDS)
    if any(codes) or metrics.file() != file or not all(refusals):
        raise EmulationError(
            f"the first job was disturbed ({codes}), or the second went on: {refusals}, {printed}"
        )
    return Outcome(f"the second job ends, exit {_said(refusals)}; the first goes on undisturbed", None, 0)


def _said(codes: list[int]) -> str:
    return f"code {codes[0]}" if len(set(codes)) == 1 else f"codes {' and '.join(map(str, codes))}"
