"""Layer-wise and partition-wise runs: the same numbers wherever partitions lie, and nothing lost when they move."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from efficient_dl.config import DataSpec
from efficient_dl.errors import CheckpointError, ConfigError, TransportError
from efficient_dl.local_learning import recompute
from efficient_dl.local_learning.feature_cache import CacheStats, FeatureCache
from efficient_dl.models import build_model
from efficient_dl.training import Summary, run
from efficient_dl.training.checkpoint import CheckpointFolder
from efficient_dl.training.local_loop import LocalTrainer
from efficient_dl.training.run_folder import DECISIONS, RunFolder
from tests.distributed.launch import run_failing_ranks, run_ranks
from tests.distributed.local_runs import GPT, RESNET, config_of, differing, measure_no_ranks, trained

PLACES = {
    "2 ranks, a partition each": (2, ["local.mode=partitionwise"]),
    "2 ranks, activations lossless": (
        2,
        ["local.mode=partitionwise", "local.activations=lossless", "train.accumulate=2"],
    ),
    "3 ranks, three partitions": (
        3,
        [
            "local.mode=partitionwise",
            "local.partitions=3",
        ],  # 3 micro-batches: no group of 2 ranks divides them
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_streamed_partitions_have_the_bits_of_one_rank(tmp_path: Path, place: str) -> None:
    """A partition on a rank of its own sees the same micro-batches as on a rank that holds them all."""
    world_size, settings = PLACES[place]
    accumulate = world_size * (2 if "train.accumulate=2" in settings else 1)
    alone = [
        "local.mode=layerwise",
        *settings[1:],
        f"train.accumulate={accumulate}",
        "local.activations=identity",
    ]
    ((expected, tensors),) = run_ranks(trained, 1, tmp_path / "alone", *GPT, *alone)
    for summary, streamed in run_ranks(trained, world_size, tmp_path / "apart", *GPT, *settings):
        assert differing(tensors, streamed) == []
        assert summary.val_loss == expected.val_loss
        assert summary.wire_bytes_per_step > 0
    assert expected.wire_bytes_per_step == 0


def test_the_result_is_a_state_of_the_whole_model(tmp_path: Path) -> None:
    (_, tensors), _ = run_ranks(trained, 2, tmp_path / "run", *GPT, "local.mode=partitionwise")
    config = config_of(tmp_path, *GPT)
    model = build_model(config.model, DataSpec("tokens", 256, (16,)), seed=1)
    state = {key.removeprefix("model/"): one for key, one in tensors.items() if key.startswith("model/")}
    assert not torch.equal(
        state["blocks.0.attention.qkv.weight"], model.state_dict()["blocks.0.attention.qkv.weight"]
    )
    model.load_state_dict(state)  # strict: no name of a head, none missing


def test_partitions_on_several_ranks_each_stay_equal_there(tmp_path: Path) -> None:
    """Two ranks a partition average its gradients, about as one rank does that takes both micro-batches."""
    settings = ["local.mode=partitionwise", "optimizer.name=sgd", "optimizer.lr=0.01"]
    four = run_ranks(trained, 4, tmp_path / "four", *GPT, *settings)
    two = run_ranks(trained, 2, tmp_path / "two", *GPT, *settings, "train.accumulate=2")
    decisions = RunFolder(tmp_path / "four", writes=False).rows(DECISIONS)
    assert decisions[0]["ranks"] == [[0, 1], [2, 3]]
    for key, value in two[0][1].items():
        torch.testing.assert_close(four[0][1][key], value, rtol=1e-4, atol=1e-5)


CHECKPOINTED = {
    "end to end": [*GPT, "local.mode=end-to-end", "compression.bits=none"],
    "end to end, batch norm": [*RESNET, "local.mode=end-to-end"],
    "window 2": [*GPT, "local.mode=layerwise", "local.window=2"],
    "partitionwise, batch norm": [*RESNET, "local.mode=partitionwise"],
}


def trained_again(rank: int, out: Path, *settings: str) -> tuple[int, Summary, dict[str, torch.Tensor]]:
    """How often blocks have forgotten their activations, and what `trained` returns."""
    forgot = recompute._run_checkpointed
    passes = 0

    def counted(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += torch.is_grad_enabled()
        return forgot(module, x)

    recompute._run_checkpointed = counted
    summary, tensors = trained(rank, out, *settings)
    return passes, summary, tensors


@pytest.mark.parametrize("case", CHECKPOINTED)
def test_blocks_that_run_again_train_to_the_same_bits(tmp_path: Path, case: str) -> None:
    settings = [*CHECKPOINTED[case], "model.dropout=0.1"]
    plain = run_ranks(trained_again, 2, tmp_path / "plain", *settings)
    again = run_ranks(trained_again, 2, tmp_path / "again", *settings, "train.activation_checkpointing=true")
    for (none, one, tensors), (some, other, others) in zip(plain, again, strict=True):
        assert differing(tensors, others) == []
        assert one.val_loss == other.val_loss
        assert none == 0 and some >= 6  # in every step at least


def test_a_resume_with_checkpointing_plans_with_other_costs(tmp_path: Path) -> None:
    settings = [*GPT, "local.mode=partitionwise"]
    run_ranks(trained, 2, tmp_path / "run", *settings, "train.steps=4")
    again = [*settings, "train.activation_checkpointing=true"]
    notes = run_ranks(resumed, 2, tmp_path / "run", *again)
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    before, after = (folder.load(step).about["local"]["coordinator"]["costs"] for step in (4, 6))
    assert all(one["again_bytes"] == 0 for one in before)
    assert all(one["again_bytes"] > 0 for one in after)
    assert notes == [6, 6]


def resumed(rank: int, out: Path, *settings: str) -> int:
    return run(config_of(out, *settings), resumed=True).steps


FEATURES = [
    *RESNET,
    "data.batch_size=350",  # so that samples come again
    "local.mode=layerwise",
    "local.schedule=sequential",
    "local.partitions=3",
    "local.cache_bytes=100000000",
]
RESUMED: dict[str, tuple[int, list[str]]] = {
    "partitionwise-2bit-gpt": (
        2,
        [
            *GPT,
            "local.mode=partitionwise",
            "compression.bits=2.0",
            "local.activations=4.0",
            "model.dropout=0.1",
        ],
    ),
    "partitionwise-4-ranks-resnet": (4, [*RESNET, "local.mode=partitionwise"]),
    "layerwise-sequential-gpt": (
        2,
        [
            *GPT,
            "local.mode=layerwise",
            "local.schedule=sequential",
            "compression.bits=2.0",
            "model.dropout=0.1",
        ],
    ),
    "features-inside-a-stage": (2, FEATURES),
    "features-where-partitions-move": (2, FEATURES),
    "layerwise-window-2-gpt": (
        2,
        [*GPT, "local.mode=layerwise", "local.window=2", "local.partitions=3", "train.accumulate=2"],
    ),
    "layerwise-hardest-half-gpt": (
        2,
        [*GPT, "local.mode=layerwise", "local.keep_examples=0.5", "data.batch_size=4"],
    ),
    "layerwise-predsim-penalty": (
        1,
        [*RESNET, "local.mode=layerwise", "local.heads=predsim", "local.penalty=0.01", "optimizer.name=sgd"],
    ),
}


def reading(rank: int, out: Path) -> tuple[list[dict[str, torch.Tensor]], CacheStats, list[Path]]:
    """What was trained without and with kept features, how many were read in the last stage, what is left of them."""
    stats: list[CacheStats] = []
    close = FeatureCache.close

    def closing(self: FeatureCache) -> None:
        stats.append(self.stats)
        close(self)

    FeatureCache.close = closing  # type: ignore[method-assign]
    settings = ["local.mode=layerwise", "local.schedule=sequential", "data.batch_size=1000", "train.steps=8"]
    both = [
        trained(rank, out / limit, *RESNET, *settings, f"local.cache_bytes={limit}")[1]
        for limit in ("0", "100000000")
    ]
    FeatureCache.close = close  # type: ignore[method-assign]
    return both, stats[-1], [*out.glob("*/features/**/*")]


def test_kept_features_train_as_computed_ones_do(tmp_path: Path) -> None:
    (((computed, read), stats, left),) = run_ranks(reading, 1, tmp_path)
    assert stats.hits > 0
    assert left == []
    for name, value in computed.items():
        torch.testing.assert_close(read[name], value, rtol=1e-3, atol=1e-5)


@contextlib.contextmanager
def copied_after_saving(at: int, whole: Path, copy: Path) -> Iterator[None]:
    """Inside, a run's folder is copied right after the checkpoint of this step: what a crash there would leave."""
    save = CheckpointFolder.save

    def copying(self: CheckpointFolder, step: int, *state: Any) -> Path:
        folder = save(self, step, *state)
        if step == at:
            if dist.get_rank() == 0:
                shutil.copytree(whole, copy)
            dist.barrier()
        return folder

    CheckpointFolder.save = copying  # type: ignore[method-assign]
    yield
    CheckpointFolder.save = save  # type: ignore[method-assign]


def resume_differences(rank: int, folder: Path, settings: list[str], crash_at: int) -> list[str]:
    """What differs between 8 steps in one go, and a crash after a checkpoint and a resume.

    Both follow the same measured costs, because the crash is a copy of the run itself: other measurements may give
    other decisions.
    """
    measure_no_ranks()
    intervals = ["train.steps=8", "train.checkpoint_every=3", "train.eval_every=2", "local.stage_steps=5"]
    whole, crashed = (config_of(folder / name, *settings, *intervals) for name in ("whole", "crashed"))
    with copied_after_saving(crash_at, Path(whole.run.out), Path(crashed.run.out)):
        run(whole)
    torch.manual_seed(99)
    run(crashed, resumed=True)
    ends = [CheckpointFolder(Path(one.run.out) / "checkpoints").load(8) for one in (whole, crashed)]
    differences = differing(ends[0].tensors, ends[1].tensors)
    folders = [RunFolder(Path(one.run.out), False) for one in (whole, crashed)]
    kept = ("step", "loss", "val_loss", "lr_partition_0", "lr_partition_1")
    rows = [[{key: row.get(key) for key in kept} for row in one.rows()] for one in folders]
    if rows[0] != rows[1]:
        differences.append(f"metrics: {rows}")
    if folders[0].rows(DECISIONS) != folders[1].rows(DECISIONS):
        differences.append("decisions")
    return differences


CRASHES = {"features-inside-a-stage": 6, "features-where-partitions-move": 5}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_a_resume_equals_never_stopping(tmp_path: Path, case: str) -> None:
    world_size, settings = RESUMED[case]
    crash_at = CRASHES.get(case, 4 if "local.schedule=sequential" in settings else 3)
    for differences in run_ranks(resume_differences, world_size, tmp_path, settings, crash_at):
        assert differences == []


def freezing(rank: int, out: Path) -> tuple[list[dict[str, Any]], Summary]:
    settings = ["local.mode=partitionwise", "local.stage_steps=3", "local.freeze_below=0.9", "train.steps=40"]
    config = config_of(out, *GPT, *settings, "optimizer.lr=1e-5")
    summary = run(config)
    decisions = RunFolder(out, False).rows(DECISIONS)
    assert run(config, resumed=True) == summary
    assert RunFolder(out, False).rows(DECISIONS) == decisions
    return decisions, summary


def test_a_converged_run_ends_before_its_last_step_and_stays_ended(tmp_path: Path) -> None:
    for decisions, summary in run_ranks(freezing, 2, tmp_path / "run"):
        assert decisions[-1]["training"] == [False, False]
        assert "converged" in decisions[-1]["reason"] or "frozen" in decisions[-1]["reason"]
        assert summary.steps == decisions[-1]["step"] < 40
        assert summary.val_loss > 0


def paced(rank: int, out: Path) -> list[tuple[int, int]]:
    """On a rank without partitions: the steps that it has ended, and those of the first rank that works."""
    ahead: list[tuple[int, int]] = []
    step = LocalTrainer._train_step

    def watched(self: LocalTrainer) -> Any:
        row = step(self)
        assert self.stage is not None
        if not self.stage.held:
            store = dist.distributed_c10d._get_default_store()
            told = [key for key in self.pace._keys if not key.endswith("/2")]
            ahead.append((self.step, max(int(one) for one in store.multi_get(told))))
        return row

    LocalTrainer._train_step = watched  # type: ignore[method-assign]
    measure_no_ranks()  # so that the last one is left over
    run(config_of(out, *GPT, "local.mode=partitionwise", "train.steps=12", "local.stage_steps=12"))
    LocalTrainer._train_step = step  # type: ignore[method-assign]
    return ahead


def test_a_rank_that_is_left_over_keeps_step_with_the_others(tmp_path: Path) -> None:
    ahead = run_ranks(paced, 3, tmp_path / "run")  # two partitions, three micro-batches: groups of one
    assert ahead[0] == ahead[1] == []
    assert len(ahead[2]) == 12
    assert all(step <= first for step, first in ahead[2])


def residuals(state: dict[str, Any], inside: bool = False) -> list[torch.Tensor]:
    """All residuals in the state of a compression."""
    found: list[torch.Tensor] = []
    for key, value in state.items():
        if isinstance(value, dict):
            found += residuals(value, inside or "residual" in str(key))
        elif inside and isinstance(value, torch.Tensor):
            found.append(value.clone())
    return found


def frozen_first(rank: int, out: Path) -> list[dict[int, list[torch.Tensor]]]:
    """Residuals before and after partition 0, and it alone, is frozen."""
    seen: list[dict[int, list[torch.Tensor]]] = []
    decide, carry = LocalTrainer._decide, LocalTrainer._carry_over

    def as_told(self: LocalTrainer, losses: Any) -> Any:
        told = {index: 1.0 if index == 0 else 0.05**self.step for index in losses}
        return decide(self, told)

    def watched(self: LocalTrainer, compressed: Any) -> None:
        seen.append({index: residuals(state) for index, (_, state) in compressed.items()})
        carry(self, compressed)
        seen.append({index: residuals(state) for index, (_, state) in self._compressed().items()})

    LocalTrainer._decide, LocalTrainer._carry_over = as_told, watched  # type: ignore[method-assign]
    settings = ["local.mode=layerwise", "local.partitions=3", "local.freeze_below=0.1", "local.stage_steps=1"]
    feedback = ["compression.bits=1.0", "compression.error_feedback=on"]
    run(config_of(out, *GPT, *settings, *feedback, "optimizer.lr=1e-5", "train.steps=7"))
    LocalTrainer._decide, LocalTrainer._carry_over = decide, carry  # type: ignore[method-assign]
    return seen


def test_what_stays_where_it_is_keeps_its_residuals_when_another_is_frozen(tmp_path: Path) -> None:
    for before, after in run_ranks(frozen_first, 2, tmp_path / "run"):
        assert before.keys() == {0, 1, 2} and after.keys() == {1, 2}
        for index, kept in after.items():
            assert kept and any(one.abs().sum() > 0 for one in kept)
            assert all(torch.equal(one, other) for one, other in zip(before[index], kept, strict=True))


def continued(rank: int, out: Path, accumulate: int) -> tuple[Summary, dict[str, torch.Tensor]]:
    settings = [
        "local.mode=partitionwise",
        f"train.accumulate={accumulate}",
        "train.steps=9",
        "local.stage_steps=4",
    ]
    summary = run(config_of(out, *GPT, *settings), resumed=True)
    return summary, CheckpointFolder(out / "checkpoints").load(9).tensors


def test_another_number_of_ranks_goes_on_with_every_partition(tmp_path: Path) -> None:
    settings = ["local.mode=partitionwise", "train.accumulate=2", "local.stage_steps=4"]
    run_ranks(trained, 2, tmp_path / "run", *GPT, *settings)
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    (same, expected), _ = run_ranks(continued, 2, tmp_path / "same", 2)
    for world_size in (1, 4):
        shutil.copytree(tmp_path / "run", tmp_path / str(world_size), dirs_exist_ok=True)
        outcomes = run_ranks(continued, world_size, tmp_path / str(world_size), 4 // world_size)
        summary, tensors = outcomes[0]
        assert summary.steps == 9
        assert tensors.keys() == expected.keys()
        # The same samples in the same steps: only sums run in another order.
        assert summary.val_loss == pytest.approx(same.val_loss, rel=1e-3)
    history = RunFolder(tmp_path / "4", False).rows(DECISIONS)
    assert next(row["world_size"] for row in history if row["step"] >= 6) == 4


def refused(rank: int, out: Path, settings: list[str], resumed: bool) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        run(config_of(out, *settings), resumed=resumed)
    return str(caught.value)


REFUSED = {
    "window 2 apart": (["local.mode=partitionwise", "local.window=2"], "window 2 needs"),
    "too many partitions": (["local.mode=layerwise", "local.partitions=99"], "99"),
    "a head of another task": (["local.mode=layerwise", "local.heads=predsim"], "predsim"),
    "features of tokens": (
        ["local.mode=layerwise", "local.schedule=sequential", "local.cache_bytes=1000000000"],
        "features are worth keeping",
    ),
    "features of a whole model": (["local.cache_bytes=1000000000"], "local.mode=end-to-end"),
    "fewer steps than partitions": (
        ["local.mode=layerwise", "local.schedule=sequential", "local.partitions=3", "train.steps=2"],
        "a step for each partition",
    ),
    "too little memory": (["local.mode=partitionwise", "local.memory_bytes=1000"], "memory"),
    "a cut at no piece": (["local.mode=partitionwise", "local.cuts=blocks.9"], "where: local.cuts"),
    "an override of nothing": (
        ["local.mode=layerwise", "compression.overrides=body.*=none"],
        "matches no parameter",
    ),
    "a cut of the whole": (["local.cuts=blocks.2"], "is not cut"),
    "nothing to compare": (
        ["local.mode=layerwise", "local.heads=predsim", "data.batch_size=1"],
        "data.batch_size of at least 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_on_every_rank(tmp_path: Path, case: str) -> None:
    settings, words = REFUSED[case]
    for text in run_ranks(refused, 2, tmp_path / "run", [*GPT, *settings], False):
        assert words in text


def test_a_resume_refuses_other_partitions(tmp_path: Path) -> None:
    run_ranks(trained, 1, tmp_path / "run", *GPT, "local.mode=layerwise")
    settings = [*GPT, "local.mode=layerwise", "local.partitions=3"]
    (text,) = run_ranks(refused, 1, tmp_path / "run", settings, True)
    assert "local.partitions = 3, 2" in text


def dying(rank: int, out: Path, victim: int) -> None:
    step = LocalTrainer._train_step

    def dies(self: LocalTrainer) -> Any:
        if self.rank == victim and self.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    LocalTrainer._train_step = dies  # type: ignore[method-assign]
    settings = ["local.mode=partitionwise", "train.checkpoint_every=2", "run.timeout_seconds=250"]
    run(config_of(out, *GPT, "train.steps=50", *settings))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_leaves_a_checkpoint(tmp_path: Path, victim: int) -> None:
    outcome = run_failing_ranks(dying, 2, tmp_path / "run", victim)[1 - victim]
    assert outcome.error is not None
    assert isinstance(outcome.error, TransportError) or "gloo" in str(outcome.error), outcome.trace
    assert outcome.seconds < 100.0  # less than any time-out
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").latest() == 4


def raising(rank: int, out: Path) -> None:
    """Rank 1 has an error of its own, and lives on until rank 0 has ended its run."""
    step = LocalTrainer._train_step

    def raises(self: LocalTrainer) -> Any:
        if self.rank == 1 and self.step == 2:
            raise ArithmeticError("an error of rank 1 alone")
        return step(self)

    LocalTrainer._train_step = raises  # type: ignore[method-assign]
    store = dist.distributed_c10d._get_default_store()
    settings = ["local.mode=partitionwise", "train.steps=500", "run.timeout_seconds=90"]
    try:
        run(config_of(out, *GPT, *settings))
    except ArithmeticError:
        store.wait(["rank 0 has ended"], timedelta(seconds=60))
        raise
    finally:
        if rank == 0:
            store.set("rank 0 has ended", "")


def test_a_rank_that_raises_ends_the_others_at_once_and_is_named(tmp_path: Path) -> None:
    first, second = run_failing_ranks(raising, 2, tmp_path / "run")
    assert isinstance(second.error, ArithmeticError), second.trace
    assert isinstance(first.error, TransportError), first.trace
    assert "rank 1" in str(first.error)


def test_metrics_tell_leads_and_waiting(tmp_path: Path) -> None:
    run_ranks(trained, 2, tmp_path / "run", *GPT, "local.mode=partitionwise")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    known = {key for row in rows for key in row}
    assert {
        "lead_partition_1",
        "waiting_seconds_partition_0",
        "loss_partition_0",
        "loss_partition_1",
    } <= known
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "timeline.svg").read_text().count("<svg") == 1
