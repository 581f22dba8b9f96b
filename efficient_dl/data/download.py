"""Fetch files into the user's cache: checked, complete or not there at all, once a machine."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from efficient_dl.errors import DataError

CONNECT_TIMEOUT_SECONDS = 20.0  # without a byte
CHUNK_BYTES = 2**16


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/efficient_dl, or ~/.cache/efficient_dl."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "efficient_dl"


def fetch_all(checksums: Mapping[str, str], mirrors: Sequence[str], folder: Path) -> None:
    """Bring the files {name: sha-256 in hexadecimal} from the first mirror that has them into the folder.

    A file appears under its name only when it is complete and its checksum right. Other processes that ask for
    the same folder wait, and then find the files. Shows progress on standard error. Raises DataError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder / ".lock"), _progress() as progress:
            for name, checksum in checksums.items():
                if not (folder / name).is_file():
                    _fetch(name, checksum, mirrors, folder, progress)
    except OSError as error:
        fix = "make room or give another folder by XDG_CACHE_HOME"
        raise DataError("the cache cannot be written", found=str(error), where=str(folder), fix=fix) from None


def _fetch(name: str, checksum: str, mirrors: Sequence[str], folder: Path, progress: Progress) -> None:
    failures: list[str] = []
    for mirror in mirrors:
        handle, partial = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                failure = _copy(mirror + name, checksum, file, progress)
            if failure is None:
                os.replace(partial, folder / name)
                return
            failures.append(f"{mirror}: {failure}")
        finally:
            Path(partial).unlink(missing_ok=True)
    raise DataError(
        f"{name} cannot be downloaded",
        found="; ".join(failures),
        where=str(folder),
        fix="see whether this machine reaches the internet, or put the file into a folder and set data.path",
    )


def _copy(url: str, checksum: str, file: IO[bytes], progress: Progress) -> str | None:
    """Write what the address holds into the file; what went wrong, or None."""
    digest = hashlib.sha256()
    try:
        response = urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_SECONDS)
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
        return str(getattr(error, "reason", error))
    with response:
        length = response.headers.get("Content-Length", "")
        task = progress.add_task(url.rsplit("/", 1)[-1], total=int(length) if length.isdigit() else None)
        while True:
            try:
                chunk = response.read(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                return str(error) or type(error).__name__
            if not chunk:
                break
            digest.update(chunk)
            file.write(chunk)
            progress.advance(task, len(chunk))
    found = digest.hexdigest()
    return None if found == checksum else f"wrong checksum: sha-256 {found[:16]}… instead of {checksum[:16]}…"


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True))


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold the lock of a file; it is released when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
