"""Who holds which cluster: a locked file each, so that what a killed holder has left is known as such."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from cluster import namespaces
from cluster.errors import EmulationError
from cluster.interruption import uninterrupted
from cluster.slurm.config import Folder, check_name

ROOT = Path("/run/edl-slurm")
_PREFIX = "namespaces"  # the file that says how the names of the cluster's namespaces begin
_DOWN_SECONDS = 60.0
_LOOK_SECONDS = 0.3


@contextlib.contextmanager
def claimed(name: str, namespace_prefix: str) -> Iterator[Folder]:
    """Holds the name, and its folder, inside the block; afterwards folder, namespaces and processes are gone.

    The kernel drops the lock with the process, however that ends. Raises EmulationError if another process holds it.
    """
    deadline = time.monotonic() + _LOOK_SECONDS
    while (lock := _acquire(name)) is None and time.monotonic() < deadline:
        time.sleep(0.05)  # somebody may only be looking whether there is such a cluster
    if lock is None:
        raise EmulationError(
            f"the cluster {name!r} is up already, held by process {holder(name)}; "
            f"use it, take it down by `python -m cluster.slurm down --name {name}`, or choose another --name"
        )
    owner = os.getpid()
    try:
        _remove(name)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(owner).encode(), 0)
        folder = Folder(ROOT / name)
        folder.path.mkdir(mode=0o711)  # munged insists that everybody could reach its socket
        (folder.path / _PREFIX).write_text(namespace_prefix)
        yield folder
    finally:
        if os.getpid() == owner:  # a forked child leaves its parent's cluster alone
            with uninterrupted():
                _remove(name)
                _release(name, lock)


def running_folder(name: str) -> Folder:
    """The folder of a cluster that is up. Raises EmulationError if there is none of this name."""
    check_name(name)
    if (lock := _acquire(name)) is not None:
        left = (ROOT / name).exists()
        _release(name, lock, keep=left)
        raise EmulationError(
            f"the cluster {name!r} was killed and has left things behind; `python -m cluster.slurm down --name {name}`"
            if left
            else f"no cluster {name!r}; `python -m cluster.slurm up --name {name}`"
        )
    return Folder(ROOT / name)


def holder(name: str) -> int | None:
    """The process that holds the name; None before it has said so."""
    try:
        return int((ROOT / f"{name}.lock").read_text())
    except (OSError, ValueError):
        return None


def take_down(name: str) -> bool:
    """Ends the cluster's holder and removes what is left of the cluster; False if there was nothing."""
    check_name(name)
    deadline, killed = time.monotonic() + _DOWN_SECONDS, False
    existed, asked = False, None
    while (lock := _acquire(name)) is None:
        existed = True
        pid = holder(name)
        if pid is not None and pid != asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            asked = pid
        if time.monotonic() > deadline:
            if killed or pid is None:
                raise EmulationError(f"process {pid}, which holds the cluster {name!r}, does not end")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            deadline, killed = time.monotonic() + _DOWN_SECONDS, True
        time.sleep(0.05)
    existed = existed or (ROOT / name).exists()
    with uninterrupted():
        _remove(name)
        _release(name, lock)
    return existed


def sweep() -> list[str]:
    """Removes what clusters have left whose holders were killed; their names."""
    swept = []
    for path in sorted(ROOT.glob("*.lock")):
        name = path.stem
        if (lock := _acquire(name)) is not None:
            if (ROOT / name).exists():
                swept.append(name)
            with uninterrupted():
                _remove(name)
                _release(name, lock)
    return swept


def _acquire(name: str) -> int | None:
    """The locked file's descriptor, or None if another process has locked it."""
    path = ROOT / f"{name}.lock"
    while True:
        try:
            ROOT.mkdir(mode=0o711, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # the last cluster's end removed the folder just now
        except PermissionError as error:
            raise EmulationError(f"Slurm clusters belong to root: {error}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(lock).st_ino:
                return lock
        os.close(lock)  # its last holder removed it between our opening and our locking


def _release(name: str, lock: int, keep: bool = False) -> None:
    if not keep:
        (ROOT / f"{name}.lock").unlink(missing_ok=True)
    os.close(lock)
    with contextlib.suppress(OSError):
        ROOT.rmdir()  # unless other clusters are up


def _remove(name: str) -> None:
    """Kills and removes what the folder of this name tells of; only its lock's owner may."""
    path = ROOT / name
    with contextlib.suppress(FileNotFoundError):
        if prefix := (path / _PREFIX).read_text():
            namespaces.remove(namespaces.beginning_with(prefix))
    if path.exists():
        shutil.rmtree(path)
