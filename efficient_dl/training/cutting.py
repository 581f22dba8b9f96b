"""A run's model, cut into partitions and made into blocks: measured once, then made anew wherever it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from efficient_dl.config import Config, DataSpec
from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.blocks import Blocks
from efficient_dl.local_learning.cuts import dearness
from efficient_dl.local_learning.measure import least_seconds
from efficient_dl.local_learning.partition import Balance, Partitions, cut_again, partition
from efficient_dl.local_learning.pieces import pieces_of
from efficient_dl.training.optimizers import Optimizer
from efficient_dl.training.run_model import build_run_model

_AUTO_HEADS = {"tokens": "causal:1", "samples": "auglocal"}
_RECUTS = 3
_NOISE = 1.1  # of times that are measured one after the other
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
        local = self._config.local
        balance, given = _BALANCE[local.balance], local.names
        with _where("local.cuts" if given else "local.partitions"):
            cut = partition(self._model(), given or local.partitions, batch[0], balance=balance)
        costs, measured = self._with_heads(cut, batch), cut.measured
        tried = {cut.cuts: costs}
        for _ in range(0 if given else _RECUTS):  # what heads cost is known where the model was cut before
            del cut  # one model at a time
            cut = cut_again(self._model(), local.partitions, measured, balance, costs)
            if cut.cuts in tried:
                break
            costs = tried[cut.cuts] = self._with_heads(cut, batch)
        best = _best(tried, balance)
        if best != cut.cuts:
            del cut
            cut = cut_again(self._model(), best, measured, balance)
        return cut, tried[best]

    def costs(self, cuts: Sequence[str], batch: tuple[Tensor, Tensor]) -> list[PartitionCosts]:
        """What the partitions of a known cut and their heads cost on this batch."""
        return self._with_heads(partition(self._model(), cuts, batch[0]), batch)

    def _with_heads(self, cut: Partitions, batch: tuple[Tensor, Tensor]) -> list[PartitionCosts]:
        blocks = self.blocks(cut, batch)
        for index in range(len(cut)):
            # Fails here if it finds nothing to step.
            Optimizer(blocks.make(index), self._config.optimizer, of_part=True)
        return blocks.costs(*batch)

    def work_seconds(self, batch: tuple[Tensor, Tensor]) -> float:
        """How long this rank takes for a forward and backward pass of the whole model over a batch, undisturbed."""
        model = self._model()
        return least_seconds(model, pieces_of(model), batch[0])

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
        return build_run_model(self._config, self._spec, self._device)


def _best(tried: Mapping[tuple[str, ...], list[PartitionCosts]], balance: str) -> tuple[str, ...]:
    """The cut whose dearest partition is cheapest; of those that differ by noise the last, made with the best costs."""
    dearest = {cuts: max(dearness(one, balance) for one in costs) for cuts, costs in tried.items()}
    noise = _NOISE if balance == "time" else 1.0
    return next(cuts for cuts in reversed(dearest) if dearest[cuts] <= noise * min(dearest.values()))


@contextlib.contextmanager
def _where(setting: str) -> Iterator[None]:
    """Errors name the setting instead of the function that finds them."""
    try:
        yield
    except ConfigError as error:
        where = {"where": setting} if error.details.get("where", "").startswith("partition: n") else {}
        raise ConfigError(error.problem, **{**error.details, **where}) from error
