"""Rank, size and meeting point from the variables of every launcher, as they really set them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from efficient_dl.errors import LaunchError
from efficient_dl.launching.caches import CACHES, use_node_caches
from efficient_dl.launching.meeting import find_meeting
from efficient_dl.launching.place import Place, find_place

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "node7", "MASTER_PORT": "41234", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
SCRIPT = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node7", "MASTER_PORT": "29511"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "2", "PMIX_NAMESPACE": "prterun-a-25611@1",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
CRAY = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
BATCH = {
    "SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_JOB_NUM_NODES": "2",
}  # fmt: skip
SRUN = BATCH | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[03-04]",
}  # fmt: skip
SHELL = SRUN | {
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"
}  # fmt: skip
DAEMON = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}

PLACES = {
    "torchrun": (TORCHRUN, ("torchrun", 5, 8, 1, 4)),
    "a script's variables": (SCRIPT, ("torchrun", 3, 4, None, None)),
    "Open MPI": (OPEN_MPI, ("Open MPI", 2, 4, 0, 2)),
    "MPICH and Intel MPI": (MPICH, ("MPICH", 1, 4, 1, 2)),
    "Cray": (CRAY, ("Cray MPI", 3, 4, 1, 2)),
    "PMI that tells no node": ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ("MPICH", 1, 2, None, None)),
    "srun": (SRUN, ("Slurm", 3, 4, 1, None)),
    "srun on one node": (SRUN | {"SLURM_STEP_NUM_NODES": "1"}, ("Slurm", 3, 4, 1, 4)),
    "srun --mpi=pmi2": (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}, ("Slurm", 3, 4, 1, None)),
    "srun --mpi=pmix": (SRUN | {"PMIX_RANK": "3"}, ("Slurm", 3, 4, 1, None)),
    "torchrun inside srun": (DAEMON | TORCHRUN, ("torchrun", 5, 8, 1, 4)),
    "torchrun inside mpirun": (OPEN_MPI | TORCHRUN, ("torchrun", 5, 8, 1, 4)),
    "Open MPI inside Slurm, daemons by srun": (DAEMON | OPEN_MPI, ("Open MPI", 2, 4, 0, 2)),
    "MPICH inside Slurm, daemons by srun": (DAEMON | MPICH, ("MPICH", 1, 4, 1, 2)),
    "MPICH inside Slurm, one rank a node": (
        DAEMON | {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
        ("MPICH", 1, 2, 0, 1),
    ),
    "mpirun -n 1": ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1",
                     "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ("Open MPI", 0, 1, 0, 1)),
    "a script that takes srun's ranks": (SRUN | SCRIPT, ("torchrun", 3, 4, 1, None)),
    "a script with more ranks than srun": (DAEMON | SCRIPT, ("torchrun", 3, 4, None, None)),
    "a batch script that exports WORLD_SIZE": (SRUN | {"WORLD_SIZE": "4"}, ("Slurm", 3, 4, 1, None)),
}  # fmt: skip
ALONE = {
    "nothing": {},
    "a batch script": BATCH,
    "an interactive shell": SHELL,
    "an interactive shell with PMI": SHELL | {"PMI_RANK": "0", "PMI_SIZE": "1", "PMIX_RANK": "0"},
}


@pytest.mark.parametrize("name", PLACES)
def test_every_launcher_tells_the_place(name: str) -> None:
    environment, expected = PLACES[name]
    place = find_place(environment)
    assert place is not None
    found = (place.launcher.name, place.rank, place.size, place.local_rank, place.local_size)
    assert found == expected


@pytest.mark.parametrize("name", ALONE)
def test_a_process_that_is_no_rank_is_none(name: str) -> None:
    assert find_place(ALONE[name]) is None


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"RANK": "0"}, "no WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "no RANK"),
        ({**TORCHRUN, "RANK": "8"}, "RANK below 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK below 4"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "5"}, "OMPI_COMM_WORLD_LOCAL_SIZE - 1 below 4"),
        ({**TORCHRUN, "RANK": "one"}, "a whole number"),
        ({**MPICH, "PMI_SIZE": "0"}, "at least 1"),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, "rank 2 of 4 (OMPI_COMM_WORLD_RANK"),
        ({**MPICH, "RANK": "0", "WORLD_SIZE": "4"}, "rank 0 of 4 (RANK, WORLD_SIZE)"),
        ({**SRUN, "WORLD_SIZE": "2"}, "WORLD_SIZE contradicts Slurm"),
        ({**SRUN, "PMIX_RANK": "0"}, "PMIx contradicts Slurm"),
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "prterun"}, "PMIX_RANK tells a rank"),
        ({"PMI_RANK": "0"}, "PMI_RANK tells a rank"),
    ],
)
def test_variables_that_are_missing_or_contradict_each_other_are_an_error(
    environment: dict[str, str], text: str
) -> None:
    with pytest.raises(LaunchError) as caught:
        find_place(environment)
    assert text in str(caught.value)
    assert "fix" in caught.value.details


def meeting(environment: dict[str, str]) -> tuple[str, int] | None:
    place = find_place(environment)
    assert isinstance(place, Place)
    found = find_meeting(place, environment)
    return None if found is None else (found.address, found.port)


def test_what_is_set_for_all_ranks_is_where_they_meet() -> None:
    given = {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4444"}
    for environment in (TORCHRUN, OPEN_MPI, MPICH, SRUN):
        assert meeting(environment | given) == ("10.0.0.9", 4444)
    assert meeting(OPEN_MPI | {"MASTER_ADDR": "10.0.0.9"}) == ("10.0.0.9", 29500)


def test_ranks_of_a_slurm_step_meet_on_its_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    address, port = meeting(SRUN) or ("", 0)
    assert (address, 15000 <= port < 30000) == ("gpu03", True)
    assert meeting({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == (address, port)
    assert meeting({**SRUN, "SLURM_STEP_NODELIST": "gpu04,gpu03"}) == ("gpu04", port)
    assert meeting({**SRUN, "SLURM_STEP_NUM_NODES": "1"}) == ("127.0.0.1", port)
    others = {(meeting({**SRUN, "SLURM_JOB_ID": str(job)}) or ("", 0))[1] for job in range(78, 98)}
    others.add((meeting({**SRUN, "SLURM_STEP_ID": "1"}) or ("", 0))[1])
    assert len(others - {port}) > 18


def test_mpi_on_one_node_meets_on_loopback_and_on_several_asks_mpi() -> None:
    alone = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}
    address, port = meeting(alone) or ("", 0)
    assert (address, 15000 <= port < 30000) == ("127.0.0.1", True)
    assert meeting({**alone, "PMIX_NAMESPACE": "prterun-a-25612@1"}) != (address, port)
    assert meeting(OPEN_MPI) is meeting(MPICH) is None


RANK = """
from efficient_dl.launching.ancestor import launching_process
print(launching_process("PMI_RANK"))
"""


def test_ranks_of_pmi_meet_by_the_process_that_launched_them_also_through_shells() -> None:
    words = [sys.executable, "-c", RANK]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PMI_RANK": "0"}
    shell = ["bash", "-c", '"$0" "$@"; true', *words]
    ranks = [
        subprocess.Popen(one, env={**environment, "PMI_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank, one in enumerate([words, shell])
    ]
    direct, wrapped = (rank.communicate(timeout=120)[0] for rank in ranks)
    assert direct == wrapped
    assert f"launched by process {os.getpid()} since " in direct


@pytest.mark.parametrize("text", ["", "http", "0", "70000", "-1"])
def test_a_master_port_that_is_no_port_is_an_error(text: str) -> None:
    with pytest.raises(LaunchError, match="MASTER_PORT is no port"):
        meeting({**OPEN_MPI, "MASTER_PORT": text})


def test_slurm_without_job_or_nodes_says_what_to_set() -> None:
    for missing in ("SLURM_JOB_ID", ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")):
        with pytest.raises(LaunchError, match="set MASTER_"):
            meeting({key: value for key, value in SRUN.items() if key not in missing})


def test_caches_are_on_the_node_and_of_one_user_and_what_is_set_stays(tmp_path: Path) -> None:
    environment = {"TMPDIR": str(tmp_path), "TRITON_CACHE_DIR": "/mine"}
    use_node_caches(environment, os.geteuid())
    assert environment["TRITON_CACHE_DIR"] == "/mine"
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(
        tmp_path / f"efficient_dl-{os.geteuid()}" / "inductor"
    )
    assert (tmp_path / f"efficient_dl-{os.geteuid()}").stat().st_mode & 0o777 == 0o700
    use_node_caches({"TMPDIR": str(tmp_path)}, os.geteuid())  # as the next rank


def test_caches_that_cannot_be_made_are_left_to_their_defaults_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    environment = {"TMPDIR": str(tmp_path / "file")}
    use_node_caches(environment, os.geteuid())
    assert environment.keys() == {"TMPDIR"}
    assert "kept in the home folder" in caplog.text


def test_caches_that_others_can_write_are_refused(tmp_path: Path) -> None:
    uid = os.geteuid()
    (tmp_path / f"efficient_dl-{uid}").mkdir()
    (tmp_path / f"efficient_dl-{uid}").chmod(0o777)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / f"efficient_dl-{uid + 1}").mkdir(mode=0o700)  # not that user's
    (tmp_path / f"efficient_dl-{uid + 2}").symlink_to(tmp_path / "elsewhere")
    for whose, text in ((uid, "others may write"), (uid + 1, "a folder of user"), (uid + 2, "no folder")):
        with pytest.raises(LaunchError, match=text):
            use_node_caches({"TMPDIR": str(tmp_path)}, whose)
    use_node_caches({"TMPDIR": str(tmp_path), **dict.fromkeys(CACHES, "/x")}, uid)
