"""The losses as modules that take the place of torch.nn.CrossEntropyLoss, and their names in a run's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from efficient_dl.config import suggestion
from efficient_dl.errors import ConfigError
from efficient_dl.objectives import functional
from efficient_dl.objectives.formulas import (
    CROSS_ENTROPY,
    EXP_LIMIT,
    ExpFormula,
    Formula,
    LinearFormula,
    Pow3Formula,
    RescaledSquareFormula,
    SquentropyFormula,
)
from efficient_dl.objectives.rows import Options, computed


class Objective(nn.Module):
    """A loss module around a formula, with the arguments of torch.nn.CrossEntropyLoss (`functional.objective`)."""

    weight: Tensor | None

    def __init__(
        self,
        formula: Formula,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        Options(
            weight, ignore_index, reduction, label_smoothing
        )  # wrong ones raise here, not in the first step
        self.formula = formula
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.objective(
            self.formula,
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
        )

    def probabilities(self, logits: Tensor, axis: int = -1) -> Tensor:
        """What the logits say of the classes, which lie in this axis: float32 (float64 for float64), sums of 1."""
        return self.formula.probabilities(computed(logits).movedim(axis, -1)).movedim(-1, axis)

    def log_probabilities(self, logits: Tensor, axis: int = -1) -> Tensor:
        """Natural logarithms of `probabilities`, exact for those that are softmax's."""
        return self.formula.log_probabilities(computed(logits).movedim(axis, -1)).movedim(-1, axis)

    def extra_repr(self) -> str:
        return f"{self.formula}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class CrossEntropyLoss(Objective):
    """torch.nn.CrossEntropyLoss, with `probabilities`."""

    def __init__(self, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(CROSS_ENTROPY, weight, **options)


class LinearLoss(Objective):
    """½‖z − t‖² (LinearFormula)."""

    def __init__(self, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(LinearFormula(), weight, **options)


class ExpGBLoss(Objective):
    """Σ_k αe^{z_k} − t_k z_k (ExpFormula)."""

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        alpha: float | None = None,
        limit: float = EXP_LIMIT,
        **options: Any,
    ) -> None:
        super().__init__(ExpFormula(alpha, limit), weight, **options)


class Pow3GBLoss(Objective):
    """Σ_k αz_k⁴/4 − t_k z_k (Pow3Formula)."""

    def __init__(self, weight: Tensor | None = None, *, alpha: float = 0.001, **options: Any) -> None:
        super().__init__(Pow3Formula(alpha), weight, **options)


class SquentropyLoss(Objective):
    """Cross-entropy + Σ_{j≠y} z_j²/(K − 1) (SquentropyFormula)."""

    def __init__(self, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__(SquentropyFormula(), weight, **options)


class RescaledSquareLoss(Objective):
    """(k·(z_y − M)² + Σ_{j≠y} z_j²)/K (RescaledSquareFormula)."""

    def __init__(
        self, weight: Tensor | None = None, *, k: float = 1.0, m: float = 1.0, **options: Any
    ) -> None:
        super().__init__(RescaledSquareFormula(k, m), weight, **options)


OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "cross-entropy": CrossEntropyLoss,
    "linear": LinearLoss,
    "expgb": ExpGBLoss,
    "pow3gb": Pow3GBLoss,
    "squentropy": SquentropyLoss,
    "rescaled-square": RescaledSquareLoss,
}


def make_objective(name: str, **arguments: Any) -> Objective:
    """The loss module of this name, a key of OBJECTIVES. Raises ConfigError for another one."""
    if name not in OBJECTIVES:
        raise ConfigError(f"there is no objective {name!r}", fix=suggestion(name, OBJECTIVES))
    return OBJECTIVES[name](**arguments)
