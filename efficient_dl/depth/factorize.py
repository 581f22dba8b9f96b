"""Put balanced factors in place of a model's weights, and fold them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from efficient_dl.depth.layers import FactoredConv2d, FactoredLayer, FactoredLinear
from efficient_dl.depth.selection import chosen_layers
from efficient_dl.errors import ConfigError


def factorize(
    model: nn.Module, n: int = 2, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> nn.Module:
    """Replace weights by products of n balanced factors; changed in place and returned (a bare layer: a new one).

    A linear weight is the matrix (out, in), a convolution's (out, in·kh·kw): one convolution of the same kernel to
    k = min(out, in·kh·kw) channels, then n − 1 of 1 × 1. The function stays the same up to rounding, biases the same
    objects. A weight of m values becomes about m·(1 + (n − 1)·k/max(out, in·kh·kw)).

    include, exclude: names of modules, shell patterns. Make the optimizer afterwards: the parameters are others. Its
    weight decay is then a Schatten penalty (`schatten`). Plain SGD with small steps keeps the balance; Adam, momentum
    and large steps do not (`imbalance` measures it).
    Raises ConfigError for a layer that cannot be factored (grouped, subclassed, tied, hooked, zeros) until it is
    excluded; the model is then as it was. Source: Arora, Cohen & Hazan 2018.
    """
    if n < 2:
        raise ConfigError("a product has at least two factors", expected="n from 2 on", found=str(n))
    made: dict[int, nn.Module] = {}
    for name, layer in chosen_layers(model, include, exclude).items():
        try:
            factored = FactoredConv2d(layer, n) if isinstance(layer, nn.Conv2d) else FactoredLinear(layer, n)
        except ConfigError as error:
            raise ConfigError(
                error.problem, **{**error.details, "where": name or "the model itself"}
            ) from None
        made[id(layer)] = factored.train(layer.training)
    return _replaced(model, lambda module: made.get(id(module), module))


def fold(model: nn.Module) -> nn.Module:
    """Undo `factorize`: plain layers of the products, in place; state_dict() has its old names and shapes again.

    Raises ConfigError if nothing is factored.
    """
    made = {id(layer): layer.plain() for layer in factored_layers(model).values()}
    return _replaced(model, lambda module: made.get(id(module), module))


def folded_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What `fold(model).state_dict()` would be, while the model stays factored: for checkpoints during training.

    Names shared by several places appear in all of them. Raises ConfigError if nothing is factored.
    """
    factored_layers(model)
    state = dict(model.state_dict())
    for prefix, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, FactoredLayer):
            dot = f"{prefix}." if prefix else ""
            for number in range(1, layer.n + 1):
                del state[f"{dot}factor_{number}"]
            state[f"{dot}weight"] = layer.folded_weight()
    return state


def factored_layers(model: nn.Module) -> dict[str, FactoredLayer]:
    """The factored layers by name. Raises ConfigError if there is none."""
    found = {name: one for name, one in model.named_modules() if isinstance(one, FactoredLayer)}
    if not found:
        raise ConfigError(
            "the model has no factored layer", found=type(model).__name__, fix="factorize(model) first"
        )
    return found


@torch.no_grad()
def _replaced(model: nn.Module, new: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Every module's children, wherever they appear, replaced by what `new` makes of them."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and (other := new(child)) is not child:
                module._modules[name] = other
    return new(model)
