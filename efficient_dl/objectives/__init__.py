"""What a classifier's outputs are trained for: cross-entropy, and losses whose gradient no output function squashes."""

from efficient_dl.objectives.formulas import (
    CROSS_ENTROPY,
    CrossEntropyFormula,
    ExpFormula,
    Formula,
    LinearFormula,
    MatchingFormula,
    Pow3Formula,
    RescaledSquareFormula,
    SquentropyFormula,
)
from efficient_dl.objectives.functional import (
    exp_gb,
    linear,
    objective,
    pow3_gb,
    rescaled_square,
    squentropy,
)
from efficient_dl.objectives.fused import linear_objective
from efficient_dl.objectives.modules import (
    OBJECTIVES,
    CrossEntropyLoss,
    ExpGBLoss,
    LinearLoss,
    Objective,
    Pow3GBLoss,
    RescaledSquareLoss,
    SquentropyLoss,
    make_objective,
)

__all__ = [
    "CROSS_ENTROPY",
    "OBJECTIVES",
    "CrossEntropyFormula",
    "CrossEntropyLoss",
    "ExpFormula",
    "ExpGBLoss",
    "Formula",
    "LinearFormula",
    "LinearLoss",
    "MatchingFormula",
    "Objective",
    "Pow3Formula",
    "Pow3GBLoss",
    "RescaledSquareFormula",
    "RescaledSquareLoss",
    "SquentropyFormula",
    "SquentropyLoss",
    "exp_gb",
    "linear",
    "linear_objective",
    "make_objective",
    "objective",
    "pow3_gb",
    "rescaled_square",
    "squentropy",
]
