"""A GPT's output layer fused with its loss: the same training up to rounding, without all logits in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from efficient_dl.config import Config, DataSpec, with_overrides
from efficient_dl.errors import ConfigError
from efficient_dl.models import build_model
from efficient_dl.objectives.fused import CHUNK_BYTES
from efficient_dl.training import run
from efficient_dl.training.fused import FusedHead, fused_head
from efficient_dl.training.run_folder import RunFolder
from efficient_dl.training.task import evaluate_batch, task_for
from tests.distributed.launch import run_failing_ranks, run_ranks

SETTINGS = [
    "model.name=gpt", "model.size=nano", "model.context=16", "data.name=stdlib", "data.batch_size=2", "train.steps=3",
    "train.log_every=1", "train.eval_batches=2", "compression.bits=lossless", "train.accumulate=2",
]  # fmt: skip
VOCABULARY, BATCH, CONTEXT = 40_000, 8, 64  # 82 MB of logits


def losses(rank: int, folder: Path, objective: str) -> None:
    for fused in ("on", "off"):
        settings = [*SETTINGS, f"train.objective={objective}", f"train.fused_loss={fused}"]
        run(with_overrides(Config(), [*settings, f"run.out={folder / fused}"]))


@pytest.mark.parametrize("objective", ["cross-entropy", "expgb"])
def test_fused_runs_have_the_losses_of_unfused_ones(tmp_path: Path, objective: str) -> None:
    run_ranks(losses, 2, tmp_path, objective)
    rows = [RunFolder(tmp_path / one, writes=False).rows() for one in ("on", "off")]
    assert len(rows[0]) == len(rows[1]) >= 4
    for fused, plain in zip(*rows, strict=True):
        for key in (one for one in plain if "loss" in one or "objective" in one or one == "grad_norm"):
            assert fused[key] == pytest.approx(plain[key], rel=2e-5), (key, plain["step"])


class Largest(TorchDispatchMode):
    """The most values of any tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return out


def test_a_large_vocabularys_logits_are_never_all_in_memory() -> None:
    config = with_overrides(Config(), ["model.name=gpt", "model.size=nano", f"model.context={CONTEXT}"])
    spec = DataSpec(kind="tokens", classes=VOCABULARY, shape=(CONTEXT,))
    model, task = build_model(config.model, spec, 0), task_for("tokens")
    head = fused_head(config, spec, task)
    assert head is not None, "auto fuses where logits take more than a chunk"
    inputs, targets = torch.randint(VOCABULARY, (2, BATCH, CONTEXT)).unbind(0)
    with Largest() as largest:
        head.loss(model, inputs, targets).backward()
        found = head.evaluate(model, inputs, targets)
    parameters = model.get_parameter("embedding.weight").numel()
    assert largest.numel <= max(parameters, CHUNK_BYTES // 4) < BATCH * CONTEXT * VOCABULARY
    assert float(found["loss"]) == pytest.approx(
        float(evaluate_batch(task, model(inputs), targets)["loss"]), rel=1e-6
    )


def test_small_logits_are_not_fused_unless_asked() -> None:
    spec = DataSpec(kind="tokens", classes=256, shape=(128,))
    config = with_overrides(Config(), ["model.name=gpt"])
    assert fused_head(config, spec, task_for("tokens")) is None
    asked = with_overrides(config, ["train.fused_loss=on"])
    assert isinstance(fused_head(asked, spec, task_for("tokens")), FusedHead)


def refused(rank: int, out: Path) -> None:
    settings = ["model.name=mlp", "data.name=digits", "train.fused_loss=on", f"run.out={out}"]
    run(with_overrides(Config(), settings))


def test_a_model_without_such_a_layer_is_refused(tmp_path: Path) -> None:
    (outcome,) = run_failing_ranks(refused, 1, tmp_path / "run")
    assert isinstance(outcome.error, ConfigError) and "gpt" in str(outcome.error)
