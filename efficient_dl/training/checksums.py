"""Checksums of a checkpoint's files: a flipped bit, a missing or a cut-off file is found before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import xxhash

ABOUT, CHECKSUMS = "about.json", "checksums.json"
KEY, KIND = "checksums", "xxh3-128"  # in about.json of checkpoints that have them
_PIECE_BYTES = 1 << 22


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Of each file, "its size in bytes:its 128-bit xxh3 in hexadecimal digits"."""
    return {name: _checksum(folder / name) for name in sorted(names)}


def write(folder: Path, sums: dict[str, str]) -> None:
    """Write them beside the files, onto the disk."""
    with (folder / CHECKSUMS).open("w") as file:
        json.dump(sums, file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a folder, a line each.

    part, parts: this caller looks at every parts-th file, from `part` on; together they look at all. Nothing is wrong
    with a folder of a version that wrote no checksums: its about.json says so.
    """
    try:
        if not (folder / CHECKSUMS).exists() and KEY not in json.loads((folder / ABOUT).read_text()):
            return []
        expected = json.loads((folder / CHECKSUMS).read_text())
        wanted = [(str(name), str(text)) for name, text in sorted(expected.items())]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return [f"its checksums cannot be read: {error}"] if part == 0 else []
    return [line for name, text in wanted[part::parts] if (line := _damage(folder / name, text))]


def _damage(path: Path, expected: str) -> str | None:
    try:
        size = path.stat().st_size
        if expected.partition(":")[0] != str(size):
            return f"{path.name} has {size} bytes instead of {expected.partition(':')[0]}"
        return None if _checksum(path) == expected else f"{path.name} is not what was written: other bits"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def _checksum(path: Path) -> str:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
    return f"{size}:{digest.hexdigest()}"
