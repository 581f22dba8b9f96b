"""Train a model's partitions by their own losses, on one device: `LocalLearner`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from efficient_dl.coordinator.assignment import Assignment
from efficient_dl.coordinator.plateau import PlateauRule, smoothed
from efficient_dl.errors import CheckpointError, ConfigError
from efficient_dl.local_learning.block import LocalBlock
from efficient_dl.local_learning.blocks import Blocks
from efficient_dl.local_learning.feature_cache import FeatureCache
from efficient_dl.local_learning.held import Frozen, Held, Trained
from efficient_dl.local_learning.host import Host
from efficient_dl.local_learning.measure import set_mode, unchanged
from efficient_dl.local_learning.partition import Partitions
from efficient_dl.local_learning.selection import Selection

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
_AUTO_HEADS = {"tokens": "causal:1", "samples": "auglocal"}


@dataclass
class _OneOptimizer:
    """A torch optimizer whose learning rates are its own."""

    optimizer: torch.optim.Optimizer

    def step(self, lr: float) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class LocalLearner:
    """Trains the partitions of a model side by side or one after the other, without backprop through the whole.

    Only one partition's activations (window 2: two partitions') are in memory at a time; gradients of one (with
    `accumulate` of all) that train, optimizer states of all that train: `train_sequentially` has one at a time. The
    model is the one that was cut: it can be evaluated and saved at any time, and has no trace of the heads. Each step
    sets the modes that it needs itself: train() for what trains, eval() for what is frozen.

    partitions: of `efficient_dl.partition`.
    example: a batch (inputs, targets) on the model's device; targets int64, (batch,) or (batch, tokens).
    optimizer: makes a partition's torch optimizer from its parameters, those of its head among them.
    heads: a kind of `make_head`; "auto": "causal:1" for tokens, "auglocal" for samples.
    classes: of the logits; None: as many as the model puts out.
    window: 2: a partition also learns from the next one's loss, over one cut. Better, at twice the activations and up
        to half as much more backward work.
    clip: the largest norm of a partition's gradient; 0.0: not clipped.
    penalty: 1/τ of a penalty (1/2τ)·‖branch‖² on residual branches.
    objective: the loss of logits, a name of efficient_dl.objectives.OBJECTIVES.
    keep_examples: the share of a batch's examples that a partition hands on to the next one, which learns from no
        others; with window 1, side by side. keep_by: those with the largest local loss, or at random (`Selection`).
    seed: of the heads' initial values.
    autocast: entered for every forward pass, such as lambda: torch.autocast("cuda", torch.bfloat16).

        partitions = edl.partition(model, 4, example=inputs)
        learner = edl.LocalLearner(partitions, (inputs, targets), lambda p: torch.optim.AdamW(p, 1e-3))
        for batch in batches:
            losses = learner.step(*batch)
        torch.save(model.state_dict(), "model.pt")

    After Nøkland & Eidnes 2019 (local losses), Ma et al. 2024 (AugLocal), and HPFF (window 2). Raises ConfigError.
    """

    def __init__(
        self,
        partitions: Partitions,
        example: Batch,
        optimizer: MakeOptimizer,
        *,
        heads: str = "auto",
        classes: int | None = None,
        window: Literal[1, 2] = 1,
        clip: float = 0.0,
        penalty: float = 0.0,
        objective: str = "cross-entropy",
        keep_examples: float = 1.0,
        keep_by: Literal["loss", "random"] = "loss",
        seed: int = 0,
        autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        if window not in (1, 2):
            raise ConfigError(f"window cannot be {window!r}", expected="1 or 2")
        if clip < 0:
            raise ConfigError(f"clip cannot be {clip!r}", expected="at least 0.0")
        inputs, targets = example
        unit = "tokens" if targets.dim() > 1 else "samples"
        classes = classes if classes is not None else _classes(partitions, inputs)
        kind = _AUTO_HEADS[unit] if heads == "auto" else heads
        self.partitions = partitions
        self.losses: list[float] = []  # by partition, of the latest step; NaN where it did not train
        self._window, self._autocast, self._clip = window, autocast, clip
        selection = Selection(keep_examples, keep_by, objective)
        self._selection = selection if keep_examples < 1.0 else None
        self._make_optimizer = optimizer
        self._trainable = {id(one) for one in partitions.model.parameters() if one.requires_grad}
        self._blocks = Blocks(
            partitions,
            inputs,
            targets,
            kind,
            classes,
            unit,
            penalty=penalty,
            objective=objective,
            seed=seed,
        )
        self._trained: dict[int, Trained] = {}
        self._stage(range(len(partitions)))

    def step(self, inputs: Tensor, targets: Tensor) -> list[float]:
        """One optimizer step of every partition in training, on one batch; their local losses before it, else NaN."""
        return self.accumulate([(inputs, targets)])

    def accumulate(self, batches: Sequence[Batch]) -> list[float]:
        """One optimizer step on the mean of several batches of equal size, one after the other in memory.

        Raises ConfigError if there is no batch, or no partition in training.
        """
        if not batches or not self._trained:
            raise ConfigError(
                "there is nothing to take a step with",
                expected="at least one batch and one partition in training",
                found=f"batches: {len(batches)}, partitions in training: {len(self._trained)}",
            )
        self._set_modes()
        losses = self._host.train_step(0, len(batches), lambda number: batches[number], lambda index: 0.0)
        self.losses = [
            float(losses[index]) if index in losses else float("nan") for index in range(len(self.partitions))
        ]
        return self.losses

    def train_sequentially(
        self,
        batches: Iterable[Batch],
        steps: int,
        *,
        plateau: PlateauRule | None = None,
        stage_steps: int = 100,
        features: Path | None = None,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> list[int]:
        """One partition after the other: `steps` steps each, or fewer at a plateau; then it is frozen.

        Optimizer state and gradients are those of one partition at a time. In the end all partitions are frozen: in
        eval mode, their parameters without requires_grad. It begins with the first one in training: after
        `load_state_dict` of a state in which only partition 2 trained, that one, which gets all its steps again.

        batches: one for each step, as many as all partitions need. plateau: looked at every `stage_steps` steps.
        features: a folder for what the frozen partitions make of each sample, compressed without loss: a sample passes
        through them once while a partition trains, then it is read. Worth it where samples come again bit for bit,
        as in epochs without augmentation (`FeatureCache`); nothing stays in the folder.
        progress: called with (partition, its step, its loss) after every step. Returns the steps that each took.
        """
        if self._selection is not None:
            raise ConfigError(
                "partitions that train one after the other have no loss before them to choose examples by",
                expected="keep_examples=1.0, or step() and accumulate()",
                found=f"keep_examples={self._selection.keep}",
            )
        first = min(self._trained, default=len(self.partitions))
        taken = [0] * first
        source = iter(batches)
        for index in range(first, len(self.partitions)):
            self._stage([index])
            with self._reading(features if index else None, index):
                taken.append(self._train_one(index, source, steps, plateau, stage_steps, progress))
        self._stage([])
        return taken

    def freeze(self, *indices: int) -> None:
        """Train these partitions no longer: their heads, gradients and optimizer state are given up."""
        self._stage([index for index in self._trained if index not in indices])

    @property
    def optimizers(self) -> dict[int, torch.optim.Optimizer]:
        """Of each partition in training, for schedules of the learning rate."""
        return {index: _torch_optimizer(one) for index, one in sorted(self._trained.items())}

    @property
    def training(self) -> tuple[int, ...]:
        """The partitions that train."""
        return tuple(sorted(self._trained))

    def block(self, index: int) -> LocalBlock:
        """A partition in training with its head. Raises ConfigError for one that does not train."""
        if index not in self._trained:
            raise ConfigError(
                "this partition does not train", expected=f"one of {self.training}", found=str(index)
            )
        return self._trained[index].block

    def state_dict(self) -> dict[str, Any]:
        """Heads and optimizers of the partitions in training; the model's own state_dict() holds the rest."""
        return {
            str(index): {"head": one.block.head.state_dict(), "optimizer": _torch_optimizer(one).state_dict()}
            for index, one in self._trained.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`; the partitions in training are then those of the state. Raises CheckpointError."""
        try:
            self._stage(sorted(int(index) for index in state))
            for index, one in self._trained.items():
                one.block.head.load_state_dict(state[str(index)]["head"])
                _torch_optimizer(one).load_state_dict(state[str(index)]["optimizer"])
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise CheckpointError(
                "this is not a state of this learner",
                found=str(error),
                fix="make the learner with the same partitions and heads as before",
            ) from error

    def _train_one(
        self,
        index: int,
        source: Iterator[Batch],
        steps: int,
        plateau: PlateauRule | None,
        stage_steps: int,
        progress: Callable[[int, int, float], None] | None,
    ) -> int:
        stages: list[float] = []
        recent: list[float] = []
        for step in range(steps):
            batch = next(source, None)
            if batch is None:
                raise ConfigError(
                    "there are too few batches",
                    expected=f"{steps} for each of {len(self.partitions)} partitions",
                    found=f"none for step {step} of partition {index}",
                    fix="batches that go on, such as itertools.cycle(loader)",
                )
            recent.append(self.step(*batch)[index])
            if progress is not None:
                progress(index, step + 1, recent[-1])
            if plateau is not None and len(recent) == stage_steps:
                stages.append(smoothed(recent))
                recent = []
                if plateau.converged(stages):
                    return step + 1
        return steps

    @contextlib.contextmanager
    def _reading(self, folder: Path | None, index: int) -> Iterator[None]:
        """Inside, what the partitions before this one make of a sample is kept in the folder."""
        if folder is None:
            yield
            return
        frozen = nn.Sequential(*(self.partitions[before].module for before in range(index)))
        folder.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="features-", dir=folder) as own,
            FeatureCache(Path(own), frozen.eval(), augmented=False) as cache,
        ):
            self._host.read_frozen(cache.features)
            yield

    def _stage(self, training: Iterable[int]) -> None:
        """From now on these partitions train; those before the last of them are passed through, the rest is idle."""
        wanted = sorted(training)
        active = max(wanted, default=-1) + 1
        for index in [*self._trained]:
            if index not in wanted:
                del self._trained[index]
                Frozen(index, self.partitions[index].module)
        held: list[Held] = []
        for index in range(active):
            if index in wanted and index not in self._trained:
                self._trained[index] = self._make(index)
            held.append(
                self._trained[index] if index in wanted else Frozen(index, self.partitions[index].module)
            )
        for index in wanted:  # once more where a frozen partition borrows a weight
            self._reach(index)
        ranks = tuple((0,) if index < active else () for index in range(len(self.partitions)))
        self._host = Host(0, Assignment(ranks), held, None, self._window, self._autocast, self._selection)

    def _reach(self, index: int) -> None:
        """Let gradients come to a partition's own parameters, except to those that never wanted any."""
        for parameter in self.partitions[index].owned_parameters():
            parameter.requires_grad_(id(parameter) in self._trainable)

    def _set_modes(self) -> None:
        """Whatever the caller did with the model since the last step, such as model.train() after an evaluation."""
        for index, partition in enumerate(self.partitions):
            if index in self._trained:
                self._trained[index].block.train()
            elif index < max(self._trained):
                partition.module.eval()

    def _make(self, index: int) -> Trained:
        partition = self.partitions[index]
        self._reach(index)
        block = self._blocks.make(index)
        own = [one for one in partition.owned_parameters() if one.requires_grad]
        parameters = [*own, *block.head.parameters()]
        optimizer = _OneOptimizer(self._make_optimizer(parameters))
        return Trained(index, block, block, optimizer, parameters, self._clip, bool(partition.borrowed))


def _torch_optimizer(one: Trained) -> torch.optim.Optimizer:
    assert isinstance(one.optimizer, _OneOptimizer)
    return one.optimizer.optimizer


@torch.no_grad()
def _classes(partitions: Partitions, inputs: Tensor) -> int:
    model, pieces = partitions.model, partitions.pieces
    with unchanged(model, pieces, inputs.device):
        set_mode(model, pieces, training=False)
        outputs = model(inputs[:2])
    logits = getattr(outputs, "logits", outputs)
    return int(logits.shape[-1])
