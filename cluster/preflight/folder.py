"""Whether a folder is the same on all hosts, and writable: each rank leaves a file there, and rank 0 looks for all."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_TOKEN = "token"
_SEEN_SECONDS = 10.0  # network file systems may show another host's new file that late
_POLL_SECONDS = 0.1


@contextlib.contextmanager
def token(folder: Path, text: str) -> Iterator[str | None]:
    """Rank 0's part before the others look: leaves a token inside the block. Its value says what went wrong, if so."""
    place = _place(folder, text)
    try:
        try:
            place.mkdir()
            (place / _TOKEN).write_text(text)
        except OSError as error:
            yield f"cannot be written: {error}"
        else:
            yield None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def look(folder: Path, text: str, rank: int) -> str | None:
    """A rank's part: what is wrong with the folder here, or None."""
    place = _place(folder, text)
    deadline = time.monotonic() + _SEEN_SECONDS
    while True:
        try:
            found = (place / _TOKEN).read_text()
            break
        except FileNotFoundError:
            if not folder.is_dir():
                return "does not exist"
            if time.monotonic() > deadline:
                return "is not the folder that rank 0 has: its file is not there"
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            return f"cannot be read: {error}"
    if found != text:
        return "is not the folder that rank 0 has: its file reads otherwise"
    try:
        (place / str(rank)).write_text(text)
    except OSError as error:
        return f"cannot be written: {error}"
    return None


def unseen(folder: Path, text: str, ranks: Iterable[int]) -> list[int]:
    """Rank 0's part after the others have looked: ranks of those whose file does not show up."""
    missing = list(ranks)
    deadline = time.monotonic() + _SEEN_SECONDS
    while missing := [rank for rank in missing if not (_place(folder, text) / str(rank)).exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    return missing


def _place(folder: Path, text: str) -> Path:
    return folder / f".edl-preflight-{text}"
