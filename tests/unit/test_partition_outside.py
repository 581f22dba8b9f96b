"""partition on models of torchvision and transformers, where these are installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efficient_dl as edl
from efficient_dl.local_learning.verify import tensor_of

IMPLEMENTATIONS = ("sdpa", "eager")
TOKENS = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(1))


def _gpt2(**options: Any) -> nn.Module:
    package = importlib.import_module("transformers")
    config = package.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2,
        bos_token_id=None, eos_token_id=None, **options,
    )  # fmt: skip
    return package.GPT2LMHeadModel(config)


def _llama(**options: Any) -> nn.Module:
    package = importlib.import_module("transformers")
    config = package.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, **options,
    )  # fmt: skip
    return package.LlamaForCausalLM(config)


def _check(model: nn.Module, x: Tensor) -> edl.Partitions:
    """The chain gives what the model gives, its gradients are the model's, and it holds all of the model."""
    model.eval()
    names = set(model.state_dict())
    partitions = edl.partition(model, 3, x, balance="memory", tied="share")
    assert {name for part in partitions for name in part.names.values()} == names
    chained = x
    for part in partitions:
        chained = part.module(chained)
    whole = tensor_of(model(x))
    assert torch.equal(chained, whole)
    parameters = list(model.parameters())
    of_chain = torch.autograd.grad(chained.square().sum(), parameters)
    of_whole = torch.autograd.grad(whole.square().sum(), parameters)
    assert all(map(torch.equal, of_chain, of_whole))
    return partitions


@pytest.mark.package("torchvision")
@pytest.mark.parametrize("depth", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_torchvisions_resnets_are_cut_between_their_blocks(depth: str) -> None:
    models = importlib.import_module("torchvision.models")
    partitions = _check(getattr(models, depth)(num_classes=7), torch.randn(2, 3, 32, 32))
    assert [piece.name for piece in partitions.pieces][:2] == ["conv1", "layer1.0"]


@pytest.mark.package("transformers")
@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gpt2_is_cut_between_its_blocks(implementation: str) -> None:
    partitions = _check(_gpt2(attn_implementation=implementation), TOKENS)
    names = ["transformer.wte", "transformer.h.0", "transformer.h.1", "transformer.h.2", "lm_head"]
    assert [piece.name for piece in partitions.pieces] == names


@pytest.mark.package("transformers")
@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_llama_is_cut_between_its_layers(implementation: str, tied: bool) -> None:
    _check(_llama(attn_implementation=implementation, tie_word_embeddings=tied), TOKENS)


@pytest.mark.package("transformers")
@pytest.mark.slow
@pytest.mark.parametrize("build", [_gpt2, _llama])
def test_the_models_without_an_output_layer_are_cut_too(build: Any) -> None:
    model = build()
    _check(getattr(model, model.base_model_prefix), TOKENS)


@pytest.mark.package("transformers")
@pytest.mark.slow
def test_an_untied_model_is_saved_and_loaded_with_both_weights(tmp_path: Path) -> None:
    model: Any = _gpt2().eval()
    partitions = edl.partition(model, 2, TOKENS)
    assert [one.name for one in partitions.tied] == ["lm_head.weight"]
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.package("transformers")
@pytest.mark.slow
def test_dropout_is_drawn_as_in_the_model() -> None:
    model = _gpt2().train()
    partitions = edl.partition(model, 3, tied="share")
    torch.manual_seed(3)
    whole = tensor_of(model(TOKENS))
    torch.manual_seed(3)
    chained = TOKENS
    for part in partitions:
        chained = part.module(chained)
    assert torch.equal(chained, whole)
