"""From logits and targets to a loss for each row and its reduction, as torch.nn.CrossEntropyLoss does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from efficient_dl.errors import ConfigError
from efficient_dl.objectives.formulas import Formula

REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class Options:
    """What torch.nn.CrossEntropyLoss takes beside logits and targets, checked. weight: (K,) or None."""

    weight: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ConfigError(
                "there is no such reduction", expected=" | ".join(REDUCTIONS), found=str(self.reduction)
            )
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ConfigError(
                "label_smoothing is a share", expected="from 0 to 1", found=str(self.label_smoothing)
            )


def computed(logits: Tensor) -> Tensor:
    """The logits in the precision that losses are computed in: float64 stays, all else becomes float32."""
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating-point numbers, these are {logits.dtype}")
    return logits if logits.dtype == torch.float64 else logits.float()


def classes_last(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(C), (N, C) or (N, C, d1, ...) logits as (..., C), and targets likewise. Raises ValueError for other shapes."""
    if logits.dim() == 0:
        raise ValueError("logits need an axis of classes, these are a single number")
    axis = 0 if logits.dim() == 1 else 1
    last = logits.movedim(axis, -1)
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                f"target probabilities of shape {tuple(target.shape)} for logits of shape {tuple(logits.shape)}: "
                "they must be equal"
            )
        return last, target.movedim(axis, -1)
    if target.shape != last.shape[:-1]:
        raise ValueError(
            f"target classes of shape {tuple(target.shape)} for logits of shape {tuple(logits.shape)}: "
            f"expected {tuple(last.shape[:-1])}, the logits' shape without axis {axis}, that of the classes"
        )
    return last, target


def row_losses(formula: Formula, z: Tensor, target: Tensor, options: Options) -> Tensor:
    """The loss of each row: (...). z: (..., K), float32 or float64. target: int (...) or float (..., K).

    With weights w and targets t (after smoothing) it is Σ_c w_c t_c · loss(z, c); 0 where the class is ignored.
    """
    num_classes = z.shape[-1]
    if num_classes < 2:
        raise ValueError(f"a loss over classes needs at least 2 of them, the logits have {num_classes}")
    weight = _weight(z, options)
    common, score = formula.common(z), formula.score(z)
    smooth = options.label_smoothing
    if target.is_floating_point():
        if options.ignore_index >= 0:
            raise ValueError(f"ignore_index = {options.ignore_index} needs targets that are classes")
        shares = target.to(z.dtype) * (1 - smooth) + smooth / num_classes
        shares = shares if weight is None else shares * weight
        return shares.sum(-1) * common - (shares * score).sum(-1)
    ignored, known = _known(target, options)
    loss = common - score.gather(-1, known.unsqueeze(-1)).squeeze(-1)
    loss = loss if weight is None else weight[known] * loss
    if smooth > 0:
        if weight is None:
            spread = common - score.mean(-1)
        else:
            spread = (weight.sum() * common - (weight * score).sum(-1)) / num_classes
        loss = (1 - smooth) * loss + smooth * spread
    return loss.masked_fill(ignored, 0.0)


def divisor(target: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    """What the sum over rows is divided by, 0-dim of this dtype; 1 for "sum".

    For "mean" the number of rows, or of targets that are classes the weights of those that are not ignored.
    """
    if options.reduction == "sum":
        return torch.ones((), dtype=dtype, device=target.device)
    if target.is_floating_point():
        return torch.full((), target.numel() // target.shape[-1], dtype=dtype, device=target.device)
    ignored, known = _known(target, options)
    if options.weight is None:
        return (~ignored).sum().to(dtype)
    return options.weight.to(dtype)[known].masked_fill(ignored, 0.0).sum()


def _known(target: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    target = target.long()
    ignored = target == options.ignore_index
    return ignored, target.masked_fill(ignored, 0)


def _weight(z: Tensor, options: Options) -> Tensor | None:
    weight = options.weight
    if weight is None:
        return None
    if weight.shape != z.shape[-1:]:
        raise ValueError(f"class weights of shape {tuple(weight.shape)} for {z.shape[-1]} classes")
    return weight.to(z.dtype)
