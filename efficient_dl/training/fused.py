"""A GPT's output layer and its loss in one, chunk by chunk: a large vocabulary's logits are never all in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_dl.config import Config, DataSpec
from efficient_dl.errors import ConfigError
from efficient_dl.objectives import linear_objective, make_objective
from efficient_dl.objectives.fused import CHUNK_BYTES
from efficient_dl.training.task import Task, evaluate_batch


class FusedHead:
    """What `GPT.forward` takes in the place of its output layer, for a task with a named objective."""

    def __init__(self, task: Task, objective: str) -> None:
        self._task = task
        self._formula = make_objective(objective).formula

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, with its gradients; model: the GPT, or the DDP around it."""

        def head_of(hidden: Tensor, projection: Tensor) -> Tensor:
            return linear_objective(self._formula, hidden, projection, targets)

        return model(inputs, head_of)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What `evaluate_batch` says of the whole batch's logits, from chunks of them."""

        def head_of(hidden: Tensor, projection: Tensor) -> dict[str, Tensor]:
            rows, flat = hidden.flatten(0, -2), targets.flatten()
            size = max(1, CHUNK_BYTES // (4 * projection.shape[0]))
            sums: dict[str, Tensor] = {}
            for start in range(0, len(rows), size):
                logits = F.linear(rows[start : start + size], projection).unsqueeze(0)
                part = flat[start : start + size].unsqueeze(0)
                for name, mean in evaluate_batch(self._task, logits, part).items():
                    sums[name] = sums.get(name, 0.0) + mean * (part.numel() / len(rows))
            return sums

        return model(inputs, head_of)


def fused_head(config: Config, spec: DataSpec, task: Task) -> FusedHead | None:
    """The fused head where the configuration wants one; None: the model makes its logits."""
    wanted = config.train.fused_loss
    if wanted == "auto":
        rows = config.data.batch_size * config.model.context
        large = 4 * rows * spec.classes > CHUNK_BYTES
        wanted = "on" if large and is_fusible(config) else "off"
    return FusedHead(task, config.train.objective) if wanted == "on" else None


def is_fusible(config: Config) -> bool:
    """Whether a run of this configuration has a single output layer that can be fused with its loss."""
    return config.model.name == "gpt" and config.local.mode == "end-to-end"


def check_fused(config: Config) -> None:
    """Raise ConfigError where a fused loss is asked for that there is not."""
    if config.train.fused_loss == "on" and not is_fusible(config):
        raise ConfigError(
            "only a gpt that is trained end to end has an output layer to fuse with its loss",
            expected="model.name=gpt, local.mode=end-to-end",
            found=f"model.name={config.model.name}, local.mode={config.local.mode}",
            where="train.fused_loss",
            fix="train.fused_loss=auto",
        )
