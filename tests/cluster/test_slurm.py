"""Slurm on emulated hosts: jobs run behind shaped links, clusters do not meet, and nothing is left of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import namespaces
from cluster.errors import EmulationError
from cluster.slurm import RunningCluster, SlurmCluster, SlurmOptions, claims
from cluster.slurm.__main__ import main
from cluster.slurm.config import Folder, configuration_text
from cluster.topology import Topology
from tests.cluster.jobs import REPOSITORY, train_arguments

# In one worker with all that starts clusters: a start removes what killed ones have left, and a test looks at that.
pytestmark = pytest.mark.xdist_group("slurm")

NAME = f"test-{os.getpid()}"


@pytest.fixture(scope="module")
def running() -> Iterator[RunningCluster]:
    with SlurmCluster(SlurmOptions(name=NAME, topology=Topology.uniform(2, "200mbit"))) as cluster:
        yield cluster


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cluster.slurm", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines of what runs with a cluster's slurm.conf or munge key."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() + b"/" in text:
            found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


# -------------------------------------------------------------------- jobs
@pytest.mark.slurm
def test_a_job_runs_on_every_node_behind_its_shaped_link(running: RunningCluster) -> None:
    shown = running.run(["srun", "-N", "2", "sh", "-c", "echo $(hostname) $(tc qdisc show dev eth0)"])
    lines = sorted(shown.stdout.splitlines())
    assert [line.split()[0] for line in lines] == ["h0", "h1"], shown.stderr
    assert all("tbf" in line and "rate 200Mbit" in line for line in lines)


@pytest.mark.slurm
def test_nodes_and_head_know_each_other_by_name(running: RunningCluster) -> None:
    script = "import socket; print([socket.gethostbyname(name) for name in ('h0', 'h1', 'head')])"
    shown = running.run(["srun", "-N", "2", sys.executable, "-c", script])
    first, second = shown.stdout.splitlines()
    assert first == second
    assert len(set(eval(first))) == 3


@pytest.mark.slurm
def test_the_exit_code_of_a_job_is_that_of_the_command_line(running: RunningCluster) -> None:
    done = call("run", "--name", NAME, "--", "srun", "-N", "2", "sh", "-c", "exit 7")
    assert done.returncode == 7, done.stderr
    assert running.folder == Folder(claims.ROOT / NAME)


@pytest.mark.slurm
def test_a_name_that_is_in_use_is_refused(running: RunningCluster) -> None:
    done = call("up", "--name", NAME)
    assert done.returncode == 125
    assert f"the cluster '{NAME}' is up already, held by process {os.getpid()}" in done.stderr
    assert set(running.states()) == {"h0", "h1"}


@pytest.mark.slurm
def test_a_second_cluster_has_nodes_and_keys_of_its_own(running: RunningCluster) -> None:
    script = f"sinfo -h -N -o %N | sort -u; cat $(dirname $SLURM_CONF)/munge.key | cmp - {running.folder.munge_key}"
    done = call("once", "--nodes", "3", "--", "sh", "-c", script)
    assert done.stdout.split()[:3] == ["h0", "h1", "h2"]
    assert "differ" in done.stdout
    assert done.returncode == 1  # cmp's
    assert set(running.states()) == {"h0", "h1"}


@pytest.mark.slurm
def test_a_host_that_is_not_there_is_named(running: RunningCluster) -> None:
    with pytest.raises(EmulationError, match="no host 'h9'; there are h0, h1, head"):
        running.on_host("h9", ["true"])


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(280)
def test_a_job_of_edl_launch_is_announced_its_end_is_requeued_and_goes_on(
    running: RunningCluster, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["launch", "slurm", "--nodes", "2", "--workers", "1", "--cpus", "1", "--python", sys.executable]
    words += ["--folder", str(tmp_path), "--env", f"PYTHONPATH={REPOSITORY}", "--time", "5", "--"]
    words += train_arguments(out, 400, "--set", "train.log_every=5")
    edl = ["env", f"--chdir={tmp_path}", sys.executable, "-m", "efficient_dl.cli", *words]
    submitted = running.run(edl, {"PYTHONPATH": str(REPOSITORY)})  # the job's log is where one submits
    number = re.search(r"Submitted batch job (\d+)", submitted.stdout)
    assert number, submitted.stdout + submitted.stderr
    log = tmp_path / f"edl-{number[1]}.log"

    def wait_for(path: Path, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not (path.exists() and path.stat().st_size):
            shown = log.read_text() if log.exists() else "no log"
            assert time.monotonic() < deadline, shown + running.run(["squeue"]).stdout
            time.sleep(0.1)

    wait_for(out / "metrics.jsonl", 100)
    running.run(["scancel", "--signal=USR1", "--batch", number[1]])
    wait_for(out / "summary.json", 160)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"], summary["bits"]) == (2, 400, 2.0)
    assert "after the announcement of the end" in log.read_text()
    starts = [int(step) for step in re.findall(r"from step (\d+) to 400", log.read_text())]
    assert len(starts) == 2 and starts[0] == 0 < starts[1] < 400


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(280)
def test_a_job_whose_data_is_missing_ends_with_that_code_and_is_not_requeued(
    running: RunningCluster, tmp_path: Path
) -> None:
    words = ["launch", "slurm", "--nodes", "2", "--workers", "1", "--cpus", "1", "--python", sys.executable]
    words += [
        "--folder",
        str(tmp_path),
        "--env",
        f"PYTHONPATH={REPOSITORY}",
        "--time",
        "5",
        "--option=--wait",
    ]
    words += ["--", "train", "--model", "gpt-nano", "--data", f"tokens:{tmp_path}/nothing"]
    edl = ["env", f"--chdir={tmp_path}", sys.executable, "-m", "efficient_dl.cli", *words]
    done = running.run(edl, {"PYTHONPATH": str(REPOSITORY)}, timeout_seconds=250)
    (log,) = tmp_path.glob("edl-*.log")
    text = log.read_text()
    assert done.returncode == 3, done.stdout + done.stderr + text
    assert text.count("DataError: ") == 1 == text.count("srun ended with")
    assert "a rank ended with 3, as it would again" in text


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.timeout(280)
def test_partitions_train_on_nodes_of_their_own(running: RunningCluster, tmp_path: Path) -> None:
    mode = ["--mode", "partitionwise", "--partitions", "2"]
    words = [sys.executable, "-m", "efficient_dl.cli", *train_arguments(tmp_path / "run", 4, *mode)]
    done = running.run(["srun", "-N", "2", *words], {"PYTHONPATH": str(REPOSITORY)}, timeout_seconds=250)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, 4)


@pytest.mark.slurm
def test_the_pre_flight_check_runs_under_srun(running: RunningCluster, tmp_path: Path) -> None:
    check = [sys.executable, "-m", "cluster.preflight", "--folder", str(tmp_path)]
    done = running.run(["srun", "-N", "2", *check], {"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 ranks on 2 hosts, started by Slurm" in done.stdout
    assert "slurm: slurm" in done.stdout and "munge: munge-" in done.stdout


# -------------------------------------------------------------------- ends
@pytest.mark.slurm
def test_up_and_down_leave_nothing() -> None:
    name = f"{NAME}-up"
    folder = claims.ROOT / name
    up = call("up", "--name", name, "--nodes", "1")
    try:
        assert up.returncode == 0, up.stderr
        prefix = (folder / "namespaces").read_text()
        assert (
            call("run", "--name", name, "--", "sbatch", "--wrap", "sleep 300", "-o", "/dev/null").returncode
            == 0
        )
        assert len(namespaces.beginning_with(prefix)) == 3
        assert processes_of(folder)
    finally:
        down = call("down", "--name", name)
    assert (down.returncode, down.stdout) == (0, f"the cluster '{name}' is down\n")
    assert namespaces.beginning_with(prefix) == []
    assert processes_of(folder) == []
    assert not folder.exists()
    assert not folder.with_name(f"{name}.lock").exists()


@pytest.mark.slurm
@pytest.mark.parametrize("remover", ["down", "the next cluster"])
def test_what_a_killed_holder_leaves_is_removed_by(remover: str) -> None:
    name = f"{NAME}-killed"
    folder = claims.ROOT / name
    assert call("up", "--name", name, "--nodes", "1").returncode == 0
    try:
        prefix = (folder / "namespaces").read_text()
        holder = claims.holder(name)
        assert holder is not None
        assert len(namespaces.beginning_with(prefix)) == 3
        assert len(processes_of(folder)) >= 3
        os.kill(holder, signal.SIGKILL)
        assert "was killed and has left things" in call("status", "--name", name).stderr
    finally:
        done = (
            call("down", "--name", name) if remover == "down" else call("once", "--nodes", "1", "--", "true")
        )
    assert done.returncode == 0, done.stderr
    assert namespaces.beginning_with(prefix) == []
    assert processes_of(folder) == []
    assert not folder.exists()


# -------------------------------------------------------------------- without Slurm
def test_variables_of_another_slurm_do_not_reach_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    monkeypatch.setenv("MINE", "kept")
    environment = RunningCluster(Folder(Path("/run/edl-slurm/x")), {}).environment()
    assert {key for key in environment if key.startswith("SLURM")} == {"SLURM_CONF"}
    assert environment["SLURM_CONF"] == "/run/edl-slurm/x/slurm.conf"
    assert environment["MINE"] == "kept"


def test_every_path_of_a_cluster_is_in_its_folder() -> None:
    folder = Folder(Path("/run/edl-slurm/x"))
    text = configuration_text(SlurmOptions(), folder, {"h0": "10.0.0.1", "head": "10.0.0.2"})
    paths = [
        word
        for line in text.splitlines()
        for word in line.partition("=")[2].split(",")
        if word.startswith(("/", "socket="))
    ]
    assert len(paths) == 5
    assert all("/run/edl-slurm/x/" in path for path in paths)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["up", "--name", "Edl"], "no name of a cluster: 'Edl'"),
        (["up", "--name", "../edl"], "no name of a cluster"),
        (["up", "--nodes", "0"], "no number of hosts: 0"),
        (["up", "--cpus", "0"], "no number of cpus: 0"),
        (["down", "--name", ""], "no name of a cluster: ''"),
    ],
)
def test_wrong_arguments_end_without_a_traceback(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 125
    assert complaint in capsys.readouterr().err


def test_what_is_missing_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "missing: the program slurmctld: apt-get install slurm-wlm" in out
    assert "missing: the program munged: apt-get install munge" in out
    with pytest.raises(EmulationError, match="it lacks\n  - the program munged"), SlurmCluster():
        pass
