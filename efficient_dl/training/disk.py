"""A full disk, told apart from other failures to write, and reported as DiskFull."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from efficient_dl.errors import ConfigError, DiskFull

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PROBE_BYTES = 1 << 20


@contextlib.contextmanager
def disk_full(path: Path, kept: str | None = None) -> Iterator[None]:
    """Turn an OSError for want of room into DiskFull. path: where is written. kept: what the user still has."""
    try:
        yield
    except OSError as error:
        raise_if_disk_full(error, path, kept)
        raise


@contextlib.contextmanager
def writable(path: Path, fix: str = "choose another --out") -> Iterator[None]:
    """DiskFull or ConfigError for what the operating system has against writing to this folder."""
    try:
        with disk_full(path):
            yield
    except OSError as error:
        raise ConfigError(
            "the folder cannot be written", found=str(error), where=str(path), fix=fix
        ) from None


def raise_if_disk_full(error: BaseException, path: Path, kept: str | None = None) -> None:
    """Raise DiskFull if the error came from a disk without room, quota or file-size limit.

    torch's zip writer hides the operating system's error ("unexpected pos"); then writing a probe file decides.
    """
    if isinstance(error, OSError):
        full = error.errno in _FULL
    else:
        full = isinstance(error, RuntimeError) and "unexpected pos" in str(error) and not _has_room(path)
    if not full:
        return
    folder = path if path.is_dir() else path.parent
    raise DiskFull(
        "the disk is full",
        found=f"{_free_bytes(folder) / 1e6:.1f} MB free",
        where=str(path),
        fix="free some space, then continue with --resume" + (f"; {kept}" if kept else ""),
    ) from None


def _has_room(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except OSError as error:
        return error.errno not in _FULL
    return True


def _free_bytes(folder: Path) -> int:
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize
