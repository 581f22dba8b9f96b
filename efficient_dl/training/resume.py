"""What a resumed run must have in common with the run it continues, and the state it takes over.

Equal it must have the model, the data (by its fingerprint), the optimizer's name, the seed and the samples of a step
(batch_size × workers × accumulate), and in local training how the model is cut and what its partitions learn by.
Everything else may change: steps, lr, bits, intervals, the number of workers, the folder's place. Changes that matter
for the result are named when the run goes on. The run continues bit for bit if only [run] (but not the number of
workers), [entropy], the intervals of [train] and, with a constant schedule, its steps change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from efficient_dl.config import Config
from efficient_dl.errors import CheckpointError
from efficient_dl.training.checkpoint import Checkpoint
from efficient_dl.training.optimizers import Optimizer

_NO_MATTER = (
    "run",
    "entropy",
    "data.name",  # its kind is compared: files may move, their content is known by its fingerprint
    "data.path",
    "data.download",
    "data.fingerprint",
    "data.batch_size",
    "train.accumulate",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)
_FIXED = (
    "optimizer.name",
    "train.seed",
    "local.mode",
    "local.partitions",
    "local.cuts",
    "local.schedule",
    "local.window",
    "local.heads",
    "local.penalty",
)


class HasState(Protocol):
    """The compression, as far as checkpoints are concerned."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any] | list[dict[str, Any]]) -> None: ...


def check_same_training(before: Config, now: Config) -> list[str]:
    """What changed since the run in a folder was started, one line each, [] if nothing that matters did.

    Raises CheckpointError if the two cannot be one training. The number of samples a step takes is checked when
    the checkpoint is loaded, because it depends on the workers.
    """
    changes = now.differences(before, _NO_MATTER)
    fixed = [
        line for line in changes if line.startswith(("model.", "data.")) or line.split(" = ")[0] in _FIXED
    ]
    if now.data.name.partition(":")[0] != before.data.name.partition(":")[0]:
        fixed.append(f'data.name = "{now.data.name}", "{before.data.name}"')
    if now.data.fingerprint != before.data.fingerprint and now.data.fingerprint and before.data.fingerprint:
        fixed.append(f"data.fingerprint = {now.data.fingerprint}, {before.data.fingerprint}")
    if fixed:
        raise CheckpointError(
            "this folder holds another run",
            differs="; ".join(fixed) + " (now, in the folder)",
            where=before.run.out,
            fix="--out and --resume alone take the folder's settings over; for another run choose another --out",
        )
    return [f"changed since the checkpoint: {line} (now, before)" for line in changes]


def same_samples(before: Config, now: Config, world_size: int, always: bool) -> tuple[Config, list[str]]:
    """The configuration with each worker's share such that a step takes the samples it took before; what changed.

    Another number of workers keeps batch_size and changes accumulate where that divides; else batch_size becomes the
    largest one below that does, and an evaluation takes more batches. always: also where batch_size or accumulate were
    set to something else. Raises CheckpointError if the samples cannot be dealt out evenly.
    """
    wanted = samples_per_step(before, before.run.workers)
    is_set = (before.data.batch_size, before.train.accumulate) != (now.data.batch_size, now.train.accumulate)
    if samples_per_step(now, world_size) == wanted or (is_set and not always):
        return now, []
    if wanted % world_size:
        raise CheckpointError(
            "a step's samples cannot be dealt out evenly to this number of workers",
            expected=f"a divisor of {wanted}, the samples of a step",
            found=f"{world_size} workers",
            fix="start another number of workers; for a run that may shrink, choose batch_size * workers * accumulate "
            "divisible by every number that may remain",
        )
    share = wanted // world_size
    batch_size = max(size for size in range(1, min(now.data.batch_size, share) + 1) if share % size == 0)
    evaluated = before.train.eval_batches * before.data.batch_size
    if now.train.eval_batches != before.train.eval_batches:
        evaluated = now.train.eval_batches * now.data.batch_size
    changed = dataclasses.replace(
        now,
        data=dataclasses.replace(now.data, batch_size=batch_size),
        train=dataclasses.replace(
            now.train, accumulate=share // batch_size, eval_batches=math.ceil(evaluated / batch_size)
        ),
    )
    return changed, [
        f"{world_size} workers, {before.run.workers} before: a step still takes {wanted} samples, now "
        f"{batch_size} a worker at once, {share // batch_size} times (before: {before.data.batch_size}, "
        f"{before.train.accumulate} times)"
    ]


def samples_per_step(config: Config, world_size: int) -> int:
    """Samples of one optimizer step over all ranks."""
    return config.data.batch_size * config.train.accumulate * world_size


def check_position(checkpoint: Checkpoint, config: Config, world_size: int) -> list[str]:
    """Raise CheckpointError if a step takes other samples than before; what else a changed world size means."""
    before, now = checkpoint.about["samples_per_step"], samples_per_step(config, world_size)
    if before != now:
        raise CheckpointError(
            "a step would take another number of samples than before",
            expected=f"{before} = batch_size * workers * accumulate",
            found=f"{now} = {config.data.batch_size} * {world_size} * {config.train.accumulate}",
            fix="change --batch-size or train.accumulate together with --workers",
        )
    ranks = checkpoint.about["ranks"]
    if ranks == world_size:
        return []
    return [
        f"{ranks} workers before, {world_size} now: not bit for bit; generators start afresh, bytes are counted anew"
    ]


def generator_state(device: torch.device) -> dict[str, Any]:
    """The state of torch's generators. Nothing here draws from Python's or numpy's."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_generators(state: Mapping[str, Any], device: torch.device) -> None:
    """Undo `generator_state`."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def rank_state(compression: HasState, device: torch.device) -> dict[str, Any]:
    """This rank's own state: the generators' and the compression's."""
    return {**generator_state(device), "compression": compression.state_dict()}


def restore_rank_state(state: Mapping[str, Any], compression: HasState | None, device: torch.device) -> None:
    """Undo `rank_state`. compression: None leaves it as it starts, because it follows another plan now."""
    restore_generators(state, device)
    if compression is not None:
        compression.load_state_dict(state["compression"])


def tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The state that is equal on all ranks, by name, not copied."""
    named = {f"model/{name}": value for name, value in model.state_dict().items()}
    return named | {f"optimizer/{name}": value for name, value in optimizer.state_dict().items()}


def restore_tensors(state: Mapping[str, torch.Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    """Undo `tensors`, copying. Raises CheckpointError if they are of another model."""
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
    for key, value in state.items():
        part, _, name = key.partition("/")
        parts[part][name] = value
    try:
        model.load_state_dict(parts["model"])
    except RuntimeError as error:
        raise CheckpointError(
            "the checkpoint is of another model",
            found=str(error),
            fix="resume with the model of the run's config.toml, or start a new run in another --out",
        ) from None
    optimizer.load_state_dict(parts["optimizer"])
