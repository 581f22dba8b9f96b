"""From partitions to blocks that can be trained: a head and an objective for each, made for an example batch."""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
from torch import Tensor, nn

from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.block import LocalBlock
from efficient_dl.local_learning.heads import make_head
from efficient_dl.local_learning.measure import REPEATS, set_mode, unchanged
from efficient_dl.local_learning.objectives import make_objective
from efficient_dl.local_learning.partition import Partitions
from efficient_dl.local_learning.saved import SavedTensors

_EXAMPLES = 2  # samples that are kept: the fewest that batch norm takes


class Blocks:
    """Makes the blocks of a model's partitions, each with the same initial values whenever it is made.

    inputs, targets: a batch. heads: a kind of `make_head`. classes: of logits. unit: "tokens" or "samples".
    penalty: 1/τ of the transport penalty, 0.0 for none. objective: a name of efficient_dl.objectives.OBJECTIVES.
    seed: of the heads' initial values. Raises ConfigError.
    """

    def __init__(
        self,
        partitions: Partitions,
        inputs: Tensor,
        targets: Tensor,
        heads: str,
        classes: int,
        unit: str,
        *,
        penalty: float = 0.0,
        objective: str = "cross-entropy",
        seed: int = 0,
    ) -> None:
        if heads == "deep":
            raise ConfigError(
                "a partition without a head has no loss of its own",
                found='heads = "deep"',
                expected="linear, auglocal, predsim (images), causal:BLOCKS (tokens)",
                fix="another kind of heads; deep is for training end to end with heads on the way",
            )
        self.partitions = partitions
        self._heads, self._classes, self._unit = heads, classes, unit
        self._penalty, self._objective, self._seed = penalty, objective, seed
        self._targets = targets[:_EXAMPLES].clone()  # not a view, which would keep the whole batch
        self._features = _features(partitions, inputs[:_EXAMPLES].clone())

    def make(self, index: int) -> LocalBlock:
        """The block of one partition, in training mode."""
        body = self.partitions[index].module
        head = make_head(
            self._heads,
            index,
            self.partitions,
            self._features[index + 1],
            self._classes,
            self._unit,
            self._seed,
        )
        inside = {id(module) for module in body.modules()}
        objective = make_objective(
            self._heads,
            [piece.module for piece in self.partitions.pieces if id(piece.module) in inside],
            tau=1 / self._penalty if self._penalty else None,
            unit=self._unit,
            task_loss=self._objective,
        )
        return LocalBlock(body, head, objective).train()

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        """Two samples of what goes into a partition, in evaluation mode, and their targets."""
        return self._features[index], self._targets

    def costs(self, inputs: Tensor, targets: Tensor) -> list[PartitionCosts]:
        """The partitions' costs with those of their heads, measured on a batch; nothing of the model changes."""
        model, pieces = self.partitions.model, self.partitions.pieces
        measured: list[PartitionCosts] = []
        with unchanged(model, pieces, inputs.device):
            set_mode(model, pieces, training=True)
            features = inputs
            for partition in self.partitions:
                with torch.no_grad():
                    features = partition.module(features)
                measured.append(self._with_head(partition.index, features, targets))
        return measured

    def _with_head(self, index: int, features: Tensor, targets: Tensor) -> PartitionCosts:
        block, costs = self.make(index), self.partitions[index].costs
        seconds: list[float] = []
        saved = 0
        for _ in range(REPEATS + 1):
            entering = features.detach().requires_grad_(True)
            begin = _now(features)
            with torch.enable_grad(), SavedTensors(block) as meter:
                loss = block.objective(features, entering, block.head, targets)
            saved = meter.bytes
            wanted = [entering, *(one for one in block.head.parameters() if one.requires_grad)]
            torch.autograd.grad(loss, wanted, allow_unused=True)
            seconds.append(_now(features) - begin)
        return dataclasses.replace(
            costs,
            head_seconds=statistics.median(seconds[1:]),
            head_parameter_bytes=_parameter_bytes(block.head),
            head_activation_bytes=saved,
        )


@torch.no_grad()
def _features(partitions: Partitions, inputs: Tensor) -> list[Tensor]:
    """What goes into the first partition, and what comes out of each."""
    features = [inputs]
    with unchanged(partitions.model, partitions.pieces, inputs.device):
        set_mode(partitions.model, partitions.pieces, training=False)
        for partition in partitions:
            features.append(partition.module(features[-1]))
    return features


def _parameter_bytes(module: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in module.parameters())


def _now(tensor: Tensor) -> float:
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize(tensor.device)
    return time.perf_counter()
