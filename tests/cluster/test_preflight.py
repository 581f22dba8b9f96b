"""The pre-flight check names the host that lacks something or differs, before a job fails on it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.emulate import EmulatedNetwork
from cluster.errors import EmulationError
from cluster.mpi import MpiHosts
from cluster.preflight.place import Place, find_place
from cluster.preflight.verdict import Report, problems_of
from cluster.processes import RunResult
from cluster.scratch import scratch_folder
from tests.cluster.jobs import REPOSITORY
from tests.cluster.test_mpi_hosts import BOTH, mpirun_of

CHECK = [sys.executable, "-m", "cluster.preflight"]
ALIKE = [
    Report(rank, f"node{rank}", f"10.0.0.{rank + 1}", {"python": "3.11.7", "torch": "2.13.0"})
    for rank in range(3)
]


def check_on_hosts(hosts: int, *arguments: str, first: str = "true") -> RunResult:
    """The check on emulated hosts. first: a shell command before it, which knows its RANK."""
    command = ["sh", "-c", f'{first}; exec "$@"', "sh", *CHECK, *arguments]
    with EmulatedNetwork(hosts=hosts) as network:
        return network.run(command, quiet=True, timeout_seconds=100)


# -------------------------------------------------------------------- the verdict
def test_equal_hosts_have_no_problem() -> None:
    assert problems_of(ALIKE, 3, {1: (0.4, 0.0), 2: (-0.9, 0.0)}, 1.0) == []


def test_the_odd_one_is_named_with_its_value_and_that_of_the_others() -> None:
    odd = replace(ALIKE[1], facts={"python": "3.11.7", "torch": "2.12.0"})
    (problem,) = problems_of([ALIKE[0], odd, ALIKE[2]], 3, {}, 1.0)
    assert problem.startswith(
        "rank 1 on node1 (10.0.0.2): torch is 2.12.0, but 2.13.0 on 2 of 3 ranks; install"
    )


def test_ranks_that_did_not_come_are_named() -> None:
    (problem,) = problems_of(ALIKE[:1], 3, {}, 1.0)
    assert problem.startswith("ranks 1, 2 did not come")


def test_a_clock_counts_as_wrong_only_beyond_the_error_of_measuring_it() -> None:
    (problem,) = problems_of(ALIKE, 3, {1: (1.4, 0.5), 2: (-7.25, 0.5)}, 1.0)
    assert problem.startswith("rank 2 on node2 (10.0.0.3): its clock is 7.2 s behind rank 0's")


# -------------------------------------------------------------------- places
@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place("no launcher", 0, 1, "")),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
         Place("torchrun", 1, 2, "a")),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "a"}, Place("Open MPI", 3, 4, "a")),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, Place("MPICH", 0, 1, "")),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "MASTER_ADDR": "a"}, Place("Slurm", 1, 2, "a")),
    ],
)  # fmt: skip
def test_every_launcher_tells_its_ranks(environment: dict[str, str], place: Place) -> None:
    assert find_place(environment) == place


def test_a_launcher_that_does_not_tell_the_head_needs_it_told() -> None:
    environment = {"PMI_RANK": "1", "PMI_SIZE": "2"}
    with pytest.raises(EmulationError, match="MPICH does not say on which host rank 0 is; pass --head HOST"):
        find_place(environment)
    assert find_place(environment, "node0").head == "node0"


# -------------------------------------------------------------------- hosts
@pytest.mark.netns
def test_hosts_that_are_alike_pass(tmp_path: Path) -> None:
    run = check_on_hosts(3, "--folder", str(tmp_path))
    assert run.exit_codes == (0, 0, 0), run.output
    assert "3 of 3 ranks on 3 hosts" in run.output[0] and "nothing is wrong" in run.output[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.netns
def test_everything_that_is_wrong_is_found_at_once(tmp_path: Path) -> None:
    """On rank 1 another torch and another folder, on rank 2 fewer files and no interface for gloo."""
    shared, other = tmp_path / "shared", tmp_path / "other/torch-2.0.0.dist-info"
    shared.mkdir()
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0.0\n")
    first = (
        f"[ $RANK != 1 ] || {{ mount -t tmpfs none {shared}; export PYTHONPATH={other.parent}; }}; "
        "[ $RANK != 2 ] || { ulimit -n 512; export GLOO_SOCKET_IFNAME=ib7; }"
    )
    run = check_on_hosts(3, "--folder", str(shared), first=first)
    assert run.exit_code == 1
    problems = [line for line in run.output[0].splitlines() if "problem:" in line]
    for rank, words in (
        (1, "torch is 2.0.0, but "),
        (1, f"{shared} is not the folder that rank 0 has"),
        (2, "open files is 512, but "),
        (2, "GLOO_SOCKET_IFNAME=ib7, but there is no such interface"),
    ):
        assert [one for one in problems if f"rank {rank} on" in one and words in one], run.output[0]
    assert len(problems) == 4, run.output[0]


@pytest.mark.netns
def test_a_taken_port_and_a_blocked_host_are_found() -> None:
    """Rank 1 refuses what rank 2 sends it, as a firewall between workers does; rank 0 has the job's port in use."""
    first = (
        '[ $RANK != 1 ] || ip route add blackhole "${MASTER_ADDR%.*}.3/32"; '
        f'[ $RANK != 0 ] || {{ {sys.executable} -c "import socket, time; '
        "server = socket.create_server(('', $MASTER_PORT)); time.sleep(200)\" & "
        'until [ "$(ss -Hltn sport = :$MASTER_PORT)" ]; do sleep 0.05; done; }'
    )
    run = check_on_hosts(3, first=first)
    assert run.exit_code == 1
    output = run.output[0]
    assert "cannot be listened at: [Errno 98]" in output
    assert "it cannot reach rank 2 on" in output and "it cannot reach rank 1 on" in output
    assert "it cannot reach rank 0" not in output


@pytest.mark.netns
def test_a_rank_that_never_comes_is_named_and_the_others_end() -> None:
    run = check_on_hosts(2, "--timeout", "2", first="[ $RANK = 0 ] || exit 0")
    assert run.exit_code == 1
    assert "rank 1 did not come" in run.output[0]


@pytest.mark.netns
def test_a_head_that_is_not_to_be_reached_is_named() -> None:
    run = check_on_hosts(2, "--timeout", "1", "--head", "10.9.9.9", first="[ $RANK = 1 ] || sleep 30")
    assert run.exit_code == 125
    assert "cannot reach rank 0 at 10.9.9.9:29502" in run.output[1]


# -------------------------------------------------------------------- launchers
@pytest.mark.slow
def test_it_runs_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "cluster.preflight", "--folder", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 ranks on 1 hosts, started by torchrun" in done.stdout


@pytest.mark.parametrize("name", BOTH)
def test_it_runs_under_mpirun(name: str, tmp_path: Path) -> None:
    with EmulatedNetwork(hosts=2) as network, scratch_folder(network.prefix) as folder:
        done = MpiHosts(network, folder).run(
            mpirun_of(name), 4, [*CHECK, "--folder", str(tmp_path)], capture=True, timeout_seconds=100
        )
    assert done.returncode == 0, done.stdout
    assert "4 of 4 ranks on 2 hosts, started by " in done.stdout
