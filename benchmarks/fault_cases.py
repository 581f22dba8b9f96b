"""The faults of `benchmarks.faults` for each launcher: what is done, and what is promised."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fault_behaviour import (
    FAULT_STEP,
    Fault,
    Outcome,
    again_after,
    ends_after,
    inside_restarted,
    link_cut_for,
    refused,
    restarted_after,
    same_port,
    slowed,
    train_words,
)
from benchmarks.fault_jobs import MakesJob, mpirun_job, slurm_job, torchrun_job
from cluster.faults import HurtJob
from cluster.torchrun import Launcher, TorchrunJob

_PACE_SECONDS = 0.04
RESTARTED = "started again by the launcher, from the last checkpoint"
AGAIN = "ends in time; the same command goes on from the last checkpoint"
WAITS = "training waits, and goes on"
REFUSED = "refused before the first step, and not started again"


@dataclass(frozen=True)
class Case:
    """A fault, and what is promised. inside: arguments of `benchmarks.faulty_rank`. settings: of the run, for `--set`.

    is_exact: the run must come to the bits of an undisturbed one, where it comes to its end. pace_seconds: that each
    step takes longer.
    """

    title: str
    promise: str
    fault: Fault
    launcher: Launcher = field(default_factory=Launcher)
    inside: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    is_exact: bool = True
    pace_seconds: float = _PACE_SECONDS

    @contextlib.contextmanager
    def job(self, makes: MakesJob, folder: Path) -> Iterator[HurtJob]:
        """The job, begun, until the block ends."""
        inside = ["--pace", str(self.pace_seconds), *self.inside]
        if self.inside:
            inside += ["--once", str(folder / "fault")]
        words = [*train_words(folder / "run"), *(word for one in self.settings for word in ("--set", one))]
        with makes([*inside, "--", *words, "--resume-or-start"], folder, self.launcher) as job:
            yield job

    def run(self, job: HurtJob, out: Path) -> Outcome:
        """Waits until the job trains, lets the fault happen, and tells what came of it."""
        return self.fault(job, out)


def _inside(fault: str) -> tuple[str, ...]:
    return ("--fault", fault, "--step", str(FAULT_STEP))


def _signal_agents(job: TorchrunJob) -> None:
    for host in job.hosts():
        os.kill(job.agent(host), signal.SIGTERM)


_SHORT = ("run.timeout_seconds=8",)
_WATCHED = ("run.watchdog_seconds=8",)
_ALONE = Launcher(hosts="1:2", join_seconds=30)
_VERSION = "PlanMismatch: rank 1 runs another version than rank 0"
_STUCK = "RankStuck: rank 1 makes no progress"
_DEAD_RANK = "SIGKILL of a worker"
_DEAD_FIRST = "SIGKILL of rank 0"
_STOPPED = "SIGSTOP of a worker, time-out 8 s"
_HANGS = "a rank hangs, watchdog 8 s"
_FLIP = "a bit flips in a packet"
_CUT = "a link is cut for good, time-out 8 s"

_ALL: dict[str, Case] = {  # the same under every launcher
    "link-cut-5-s": Case("a link is cut for 5 s", WAITS, link_cut_for(5.0)),
    "slow": Case("a rank takes 1 s longer for 10 steps", WAITS, slowed, inside=_inside("slow")),
    "same-port": Case(
        "a second job on the same port",
        "the second is refused, the first goes on",
        same_port,
        pace_seconds=0.6,
    ),
}
_RESTARTED: dict[str, Case] = {  # where the launcher restarts
    "worker-killed": Case(_DEAD_RANK, RESTARTED, restarted_after(lambda job: job.kill(1))),
    "rank-0-killed": Case(_DEAD_FIRST, RESTARTED, restarted_after(lambda job: job.kill(0))),
    "worker-stopped": Case(_STOPPED, RESTARTED, restarted_after(lambda job: job.stop(1)), settings=_SHORT),
    "hang": Case(_HANGS, RESTARTED, inside_restarted(_STUCK), inside=_inside("hang"), settings=_WATCHED),
    "flip": Case(_FLIP, RESTARTED, inside_restarted("CorruptPacket"), inside=_inside("flip")),
}
TORCHRUN: dict[str, Case] = {
    **_RESTARTED,
    "agent-killed": Case(
        "SIGKILL of an agent, --nnodes 1:2",
        RESTARTED,
        restarted_after(lambda job: job.kill_agent(1), hosts=(0,)),
        _ALONE,
        is_exact=False,  # of one worker
    ),
    "head-killed": Case(
        "SIGKILL of the agent with the rendezvous", AGAIN, again_after(lambda job: job.kill_agent(0))
    ),
    "sigterm": Case(
        "SIGTERM to all agents",
        "a checkpoint, and the end; the same command goes on without loss",
        again_after(_signal_agents, "a checkpoint of the last step, and the end"),
    ),
    "link-cut": Case(
        "a link is cut for good, --nnodes 1:2, time-out 8 s",
        RESTARTED,
        restarted_after(lambda job: job.cut(1), hosts=(0,)),
        _ALONE,
        settings=_SHORT,
        is_exact=False,
    ),
    "version": Case(
        "different versions on two ranks",
        REFUSED,
        refused(_VERSION),
        Launcher(max_restarts=0),
        inside=("--fault", "version"),
    ),
    **_ALL,
}
SLURM: dict[str, Case] = {
    **_RESTARTED,
    "agent-killed": Case(
        "SIGKILL of torchrun on a node", RESTARTED, restarted_after(lambda job: job.kill_agent(1))
    ),
    "step-killed": Case("SIGKILL of the step", RESTARTED, restarted_after(lambda job: job.kill_step())),
    "node-down": Case(
        "a node is down",
        "requeued on another node, from the last checkpoint",
        restarted_after(lambda job: job.kill_node(1), afterwards=lambda job: job.mend()),
    ),
    "batch-node-down": Case(
        "the node of the batch script is down",
        "requeued on another node, from the last checkpoint",
        restarted_after(lambda job: job.kill_node(0), afterwards=lambda job: job.mend()),
    ),
    "link-cut": Case(
        _CUT,
        "requeued on another node; once the link is back, nothing is left on the old one",
        restarted_after(lambda job: job.cut(1), afterwards=lambda job: job.restore(1)),
        settings=_SHORT,
    ),
    "time-limit": Case(
        "the time limit is announced (SIGUSR1)",
        "a checkpoint, requeued without loss",
        restarted_after(lambda job: job.announce()),
    ),
    "preempted": Case(
        "an urgent job takes all nodes",
        "a checkpoint, requeued without loss",
        restarted_after(lambda job: job.displace()),
    ),
    "cancelled": Case(
        "scancel",
        "the end; not requeued",
        ends_after(lambda job: job.cancel(), "a checkpoint of the last step, and the end"),
    ),
    "version": Case(
        "different versions on two ranks", REFUSED, refused(_VERSION), inside=("--fault", "version")
    ),
    **_ALL,
}
MPIRUN: dict[str, Case] = {
    "worker-killed": Case(_DEAD_RANK, AGAIN, again_after(lambda job: job.kill(1))),
    "rank-0-killed": Case(_DEAD_FIRST, AGAIN, again_after(lambda job: job.kill(0))),
    "worker-stopped": Case(_STOPPED, AGAIN, again_after(lambda job: job.stop(1)), settings=_SHORT),
    "hang": Case(_HANGS, AGAIN, again_after(None, words=_STUCK), inside=_inside("hang"), settings=_WATCHED),
    "flip": Case(_FLIP, AGAIN, again_after(None, words="CorruptPacket"), inside=_inside("flip")),
    "daemon-killed": Case(
        "SIGKILL of mpirun's daemon on a host",
        AGAIN,
        again_after(lambda job: job.kill_daemon(1)),  # Open MPI's own code is 0 now and then
    ),
    "mpirun-killed": Case("SIGKILL of mpirun", AGAIN, again_after(lambda job: job.kill_mpirun())),
    "sigterm": Case("SIGTERM to mpirun", AGAIN, again_after(lambda job: job.signal_script(signal.SIGTERM))),
    "sigusr1": Case(
        "SIGUSR1 to mpirun",
        "a checkpoint, and the end; the same command goes on without loss",
        again_after(
            lambda job: job.signal_script(signal.SIGUSR1), "a checkpoint of the last step, and the end"
        ),
    ),
    "link-cut": Case(
        _CUT,
        AGAIN,
        again_after(lambda job: job.cut(1), mend=lambda job: job.restore(1)),
        settings=_SHORT,
    ),
    "version": Case(
        "different versions on two ranks", REFUSED, refused(_VERSION), inside=("--fault", "version")
    ),
    **_ALL,
}
LAUNCHERS: dict[str, tuple[MakesJob, dict[str, Case]]] = {
    "torchrun": (torchrun_job, TORCHRUN),
    "slurm": (slurm_job, SLURM),
    "mpirun": (mpirun_job, MPIRUN),
}
