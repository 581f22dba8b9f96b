"""The losses as functions, with the arguments of torch.nn.functional.cross_entropy."""

from __future__ import annotations

from torch import Tensor

from efficient_dl.objectives.formulas import (
    EXP_LIMIT,
    ExpFormula,
    Formula,
    LinearFormula,
    Pow3Formula,
    RescaledSquareFormula,
    SquentropyFormula,
)
from efficient_dl.objectives.rows import Options, classes_last, computed, divisor, row_losses


def objective(
    formula: Formula,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss that the formula says, with torch.nn.functional.cross_entropy's arguments and their meaning.

    input: logits (C), (N, C) or (N, C, d1, ...), of any floating-point dtype. target: classes, integers of the
    logits' shape without C; or probabilities, floating-point of the logits' shape. weight: (C), of the classes.
    Returns float32 (float64 for float64 logits): 0-dim for "mean" and "sum", the shape without C for "none". A target
    distribution t weighted by w costs Σ_c w_c t_c · loss(z, c); "mean" divides by the sum of the weights of the target
    classes that are not ignored, for probabilities by the number of rows. Raises ValueError for shapes that do not
    fit, ConfigError for arguments out of range.
    """
    options = Options(weight, ignore_index, reduction, label_smoothing)
    z, target = classes_last(computed(input), target)
    losses = row_losses(formula, z, target, options)
    if reduction == "none":
        return losses
    return losses.sum() / divisor(target, options, z.dtype)


def linear(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """½‖z − t‖²: LinearFormula. Arguments as in `objective`."""
    return objective(LinearFormula(), input, target, weight, ignore_index, reduction, label_smoothing)


def exp_gb(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    alpha: float | None = None,
    limit: float = EXP_LIMIT,
) -> Tensor:
    """Σ_k αe^{z_k} − t_k z_k: ExpFormula. Arguments as in `objective`."""
    formula = ExpFormula(alpha, limit)
    return objective(formula, input, target, weight, ignore_index, reduction, label_smoothing)


def pow3_gb(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    alpha: float = 0.001,
) -> Tensor:
    """Σ_k αz_k⁴/4 − t_k z_k: Pow3Formula. Arguments as in `objective`."""
    return objective(Pow3Formula(alpha), input, target, weight, ignore_index, reduction, label_smoothing)


def squentropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy + Σ_{j≠y} z_j²/(K − 1): SquentropyFormula. Arguments as in `objective`."""
    return objective(SquentropyFormula(), input, target, weight, ignore_index, reduction, label_smoothing)


def rescaled_square(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    k: float = 1.0,
    m: float = 1.0,
) -> Tensor:
    """(k·(z_y − M)² + Σ_{j≠y} z_j²)/K: RescaledSquareFormula. Arguments as in `objective`."""
    formula = RescaledSquareFormula(k, m)
    return objective(formula, input, target, weight, ignore_index, reduction, label_smoothing)
