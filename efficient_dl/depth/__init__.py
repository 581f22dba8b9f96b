"""What depth does to the matrices inside a layer: balanced factors, their preconditioner, Schatten penalties.

    factorize(model, n)      every weight becomes a product of n balanced factors; the function stays the same
    fold(model)              the products become plain weights again, under their old names
    EndToEndPreconditioner   the folded weight's motion without the factors: for SGD, in front of optimizer.step()
    schatten_penalty         the penalty that weight decay of balanced factors amounts to
    effective_rank           exp of the entropy of a matrix's singular values
    imbalance                how far factors are from balance

Source: Arora, Cohen & Hazan 2018 (arXiv 1802.06509). The transport penalty (TRGL) belongs to local learning:
`LocalLearner(penalty=...)`, efficient_dl.local_learning.objectives.TransportPenalty.
"""

from efficient_dl.depth.factorize import factored_layers, factorize, fold, folded_state_dict
from efficient_dl.depth.layers import FactoredConv2d, FactoredLayer, FactoredLinear, balanced_factors
from efficient_dl.depth.preconditioner import EndToEndPreconditioner, precondition
from efficient_dl.depth.schatten import factor_penalty, schatten, schatten_penalty
from efficient_dl.depth.spectrum import effective_rank, imbalance

__all__ = [
    "EndToEndPreconditioner",
    "FactoredConv2d",
    "FactoredLayer",
    "FactoredLinear",
    "balanced_factors",
    "effective_rank",
    "factor_penalty",
    "factored_layers",
    "factorize",
    "fold",
    "folded_state_dict",
    "imbalance",
    "precondition",
    "schatten",
    "schatten_penalty",
]
