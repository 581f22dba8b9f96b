"""Atomic checkpoints through torch.distributed.checkpoint: a crash while one is written leaves the one before."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from efficient_dl.errors import CheckpointError
from efficient_dl.training import checksums
from efficient_dl.training.disk import disk_full, raise_if_disk_full

_NAME = re.compile(r"step-(\d{6,})")
_RANK_STATE = "ranks/{rank}"
_ABOUT = checksums.ABOUT
_DAMAGED = ".damaged"


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds.

    tensors: replicated state by name (model and optimizer). rank_states: this rank's own (generators, compression)
    alone, or those of all ranks that wrote it, in order, where their number was another. about: the JSON beside them.
    """

    step: int
    tensors: dict[str, Tensor]
    rank_states: list[Any]
    about: dict[str, Any]


class CheckpointFolder:
    """The folder of a run's checkpoints, one subfolder each: step-000100, step-000200, ….

    A checkpoint is written to `.step-000100.partial` by all ranks and renamed when it is complete and on the disk.
    All ranks must see the same file system. Only complete checkpoints are ever listed. Every file has a checksum, which
    is compared before anything is loaded.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path = path
        self.keep = keep
        self._intact: set[int] = set()  # known from this process's own look, or because it was just written

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def folder(self, step: int) -> Path:
        return self.path / f"step-{step:06d}"

    def save(
        self, step: int, tensors: Mapping[str, Tensor], rank_state: Any, about: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint, a collective call; older ones than the newest `keep` are removed.

        tensors: by name; one that several ranks give must be equal on them, and is written once. rank_state: of each
        rank, anything torch.save takes and torch.load(weights_only=True) gives back. Raises DiskFull or
        CheckpointError, leaving earlier ones alone.
        """
        final = self.folder(step)
        partial = self.path / f".{final.name}.partial"
        state = {**tensors, _RANK_STATE.format(rank=_rank()): _to_blob(rank_state)}
        if _rank() == 0:
            with disk_full(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self._remove_partial()
                partial.mkdir()
                with (partial / _ABOUT).open("w") as file:
                    first = {"step": step, "ranks": _world_size(), checksums.KEY: checksums.KIND}
                    json.dump({**first, **about}, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
        _barrier()
        try:
            dcp.save(state, checkpoint_id=partial)
        except dcp.CheckpointException as error:
            _barrier()
            _raise_save_error(error, partial, self.latest())
        sums = _sums_of_all(partial)
        if _rank() == 0:
            with disk_full(self.path):
                checksums.write(partial, sums)
                _sync_folder(partial)
                if final.exists():
                    shutil.rmtree(final)
                partial.rename(final)
                _sync_folder(self.path)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder(old), ignore_errors=True)
        _barrier()
        self._intact.add(step)
        return final

    def newest_intact(self) -> tuple[int | None, list[str]]:
        """The newest checkpoint whose files are as they were written, a collective call; None if there is none at all.

        Ranks share the reading, and agree. Newer, damaged ones get a name that does not count; the lines say which.
        Raises CheckpointError if all are damaged.
        """
        damaged: dict[int, list[str]] = {}
        for step in reversed(_gather(self.steps())[0]):
            lines = self._damage(step)
            if not lines:
                return step, self._set_aside(damaged, step)
            damaged[step] = lines
        if damaged:
            raise CheckpointError(
                "all checkpoints are damaged",
                found="; ".join(f"step {step}: {lines[0]}" for step, lines in damaged.items()),
                where=str(self.path),
                fix="look at the disk; without a copy of a checkpoint, start again in another --out",
            )
        return None, []

    def _damage(self, step: int) -> list[str]:
        if step in self._intact:
            return []
        everyone = _gather(checksums.damage(self.folder(step), _rank(), _world_size()))
        lines = [line for lines in everyone for line in lines]
        if not lines:
            self._intact.add(step)
        return lines

    def _set_aside(self, damaged: Mapping[int, list[str]], instead: int) -> list[str]:
        """Rename damaged checkpoints, so that they neither count among those kept nor are looked at again."""
        if not damaged:
            return []
        problem: str | None = None
        for step in damaged if _rank() == 0 else ():
            name = self.folder(step)
            aside = name.with_name(name.name + _DAMAGED)
            try:
                shutil.rmtree(aside, ignore_errors=True)
                name.rename(aside)
            except OSError as error:
                problem = str(error)
        problem = _gather(problem)[0]
        if problem is not None:
            raise CheckpointError(
                "a damaged checkpoint cannot be renamed", found=problem, where=str(self.path)
            )
        return [
            f"the checkpoint of step {step} is damaged ({'; '.join(lines)}): it is now called "
            f"{self.folder(step).name}{_DAMAGED}, and the run goes on from step {instead}"
            for step, lines in damaged.items()
        ]

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, None if there is none."""
        return next(reversed(self.steps()), None)

    def about(self, step: int) -> dict[str, Any]:
        """The JSON written beside a checkpoint. Raises CheckpointError."""
        with _damaged(self.folder(step)):
            return json.loads((self.folder(step) / _ABOUT).read_text())

    def load(self, step: int, wanted_tensor: Callable[[str], bool] = lambda name: True) -> Checkpoint:
        """Read a checkpoint, a collective call. Raises CheckpointError if it is missing or damaged.

        wanted_tensor: which tensors this rank takes, by name; others are not read.
        """
        folder = self.folder(step)
        if lines := self._damage(step):
            raise CheckpointError(
                "a checkpoint is damaged",
                found="; ".join(lines),
                where=str(folder),
                fix="--resume goes on from the checkpoint before it",
            )
        about = self.about(step)
        ranks = [_rank()] if about["ranks"] == _world_size() else range(about["ranks"])
        wanted = [_RANK_STATE.format(rank=rank) for rank in ranks]
        with _damaged(folder):
            entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
            tensors = {
                key: torch.empty(entry.size, dtype=entry.properties.dtype)
                for key, entry in entries.items()
                if isinstance(entry, TensorStorageMetadata)
                and (key in wanted or (not key.startswith("ranks/") and wanted_tensor(key)))
            }
            dcp.load(tensors, checkpoint_id=folder)
            states = [_from_blob(tensors.pop(key)) for key in wanted]
            return Checkpoint(about["step"], tensors, states, about)

    def _remove_partial(self) -> None:
        for leftover in self.path.glob(".*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)


def _sums_of_all(folder: Path) -> dict[str, str]:
    """The checksums of all files: each rank's of what it wrote itself, rank 0's of the rest. On all ranks."""
    own = [path.name for path in folder.glob(f"__{_rank()}_*")]
    sums: dict[str, str] = {}
    error: str | None = None
    try:
        sums = checksums.checksums(folder, own)
    except OSError as caught:
        error = str(caught)
    everyone = _gather((sums, error))
    found = {name: text for theirs, _ in everyone for name, text in theirs.items()}
    errors = [one for _, one in everyone if one is not None]
    if not errors and _rank() == 0:
        try:
            rest = {path.name for path in folder.iterdir()} - found.keys()
            found |= checksums.checksums(folder, rest)
        except OSError as caught:
            errors = [str(caught)]
    errors = _gather(errors)[0]
    if errors:
        raise CheckpointError(
            "a checkpoint cannot be read again for its checksums", found=errors[0], where=str(folder)
        )
    return found


def _to_blob(state: Any) -> Tensor:
    """Any state as a uint8 tensor, so that one rank's part of a checkpoint is one entry."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _from_blob(blob: Tensor) -> Any:
    return torch.load(io.BytesIO(blob.numpy().tobytes()), weights_only=True)


def _raise_save_error(error: dcp.CheckpointException, partial: Path, latest: int | None) -> None:
    kept = "no earlier checkpoint" if latest is None else f"the checkpoint of step {latest} is intact"
    causes = [failure[0] for failure in error.failures.values()]
    try:
        for cause in causes:
            raise_if_disk_full(cause, partial, kept)
    finally:
        _barrier()  # every rank has probed the disk before the partial files go
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
    raise CheckpointError(
        "a checkpoint could not be written", found=repr(causes[0]), where=str(partial), fix=kept
    ) from None


@contextlib.contextmanager
def _damaged(folder: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:
        causes = (
            [one[0] for one in error.failures.values()]
            if isinstance(error, dcp.CheckpointException)
            else [error]
        )
        raise CheckpointError(
            "a checkpoint cannot be read",
            found=f"{type(causes[0]).__name__}: {str(causes[0]).splitlines()[0] if str(causes[0]) else ''}",
            where=str(folder),
            fix="remove this folder to go on from the checkpoint before it",
        ) from None


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    if not dist.is_initialized():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
