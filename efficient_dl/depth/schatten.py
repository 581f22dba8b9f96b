"""The penalty that weight decay of balanced factors amounts to: a Schatten quasi-norm of their product.

For a product of n factors, Σ_j ‖W_j‖² ≥ n Σ_i σ_i^{2/n}, with equality for balanced ones (a matrix's arithmetic and
geometric means). So weight decay λ of an optimizer, ½λ Σ_j ‖W_j‖², is ½λn ‖W‖_p^p with p = 2/n: the nuclear norm for
n = 2, and a quasi-norm (p < 1), closer to the rank, from n = 3 on. Source: Shang et al. 2016 (arXiv 1606.01245).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from efficient_dl.depth.factorize import factored_layers
from efficient_dl.depth.selection import chosen_layers
from efficient_dl.errors import ConfigError


def schatten(weight: Tensor, p: float, eps: float = 1e-12) -> Tensor:
    """Σ_i (σ_i² + eps)^{p/2}, a 0-dim tensor, differentiable; p > 0. weight: (rows, ...), later axes flattened.

    It is computed from the eigenvalues of the smaller Gram matrix in float64. eps: keeps the gradient finite where
    a singular value is 0 and p < 2; it is in units of σ².
    """
    if p <= 0:
        raise ConfigError("a Schatten penalty has a positive p", expected="p > 0", found=str(p))
    matrix = weight.flatten(1).double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    if p == 2:
        return gram.trace().to(weight.dtype)
    return _trace_of_power(gram, p / 2, eps).to(weight.dtype)


def schatten_penalty(
    model: nn.Module, n: int = 2, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Tensor:
    """(n/2) Σ ‖W‖_p^p over a plain model's layers, p = 2/n: what ½ Σ_j ‖W_j‖² is for balanced factors; 0-dim.

    Multiply it by the weight decay that the factors would have, and add it to the loss. Layers are chosen as by
    `factorize`. Raises ConfigError.
    """
    layers = chosen_layers(model, include, exclude).values()
    return torch.stack([schatten(layer.weight, 2 / n) for layer in layers]).sum() * (n / 2)


def factor_penalty(model: nn.Module) -> Tensor:
    """½ Σ_j ‖W_j‖² over a factored model's factors: what weight decay 1 in an optimizer adds; 0-dim, differentiable."""
    factors = [one for layer in factored_layers(model).values() for one in layer.factors]
    return torch.stack([factor.square().sum() for factor in factors]).sum() / 2


def _trace_of_power(gram: Tensor, power: float, eps: float) -> Tensor:
    """tr (gram + eps)^power, with the gradient power·(gram + eps)^{power − 1}: also for repeated eigenvalues."""
    values, vectors = torch.linalg.eigh(gram.detach())
    values = values.clamp(min=0.0) + eps
    slope = (vectors * (power * values ** (power - 1))) @ vectors.T
    surrogate = (slope * gram).sum()
    return (values**power).sum() + surrogate - surrogate.detach()
