"""Under Slurm, training outlives a killed worker, a lost node and pre-emption, and leaves nothing when cancelled."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster import namespaces
from cluster.slurm import RunningCluster, SlurmCluster, SlurmOptions
from cluster.topology import Topology
from tests.cluster.jobs import train_arguments, write_script

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(280)]

# Without a checkpoint the job never ends; from one on it takes five more steps. So each test ends, at any speed.
RESUME = """
last=$(ls -d {out}/checkpoints/step-* 2>{nowhere} | tail -n 1)
if [ -n "$last" ]; then
    ARGUMENTS="train --out {out} --resume --steps $((10#${{last##*-}} + 5))"
    echo "resumes from ${{last##*/}}"
fi
"""
# Slurm requeues by itself only what it has ended; a job whose workers fail, or stop at SIGTERM, must ask.
REQUEUE = """
if [ $code -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60
fi
"""


class Job(NamedTuple):
    number: str
    out: Path  # the run's folder
    log: Path

    def steps_saved(self) -> list[int]:
        return sorted(int(path.name.partition("-")[2]) for path in self.out.glob("checkpoints/step-*"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """Three nodes, for jobs of two: one to spare. The value is the context; `running` is what it gives."""
    options = SlurmOptions(
        name=f"faults-{os.getpid()}",
        topology=Topology.uniform(3, "200mbit"),
        node_timeout_seconds=5,
        grace_seconds=20,
    )
    context = SlurmCluster(options)
    with context:
        yield context


@pytest.fixture
def running(cluster: SlurmCluster) -> Iterator[RunningCluster]:
    """The cluster, with all nodes idle and no job before and after."""
    running = RunningCluster.named(cluster.options.name)
    yield running
    running.run(["scancel", "--user=root"])
    wait_until(lambda: set(running.states().values()) == {"idle"}, lambda: f"idle nodes: {running.states()}")


def submit(running: RunningCluster, folder: Path) -> Job:
    """Starts a training job on two nodes, and waits for its first checkpoint."""
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
    job = Job(submitted.stdout.strip(), out, log)
    wait_until(job.steps_saved, lambda: f"a checkpoint\n{shown(running, job)}\n{text_of(log)}")
    return job


def wait_until(condition: Callable[[], object], what: Callable[[], str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what()}"
        time.sleep(0.1)


def shown(running: RunningCluster, job: Job) -> dict[str, str]:
    """What Slurm says of a job: JobState, Restarts, BatchHost, NodeList, ..."""
    text = running.run(["scontrol", "--oneliner", "show", "job", job.number]).stdout
    return dict(re.findall(r"(\w+)=(\S*)", text))


def text_of(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def workers(running: RunningCluster, job: Job, node: str) -> list[int]:
    """Process numbers of the job's workers on a node."""
    found = []
    for pid in map(int, namespaces.ip("netns", "pids", running.namespaces[node]).split()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"efficient_dl.cli" in words and str(job.out).encode() in words:
            found.append(pid)
    return found


def assert_completes_from_a_checkpoint(running: RunningCluster, job: Job, begun: int) -> None:
    """That the job restarts, resumes at or after step `begun`, and ends as a whole run does."""
    wait_until(
        lambda: shown(running, job)["JobState"] == "COMPLETED",
        lambda: f"the job's end\n{shown(running, job)}\n{running.states()}\n{text_of(job.log)}",
    )
    resumed = re.findall(r"resumes from step-(\d+)", text_of(job.log))
    assert resumed and int(resumed[-1]) >= begun
    assert int(shown(running, job)["Restarts"]) >= 1
    assert job.steps_saved()[-1] == int(resumed[-1]) + 5
    assert json.loads((job.out / "summary.json").read_text())["world_size"] == 2


def test_a_killed_worker_ends_the_step_and_the_requeued_job_completes(
    running: RunningCluster, tmp_path: Path
) -> None:
    job = submit(running, tmp_path)
    begun = job.steps_saved()[-1]
    node = sorted(node for node in running.nodes if workers(running, job, node))[-1]
    os.kill(workers(running, job, node)[0], signal.SIGKILL)
    assert_completes_from_a_checkpoint(running, job, begun)


def test_a_job_on_a_dead_node_completes_on_others(running: RunningCluster, tmp_path: Path) -> None:
    """The node that dies runs the batch script too: nothing of the job itself can ask for the restart."""
    job = submit(running, tmp_path)
    begun, node = job.steps_saved()[-1], shown(running, job)["BatchHost"]
    running.kill_node(node)
    try:
        assert_completes_from_a_checkpoint(running, job, begun)
        assert running.states()[node].startswith("down")
        assert node not in shown(running, job)["NodeList"]
    finally:
        running.start_node(node)


def test_a_cancelled_job_leaves_no_process(running: RunningCluster, tmp_path: Path) -> None:
    job = submit(running, tmp_path)
    pids = [pid for node in running.nodes for pid in workers(running, job, node)]
    assert len(pids) == 2
    assert running.run(["scancel", job.number]).returncode == 0
    wait_until(lambda: set(running.states().values()) == {"idle"}, lambda: str(running.states()))
    assert shown(running, job)["JobState"] == "CANCELLED"
    for node in running.nodes:
        (daemon,) = namespaces.ip("netns", "pids", running.namespaces[node]).split()
        assert Path(f"/proc/{daemon}/comm").read_text() == "slurmd\n"


def test_a_job_that_makes_way_for_another_completes_afterwards(
    running: RunningCluster, tmp_path: Path
) -> None:
    job = submit(running, tmp_path)
    begun = job.steps_saved()[-1]
    urgent = running.run(
        ["srun", "--partition=urgent", "--exclusive", "-N", "3", "hostname"], timeout_seconds=120
    )
    assert sorted(urgent.stdout.split()) == ["h0", "h1", "h2"], urgent.stderr
    assert_completes_from_a_checkpoint(running, job, begun)
    assert "SIGTERM" in text_of(job.log)  # the workers were asked, not killed
