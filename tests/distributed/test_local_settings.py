"""What settings mean for layer-wise and partition-wise runs: bits that are planned, Muon, a folder in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from efficient_dl.config import load_config
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.feature_cache import FeatureCache
from efficient_dl.training import Summary, run
from efficient_dl.training.run_folder import locked
from tests.distributed.launch import run_ranks
from tests.distributed.local_runs import GPT, RESNET, config_of, measure_no_ranks, trained
from tests.distributed.measured_links import measuring, network

AUTO = ["local.mode=layerwise", "compression.bits=auto"]
NOT_NATIVE = [
    "compression.error_feedback=on",
    "compression.overrides=*norm*=none, head.*=4.0",
    "compression.messages=bounded",
]


def planned(rank: int, out: Path, megabits: float, *settings: str) -> Summary:
    measure_no_ranks()
    with measuring(network((1, 1), megabits, family="bits")):
        return run(config_of(out, *GPT, *AUTO, *settings), resumed=(out / "config.toml").exists())


@pytest.mark.parametrize("megabits", [0.5, 1e7])
def test_auto_is_decided_once_whatever_the_links_and_the_folder_keeps_the_wish(
    tmp_path: Path, megabits: float
) -> None:
    """Where native is chosen, what only compression takes is left out; a resume on other links decides nothing anew."""
    out, words = tmp_path / "run", NOT_NATIVE
    first, _ = run_ranks(planned, 2, out, megabits, *words)
    assert (first.bits == "none") == (megabits > 1)
    assert load_config(out / "config.toml").compression.bits == "auto"
    second, _ = run_ranks(planned, 2, out, 1 / megabits, *words, "train.steps=8")
    assert (second.bits, second.steps) == (first.bits, 8)


def test_a_partition_without_hidden_matrices_goes_by_adamw_where_the_others_have_muon(tmp_path: Path) -> None:
    settings = [*GPT, "local.mode=layerwise", "local.cuts=head", "optimizer.name=muon"]
    ((summary, _),) = run_ranks(trained, 1, tmp_path / "run", *settings)
    assert summary.steps == 6


def one_is_refused(rank: int, out: Path) -> str:
    """Another run has the folder locked, as only rank 0 can see."""
    held = locked(out, resumed=False) if rank == 0 else None
    with pytest.raises(ConfigError) as caught:
        run(config_of(out, *GPT, "run.timeout_seconds=200"))
    if held is not None:
        held.close()
    return str(caught.value)


def test_what_one_rank_alone_is_refused_ends_all(tmp_path: Path) -> None:
    first, second = run_ranks(one_is_refused, 2, tmp_path / "run")
    assert "another run writes here" in first
    assert "rank 0 cannot begin" in second and "another run writes here" in second


def with_a_damaged_cache(rank: int, out: Path) -> tuple[float, float]:
    """A cache that is damaged on the disk before its stage begins, and what the run comes to without that."""
    settings = ["local.mode=layerwise", "local.schedule=sequential", "local.cache_bytes=100000000"]
    opened = FeatureCache.__init__
    damaged: list[Path] = []

    def damaging(self: FeatureCache, folder: Path, *rest: Any, **more: Any) -> None:
        if not damaged:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "features.bin").write_bytes(b"\0" * 100)
            damaged.append(folder)
        opened(self, folder, *rest, **more)

    measure_no_ranks()
    whole = run(config_of(out / "whole", *RESNET, *settings))
    FeatureCache.__init__ = damaging  # type: ignore[method-assign]
    mended = run(config_of(out / "mended", *RESNET, *settings))
    FeatureCache.__init__ = opened  # type: ignore[method-assign]
    assert damaged
    return whole.val_loss, mended.val_loss


def test_features_in_a_damaged_file_are_computed_again(tmp_path: Path) -> None:
    ((whole, mended),) = run_ranks(with_a_damaged_cache, 1, tmp_path)
    assert whole == mended
