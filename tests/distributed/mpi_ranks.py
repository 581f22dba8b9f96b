"""Runs functions on ranks that a real mpirun has started: Open MPI's and MPICH's, where the machine has them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MAX_RANKS = 4
_PAUSE_SECONDS = 0.005
_LONGEST_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class Mpi:
    """One MPI: its mpirun, what that needs on its command line, and what its ranks need in their environment."""

    name: str
    mpirun: Path
    options: tuple[str, ...]
    environment: dict[str, str]


@functools.cache
def find_mpi(name: str) -> Mpi | None:
    """The MPI of this name: the environment's, or the one in its folder `mpich` (see the Makefile), or the PATH's."""
    on_path = shutil.which("mpirun")
    for mpirun in (
        Path(sys.executable).parent / "mpirun",
        Path(sys.prefix) / "mpich/bin/mpirun",
        *([Path(on_path)] if on_path else []),
    ):
        if mpirun.exists():
            version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30).stdout
            environment = {}
            if mpirun.parent.parent.name == "mpich":  # mpi4py would load the environment's library
                environment["MPI4PY_LIBMPI"] = str(mpirun.parents[1] / "lib/libmpi.so.12")
            if name == "mpich" and "HYDRA" in version:
                return Mpi(name, mpirun, (), environment)
            if name == "openmpi" and ("Open MPI" in version or "OpenRTE" in version):
                options = ("--oversubscribe", "--bind-to", "none")
                environment["OMPI_MCA_mpi_yield_when_idle"] = "1"  # more ranks than cores
                root = ("--allow-run-as-root",) if os.getuid() == 0 else ()
                return Mpi(name, mpirun, root + options, environment)
    return None


def missing_requirements(name: str) -> list[str]:
    """What the machine lacks to run ranks by this MPI."""
    import importlib.util

    missing = [] if importlib.util.find_spec("mpi4py") else ["the package mpi4py"]
    return missing + ([] if find_mpi(name) else [f"{name}'s mpirun in this environment or on the PATH"])


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    seconds: since the last rank had started. reports: each rank's value, or exception; absent if it was killed before.
    leaked: command lines of its processes that still run.
    """

    code: int
    seconds: float
    reports: dict[int, Any]
    output: str
    leaked: list[str]


def launch(
    mpi: str, world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0
) -> Ended:
    """Starts a job that calls function(*arguments) on all ranks, and waits for its end.

    timeout: seconds, then the test fails; most of them for the start on a busy machine.
    """
    with _Folder() as folder:
        (folder / "0.task").write_bytes(pickle.dumps((function, world_size, arguments)))
        process = _start(mpi, world_size, folder, "once")
        try:
            code = process.wait(timeout)
            seconds = time.time() - max(
                (path.stat().st_mtime for path in folder.glob("*.started")), default=0
            )
            return Ended(code, seconds, _reports(folder, 0), (folder / "log").read_text(), _left_over(folder))
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"mpirun still runs after {timeout} s\n{(folder / 'log').read_text()}"
            ) from None
        finally:
            _end(process)


def run_mpi_ranks(mpi: str, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Calls function(transport, *arguments) on the first ranks of a job that all tests share; the values by rank."""
    job = _job(mpi)
    try:
        return job.run(function, world_size, arguments)
    except TimeoutError as error:
        _job.cache_clear()
        job.end()
        raise AssertionError(f"{error}\n{job.log()}") from None


class _Job:
    """Ranks that wait for tasks, because starting them takes seconds. A task is a file, and so is a result."""

    def __init__(self, mpi: str) -> None:
        self._folder = _Folder()
        self._tasks = 0
        self._path = self._folder.__enter__()
        self._process = _start(mpi, MAX_RANKS, self._path, "serve")
        atexit.register(self.end)

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        arguments: tuple[Any, ...],
        timeout: float = 240.0,
    ) -> list[Any]:
        number, self._tasks = self._tasks, self._tasks + 1
        _write(self._path / f"{number}.task", (function, world_size, arguments))
        deadline = time.monotonic() + timeout
        while len(reports := _reports(self._path, number)) < world_size:
            if time.monotonic() > deadline or self._process.poll() is not None:
                missing = sorted(set(range(world_size)) - set(reports))
                raise TimeoutError(f"no result of ranks {missing} of {function.__name__}")
            time.sleep(_PAUSE_SECONDS)
        for rank in range(world_size):
            if isinstance(reports[rank], BaseException):
                raise AssertionError(f"rank {rank} failed") from reports[rank]
        return [reports[rank] for rank in range(world_size)]

    def log(self) -> str:
        return (self._path / "log").read_text() if self._path.exists() else ""

    def end(self) -> None:
        (self._path / "end").touch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        _end(self._process)
        self._folder.__exit__(None, None, None)


_job = functools.cache(_Job)


class _Folder(tempfile.TemporaryDirectory[str]):
    def __enter__(self) -> Path:  # type: ignore[override]
        return Path(super().__enter__())

    def __exit__(self, *_: Any) -> None:
        self.cleanup()


def _start(mpi: str, num_ranks: int, folder: Path, mode: str) -> subprocess.Popen[bytes]:
    found = find_mpi(mpi)
    assert found is not None
    environment = {**os.environ, **found.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(found.mpirun), *found.options, "-n", str(num_ranks)]
    command += [sys.executable, "-m", "tests.distributed.mpi_ranks", mode, str(folder), str(os.getpid())]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _reports(folder: Path, number: int) -> dict[int, Any]:
    paths = folder.glob(f"{number}.*.result")
    return {int(path.name.split(".")[1]): pickle.loads(path.read_bytes()) for path in paths}


def _left_over(folder: Path) -> list[str]:
    """Command lines of ranks of this job that still run, or are ending, 20 seconds after mpirun's end."""
    deadline = time.monotonic() + 20.0
    while (found := _running(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _running(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode()
            if str(folder) in line:
                found.append(line)
    return found


def _write(path: Path, value: Any) -> None:
    path.with_suffix(".part").write_bytes(pickle.dumps(value))
    path.with_suffix(".part").rename(path)


def _once(folder: Path) -> None:
    """One task, as a user's script: an exception ends the process."""
    from mpi4py import MPI

    result = folder / f"0.{MPI.COMM_WORLD.Get_rank()}.result"
    function, world_size, arguments = pickle.loads((folder / "0.task").read_bytes())
    assert MPI.COMM_WORLD.Get_size() == world_size, f"{MPI.Get_library_version()} does not belong to mpirun"
    (folder / f"{MPI.COMM_WORLD.Get_rank()}.started").touch()
    try:
        value = function(*arguments)
    except BaseException as error:
        _write(result, error)
        raise
    _write(result, value)


def _serve(folder: Path, owner: int) -> None:
    """Tasks, until the tests end."""
    from mpi4py import MPI

    from efficient_dl.comm.mpi import MpiTransport

    world = MPI.COMM_WORLD
    assert world.Get_size() == MAX_RANKS, f"{MPI.Get_library_version()} does not belong to mpirun"
    number = 0
    while True:
        path, pause = folder / f"{number}.task", _PAUSE_SECONDS
        while not path.exists():
            if (folder / "end").exists():
                return
            if not Path(f"/proc/{owner}").exists():
                world.Abort(1)
            time.sleep(pause)
            pause = min(1.02 * pause, _LONGEST_PAUSE_SECONDS)  # other tests want the cores
        function, world_size, arguments = pickle.loads(path.read_bytes())
        comm = world.Split(int(world.Get_rank() >= world_size))
        if world.Get_rank() < world_size:
            try:
                value = function(MpiTransport(comm, timeout=120.0), *arguments)
            except BaseException as error:
                traceback.print_exc()
                value = error
            _write(folder / f"{number}.{world.Get_rank()}.result", value)
        number += 1


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sys.argv[1] == "once":
        _once(Path(sys.argv[2]))
    else:
        _serve(Path(sys.argv[2]), int(sys.argv[3]))
