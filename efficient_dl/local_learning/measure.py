"""What each piece of a chain costs in time and memory on an example, measured without leaving a trace."""

from __future__ import annotations

import statistics
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.pieces import Piece
from efficient_dl.local_learning.recompute import run_once, runs_again
from efficient_dl.local_learning.saved import SavedTensors

REPEATS = 5  # forward and backward passes a piece, of which the medians count, after one to warm up
TRIES, TRIES_SECONDS = 12, 1.0  # by which ranks measure how fast they are: of each piece, and of all of them


@dataclass(frozen=True)
class PieceCosts:
    """One piece on the example, in training mode.

    saved: what it keeps for backward, storage -> bytes. A storage that two pieces keep, such as the activations
    between them, has the same key in both. again_bytes: what it also keeps while it runs again, if it is checkpointed.
    """

    forward_seconds: float
    backward_seconds: float
    saved: dict[Hashable, int]
    output_bytes: int
    again_bytes: int = 0


def measure(model: nn.Module, pieces: Sequence[Piece], example: Tensor) -> list[PieceCosts]:
    """The costs of every piece, each on what the pieces before it make of the example.

    Only one piece's activations exist at a time. Gradients, buffers, modes and random generators are afterwards what
    they were. Raises ConfigError where a piece cannot run a training step on the example.
    """
    saved: list[dict[Hashable, int]] = []
    sizes: list[int] = []
    again: list[int] = []
    start = example.detach().clone()
    with unchanged(model, pieces, example.device), torch.enable_grad():
        set_mode(model, pieces, training=True)
        source, number = start, 0
        for index, piece in enumerate(pieces):
            with _training_step(piece):
                storages, output = _saved(model, piece, source)
                again.append(_saved_again(model, piece, source))
            # What lies inside a piece is gone after it, and its address may come again.
            between = {_address(source): number}
            number = between.setdefault(_address(output), index + 1)  # the same one if that is a view
            saved.append({between.get(key, (index, key)): size for key, size in storages.items()})
            sizes.append(output.numel() * output.element_size())
            source = _as_input(output)
            del output
        # Round by round, so that what disturbs the machine for a moment does not fall on one piece alone.
        rounds: list[list[tuple[float, float]]] = []
        for _ in range(REPEATS + 1):
            rounds.append([])
            source = start
            for piece in pieces:
                with _training_step(piece):
                    seconds, source = _seconds(piece, source)
                rounds[-1].append(seconds)
    costs: list[PieceCosts] = []
    for index, (storages, size, more) in enumerate(zip(saved, sizes, again, strict=True)):
        forward, backward = (statistics.median(one[index][which] for one in rounds[1:]) for which in range(2))
        costs.append(PieceCosts(forward, backward, storages, size, more))
    return costs


def least_seconds(model: nn.Module, pieces: Sequence[Piece], example: Tensor) -> float:
    """Of one forward and backward pass through all pieces, each piece at its fastest of several times.

    For ranks to compare themselves by: what disturbs one for a moment does not count. Only one piece's activations
    exist at a time. Leaves the model as `measure` does.
    """
    source, total = example.detach().clone(), 0.0
    with unchanged(model, pieces, example.device), torch.enable_grad():
        set_mode(model, pieces, training=True)
        for piece in pieces:
            with _training_step(piece):
                begin, taken, following = _now(example.device), list[float](), source
                while len(taken) < 2 or (
                    len(taken) < TRIES and _now(example.device) - begin < TRIES_SECONDS / len(pieces)
                ):
                    del following
                    seconds, following = _seconds(piece, source)
                    taken.append(sum(seconds))
                total += min(taken)
                source = following
    return total


@contextmanager
def _training_step(piece: Piece) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the piece {piece.name!r} cannot run a training step on the example",
            found=f"{type(error).__name__}: {error}",
            fix="give a batch as training will have it (batch norm needs two samples)",
        ) from error


def _saved(model: nn.Module, piece: Piece, source: Tensor) -> tuple[dict[int, int], Tensor]:
    """Data pointer -> bytes of what the piece keeps for backward, and its output without a graph."""
    with SavedTensors(model) as meter:
        output = piece.module(source)
    if not isinstance(output, Tensor):
        raise TypeError(f"it returns {type(output).__name__}, not one tensor")
    return dict(meter.storages), output.detach()


def _saved_again(model: nn.Module, piece: Piece, source: Tensor) -> int:
    """What a checkpointed piece keeps while it runs again, beside its input."""
    if not runs_again(piece.module):
        return 0
    with SavedTensors(model) as meter:
        output = run_once(piece.module, source)
        held = {**meter.storages}
    del output  # with what it kept
    held.pop(_address(source), None)
    return sum(held.values())


def _seconds(piece: Piece, source: Tensor) -> tuple[tuple[float, float], Tensor]:
    """Of one forward, and of its backward to the piece's parameters and, where it has a gradient, its input.

    Also its output, as the next piece's input.
    """
    wanted = [one for one in (source, *piece.module.parameters()) if one.requires_grad]
    started = _now(source.device)
    output = piece.module(source)
    between = _now(source.device)
    if output.requires_grad:
        # Not backward(): that would add to the gradients of the model.
        torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
    return (between - started, _now(source.device) - between), _as_input(output)


def _as_input(output: Tensor) -> Tensor:
    return output.detach().requires_grad_(output.is_floating_point())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def set_mode(model: nn.Module, pieces: Sequence[Piece], *, training: bool) -> None:
    """Puts the model, and what adapters put around its modules, into training or evaluation mode."""
    model.train(training)
    for piece in pieces:
        piece.module.train(training)


@contextmanager
def unchanged(model: nn.Module, pieces: Sequence[Piece], device: torch.device) -> Iterator[None]:
    """Restores on leaving: modes, buffers (the same tensors, their values) and random generators."""
    modules = {
        id(one): one for root in (model, *(piece.module for piece in pieces)) for one in root.modules()
    }
    modes = [(module, module.training) for module in modules.values()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules.values()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                buffer.copy_(value)
