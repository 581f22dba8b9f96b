"""Folders for the files of an emulation, whose names tell when nobody needs them any more."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from cluster import namespaces

_PARENT = Path("/tmp")  # not TMPDIR: sockets are made below it, and their paths may have 107 bytes
_ENDING = "files"


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A new folder inside the block. prefix: how the names of the emulation's namespaces begin."""
    folder = _PARENT / f"{prefix}-{_ENDING}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def stale_folders() -> list[Path]:
    """Folders of processes that were killed."""
    found = [path for path in _PARENT.glob(f"edl-*-{_ENDING}") if namespaces.is_stale(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink()]
