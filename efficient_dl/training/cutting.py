"""A run's model, cut into partitions and made into blocks: measured once, then made anew wherever it is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from efficient_dl.config import Config, DataSpec
from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.local_learning.blocks import Blocks
from efficient_dl.local_learning.partition import Balance, Partitions, partition
from efficient_dl.models import build_model
from efficient_dl.training.optimizers import Optimizer

_AUTO_HEADS = {"tokens": "causal:1", "samples": "auglocal"}
_BALANCE: dict[str, Balance] = {"time": "time", "memory": "memory", "parameters": "parameters"}


class Cutter:
    """Makes partitions with the values of the run's start. unit: "tokens" or "samples"."""

    def __init__(self, config: Config, spec: DataSpec, unit: str, device: torch.device) -> None:
        self.heads = _AUTO_HEADS[unit] if config.local.heads == "auto" else config.local.heads
        self._config, self._spec, self._unit, self._device = config, spec, unit, device

    def measured(self, batch: tuple[Tensor, Tensor]) -> tuple[Partitions, list[PartitionCosts]]:
        """The model cut as the configuration says, and what each partition and its head cost on this batch.

        Raises ConfigError for everything that a partition, its head or its optimizer cannot be.
        """
        local, model = self._config.local, self._model()
        cut = partition(model, local.partitions, batch[0], balance=_BALANCE[local.balance])
        blocks = self.blocks(cut, batch)
        for index in range(len(cut)):
            Optimizer(blocks.make(index), self._config.optimizer)  # fails here if it finds nothing to step
        return cut, blocks.costs(*batch)

    def fresh(self, cuts: Sequence[str]) -> Partitions:
        """The model's partitions again; who holds none of them keeps no memory for it."""
        return partition(self._model(), cuts)

    def blocks(self, partitions: Partitions, batch: tuple[Tensor, Tensor]) -> Blocks:
        """Partitions with heads and losses. batch: any (inputs, targets)."""
        return Blocks(
            partitions,
            *batch,
            self.heads,
            self._spec.classes,
            self._unit,
            penalty=self._config.local.penalty,
            objective=self._config.train.objective,
            seed=self._config.train.seed,
        )

    def _model(self) -> torch.nn.Module:
        return build_model(self._config.model, self._spec, self._config.train.seed).to(self._device)
