"""Python's own standard library as a corpus of bytes: 12 MB of source text on every machine."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efficient_dl.data.tokens import TokenData, split_off
from efficient_dl.errors import DataError

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Written when Python is built or installed, so they differ between machines with the same Python.
EXCLUDED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")
MIN_BYTES = 2**20


def load_standard_library(
    *, holdout: float, context: int, seed: int, folder: Path | None = None
) -> TokenData:
    """The .py files of the running Python, one after the other in the order of their relative paths, as bytes.

    Vocabulary 256. Without site-packages, tests and files made by the installation, so that two machines with the
    same Python version mostly see the same bytes; where they do not, the fingerprint tells. Reading takes about
    0.1 s; nothing is cached. Raises DataError.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    content = b"".join(path.read_bytes() for path in source_files(root))
    if len(content) < MIN_BYTES:
        raise DataError(
            "this Python comes without the sources of its standard library",
            expected=f"at least {MIN_BYTES:,} bytes of .py files",
            found=f"{len(content):,} bytes",
            where=str(root),
            fix="install Python's full library (Debian: apt install libpython3-stdlib), or take other data",
        )
    tokens: NDArray[np.uint8] = np.frombuffer(content, dtype=np.uint8)
    train, validation = split_off(tokens, holdout)
    return TokenData("stdlib", train, validation, vocabulary=256, context=context, seed=seed)


def source_files(root: Path) -> list[Path]:
    """The corpus's files below root, sorted by their path's parts: the same order on every file system."""
    return sorted(_walk(root), key=lambda path: path.relative_to(root).parts)


def _walk(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in EXCLUDED_FOLDERS and not entry.is_symlink():
            yield from _walk(entry)
        elif entry.suffix == ".py" and entry.is_file() and not entry.name.startswith(EXCLUDED_FILES):
            yield entry
