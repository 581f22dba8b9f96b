"""Models: shapes, sizes, seeds, and that each of them can learn."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from efficient_dl.config import DataSpec, ModelConfig
from efficient_dl.errors import ConfigError
from efficient_dl.models import build_model, check_model, count_parameters, model_names
from efficient_dl.models.build import ARCHITECTURES
from efficient_dl.models.gpt import RotaryPositions

TOKENS = DataSpec("tokens", classes=256, shape=(32,))
IMAGES = DataSpec("images", classes=10, shape=(1, 8, 8))
NAMES = sorted(ARCHITECTURES)


def _spec(name: str) -> DataSpec:
    return TOKENS if ARCHITECTURES[name].kind == "tokens" else IMAGES


def _batch(spec: DataSpec, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if spec.kind == "tokens":
        x = torch.randint(spec.classes, (batch, *spec.shape), generator=generator)
        return x, torch.roll(x, -1, dims=1)
    return torch.randn(batch, *spec.shape, generator=generator), torch.arange(batch) % spec.classes


def _loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), y.flatten())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", ["nano", "micro", "mini", "small", "base"])
def test_every_size_exists_and_is_larger_than_the_one_before(name: str, size: str) -> None:
    with torch.device("meta"):
        spec = _spec(name)
        config = ModelConfig(name=name, size=size, context=32)
        numel = count_parameters(ARCHITECTURES[name].build(config, spec))
        sizes = list(ARCHITECTURES[name].sizes)
        before = sizes[sizes.index(size) - 1] if size != "nano" else None
        if before:
            smaller = ModelConfig(name=name, size=before, context=32)
            assert numel > count_parameters(ARCHITECTURES[name].build(smaller, spec))


@pytest.mark.parametrize(
    ("name", "size", "numel"),
    [
        ("gpt", "nano", 213_568),
        ("gpt", "micro", 1_017_216),
        ("gpt", "mini", 3_213_568),
        ("gpt", "small", 10_720_128),
        ("gpt", "base", 25_305_600),
        ("mlp", "base", 2_176_010),
        ("vgg8b", "base", 7_325_066),
        ("resnet18", "base", 11_172_810),
    ],
)
def test_parameters_are_as_many_as_the_documentation_says(name: str, size: str, numel: int) -> None:
    with torch.device("meta"):
        model = ARCHITECTURES[name].build(ModelConfig(name=name, size=size), _spec(name))
    assert count_parameters(model) == numel


def test_base_networks_have_their_papers_size_on_cifar() -> None:
    """8.9 M for VGG8B (Nøkland & Eidnes 2019), 11.17 M for the CIFAR form of ResNet-18."""
    spec = DataSpec("images", classes=10, shape=(3, 32, 32))
    with torch.device("meta"):
        counts = {
            name: count_parameters(ARCHITECTURES[name].build(ModelConfig(name=name, size="base"), spec))
            for name in ("vgg8b", "resnet18")
        }
    assert counts == {"vgg8b": 8_900_234, "resnet18": 11_173_962}


@pytest.mark.parametrize("name", NAMES)
def test_logits_have_one_number_a_class(name: str) -> None:
    spec = _spec(name)
    x, _ = _batch(spec, 3)
    logits = build_model(ModelConfig(name=name, size="nano", context=32), spec)(x)
    assert logits.shape == ((3, 32, 256) if spec.kind == "tokens" else (3, 10))
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 96, 80)])
@pytest.mark.parametrize("name", ["mlp", "vgg8b", "resnet18"])
def test_images_of_any_size_are_taken(name: str, shape: tuple[int, ...]) -> None:
    spec = DataSpec("images", classes=7, shape=shape)
    model = build_model(ModelConfig(name=name, size="nano"), spec)
    assert model(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_initial_values_depend_on_the_seed_alone(name: str) -> None:
    config, spec = ModelConfig(name=name, size="nano"), _spec(name)
    torch.manual_seed(11)
    first = build_model(config, spec, seed=5).state_dict()
    torch.manual_seed(12)
    same = build_model(config, spec, seed=5).state_dict()
    other = build_model(config, spec, seed=6).state_dict()
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_building_leaves_torchs_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_model(ModelConfig(size="nano"), TOKENS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    spec = _spec(name)
    model = build_model(ModelConfig(name=name, size="nano", context=32), spec)
    x, y = _batch(spec, 4)
    for block in model.modules():  # residual branches that start at zero pass no gradient in the first step
        if hasattr(block, "bn2"):
            torch.nn.init.ones_(block.bn2.weight)
    _loss(model(x), y).backward()
    empty = [key for key, one in model.named_parameters() if one.grad is None or not one.grad.any()]
    assert not empty


@pytest.mark.parametrize("name", NAMES)
def test_each_model_can_learn_eight_samples_by_heart(name: str) -> None:
    spec = _spec(name)
    model = build_model(ModelConfig(name=name, size="nano", context=32), spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = _batch(spec, 8)
    first = _loss(model(x), y).item()
    for _ in range(60):
        optimizer.zero_grad()
        _loss(model(x), y).backward()
        optimizer.step()
    assert _loss(model(x), y).item() < first / 5


def test_a_gpt_starts_at_the_entropy_of_its_vocabulary() -> None:
    model = build_model(ModelConfig(size="micro", context=32), TOKENS)
    x, y = _batch(TOKENS, 4)
    assert abs(_loss(model(x), y).item() - math.log(256)) < 0.1


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_gpt_does_not_see_the_future(positions: str) -> None:
    model = build_model(ModelConfig(size="nano", context=32, positions=positions), TOKENS).eval()
    x, _ = _batch(TOKENS, 2)
    changed = x.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 256
    with torch.no_grad():
        before, after = model(x), model(changed)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-6)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-3)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_gpt_knows_the_order_of_its_tokens(positions: str) -> None:
    model = build_model(ModelConfig(size="nano", context=32, positions=positions), TOKENS).eval()
    x, _ = _batch(TOKENS, 1)
    swapped = x.clone()
    swapped[:, [2, 3]] = x[:, [3, 2]]
    with torch.no_grad():
        assert not torch.allclose(model(x)[:, -1], model(swapped)[:, -1], atol=1e-6)


def test_rotary_products_depend_on_the_distance_alone() -> None:
    rotary = RotaryPositions(head_dim=16, context=64)
    query, key = torch.randn(16), torch.randn(16)
    rotated_queries = rotary(query.expand(1, 1, 64, 16))[0, 0]
    rotated_keys = rotary(key.expand(1, 1, 64, 16))[0, 0]
    products = rotated_queries @ rotated_keys.T
    for distance in (0, 1, 7):
        diagonal = torch.diagonal(products, offset=distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)


def test_tied_weights_are_one_parameter() -> None:
    tied = build_model(ModelConfig(size="nano"), TOKENS)
    free = build_model(ModelConfig(size="nano", tie_weights=False), TOKENS)
    assert count_parameters(free) - count_parameters(tied) == 256 * 64
    assert "head.weight" not in dict(tied.named_parameters())


def test_frozen_parameters_are_not_counted_as_trainable() -> None:
    model = build_model(ModelConfig(name="mlp", size="nano"), IMAGES)
    model.head.requires_grad_(False)
    assert count_parameters(model) - count_parameters(model, trainable=True) == 32 * 10 + 10


def test_a_longer_sequence_than_the_context_is_refused() -> None:
    model = build_model(ModelConfig(size="nano", context=8), TOKENS)
    with pytest.raises(ValueError, match="context of 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_trains(name: str) -> None:
    spec = _spec(name)
    model = build_model(ModelConfig(name=name, size="nano", context=32), spec)
    x, y = _batch(spec, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = _loss(model(x), y)
    loss.backward()
    assert loss.isfinite()
    assert all(one.grad is not None and one.grad.dtype == torch.float32 for one in model.parameters())


def test_dropout_acts_only_in_training() -> None:
    for name in NAMES:
        spec = _spec(name)
        model = build_model(ModelConfig(name=name, size="nano", context=32, dropout=0.5), spec)
        x, _ = _batch(spec, 4)
        assert not torch.equal(model(x), model(x)), name
        model.eval()
        assert torch.equal(model(x), model(x)), name


def test_unknown_names_are_answered_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean resnet18"):
        check_model(ModelConfig(name="resnet"))
    with pytest.raises(ConfigError, match="did you mean micro"):
        build_model(ModelConfig(size="mikro"), TOKENS)
    assert set(model_names()) == set(NAMES)


def test_a_model_for_other_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"take the model vgg8b or resnet18 or mlp"):
        build_model(ModelConfig(name="gpt"), IMAGES)
    with pytest.raises(ConfigError, match=r"take the model gpt"):
        build_model(ModelConfig(name="mlp"), TOKENS)


def test_a_batch_of_one_is_refused_by_batch_norm_only() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size"):
        check_model(ModelConfig(name="vgg8b"), IMAGES, batch_size=1)
    check_model(ModelConfig(name="mlp"), IMAGES, batch_size=1)
    check_model(ModelConfig(name="vgg8b"), IMAGES, batch_size=2)
