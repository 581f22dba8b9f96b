"""Auxiliary heads: what they are made of, where their values come from, what they may see."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from efficient_dl.config import DataSpec, ModelConfig
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.head_layers import new_copy, shapes_along
from efficient_dl.local_learning.heads import head_costs, make_head
from efficient_dl.local_learning.pieces import Piece
from efficient_dl.models import build_model

IMAGES = DataSpec("images", classes=10, shape=(1, 28, 28))
TOKENS = DataSpec("tokens", classes=50, shape=(16,))


@dataclass
class Part:
    module: nn.Module


class Cut:
    """A model that was cut before the named pieces."""

    def __init__(self, model: nn.Module, pieces: list[tuple[str, nn.Module]], *begin: str) -> None:
        self.model = model
        self.pieces = [Piece(name, module, {}) for name, module in pieces]
        names = [name for name, _ in pieces]
        edges = [0, *(names.index(name) for name in begin), len(names)]
        self.parts = [Part(nn.Sequential(*(module for _, module in pieces[a:b]))) for a, b in pairwise(edges)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Part:
        return self.parts[index]

    def features(self, index: int, x: Tensor) -> Tensor:
        with torch.no_grad():
            for part in self.parts[: index + 1]:
                x = part.module(x)
        return x


def vgg(*begin: str) -> tuple[Cut, Tensor]:
    model = build_model(ModelConfig(name="vgg8b", size="nano"), IMAGES)
    pieces = [(f"features.{name}", layer) for name, layer in model.features.named_children()]  # type: ignore[union-attr]
    pieces += [("hidden", model.hidden), ("head", model.head)]  # type: ignore[list-item]
    return Cut(model, pieces, *begin), torch.randn(6, 1, 28, 28)


def gpt(*begin: str) -> tuple[Cut, Tensor]:
    model = build_model(ModelConfig(name="gpt", size="nano", context=16, tie_weights=False), TOKENS)
    blocks = [(f"blocks.{name}", block) for name, block in model.blocks.named_children()]  # type: ignore[union-attr]
    head = nn.Sequential(model.norm, model.head)  # type: ignore[arg-type]
    return Cut(model, [("embedding", model.embedding), *blocks, ("head", head)], *begin), torch.randint(  # type: ignore[list-item]
        50, (3, 16)
    )


@pytest.mark.parametrize("kind", ["linear", "auglocal", "auglocal:3", "predsim"])
@pytest.mark.parametrize("begin", ["features.1", "features.2", "features.4", "hidden", "head"])
def test_heads_of_images_give_logits_after_any_cut(kind: str, begin: str) -> None:
    cut, x = vgg(begin)
    features = cut.features(0, x)
    answer = make_head(kind, 0, cut, features, 10, "samples", seed=0)(features)
    assert (answer[0] if kind == "predsim" else answer).shape == (6, 10)


@pytest.mark.parametrize("kind", ["linear", "auglocal:2", "causal:2"])
@pytest.mark.parametrize("begin", ["blocks.0", "blocks.2", "head"])
def test_heads_of_tokens_give_logits_at_every_position(kind: str, begin: str) -> None:
    cut, x = gpt(begin)
    features = cut.features(0, x)
    assert make_head(kind, 0, cut, features, 50, "tokens", seed=0)(features).shape == (3, 16, 50)


def test_the_last_partition_has_no_head() -> None:
    cut, x = vgg("features.3")
    features = cut.features(1, x)
    assert isinstance(make_head("auglocal", 1, cut, features, 10, "samples", seed=0), nn.Identity)


@pytest.mark.parametrize("kind", ["linear", "auglocal:2", "predsim"])
def test_a_head_begins_from_its_seed_alone(kind: str) -> None:
    def values(seed: int, noise: int) -> list[Tensor]:
        cut, x = vgg("features.1", "features.3")
        torch.manual_seed(noise)
        with torch.no_grad():  # as after training: another head must not depend on it
            for parameter in cut.model.parameters():
                parameter.add_(torch.randn(parameter.shape))
        features = cut.features(0, x)
        before = torch.get_rng_state()
        head = make_head(kind, 0, cut, features, 10, "samples", seed)
        assert torch.equal(before, torch.get_rng_state())
        return list(head.state_dict().values())

    first, again, other = values(1, 5), values(1, 6), values(2, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_head_is_apart_from_the_model() -> None:
    cut, x = gpt("blocks.1", "blocks.3")
    before = {name: value.clone() for name, value in cut.model.state_dict().items()}
    features = cut.features(0, x)
    head = make_head("causal:1", 0, cut, features, 50, "tokens", seed=0)
    head(features).sum().backward()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in cut.model.state_dict().items())
    assert all(parameter.grad is None for parameter in cut.model.parameters())


def test_auglocal_samples_fewer_layers_the_later_the_partition() -> None:
    begin = ["features.1", "features.2", "features.3", "features.4", "features.6", "hidden"]
    cut, x = vgg(*begin)
    depths = []
    for index in range(len(begin)):
        features = cut.features(index, x)
        head = make_head("auglocal:4", index, cut, features, 10, "samples", seed=0)
        depths.append(sum(isinstance(part, (nn.BatchNorm2d, nn.BatchNorm1d)) for part in head.modules()))
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == 4 and depths[-1] == 1


def test_new_copies_begin_as_the_model_does() -> None:
    cut, _ = gpt("blocks.1")
    trained = cut.pieces[2].module
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.fill_(7.0)
    torch.manual_seed(0)
    clone = new_copy(trained.requires_grad_(False), cut.model)
    assert clone.get_parameter("attention.qkv.weight").std().item() == pytest.approx(0.02, rel=0.05)
    assert clone.get_parameter("attention.out.weight").std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert torch.equal(clone.get_parameter("attention_norm.weight"), torch.ones(64))
    assert all(parameter.requires_grad for parameter in clone.parameters())


def test_a_piece_that_nothing_initializes_is_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3))

    with pytest.raises(ConfigError, match="nothing says how a new Sequential begins"):
        new_copy(nn.Sequential(Scale()), nn.Linear(3, 3))


def test_a_hugging_face_model_initializes_its_copies() -> None:
    class Model(nn.Module):
        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.weight, 0.5)

    assert torch.equal(new_copy(nn.Sequential(nn.Linear(2, 2)), Model())[0].weight, torch.full((2, 2), 0.5))  # type: ignore[index]


def test_heads_that_look_ahead_are_refused() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mix(x.mean(1, keepdim=True))

    cut, x = gpt("blocks.0")
    seeing = [(one.name, Mean() if one.name.startswith("blocks") else one.module) for one in cut.pieces]
    cut = Cut(cut.model, seeing, "blocks.0")
    with pytest.raises(ConfigError, match="looks ahead"):
        make_head("causal:1", 0, cut, cut.features(0, x), 50, "tokens", seed=0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lineal", "unknown head"),
        ("auglocal:0", "cannot be read"),
        ("linear:2", "cannot be read"),
        ("causal:x", "cannot be read"),
        ("causal", "language models"),
    ],
)
def test_kinds_that_do_not_exist_or_fit_are_refused(kind: str, message: str) -> None:
    cut, x = vgg("features.3")
    with pytest.raises(ConfigError, match=message):
        make_head(kind, 0, cut, cut.features(0, x), 10, "samples", seed=0)


def test_predsim_is_refused_for_tokens() -> None:
    cut, x = gpt("blocks.2")
    with pytest.raises(ConfigError, match="predsim"):
        make_head("predsim", 0, cut, cut.features(0, x), 50, "tokens", seed=0)


def test_shapes_are_found_without_touching_the_pieces() -> None:
    cut, x = vgg("features.1")
    modules = [piece.module for piece in cut.pieces]
    before = {name: value.clone() for name, value in cut.model.state_dict().items()}
    assert shapes_along(modules, x)[-2:] == [(64,), (10,)]
    assert cut.model.training
    assert all(torch.equal(value, before[name]) for name, value in cut.model.state_dict().items())


def test_costs_are_those_of_a_known_layer() -> None:
    costs = head_costs(nn.Linear(8, 4, bias=False), torch.randn(3, 8))
    assert costs.parameters == 32 and costs.parameter_bytes == 128
    assert costs.forward_flops == 2 * 3 * 8 * 4
    assert costs.backward_flops == 2 * costs.forward_flops  # to the weights and to the features
