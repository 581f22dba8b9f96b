"""The faults of `benchmarks.faults`, one function each: what is done to a running job, and what it must come to."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import EmulationError
from cluster.faults import Launcher, TorchrunJob, wait_until
from cluster.network import EmulatedNetwork

STEPS = 120
CHECKPOINT_EVERY = 10
FAULT_STEP = 33
PACE_SECONDS = 0.04
REPOSITORY = Path(__file__).parents[1]
_START_SECONDS = 120.0
_END_SECONDS = 200.0
_START = re.compile(r"from step (\d+) to \d+")


@dataclass(frozen=True)
class Outcome:
    """behaviour: in words, with exit codes. recovery_seconds: from the fault to the first step after it.

    lost_steps: trained before the fault, and once more after it.
    """

    behaviour: str
    recovery_seconds: float | None = None
    lost_steps: int | None = None


@dataclass(frozen=True)
class Case:
    """A fault. inside: arguments of `benchmarks.faulty_rank`. settings: of the run, for `--set`.

    is_exact: the run must come to the bits of an undisturbed one, where it comes to its end. pace_seconds: that each
    step takes longer.
    """

    title: str
    fault: Callable[[TorchrunJob, Path], Outcome]
    launcher: Launcher = field(default_factory=Launcher)
    inside: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    is_exact: bool = True
    pace_seconds: float = PACE_SECONDS

    def job(self, network: EmulatedNetwork, folder: Path) -> TorchrunJob:
        """The job, not yet started."""
        inside = ["--pace", str(self.pace_seconds), *self.inside]
        if self.inside:
            inside += ["--once", str(folder / "fault")]
        words = [*train_words(folder / "run"), *(word for one in self.settings for word in ("--set", one))]
        command = ["-m", "benchmarks.faulty_rank", *inside, "--", *words, "--resume-or-start"]
        return TorchrunJob(network, command, folder, self.launcher, {"PYTHONPATH": str(REPOSITORY)})

    def run(self, job: TorchrunJob, out: Path) -> Outcome:
        """Waits until the job trains, lets the fault happen, and tells what came of it."""
        return self.fault(job, out)


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


def running(job: TorchrunJob, out: Path) -> Metrics:
    """Waits until the job has passed the step at which faults happen."""
    metrics = Metrics(out)
    wait_until(
        lambda: metrics.last() >= FAULT_STEP, _START_SECONDS, lambda: f"step {FAULT_STEP}; {job.output()}"
    )
    return metrics


class Restart:
    """Waits for a job's next start, and for its first step. Made when the fault happens."""

    def __init__(self, job: TorchrunJob, metrics: Metrics) -> None:
        self._job, self._metrics = job, metrics
        self._begin = time.monotonic()
        self._starts = self._all_starts()
        self._last = metrics.last()

    def awaited(self) -> tuple[float, int]:
        """The seconds from the fault to a step of the restarted run, and how many steps were trained in vain."""
        wait_until(self._has_started, _END_SECONDS, lambda: f"a restart; {self._job.output()}")
        before, now = self._starts, self._all_starts()
        resumed = [step for old, new in zip(before, now, strict=True) for step in new[len(old) :]][-1]
        wait_until(
            lambda: self._metrics.last() > resumed,
            _START_SECONDS,
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
        """By host, the steps from which runs have gone on: what rank 0 prints, wherever it is."""
        return [[int(step) for step in _START.findall(text)] for text in self._job.output()]


def restarted_after(
    hurt: Callable[[TorchrunJob], None], hosts: tuple[int, ...] = (0, 1)
) -> Callable[[TorchrunJob, Path], Outcome]:
    """The agents start all workers again, which go on from the last checkpoint. hosts: that are left."""

    def fault(job: TorchrunJob, out: Path) -> Outcome:
        metrics = running(job, out)
        restart = Restart(job, metrics)
        hurt(job)
        seconds, lost = restart.awaited()
        codes = job.wait(_END_SECONDS, hosts)
        if any(codes):
            raise EmulationError(f"agents ended with {codes}; {job.output()}")
        workers = "all workers" if len(hosts) == 2 else "the worker of the host that is left"
        return Outcome(f"{workers} restarted from the last checkpoint; exit code 0", seconds, lost)

    return fault


def inside_restarted(words: str) -> Callable[[TorchrunJob, Path], Outcome]:
    """A fault inside a rank: all end, and are restarted. words: that one of them must print."""

    def fault(job: TorchrunJob, out: Path) -> Outcome:
        metrics, happened = Metrics(out), out.parent / "fault"
        wait_until(happened.exists, _START_SECONDS, lambda: f"the fault; {job.output()}")
        seconds, lost = Restart(job, metrics).awaited()
        codes = job.wait(_END_SECONDS)
        if any(codes) or not any(words in text for text in job.output()):
            raise EmulationError(f"agents ended with {codes}, without {words!r}; {job.output()}")
        return Outcome(
            f"`{words}`; all workers restarted from the last checkpoint; exit code 0", seconds, lost
        )

    return fault


def link_cut_for(seconds: float) -> Callable[[TorchrunJob, Path], Outcome]:
    """A link is dead for some seconds: training waits, and goes on."""

    def fault(job: TorchrunJob, out: Path) -> Outcome:
        metrics = running(job, out)
        file = metrics.file()
        job.cut(1)
        time.sleep(seconds)
        last, begin = metrics.last(), time.monotonic()
        job.restore(1)
        wait_until(
            lambda: metrics.last() > last,
            _END_SECONDS,
            lambda: f"a step after the link is back; {job.output()}",
        )
        waited = time.monotonic() - begin
        codes = job.wait(_END_SECONDS)
        if any(codes) or metrics.file() != file:
            raise EmulationError(f"agents ended with {codes}, or workers were restarted; {job.output()}")
        return Outcome("training waits for the link, and goes on; exit code 0", waited, 0)

    return fault


def head_killed(job: TorchrunJob, out: Path) -> Outcome:
    """The agent that keeps the rendezvous is gone: the job ends, and the same command goes on."""
    metrics = running(job, out)
    begin = time.monotonic()
    job.kill_agent(0)
    codes = job.wait(_END_SECONDS)
    wait_until(lambda: not job.left(), _END_SECONDS, lambda: f"all processes to end; {job.output()}")
    ended = time.monotonic() - begin
    restart = Restart(job, metrics)
    for host in range(2):
        job.start(host)
    seconds, lost = restart.awaited()
    if any(job.wait(_END_SECONDS)):
        raise EmulationError(f"the second job failed; {job.output()}")
    return Outcome(
        f"the job ends after {ended:.0f} s, exit codes {codes}; the same command goes on", seconds, lost
    )


def preempted(number: signal.Signals) -> Callable[[TorchrunJob, Path], Outcome]:
    """All agents are signalled: a checkpoint, and the same command goes on without loss."""

    def fault(job: TorchrunJob, out: Path) -> Outcome:
        metrics = running(job, out)
        begin = time.monotonic()
        for host in range(2):
            os.kill(job.agent(host), number)
        codes = job.wait(_END_SECONDS)
        ended, restart = time.monotonic() - begin, Restart(job, metrics)
        for host in range(2):
            job.start(host)
        seconds, lost = restart.awaited()
        if any(job.wait(_END_SECONDS)):
            raise EmulationError(f"the second job failed; {job.output()}")
        return Outcome(
            f"a checkpoint of the last step, and the end, after {ended:.1f} s, exit codes {codes} of torchrun; "
            "the same command goes on",
            seconds,
            lost,
        )

    return fault


def refused(words: str) -> Callable[[TorchrunJob, Path], Outcome]:
    """The job ends before its first step. words: that one of its ranks must print."""

    def fault(job: TorchrunJob, out: Path) -> Outcome:
        begin = time.monotonic()
        codes = job.wait(_END_SECONDS)
        if not all(codes) or not any(words in text for text in job.output()):
            raise EmulationError(f"agents ended with {codes}, without {words!r}; {job.output()}")
        return Outcome(f"`{words}`, {time.monotonic() - begin:.0f} s after the start", None, None)

    return fault


def same_port(job: TorchrunJob, out: Path) -> Outcome:
    """A second job is given the first one's address and port, without an agent: it is refused, the first goes on."""
    metrics = running(job, out)
    file = metrics.file()
    with Path(f"/proc/{job.worker(0)}/environ").open("rb") as environ:
        theirs = dict(one.split("=", 1) for one in environ.read().decode().split("\0") if "=" in one)
    variables = {
        key: theirs[key] for key in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "GLOO_SOCKET_IFNAME")
    }
    environment = {**os.environ, **variables, "LOCAL_RANK": "0", "PYTHONPATH": str(REPOSITORY)}
    words = train_words(out.with_name("second"))
    second = [
        subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                job.network.namespace(host),
                sys.executable,
                "-m",
                "efficient_dl.cli",
                *words,
            ],
            env={**environment, "RANK": str(host), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    printed = [process.communicate(timeout=_END_SECONDS)[1] for process in second]
    codes = [process.returncode for process in second]
    if any(job.wait(_END_SECONDS)) or metrics.file() != file or not all(codes):
        raise EmulationError(f"the first job was disturbed, or the second went on: {codes}, {printed}")
    return Outcome(f"the second job ends, exit codes {codes}; the first goes on undisturbed", None, 0)


_SHORT = ("run.timeout_seconds=8",)
_ALONE = Launcher(hosts="1:2", join_seconds=30)
CASES: dict[str, Case] = {
    "worker-killed": Case("SIGKILL of a worker", restarted_after(lambda job: job.kill_worker(1))),
    "rank-0-killed": Case("SIGKILL of rank 0", restarted_after(lambda job: job.kill_worker(0))),
    "agent-killed": Case(
        "SIGKILL of an agent, --nnodes 1:2",
        restarted_after(lambda job: job.kill_agent(1), hosts=(0,)),
        _ALONE,
        is_exact=False,  # of one worker
    ),
    "head-killed": Case("SIGKILL of the agent with the rendezvous", head_killed),
    "sigterm": Case("SIGTERM to all agents", preempted(signal.SIGTERM)),
    "link-cut-5-s": Case("a link is cut for 5 s", link_cut_for(5.0)),
    "link-cut": Case(
        "a link is cut for good, --nnodes 1:2, time-out 8 s",
        restarted_after(lambda job: job.cut(1), hosts=(0,)),
        _ALONE,
        settings=_SHORT,
        is_exact=False,
    ),
    "worker-stopped": Case(
        "SIGSTOP of a worker, time-out 8 s", restarted_after(lambda job: job.stop_worker(1)), settings=_SHORT
    ),
    "hang": Case(
        "a rank hangs, watchdog 8 s",
        inside_restarted("RankStuck: rank 1 makes no progress"),
        inside=("--fault", "hang", "--step", str(FAULT_STEP)),
        settings=("run.watchdog_seconds=8",),
    ),
    "flip": Case(
        "a bit flips in a packet",
        inside_restarted("CorruptPacket"),
        inside=("--fault", "flip", "--step", str(FAULT_STEP)),
    ),
    "version": Case(
        "different versions on two ranks",
        refused("PlanMismatch: rank 1 runs another version than rank 0"),
        Launcher(max_restarts=0),
        inside=("--fault", "version"),
    ),
    "same-port": Case("a second job on the same port", same_port, pace_seconds=0.6),
}
