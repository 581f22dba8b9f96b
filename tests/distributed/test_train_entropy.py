"""Entropies in a run of `edl train`: rows, TensorBoard and a picture in its folder, and a resume that appends."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from efficient_dl.config import Config, with_overrides
from efficient_dl.entropy import KINDS
from efficient_dl.errors import ConfigError
from efficient_dl.training import run
from efficient_dl.training.run_folder import ENTROPY, ENTROPY_PICTURE, RunFolder
from tests.distributed.launch import run_failing_ranks, run_ranks

SETTINGS = [
    "model.name=mlp", "model.size=micro", "data.name=digits", "compression.bits=2.0", "train.eval_batches=2",
    "train.checkpoint_every=3", "train.eval_every=0", "optimizer.schedule=constant",
]  # fmt: skip


def config_of(out: Path, *settings: str) -> Config:
    return with_overrides(Config(), [*SETTINGS, f"run.out={out}", *settings])


def through_and_resumed(rank: int, folder: Path) -> list[float]:
    """Held-out losses of a run without entropies, one with them, and one that was resumed from a crash after a step."""
    plain = run(config_of(folder / "plain", "train.steps=6"))
    through = run(config_of(folder / "through", "train.steps=6", "entropy.every=2"))
    run(config_of(folder / "resumed", "train.steps=3", "entropy.every=2"))
    if rank == 0:  # what a run that was killed in its fourth step leaves: rows that no checkpoint has
        rows = RunFolder(folder / "through", writes=False).rows(ENTROPY)
        RunFolder(folder / "resumed", writes=True).log_entropy([one for one in rows if one["step"] == 4])
    resumed = run(config_of(folder / "resumed", "train.steps=6", "entropy.every=2"), resumed=True)
    return [one.val_loss for one in (plain, through, resumed)]


@pytest.mark.slow
def test_entropies_are_recorded_change_no_bit_and_a_resume_appends_to_them(tmp_path: Path) -> None:
    plain, through, resumed = run_ranks(through_and_resumed, 2, tmp_path)[0]
    assert plain == through == resumed
    rows = RunFolder(tmp_path / "through", writes=False).rows(ENTROPY)
    assert {row["step"] for row in rows} == {1, 2, 4, 6}
    assert {row["kind"] for row in rows} == set(KINDS)
    assert all(0 < row["range"] <= 8 for row in rows if row["kind"] == "weights")
    assert RunFolder(tmp_path / "resumed", writes=False).rows(ENTROPY) == rows
    for name in ("through", "resumed"):
        assert (tmp_path / name / ENTROPY_PICTURE).read_text().count("<image") >= 4, "a panel for each kind"
    assert not (tmp_path / "plain" / ENTROPY).exists()


def test_tensorboard_has_the_means(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_ranks(run_alone, 1, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (first, second) = events.Scalars("entropy/weights_range")
    assert (first.step, second.step) == (1, 2) and math.isfinite(first.value)


def run_alone(rank: int, out: Path) -> None:
    run(config_of(out, "train.steps=2", "entropy.every=2", "entropy.kinds=weights"))


def refused(rank: int, out: Path, setting: str) -> None:
    run(config_of(out, "train.steps=2", "entropy.every=1", setting))


@pytest.mark.parametrize("setting", ["local.mode=layerwise", "entropy.kinds=weights, biases"])
def test_what_is_not_observed_is_refused_on_all_ranks(tmp_path: Path, setting: str) -> None:
    outcomes = run_failing_ranks(refused, 2, tmp_path / "run", setting)
    assert all(isinstance(one.error, ConfigError) for one in outcomes), outcomes


def test_a_heat_map_of_a_long_run_is_thinned(tmp_path: Path) -> None:
    from efficient_dl.entropy.observer import MAX_COLUMNS
    from efficient_dl.training.entropy_log import _history

    folder = RunFolder(tmp_path, writes=True)
    nan = float("nan")
    row = {
        "kind": "weights",
        "name": "w",
        "numel": 9,
        "range": 1.0,
        "frozen": nan,
        "rms": 1.0,
        "exponent": 1.0,
    }
    row |= {"unchanged": 0.0, "unchanged_bf16": 0.0}
    folder.log_entropy([{**row, "step": step} for step in range(3 * MAX_COLUMNS)])
    history = _history(folder)
    assert len(history) == MAX_COLUMNS and history[1][0].step == 3 and math.isnan(history[0][0].frozen)
