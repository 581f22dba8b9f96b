"""What heads are built from: new copies of a model's later pieces, layers that fit shapes, classifiers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.recompute import plain

Shape = tuple[int, ...]  # of one sample, without the batch

_RESETS = ("reset_parameters", "_reset_parameters")  # the second is nn.MultiheadAttention's
TOKEN_INIT_STD = 0.02  # Radford et al. 2019 (GPT-2)


def new_copy(piece: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of a piece on the CPU, in training mode, that begins as the model's own do; from torch's generator.

    Every submodule's reset_parameters(), then model.initialize(copy) (this package's models) or
    copy.apply(model._init_weights) (Hugging Face's), if the model has one. Raises ConfigError where a parameter is
    drawn by none of them.
    """
    # Drawn on the CPU: a device's generator would give other values, and stay changed.
    clone = copy.deepcopy(piece).cpu().train().requires_grad_(True)
    clone.zero_grad(set_to_none=True)
    undrawn: list[str] = []
    for name, part in clone.named_modules():
        plain(part)
        resets = [getattr(part, reset) for reset in _RESETS if hasattr(part, reset)]
        if resets:
            resets[0]()
        elif any(True for _ in part.parameters(recurse=False)):
            undrawn.append(f"{name or 'itself'} ({type(part).__name__})")
    if callable(initialize := getattr(model, "initialize", None)):
        initialize(clone)
    elif callable(initialize := getattr(model, "_init_weights", None)):
        clone.apply(initialize)  # pyright: ignore[reportArgumentType]
    elif undrawn:
        raise ConfigError(
            f"nothing says how a new {type(piece).__name__} begins",
            expected="reset_parameters() of every module with parameters, or initialize(module) of the model",
            found=f"{', '.join(undrawn[:3])} of {type(model).__name__}",
            fix='give the model `def initialize(self, module)`, or take the head "linear"',
        )
    return clone


def shapes_along(pieces: Sequence[nn.Module], features: Tensor) -> list[Shape]:
    """What goes into each piece, then what comes out of the last, in eval mode, for one sample.

    The pieces' state, mode and gradients stay as they are.
    """
    shapes = [tuple(features.shape[1:])]
    with torch.no_grad():
        for piece in pieces:
            features = copy.deepcopy(piece).eval()(features)
            shapes.append(tuple(features.shape[1:]))
    return shapes


def fitting(found: Shape, wanted: Shape) -> list[nn.Module]:
    """The cheapest layers from one shape to another: average pooling, then a 1 × 1 convolution or a linear layer."""
    layers: list[nn.Module] = []
    if len(found) == len(wanted) == 3:
        if found[1:] != wanted[1:]:
            layers.append(nn.AdaptiveAvgPool2d((wanted[1], wanted[2])))
        if found[0] != wanted[0]:
            layers.append(nn.Conv2d(found[0], wanted[0], 1, bias=False))
        return layers
    if len(found) == 3 and len(wanted) == 1:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        found = found[:1]
    if len(found) != len(wanted) or found[:-1] != wanted[:-1]:
        raise ConfigError(
            "no cheap layer leads from the partition's features to a later piece",
            expected=f"features of shape {wanted} a sample",
            found=str(found),
            fix='take the head "linear", or cut the model elsewhere',
        )
    if found != wanted:
        layers.append(nn.Linear(found[-1], wanted[-1], bias=False))
    return layers


class TokenMean(nn.Module):
    """(batch, tokens, width) to (batch, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def classifier(shape: Shape, classes: int, unit: str) -> list[nn.Module]:
    """Norm, global pooling where there is something to pool, and a linear layer to the logits.

    The norms have no batch statistics: a head computes the same for every way to split a batch. Raises ConfigError
    for features that are neither images, nor tokens, nor vectors.
    """
    if unit == "tokens" and len(shape) == 2:
        output = nn.Linear(shape[-1], classes, bias=False)
        nn.init.normal_(output.weight, std=TOKEN_INIT_STD)
        return [nn.LayerNorm(shape[-1]), output]
    if unit == "samples" and len(shape) == 3:
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return [nn.GroupNorm(1, shape[0]), *pool, nn.Linear(shape[0], classes)]
    if unit == "samples" and len(shape) == 2:
        return [nn.LayerNorm(shape[-1]), TokenMean(), nn.Linear(shape[-1], classes)]
    if unit == "samples" and len(shape) == 1:
        return [nn.LayerNorm(shape[-1]), nn.Linear(shape[-1], classes)]
    raise ConfigError(
        "there is no head for features of this shape",
        expected="(tokens, width) for tokens; (channels, height, width), (tokens, width) or (width,) for samples",
        found=f"{shape} a sample, and {unit}",
        fix="cut the model where its features have one of these shapes",
    )
