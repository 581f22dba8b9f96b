"""`edl launch` and launchers that were never told about us: the same run, started in every way this machine has."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.edl_ranks import free_port
from tests.distributed.mpi_ranks import find_mpi

ROOT = Path(__file__).parents[2]
TRAIN = (
    "train",
    "--model",
    "mlp-nano",
    "--data",
    "digits",
    "--bits",
    "2.0",
    "--steps",
    "2",
    "--set",
    "train.eval_batches=1",
)
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")


def edl(*words: str, seconds: float = 200, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return subprocess.run(
        [sys.executable, "-m", "efficient_dl.cli", *words],
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def check_run(ended: subprocess.CompletedProcess[str], out: Path) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"], summary["bits"]) == (2, 2, 2.0)


@pytest.mark.slow
@pytest.mark.timeout(420)  # six fresh interpreters import torch
def test_local_workers_that_keep_to_their_cores_and_those_of_torchrun_train_alike(tmp_path: Path) -> None:
    enough = len(os.sched_getaffinity(0)) >= 2
    bound = ["--set", f"run.bind={'cores' if enough else 'none'}"]
    alone, joined = tmp_path / "a run", tmp_path / "run"
    words = ["--workers", "2", "--python", sys.executable, "--", *TRAIN, *bound, "--out", str(alone)]
    check_run(edl("launch", "local", *words), alone)
    words = ["--nodes", "1", "--workers", "2", "--restarts", "0", "--port", str(free_port())]
    job = tmp_path / "job.toml"
    job.write_text(
        f"command = {json.dumps([*TRAIN, '--out', str(joined)])}\npython = {json.dumps(sys.executable)}\n"
    )
    check_run(edl("launch", "torchrun", "--job", str(job), *words), joined)
    first, second = (json.loads((out / "summary.json").read_text()) for out in (alone, joined))
    for key in ("val_loss", "wire_bytes_per_step"):
        assert first[key] == second[key], key


def mpirun(name: str, python: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Two ranks by `edl launch mpirun`."""
    found = find_mpi(name)
    assert found is not None
    options = [f"--option={word}" for word in found.options if word.startswith("-") and word != "--bind-to"]
    path = f"{found.mpirun.parent}:{os.environ['PATH']}"
    job = ["--mpi", name, "--nodes", "1", "--workers", "2", "--python", python]
    return edl("launch", "mpirun", *job, *options, "--", *arguments, PATH=path, **found.environment)


@pytest.mark.slow
@pytest.mark.mpi("openmpi")
def test_ranks_of_open_mpi_that_know_no_node_meet_by_mpi_and_send_bytes_by_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    hidden = (
        "-u OMPI_COMM_WORLD_LOCAL_RANK -u OMPI_COMM_WORLD_LOCAL_SIZE"  # as if the ranks were on two nodes
    )
    python.write_text(f'#!/bin/bash\nexec env {hidden} {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    out = tmp_path / "run"
    check_run(mpirun("openmpi", str(python), [*TRAIN, "--transport", "mpi", "--out", str(out)]), out)


@pytest.mark.slow
@pytest.mark.mpi("mpich")
def test_ranks_of_mpich_on_one_node_need_no_mpi_to_meet(tmp_path: Path) -> None:
    out = tmp_path / "run"
    check_run(mpirun("mpich", sys.executable, [*TRAIN, "--out", str(out)]), out)


@pytest.mark.slow
@pytest.mark.netns
def test_hosts_find_the_interface_that_joins_them(tmp_path: Path) -> None:
    forget = [
        "env",
        "-u",
        "GLOO_SOCKET_IFNAME",
        "-u",
        "NCCL_SOCKET_IFNAME",
        sys.executable,
        "-m",
        "efficient_dl.cli",
    ]
    emulate = [sys.executable, "-m", "cluster.emulate", "--hosts", "2", "--"]
    ended = subprocess.run(
        [*emulate, *forget, *TRAIN, "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    check_run(ended, tmp_path / "run")


def test_a_shells_leftover_rank_under_another_launcher_is_an_error() -> None:
    """Every process of the launch would take itself for rank 0."""
    leftover = {"RANK": "0", "WORLD_SIZE": "1", "PMI_RANK": "1", "PMI_SIZE": "2"}
    ended = edl(*TRAIN, **leftover)
    assert ended.returncode == 9
    assert "RANK and WORLD_SIZE contradict MPICH" in ended.stderr
    assert "Traceback" not in ended.stderr
