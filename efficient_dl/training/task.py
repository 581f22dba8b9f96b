"""What a model is trained for: the loss and the metrics of each kind of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as functional
from torch import Tensor

from efficient_dl.errors import ConfigError
from efficient_dl.objectives import Objective, make_objective


@dataclass(frozen=True)
class Task:
    """A training objective.

    loss(outputs, targets): the mean loss that is trained, 0-dim float32.
    nats(outputs, targets): what evaluations call the loss, the mean of −log p(target), p the objective's
    probabilities: comparable among objectives, and the loss itself for cross-entropy.
    metrics(outputs, targets): further means over the batch by name, 0-dim float32.
    unit: what a sample's predictions are counted in ("tokens" or "samples").
    """

    unit: str
    loss: Callable[[Tensor, Tensor], Tensor]
    nats: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[Tensor, Tensor], dict[str, Tensor]]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats a token. logits: [batch, context, vocab], targets: int64 [batch, context]."""
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def class_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats a sample. logits: [batch, classes], targets: int64 [batch]."""
    return functional.cross_entropy(logits.float(), targets)


def accuracy(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Share of samples whose largest logit is the target's."""
    return {"accuracy": (logits.argmax(-1) == targets).float().mean()}


def no_metrics(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Nothing beside the loss."""
    return {}


TASKS: dict[str, Task] = {
    "tokens": Task("tokens", token_loss, token_loss, no_metrics),
    "images": Task("samples", class_loss, class_loss, accuracy),
}


def task_for(kind: str, objective: str = "cross-entropy") -> Task:
    """The task of a data kind, "tokens" or "images", with this objective. Raises ConfigError for another one."""
    if kind not in TASKS:
        raise ConfigError(
            "there is no training task for this data",
            expected=" | ".join(TASKS),
            found=kind,
            fix="take data of one of these kinds, or add the kind's loss and metrics to training/task.py",
        )
    task = TASKS[kind]
    return task if objective == "cross-entropy" else with_objective(task, make_objective(objective))


def with_objective(task: Task, objective: Objective) -> Task:
    """The task with another loss; its evaluations have that loss, too, as `objective`."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return objective(logits.flatten(0, -2), targets.flatten())

    def nats(logits: Tensor, targets: Tensor) -> Tensor:
        rows = objective.log_probabilities(logits.flatten(0, -2))
        return functional.nll_loss(rows, targets.flatten())

    def metrics(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"objective": loss(logits, targets), **task.metrics(logits, targets)}

    return replace(task, loss=loss, nats=nats, metrics=metrics)


def predictions(targets: Tensor) -> int:
    """How many tokens or samples a batch's loss is the mean of."""
    return targets.numel()


@torch.no_grad()
def evaluate_batch(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The batch's loss, in nats, and metrics by name, each a float64 mean over the batch."""
    named = {"loss": task.nats(outputs, targets), **task.metrics(outputs, targets)}
    return {name: value.double() for name, value in named.items()}
