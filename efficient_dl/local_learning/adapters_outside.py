"""Pieces of models from other packages, recognized by their class's path: none of the packages is imported."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from efficient_dl.local_learning.adapters import Adapter


def of_path(*paths: str) -> Callable[[nn.Module], bool]:
    """Matches models of a class with one of these paths that run its forward and none of their own."""

    def matches(model: nn.Module) -> bool:
        for kind in type(model).__mro__:
            if f"{kind.__module__}.{kind.__qualname__}" in paths:
                return type(model).forward is getattr(kind, "forward", None)
        return False

    return matches


def torchvision_resnet(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The stem, one residual block a piece, the pool with the classifier."""
    yield "conv1", nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for name, block in getattr(model, stage).named_children():
            yield f"{stage}.{name}", block
    yield "fc", nn.Sequential(model.avgpool, nn.Flatten(), model.fc)


def gpt2(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The embeddings, one block a piece, the last norm with the output layer if there is one."""
    base, prefix = _base(model, "transformer")
    replaced = {"wte": None, "wpe": _NoPositions(), "drop": nn.Identity(), "ln_f": nn.Identity()}
    yield f"{prefix}wte", _Span(base, {"h": nn.ModuleList(), "ln_f": nn.Identity()}, embedded=False)
    for index, block in enumerate(base.h):
        yield f"{prefix}h.{index}", _Span(base, {**replaced, "h": nn.ModuleList([block])}, embedded=True)
    yield from _output(model, prefix + "ln_f", base.ln_f)


def llama(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The embedding, one layer a piece, the last norm with the output layer if there is one.

    Decoders of other families with the same structure (Mistral, Qwen2) can be registered with it.
    """
    base, prefix = _base(model, "model")
    yield f"{prefix}embed_tokens", base.embed_tokens
    for index, layer in enumerate(base.layers):
        replaced = {"embed_tokens": None, "norm": nn.Identity(), "layers": nn.ModuleList([layer])}
        yield f"{prefix}layers.{index}", _Span(base, replaced, embedded=True)
    yield from _output(model, prefix + "norm", base.norm)


def _base(model: Any, attribute: str) -> tuple[Any, str]:
    """The model without its output layer, and what its names begin with."""
    base = getattr(model, attribute, None)
    return (model, "") if base is None else (base, f"{attribute}.")


def _output(model: Any, norm_name: str, norm: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    head = getattr(model, "lm_head", None)
    yield (norm_name, norm) if head is None else ("lm_head", nn.Sequential(norm, head))


class _Span(nn.Module):
    """Runs the forward of a Hugging Face decoder over some of its layers.

    The decoder's own forward makes masks, positions and their embeddings, in every version of the package and for
    every implementation of attention; it is given a shallow copy of the decoder in which some submodules are replaced.
    """

    def __init__(self, base: nn.Module, replaced: dict[str, nn.Module | None], *, embedded: bool) -> None:
        super().__init__()
        span = copy.copy(base)
        span._modules = {**base._modules, **replaced}
        self.span = span
        self.embedded = embedded

    def forward(self, x: Tensor) -> Tensor:
        """x: hidden states if embedded, else token ids. Returns hidden states (batch, tokens, width)."""
        inputs = {"inputs_embeds" if self.embedded else "input_ids": x}
        return self.span(**inputs, use_cache=False)[0]


class _NoPositions(nn.Module):
    """In the place of an embedding of positions that have been added before."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device)


OUTSIDE: tuple[Adapter, ...] = (
    Adapter("torchvision's ResNet", of_path("torchvision.models.resnet.ResNet"), torchvision_resnet),
    Adapter(
        "Hugging Face's GPT-2",
        of_path(
            "transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel",
            "transformers.models.gpt2.modeling_gpt2.GPT2Model",
        ),
        gpt2,
    ),
    Adapter(
        "Hugging Face's Llama",
        of_path(
            "transformers.models.llama.modeling_llama.LlamaForCausalLM",
            "transformers.models.llama.modeling_llama.LlamaModel",
        ),
        llama,
    ),
)
