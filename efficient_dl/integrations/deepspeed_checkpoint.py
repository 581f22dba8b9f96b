"""The compression state in DeepSpeed's checkpoints: one file a rank in the tag's folder, beside DeepSpeed's own."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from efficient_dl.comm import Transport, gather_json
from efficient_dl.errors import CheckpointError, EdlError

_log = logging.getLogger(__name__)
METHODS = {
    "save_checkpoint": (
        *("self", "save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters"),
    ),
    "load_checkpoint": (
        *("self", "load_dir", "tag", "load_module_strict", "load_optimizer_states"),
        *("load_lr_scheduler_states", "load_module_only", "custom_load_fn"),
    ),
}


class Stateful(Protocol):
    """What is saved."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, of plain numbers and strings."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from it."""
        ...

    def begin_at(self, step: int) -> None:
        """Goes on without one, after this step."""
        ...


class CheckpointFiles:
    """Stands before an engine's save_checkpoint and load_checkpoint, which every rank calls.

    saving: `efficient_dl_rank{r}.pt` (read it with torch.load(weights_only=True)) is on disk on all ranks before
        DeepSpeed writes its files and moves "latest" to the tag. If one rank cannot write, all raise CheckpointError.
    loading: at the same number of ranks every rank continues from its own file, bit for bit; if only some ranks' are
        there, all raise CheckpointError. A folder without any was saved without compression, one of another number of
        ranks belongs to other shards: the state starts again, which is logged. Without the optimizer's states
        (load_module_only=True, load_optimizer_states=False) it is a new run, and nothing is restored.
    """

    def __init__(self, engine: Any, state: Stateful, transport: Transport) -> None:
        self._engine = engine
        self._state = state
        self._transport = transport
        self._save, self._load = engine.save_checkpoint, engine.load_checkpoint
        self._name = f"efficient_dl_rank{transport.rank}.pt"

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's save_checkpoint, with the compression state."""
        call = inspect.signature(self._save).bind(*args, **kwargs).arguments
        if call["save_dir"]:
            tag = call.get("tag")
            tag = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
            self._together("save", lambda: self._write(Path(call["save_dir"]) / tag))
        return self._save(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's load_checkpoint, with the compression state."""
        result = self._load(*args, **kwargs)
        bound = inspect.signature(self._load).bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        if result[0] is None:
            return result  # DeepSpeed has found no checkpoint, and said so
        if call["load_module_only"] or not call["load_optimizer_states"]:
            _log.warning("compression state not restored: the optimizer's states are not loaded either")
            self._state.begin_at(self._engine.global_steps)
        else:
            self._restore(Path(result[0]).parent)
        return result

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{self._name}.part"
        torch.save(self._state.state_dict(), unfinished)
        os.replace(unfinished, folder / self._name)

    def _restore(self, folder: Path) -> None:
        own: list[dict[str, Any]] = []
        if (folder / self._name).exists():
            self._together("load", lambda: own.append(torch.load(folder / self._name, weights_only=True)))
        else:
            self._together("load", lambda: None)
        size = self._transport.world_size
        saved: list[int | None] = gather_json(own[0]["world_size"] if own else None, self._transport)
        sizes = sorted({found for found in saved if found is not None})
        lacking = [rank for rank, found in enumerate(saved) if found is None]
        if not sizes:
            _log.warning("compression state starts anew: the checkpoint in %s was saved without", folder)
            self._state.begin_at(self._engine.global_steps)
        elif sizes != [size]:
            _log.warning("compression state starts anew: saved by %s ranks, loaded by %d", sizes[0], size)
            self._state.begin_at(self._engine.global_steps)
        elif lacking:
            raise CheckpointError(
                "the checkpoint lacks the compression state of some ranks",
                expected=f"efficient_dl_rank0.pt … efficient_dl_rank{size - 1}.pt",
                found=f"none for rank {', '.join(map(str, lacking))}",
                where=str(folder),
                fix="restore the files, or remove the others to start the compression state anew",
            )
        else:
            self._together("load", lambda: self._state.load_state_dict(own[0]))

    def _together(self, what: str, action: Callable[[], None]) -> None:
        """Acts on every rank, and raises on every rank if one fails."""
        error: Exception | None = None
        try:
            action()
        except Exception as caught:
            error = caught
        failures: list[str] = gather_json(str(error).splitlines()[0] if error else "", self._transport)
        if isinstance(error, EdlError):
            raise error
        for rank, failure in enumerate(failures):
            if failure:
                raise CheckpointError(
                    f"rank {rank} cannot {what} its compression state", found=failure, where=self._name
                ) from error
