"""A model from its name, its size and the shape of its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from efficient_dl.config import DataSpec, ModelConfig, suggestion
from efficient_dl.errors import ConfigError
from efficient_dl.models import gpt, mlp, resnet18, vgg8b


@dataclass(frozen=True)
class Architecture:
    """What a name in the configuration stands for."""

    kind: str  # the kind of data it takes: DataSpec.kind
    sizes: Mapping[str, Any]
    build: Callable[[ModelConfig, DataSpec], nn.Module]
    min_batch: int = 1  # batch norm has no variance to divide by in a batch of one


def _gpt(config: ModelConfig, spec: DataSpec) -> nn.Module:
    return gpt.GPT(
        gpt.SIZES[config.size],
        vocabulary=spec.classes,
        context=config.context,
        dropout=config.dropout,
        positions=config.positions,
        tie_weights=config.tie_weights,
    )


def _vgg8b(config: ModelConfig, spec: DataSpec) -> nn.Module:
    divisor = vgg8b.SIZES[config.size]
    return vgg8b.VGG8B(spec.shape, spec.classes, divisor=divisor, dropout=config.dropout)


def _resnet18(config: ModelConfig, spec: DataSpec) -> nn.Module:
    width = resnet18.SIZES[config.size]
    return resnet18.ResNet18(spec.shape, spec.classes, width=width, stem=config.stem, dropout=config.dropout)


def _mlp(config: ModelConfig, spec: DataSpec) -> nn.Module:
    return mlp.MLP(spec.numel, spec.classes, hidden=mlp.SIZES[config.size], dropout=config.dropout)


ARCHITECTURES: dict[str, Architecture] = {
    "gpt": Architecture("tokens", gpt.SIZES, _gpt),
    "vgg8b": Architecture("images", vgg8b.SIZES, _vgg8b, min_batch=2),
    "resnet18": Architecture("images", resnet18.SIZES, _resnet18, min_batch=2),
    "mlp": Architecture("images", mlp.SIZES, _mlp),
}


def check_model(
    config: ModelConfig, spec: DataSpec | None = None, batch_size: int | None = None
) -> Architecture:
    """Raise ConfigError if there is no such model or size or, where given, it cannot take the data or batches.

    batch_size: samples a worker takes at once.
    """
    if config.name not in ARCHITECTURES:
        fix = suggestion(config.name, ARCHITECTURES)
        raise ConfigError(f"unknown model {config.name!r}", where="model.name", fix=fix)
    architecture = ARCHITECTURES[config.name]
    if config.size not in architecture.sizes:
        fix = suggestion(config.size, architecture.sizes)
        raise ConfigError(f"{config.name} has no size {config.size!r}", where="model.size", fix=fix)
    if spec is not None and spec.kind != architecture.kind:
        fitting = [name for name, other in ARCHITECTURES.items() if other.kind == spec.kind]
        raise ConfigError(
            f"{config.name} cannot be trained on this data",
            expected=architecture.kind,
            found=spec.kind,
            where="model.name and data.name",
            fix=f"for {spec.kind} take the model {' or '.join(fitting)}, or take data of {architecture.kind}",
        )
    if batch_size is not None and batch_size < architecture.min_batch:
        raise ConfigError(
            f"{config.name} normalizes over the batch and cannot be trained on single images",
            expected=f"at least {architecture.min_batch}",
            found=str(batch_size),
            where="data.batch_size",
            fix="take larger batches a worker, and fewer workers or a smaller train.accumulate",
        )
    return architecture


def build_model(config: ModelConfig, spec: DataSpec, seed: int = 0) -> nn.Module:
    """The model in fp32 on the CPU, its initial values a function of (config, spec, seed) alone.

    torch's global random state is neither read nor changed. Call it with the same seed on every rank, then move
    the model to its device. Takes x of the data's batches, returns logits: (batch, classes) for images,
    (batch, tokens, classes) for tokens. Raises ConfigError.
    """
    architecture = check_model(config, spec)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return architecture.build(config, spec)


def count_parameters(model: nn.Module, trainable: bool = False) -> int:
    """Numbers in the model's parameters, a shared (tied) one once; trainable: only those with a gradient."""
    return sum(one.numel() for one in model.parameters() if one.requires_grad or not trainable)


def model_names() -> Iterable[str]:
    """The names that model.name may have."""
    return tuple(ARCHITECTURES)
