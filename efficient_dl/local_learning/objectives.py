"""Local losses: the task's loss, similarity matching, and a penalty on how far a partition moves its features."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.block import LocalObjective
from efficient_dl.objectives import make_objective as make_task_loss

SIMILARITY_WEIGHT = 0.99  # Nøkland & Eidnes 2019, arXiv 1901.06656


class CrossEntropy:
    """The task's own loss: the mean over samples or tokens, in nats, computed in float32.

    The head's logits are (..., classes), the targets int64 of all their axes but the last.
    """

    reaches_body = False

    def __call__(self, inputs: Tensor, features: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        return cross_entropy(head(features), targets)


class TaskLoss:
    """A loss of logits (rows, classes) and targets (rows), as efficient_dl.objectives has them, for any shape."""

    reaches_body = False

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loss = loss

    def __call__(self, inputs: Tensor, features: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        return self.of(head(features), targets)

    def of(self, logits: Tensor, targets: Tensor) -> Tensor:
        _check_shapes(logits, targets)
        return self.loss(logits.flatten(0, -2), targets.flatten())


class PredSim:
    """weight · MSE(S(matching features), S(one-hot targets)) + (1 − weight) · task loss, which is cross-entropy.

    S: the samples' cosine similarities (similarities). Needs a head that returns (logits, matching features), as
    heads.PredSimHead does, and several samples in a batch. Source: Nøkland & Eidnes 2019.
    """

    reaches_body = False

    def __init__(
        self, weight: float = SIMILARITY_WEIGHT, task_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        self.weight = weight
        self.task_loss = cross_entropy if task_loss is None else task_loss

    def __call__(self, inputs: Tensor, features: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        answer = head(features)
        if isinstance(head, nn.Identity):  # of the last partition, which has the task's loss
            return self.task_loss(answer, targets)
        if not isinstance(answer, tuple):
            raise ConfigError(
                "predsim's loss needs a head with two branches",
                expected="(logits, matching features)",
                found=type(head).__name__,
                fix='make_head("predsim", ...)',
            )
        logits, matching = answer
        classes = F.one_hot(targets, logits.shape[-1]).float()
        similarity = F.mse_loss(similarities(matching), similarities(classes))
        return self.weight * similarity + (1 - self.weight) * self.task_loss(logits, targets)


class TransportPenalty:
    """(1 / 2τ) · mean over samples of Σ ‖y − x‖²: how far the partition's residual pieces move what they are given.

    A residual piece is one whose output has its input's shape and dtype: x goes in, y comes out, y − x is its branch.
    pieces: the partition's, which are observed while they run, so that none runs twice, for as long as this object
    exists; a call takes what the latest forward pass has shown. Adds each branch's size to what is saved for backward.
    With the unit "tokens" the mean is over all positions. Source: after TRGL, Karkar et al. 2023
    (arXiv 2309.17357).
    """

    reaches_body = True

    def __init__(self, pieces: Iterable[nn.Module], tau: float, unit: str = "samples") -> None:
        if not tau > 0:
            raise ConfigError(
                "the transport penalty needs a positive tau", found=str(tau), expected="tau > 0"
            )
        self.tau = tau
        moved: dict[int, Tensor] = {}
        watched = list(pieces)
        handles: list[RemovableHandle] = []
        # Closures without self: a piece must not keep the objectives alive that once observed it. And a copy of a
        # piece carries its hooks along, but must not report as the piece.
        for position, piece in enumerate(watched):

            def observe(
                module: nn.Module, args: tuple[Tensor, ...], output: Tensor, position: int = position
            ) -> None:
                if module is watched[position] and _is_residual(args[0], output):
                    rows = output.numel() // output.shape[-1] if unit == "tokens" else output.shape[0]
                    moved[position] = (output - args[0]).float().square().sum() / rows

            handles.append(piece.register_forward_hook(observe))
        self._moved = moved
        weakref.finalize(self, _remove, handles).atexit = False  # else they would go on and keep graphs alive

    def __call__(self, inputs: Tensor, features: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        total = torch.zeros((), device=features.device)
        for one in self._moved.values():
            total = total + one
        self._moved.clear()
        return total / (2 * self.tau)


class Sum:
    """Several losses, added."""

    def __init__(self, *objectives: LocalObjective) -> None:
        self.objectives = objectives
        self.reaches_body = any(one.reaches_body for one in objectives)

    def __call__(self, inputs: Tensor, features: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        total = self.objectives[0](inputs, features, head, targets)
        for objective in self.objectives[1:]:
            total = total + objective(inputs, features, head, targets)
        return total


def make_objective(
    head_kind: str,
    pieces: Iterable[nn.Module] = (),
    *,
    tau: float | None = None,
    unit: str = "samples",
    task_loss: str = "cross-entropy",
) -> LocalObjective:
    """The loss that belongs to a head of this kind (heads.make_head), with the transport penalty if tau is given.

    pieces: the modules of the partition's pieces, which the penalty observes. task_loss: a name of
    efficient_dl.objectives.OBJECTIVES.
    """
    matches = head_kind.partition(":")[0] == "predsim"
    loss: LocalObjective
    if task_loss == "cross-entropy":
        loss = PredSim() if matches else CrossEntropy()
    else:
        other = TaskLoss(make_task_loss(task_loss))
        loss = PredSim(task_loss=other.of) if matches else other
    return loss if tau is None else Sum(loss, TransportPenalty(pieces, tau, unit))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean in nats, 0-dim float32. logits: (..., classes); targets: int64 (...)."""
    _check_shapes(logits, targets)
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def _check_shapes(logits: Tensor, targets: Tensor) -> None:
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits of shape {tuple(logits.shape)} for targets of shape {tuple(targets.shape)}")


def similarities(x: Tensor) -> Tensor:
    """Cosine similarities of the rows of x, each centred on its mean: float32 (batch, batch), in [−1, 1].

    Of images (batch, channels, height, width), a row is each channel's standard deviation over the pixels, as in the
    published code; of other shapes, all its values.
    """
    x = x.float()
    if x.dim() == 4 and x.shape[1] > 3 and x.shape[2] * x.shape[3] > 1:
        x = x.flatten(2).std(2)
    rows = x.flatten(1)
    rows = F.normalize(rows - rows.mean(1, keepdim=True), dim=1, eps=1e-8)
    with torch.autocast(x.device.type, enabled=False):
        return (rows @ rows.T).clamp(-1, 1)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _is_residual(x: Tensor, y: Tensor) -> bool:
    return torch.is_grad_enabled() and x.shape == y.shape and x.dtype == y.dtype and x.is_floating_point()
