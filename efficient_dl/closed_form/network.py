"""The network that every fit ends in: inputs, stem, layers that see hidden values and inputs, a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from efficient_dl.config import suggestion
from efficient_dl.errors import ConfigError

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
CHUNK_ROWS = 2048


def make_activation(name: str) -> nn.Module:
    """Raises ConfigError for another name than those of ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"there is no activation {name!r}",
            expected=" or ".join(ACTIVATIONS),
            fix=suggestion(name, list(ACTIVATIONS)),
        )
    return ACTIVATIONS[name]()


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with these values, frozen; weight: (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def deviation(variance: Tensor) -> Tensor:
    """Standard deviations, 1 for columns that do not vary."""
    std = variance.clamp(min=0).sqrt()
    return torch.where(std > 1e-12, std, 1.0)


class Scale(nn.Module):
    """(x − mean) / std, column by column; both are buffers, which training leaves alone."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Features(nn.Module):
    """activation(x Wᵀ + b)."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None:
        super().__init__()
        self.linear = linear(weight, bias)
        self.activation = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


class StackedLayer(nn.Module):
    """A layer of a plain perceptron: what it sees of the inputs is nothing."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.features(hidden)


class BoostedLayer(nn.Module):
    """hidden + rate · [f(hidden), f(x)] Δ, standardized. step: Δᵀ without bias; scale: of the sum."""

    def __init__(self, of_hidden: Features, of_inputs: Features, step: nn.Linear, scale: Scale) -> None:
        super().__init__()
        self.of_hidden, self.of_inputs = of_hidden, of_inputs
        self.step = step
        self.scale = scale

    def features(self, hidden: Tensor, x: Tensor) -> Tensor:
        return torch.cat([self.of_hidden(hidden), self.of_inputs(x)], dim=1)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.scale(hidden + self.step(self.features(hidden, x)))


class ClosedFormNetwork(nn.Module):
    """x (batch, features) to scores (batch, outputs), in the dtype of its parameters.

    inputs: what comes before everything else: the scale of the training data, and the metric of AGOP rounds.
    Of a classifier, the outputs are one score a class, in the order of classes_; the largest one is the prediction.
    """

    def __init__(self, stem: nn.Module, layers: list[nn.Module], head: nn.Linear) -> None:
        super().__init__()
        self.inputs: nn.Module = nn.Identity()
        self.stem = stem
        self.layers = nn.ModuleList(layers)
        self.head = head

    def hidden(self, x: Tensor) -> Tensor:
        """What the head sees, from inputs that are scaled already."""
        hidden = self.stem(x)
        for layer in self.layers:
            hidden = layer(hidden, x)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        return self.head(self.hidden(x))
