"""How each kind of model falls into pieces: (name, module) in the order in which its forward runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from efficient_dl.models.gpt import GPT
from efficient_dl.models.mlp import MLP
from efficient_dl.models.resnet18 import ResNet18
from efficient_dl.models.vgg8b import VGG8B

NamedModules: TypeAlias = Iterable[tuple[str, nn.Module]]


@dataclass(frozen=True)
class Adapter:
    """Cuts one kind of model; see pieces.register_adapter."""

    name: str
    matches: Callable[[nn.Module], bool]
    pieces: Callable[[Any], NamedModules]


def sequential(model: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The elements, those of nested nn.Sequentials too; one without parameters belongs to the one before it."""
    name, parts = "", list[nn.Module]()
    for path, module in _elements(model, prefix):
        has_parameters = any(True for _ in module.parameters())
        if has_parameters and any(True for part in parts for _ in part.parameters()):
            yield name, _joined(parts)
            parts = []
        if has_parameters or not name:
            name = path
        parts.append(module)
    if parts:
        yield name, _joined(parts)


def _elements(model: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    # Not named_children, which leaves out what is used a second time, such as one ReLU for all layers.
    for name, module in zip(model._modules, model, strict=True):
        hooked = bool(module._forward_hooks or module._forward_pre_hooks)  # they run around the whole of it
        if isinstance(module, nn.Sequential) and is_sequential(module) and not hooked:
            yield from _elements(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _joined(parts: list[nn.Module]) -> nn.Module:
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def is_sequential(module: nn.Module) -> bool:
    """Whether it runs its elements one after the other: an nn.Sequential with no forward of its own."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def mlp(model: MLP) -> Iterator[tuple[str, nn.Module]]:
    """One hidden layer a piece."""
    for index, layer in enumerate(model.layers):
        yield f"layers.{index}", layer if index else nn.Sequential(nn.Flatten(), layer)
    yield "head", model.head


def vgg8b(model: VGG8B) -> Iterator[tuple[str, nn.Module]]:
    """One layer a piece, and each pool: whether it ends a partition or begins the next one is the cut's to say."""
    for name, layer in model.features.named_children():
        yield f"features.{name}", layer
    yield "hidden", model.hidden
    yield "head", model.head


def resnet18(model: ResNet18) -> Iterator[tuple[str, nn.Module]]:
    """One residual block a piece."""
    yield "stem", model.stem
    for name, block in model.blocks.named_children():
        yield f"blocks.{name}", block
    yield "head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.dropout, model.head)


class GPTEntry(nn.Module):
    """What GPT.forward does before its blocks."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.context = model.context
        self.embedding = model.embedding
        self.positions = model.positions
        self.dropout = model.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x: int64 (batch, tokens). Returns (batch, tokens, width)."""
        num_tokens = x.shape[1]
        if num_tokens > self.context:
            raise ValueError(f"{num_tokens} tokens do not fit the model's context of {self.context}")
        stream = self.embedding(x)
        if self.positions is not None:
            stream = stream + self.positions(torch.arange(num_tokens, device=x.device))
        return self.dropout(stream)


def gpt(model: GPT) -> Iterator[tuple[str, nn.Module]]:
    """The embedding with its positions, one block a piece, the last norm with the output layer."""
    yield "embedding", GPTEntry(model)
    for index, block in enumerate(model.blocks):
        yield f"blocks.{index}", block
    yield "head", nn.Sequential(model.norm, model.head)


def of_class(kind: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """Matches models of this class that run its forward and none of their own."""
    return lambda model: isinstance(model, kind) and type(model).forward is kind.forward


BUILT_IN: tuple[Adapter, ...] = (
    Adapter("nn.Sequential", is_sequential, sequential),
    Adapter("mlp", of_class(MLP), mlp),
    Adapter("vgg8b", of_class(VGG8B), vgg8b),
    Adapter("resnet18", of_class(ResNet18), resnet18),
    Adapter("gpt", of_class(GPT), gpt),
)
