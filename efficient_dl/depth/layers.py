"""Layers whose weight is a product of balanced factors: linear ones and two-dimensional convolutions."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_dl.errors import ConfigError

_Plain = TypeVar("_Plain", nn.Linear, nn.Conv2d)


def balanced_factors(matrix: Tensor, n: int) -> list[Tensor]:
    """The factors [W_1 … W_n], W_n ⋯ W_1 = matrix, W_{j+1}ᵀ W_{j+1} = W_j W_jᵀ.

    matrix: (rows, columns), floating point. With k = min(rows, columns) and matrix = U S Vᵀ the first factor is
    S^{1/n} Vᵀ (k, columns), the last U S^{1/n} (rows, k), those between are S^{1/n} (k, k). The split is computed in
    float64 and rounded to the matrix's dtype. Raises ConfigError for n < 2 and for a matrix of zeros, whose factors
    would never get a gradient, or with values that are not finite.
    """
    if n < 2:
        raise ConfigError("a product has at least two factors", expected="n from 2 on", found=str(n))
    if not bool(matrix.isfinite().all()):
        raise ConfigError("a weight with NaN or infinity cannot be split", found=str(tuple(matrix.shape)))
    u, s, vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    if not bool(s.any()):
        raise ConfigError(
            "a weight of zeros cannot be split into factors: all of them would be zero and get no gradient",
            found=f"zeros of shape {tuple(matrix.shape)}",
            fix="exclude=... this layer, or initialize it otherwise",
        )
    root = s ** (1 / n)
    factors = [root[:, None] * vh, *(torch.diag(root) for _ in range(n - 2)), u * root]
    return [factor.to(matrix.dtype).contiguous() for factor in factors]


class FactoredLayer(nn.Module):
    """A layer of factors W_1 … W_n, parameters factor_1 … factor_n; `weight` is their product in the plain shape.

    The product is formed once in a forward pass, whatever the batch, and the plain layer's kernel then runs with it:
    no activations beyond the plain layer's are kept. The result is that of the factors applied one after the other: a
    chain of linear layers, or of one convolution of the same kernel to k channels and n − 1 of 1 × 1.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, n: int) -> None:
        super().__init__()
        self.n = n
        self.shape = tuple(weight.shape)
        for number, factor in enumerate(balanced_factors(weight.flatten(1), n), 1):
            self.register_parameter(f"factor_{number}", nn.Parameter(factor, weight.requires_grad))
        self.bias: nn.Parameter | None
        same = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.register_parameter("bias", same)

    @property
    def factors(self) -> list[nn.Parameter]:
        """[W_1 … W_n]: the first is applied first."""
        return [self.get_parameter(f"factor_{number}") for number in range(1, self.n + 1)]

    @property
    def weight(self) -> Tensor:
        """The product, in the plain layer's shape and dtype; differentiable."""
        factors: list[Tensor] = [*self.factors]
        if self.shape[0] > factors[0].shape[1]:  # tall: the small matrices are on the right
            product = factors[0]
            for factor in factors[1:]:
                product = factor @ product
        else:
            product = factors[-1]
            for factor in factors[-2::-1]:
                product = product @ factor
        return product.view(self.shape)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin anew as the plain layer does, in balanced factors."""
        fresh = self.plain()
        fresh.reset_parameters()
        for factor, new in zip(self.factors, balanced_factors(fresh.weight.flatten(1), self.n), strict=True):
            factor.copy_(new)
        if self.bias is not None and fresh.bias is not None:
            self.bias.copy_(fresh.bias)

    @torch.no_grad()
    def folded_weight(self) -> Tensor:
        """The product, multiplied in float64 and rounded once to the factors' dtype."""
        product = self.factors[0].double()
        for factor in self.factors[1:]:
            product = factor.double() @ product
        return product.to(self.factors[0].dtype).view(self.shape)

    def plain(self) -> nn.Linear | nn.Conv2d:
        """A plain layer of the same function, mode, device and dtype, with its own copies of weight and bias."""
        weight = self.folded_weight()
        layer = self._empty(weight.device, weight.dtype).train(self.training)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None and self.bias is not None:
                layer.bias.copy_(self.bias)
                layer.bias.requires_grad_(self.bias.requires_grad)
        layer.weight.requires_grad_(self.factors[0].requires_grad)
        return layer

    @abstractmethod
    def _empty(self, device: torch.device, dtype: torch.dtype) -> nn.Linear | nn.Conv2d:
        """A plain layer of this configuration, whose values do not matter."""


class FactoredLinear(FactoredLayer):
    """nn.Linear with a factored weight. x: (..., in_features) to (..., out_features)."""

    def __init__(self, layer: nn.Linear, n: int) -> None:
        super().__init__(layer.weight, layer.bias, n)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, n={self.n}"

    def _empty(self, device: torch.device, dtype: torch.dtype) -> nn.Linear:
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return _undrawn(nn.Linear, **sizes, bias=self.bias is not None, device=device, dtype=dtype)


class FactoredConv2d(FactoredLayer):
    """nn.Conv2d with groups=1, whose weight (out, in, kh, kw) is factored as the matrix (out, in·kh·kw)."""

    def __init__(self, layer: nn.Conv2d, n: int) -> None:
        super().__init__(layer.weight, layer.bias, n)
        self._conv = {
            "in_channels": layer.in_channels,
            "out_channels": layer.out_channels,
            "kernel_size": layer.kernel_size,
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "padding_mode": layer.padding_mode,
        }
        # One that holds no parameters: it only knows how to convolve (padding modes included).
        self._kernel = (nn.Conv2d(**self._conv, bias=False, device="meta"),)

    def forward(self, x: Tensor) -> Tensor:
        return self._kernel[0]._conv_forward(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._conv.items()) + f", n={self.n}"

    def _empty(self, device: torch.device, dtype: torch.dtype) -> nn.Conv2d:
        return _undrawn(nn.Conv2d, **self._conv, bias=self.bias is not None, device=device, dtype=dtype)


def _undrawn(kind: type[_Plain], **settings: Any) -> _Plain:
    """A layer with uninitialized values: nothing is drawn from torch's generator."""
    layer = nn.utils.skip_init(kind, **settings)
    assert isinstance(layer, kind)
    return layer
