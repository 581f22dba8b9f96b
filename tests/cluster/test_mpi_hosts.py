"""Open MPI and MPICH start ranks on emulated hosts, whose messages go over the shaped links."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import namespaces
from cluster.emulate import EmulatedNetwork
from cluster.errors import EmulationError
from cluster.mpi import MpiHosts, Mpirun, find_mpirun
from cluster.mpi.__main__ import main
from cluster.scratch import scratch_folder
from tests.cluster.jobs import REPOSITORY, train_arguments
from tests.distributed.mpi_ranks import find_mpi

BOTH = [
    pytest.param("openmpi", marks=[pytest.mark.netns, pytest.mark.mpi("openmpi")]),
    pytest.param("mpich", marks=[pytest.mark.netns, pytest.mark.mpi("mpich")]),
]

# All ranks sum 400 kB; each says where it is.
SUM = """
import array, socket
from mpi4py import MPI
ranks = MPI.COMM_WORLD
mine, total = array.array("f", [1.0]) * 100_000, array.array("f", [0.0]) * 100_000
ranks.Allreduce([mine, MPI.FLOAT], [total, MPI.FLOAT])
assert set(total) == {ranks.Get_size()}
places = ranks.gather(socket.gethostname())
if places:
    print("places", *places, flush=True)
"""


def mpirun_of(name: str) -> Mpirun:
    found = find_mpi(name)
    assert found is not None
    return find_mpirun(str(found.mpirun))


@pytest.mark.parametrize("name", BOTH)
def test_ranks_are_spread_over_the_hosts_and_their_bytes_pass_the_links(name: str) -> None:
    with EmulatedNetwork(hosts=2, rate="1gbit") as network, scratch_folder(network.prefix) as folder:
        hosts = MpiHosts(network, folder)
        done = hosts.run(mpirun_of(name), 4, [sys.executable, "-c", SUM], capture=True, timeout_seconds=120)
        sent = [network.tx_bytes(host) for host in range(2)]
    assert done.returncode == 0, done.stdout
    assert "places h0 h0 h1 h1" in done.stdout
    assert all(one > 390_000 for one in sent)  # each host needs the other's half of the sum, or its addends


@pytest.mark.parametrize("name", BOTH)
def test_a_rank_that_fails_ends_the_job_and_leaves_nothing(name: str) -> None:
    script = "import os, sys, time; sys.exit(3) if 'yes' in os.environ.values() else time.sleep(300)"
    command = [
        "sh",
        "-c",
        f'[ "$(hostname)" = h1 ] && MINE=yes; export MINE; exec {sys.executable} -c "{script}"',
    ]
    with EmulatedNetwork(hosts=2) as network, scratch_folder(network.prefix) as folder:
        hosts = MpiHosts(network, folder)
        done = hosts.run(mpirun_of(name), 2, command, capture=True, timeout_seconds=120)
        assert done.returncode == 3, done.stdout
        running = [namespaces.ip("netns", "pids", network.namespace(host)) for host in range(2)]
    assert running == ["", ""]


@pytest.mark.parametrize("name", BOTH)
def test_a_time_out_ends_the_job(name: str) -> None:
    with EmulatedNetwork(hosts=2) as network, scratch_folder(network.prefix) as folder:
        hosts = MpiHosts(network, folder)
        done = hosts.run(mpirun_of(name), 2, ["sleep", "300"], capture=True, timeout_seconds=2)
    assert done.returncode == 124


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_four_ranks_train_at_two_bits_by_one_command(name: str, tmp_path: Path) -> None:
    trains_by_one_command(name, 4, tmp_path, *(["--transport", "mpi"] if name == "mpich" else []))


@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.mpi("openmpi")
def test_partitions_train_on_hosts_of_their_own(tmp_path: Path) -> None:
    trains_by_one_command("openmpi", 2, tmp_path, "--mode", "partitionwise", "--partitions", "2")


def trains_by_one_command(name: str, ranks: int, tmp_path: Path, *flags: str) -> None:
    command = [sys.executable, "-m", "cluster.mpi", "--hosts", "2", "--rate", "200mbit", "-n", str(ranks)]
    command += ["--mpirun", str(mpirun_of(name).path), "--timeout", "240", "--"]
    done = subprocess.run(
        [
            *command,
            sys.executable,
            "-m",
            "efficient_dl.cli",
            *train_arguments(tmp_path / "run", 4, *flags),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (ranks, 4)


@pytest.mark.netns
@pytest.mark.mpi("openmpi")
@pytest.mark.xdist_group("leftovers")  # another cleaner would be faster
def test_what_a_killed_job_leaves_is_removed_by_clean() -> None:
    command = [
        sys.executable,
        "-m",
        "cluster.mpi",
        "--mpirun",
        str(mpirun_of("openmpi").path),
        "--",
        "sleep",
        "300",
    ]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    folders = Path("/tmp")
    try:
        deadline = time.monotonic() + 60
        while not (found := list(folders.glob(f"edl-{process.pid}-*/hostfile"))):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(
        [sys.executable, "-m", "cluster.emulate", "--clean"], cwd=REPOSITORY, timeout=180, check=True
    )
    assert not found[0].parent.exists()
    assert not [
        name for name in namespaces.ip("netns", "list").split() if name.startswith(f"edl-{process.pid}-")
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--mpirun", "/nowhere/mpirun", "--", "true"], "no mpirun at /nowhere/mpirun"),
        (["--mpirun", "true", "--", "true"], "neither Open MPI nor MPICH"),
    ],
)
def test_wrong_arguments_end_without_a_traceback(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 125
    assert complaint in capsys.readouterr().err


@pytest.mark.netns
def test_no_ranks_are_refused(tmp_path: Path) -> None:
    with EmulatedNetwork(hosts=1) as network, pytest.raises(EmulationError, match="no number of ranks: 0"):
        MpiHosts(network, tmp_path).run(Mpirun(Path("/bin/true"), "openmpi", 5), 0, ["true"])
