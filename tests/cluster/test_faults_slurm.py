"""Under Slurm, training outlives a killed worker, a lost node and pre-emption, and leaves nothing when cancelled."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import namespaces
from cluster.slurm import RunningCluster, SlurmCluster, SlurmOptions
from cluster.topology import Topology
from tests.cluster.jobs import train_arguments, write_script

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(280)]

# The job never ends until it is started again with a file `finish` in its folder: so the tests hold at any speed.
RESUME = """
last=$(ls -d {out}/checkpoints/step-* 2>{nowhere} | tail -n 1)
if [ -n "$last" ]; then
    step=$((10#${{last##*-}}))
    if [ -e {out}/finish ]; then steps=$((step + 5)); else steps=1000000; fi
    ARGUMENTS="train --out {out} --resume --steps $steps"
    echo "resumes from step $step"
fi
"""
# Slurm requeues by itself only what it has ended; a job whose workers fail, or stop at SIGTERM, must ask.
REQUEUE = """
if [ $code -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 9 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60
fi
"""


@dataclass(frozen=True)
class Job:
    """A training job on two nodes. out: its run's folder."""

    running: RunningCluster
    number: str
    out: Path
    log: Path

    def shown(self) -> dict[str, str]:
        """What Slurm says of it: JobState, Restarts, BatchHost, NodeList, ..."""
        text = self.running.run(["scontrol", "--oneliner", "show", "job", self.number]).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def last_step(self) -> int:
        """Of its newest checkpoint; -1 if there is none."""
        return max((int(path.name[5:]) for path in self.out.glob("checkpoints/step-*")), default=-1)

    def resumed(self) -> list[int]:
        """The steps from which it was continued, start by start."""
        return [int(step) for step in re.findall(r"resumes from step (\d+)", self._text())]

    def workers(self, node: str) -> list[int]:
        """Process numbers of its workers on a node."""
        found = []
        for pid in namespaces.ip("netns", "pids", self.running.namespaces[node]).split():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            is_python = Path(words[0].decode()).name.startswith(
                "python"
            )  # and not srun, which has the same words
            if is_python and b"efficient_dl.cli" in words and str(self.out).encode() in words:
                found.append(int(pid))
        return found

    def nodes(self) -> list[str]:
        """Where Slurm has it, the host of its batch script first."""
        shown = self.shown()
        names = self.running.run(["scontrol", "show", "hostnames", shown["NodeList"]]).stdout.split()
        return sorted(names, key=lambda name: name != shown["BatchHost"])

    def story(self) -> str:
        """For a failure."""
        return f"{self.shown()}\n{self.running.states()}\n{self._text()[-3000:]}"

    def _text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """Four nodes, for jobs of two: two to spare. The value is the context, for its network."""
    options = SlurmOptions(
        name=f"faults-{os.getpid()}",
        topology=Topology.uniform(4, "200mbit"),
        node_timeout_seconds=8,
        grace_seconds=20,
    )
    context = SlurmCluster(options)
    with context:
        yield context


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    """Those that have been started, so that a test can take over the one before it: starting takes the most time."""
    return []


@pytest.fixture
def job(cluster: SlurmCluster, jobs: list[Job], tmp_path: Path) -> Job:
    """A training job that runs on two of the nodes, all of which are well, and has a checkpoint."""
    running = RunningCluster.named(cluster.options.name)
    wait_until(lambda: are_well(running), lambda: f"all nodes to be well: {running.states()}")
    if not jobs or jobs[-1].shown()["JobState"] != "RUNNING":
        jobs.append(submit(running, tmp_path))
    return jobs[-1]


def are_well(running: RunningCluster) -> bool:
    """Whether all nodes can be used; those that the test before has broken, or that were too slow, are resumed."""
    broken = [
        node for node, state in running.states().items() if state.rstrip("*") not in {"idle", "mix", "comp"}
    ]
    for node in broken:
        running.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"])
    return set(running.states().values()) <= {"idle", "mix"}


def submit(running: RunningCluster, folder: Path) -> Job:
    out, log = folder / "run", folder / "log"
    every = [
        "--set",
        "train.checkpoint_every=5",
        "--set",
        "train.eval_every=0",
        "--set",
        "train.eval_batches=1",
    ]
    script = write_script(
        folder / "job.sh",
        train_arguments(out, 1_000_000, *every),
        before=RESUME.format(out=out, nowhere=os.devnull),
        after=REQUEUE,
    )
    submitted = running.run(["sbatch", "--parsable", "-o", str(log), str(script)])
    assert submitted.returncode == 0, submitted.stderr
    job = Job(running, submitted.stdout.strip(), out, log)
    wait_until(lambda: job.last_step() >= 0, lambda: f"a checkpoint\n{job.story()}")
    return job


def wait_until(condition: Callable[[], object], what: Callable[[], str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what()}"
        time.sleep(0.1)


@contextlib.contextmanager
def restarted(job: Job) -> Iterator[None]:
    """That what happens inside makes Slurm start the job once more, and that it goes on from a checkpoint."""
    begun, starts, restarts = job.last_step(), len(job.resumed()), int(job.shown()["Restarts"])
    yield
    wait_until(lambda: len(job.resumed()) > starts, lambda: f"a new start\n{job.story()}")
    resumed = job.resumed()[-1]
    assert resumed >= begun
    wait_until(lambda: job.last_step() >= resumed + 5, lambda: f"a step after the restart\n{job.story()}")
    assert int(job.shown()["Restarts"]) > restarts


def test_a_job_goes_on_after_a_worker_was_killed(job: Job) -> None:
    with restarted(job):
        os.kill(job.workers(job.nodes()[1])[0], signal.SIGKILL)


def test_a_job_that_made_way_for_another_goes_on_afterwards(job: Job) -> None:
    with restarted(job):
        command = ["srun", "--partition=urgent", "--exclusive", "-N", "4", "hostname"]
        urgent = job.running.run(command, timeout_seconds=120)
        assert sorted(urgent.stdout.split()) == ["h0", "h1", "h2", "h3"], urgent.stderr
    assert "SIGTERM" in job.log.read_text()  # the workers were asked, not killed


def test_a_job_that_has_lost_its_nodes_completes_on_others_and_its_rest_is_ended(
    cluster: SlurmCluster, job: Job
) -> None:
    """One node dies, with the batch script: nothing of the job itself can ask for the restart. The other is cut off:
    its worker may live on and know nothing, until its slurmd hears from the controller again.
    """
    dead, cut = job.nodes()
    host = cluster.network.names.index(cut)
    (job.out / "finish").touch()
    try:
        with restarted(job):
            job.running.kill_node(dead)
            cluster.network.cut(host)
        wait_until(lambda: job.shown()["JobState"] == "COMPLETED", lambda: f"the job's end\n{job.story()}")
        assert not {dead, cut}.intersection(job.nodes())
        assert job.last_step() == job.resumed()[-1] + 5
        assert json.loads((job.out / "summary.json").read_text())["world_size"] == 2
    finally:
        job.running.start_node(dead)
        cluster.network.restore(host)
    wait_until(lambda: not job.workers(cut), lambda: f"the cut worker's end\n{job.story()}")


def test_a_cancelled_job_leaves_no_process(job: Job) -> None:
    assert [len(job.workers(node)) for node in job.nodes()] == [1, 1]
    assert job.running.run(["scancel", job.number]).returncode == 0
    wait_until(
        lambda: {tuple(running_on(job, node)) for node in job.running.nodes} == {("slurmd",)}, job.story
    )
    wait_until(lambda: job.shown()["JobState"] == "CANCELLED", job.story)  # COMPLETING for a while


def running_on(job: Job, node: str) -> list[str]:
    """Names of all programs that run on a node."""
    names = []
    for pid in namespaces.ip("netns", "pids", job.running.namespaces[node]).split():
        with contextlib.suppress(OSError):
            names.append(Path(f"/proc/{pid}/comm").read_text().strip())
    return names
