"""The entropy observer in a run: rows in the run's folder, frozen steps in checkpoints, a heat map at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from efficient_dl.config import Config
from efficient_dl.entropy import KINDS, EntropyObserver, Row
from efficient_dl.entropy.observer import MAX_COLUMNS
from efficient_dl.errors import ConfigError
from efficient_dl.training.optimizers import Optimizer
from efficient_dl.training.run_folder import ENTROPY, ENTROPY_PICTURE, RunFolder


class EntropyLog:
    """Watches the entropy of a model on rank 0, whose replica is that of all ranks; on others it does nothing.

    Make it before the first step, when the model has its initial values: the frozen rule keeps their range.
    """

    def __init__(self, config: Config, model: nn.Module, optimizer: Optimizer, folder: RunFolder) -> None:
        self._folder = folder
        self._observer: EntropyObserver | None = None
        if config.entropy.every and folder.writes:
            self._observer = EntropyObserver(
                model,
                optimizer.parts,
                every=config.entropy.every,
                bits=config.entropy.bits,
                kinds=_kinds(config),
                writer=folder,
                seed=config.train.seed,
            )

    def write(self, step: int) -> None:
        """After a step: its rows, if it was measured, to the folder."""
        one = self._observer
        if one is not None and one.rows and one.rows[0].step == step:
            self._folder.log_entropy([dataclasses.asdict(row) for row in one.rows])

    def state_dict(self) -> dict[str, Any] | None:
        """The observer's state, for a checkpoint; None where nothing is observed."""
        return None if self._observer is None else self._observer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Go on after `step`. state: None, or of other bits: the frozen steps stay those of the initial values."""
        if self._observer is None:
            return
        if state is not None and state["bits"] == self._observer.bits:
            self._observer.load_state_dict(state)
        self._observer.step = step

    def close(self) -> None:
        """Remove the hooks. May be called again."""
        if self._observer is not None:
            self._observer.close()

    def draw(self) -> None:
        """The heat map of all that the folder has."""
        if self._observer is None:
            return
        from efficient_dl.entropy.heat_map import draw_heat_map  # matplotlib is slow to import

        if history := _history(self._folder):
            draw_heat_map(history, self._folder.path / ENTROPY_PICTURE)


def check_entropy(config: Config) -> None:
    """Raise ConfigError where entropies are wanted of a run that does not measure them, or of unknown kinds."""
    if unknown := [one for one in _kinds(config) if one not in KINDS]:
        raise ConfigError(
            f"there is no kind of tensors {unknown[0]!r}",
            expected=", ".join(KINDS),
            found=config.entropy.kinds,
            where="entropy.kinds",
        )
    if config.entropy.every and config.local.mode != "end-to-end":
        raise ConfigError(
            "entropies are observed in end-to-end training",
            expected="local.mode=end-to-end, or entropy.every=0",
            found=f"local.mode={config.local.mode}, entropy.every={config.entropy.every}",
            fix="--entropy-every 0; or attach edl.entropy.EntropyObserver in a script of your own",
        )


def _kinds(config: Config) -> tuple[str, ...]:
    return tuple(filter(None, (one.strip() for one in config.entropy.kinds.split(","))))


def _history(folder: RunFolder) -> list[list[Row]]:
    """The file's measurements, oldest first, at most MAX_COLUMNS, evenly thinned."""
    by_step: dict[int, list[Row]] = {}
    for line in folder.rows(ENTROPY):
        values: dict[str, Any] = {
            key: float("nan") if value is None else value for key, value in line.items()
        }
        by_step.setdefault(line["step"], []).append(Row(**values))
    steps = sorted(by_step)
    every = -(-len(steps) // MAX_COLUMNS)
    return [by_step[step] for step in steps[:: max(1, every)]]
