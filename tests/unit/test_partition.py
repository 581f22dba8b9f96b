"""partition: a model's pieces compute what it does, and its partitions hold all of it, each part once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import efficient_dl as edl
from efficient_dl.config import DataSpec, ModelConfig
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.partition import Partitions
from efficient_dl.local_learning.pieces import pieces_of
from efficient_dl.models import build_model

TOKENS = DataSpec("tokens", classes=32, shape=(16,))
IMAGES = DataSpec("images", classes=10, shape=(1, 16, 16))
MODELS = {
    "mlp": ModelConfig("mlp", "micro", dropout=0.1),
    "vgg8b": ModelConfig("vgg8b", "nano", dropout=0.1),
    "resnet18": ModelConfig("resnet18", "nano", dropout=0.1),
    "resnet18, large stem": ModelConfig("resnet18", "nano", stem="imagenet"),
    "gpt": ModelConfig("gpt", "nano", context=16, dropout=0.1),
    "gpt, learned positions, untied": ModelConfig(
        "gpt", "nano", context=16, positions="learned", tie_weights=False
    ),
    "sequential": None,
}


def _model(name: str) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(1)
    config = MODELS[name]
    if config is None:
        relu = nn.ReLU()  # one module in three places
        inner = nn.Sequential(
            nn.Linear(16, 12), relu, nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 8)), relu
        )
        return nn.Sequential(nn.Flatten(), inner, nn.Linear(8, 8), relu), torch.randn(
            4, 1, 4, 4, generator=generator
        )
    if config.name == "gpt":
        return build_model(config, TOKENS), torch.randint(32, (4, 16), generator=generator)
    return build_model(config, IMAGES), torch.randn(4, *IMAGES.shape, generator=generator)


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    return _model(request.param)


def _chain(partitions: Partitions, x: Tensor) -> Tensor:
    for one in partitions:
        x = one.module(x)
    return x


def test_the_partitions_in_a_row_compute_what_the_model_computes(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    model.eval()
    with torch.no_grad():
        before = model(x)
        for n in (1, 2, 3):
            assert torch.equal(_chain(edl.partition(model, n, x), x), before)
            assert torch.equal(model(x), before)


def test_every_parameter_belongs_to_one_partition(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    partitions = edl.partition(model, 3, x, balance="memory")
    owned = [id(one) for part in partitions for one in part.module.parameters()]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(one) for one in model.parameters()}


def test_names_lead_from_the_partitions_entries_to_the_models(case: tuple[nn.Module, Tensor]) -> None:
    model, _ = case
    partitions = edl.partition(model, 2)
    whole = model.state_dict(keep_vars=True)
    for part in partitions:
        state = part.module.state_dict(keep_vars=True)
        assert list(part.names) == list(state)
        assert all(whole[part.names[key]] is tensor for key, tensor in state.items())
    assert {name for part in partitions for name in part.names.values()} == set(whole)


def test_training_one_partition_changes_the_models_state_only_there(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    partitions = edl.partition(model, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        inputs = partitions[0].module(x)
    before.update({name: value.clone() for name, value in model.state_dict().items()})
    partitions[1].module(inputs).square().sum().backward()
    torch.optim.SGD(partitions[1].module.parameters(), lr=0.1).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and changed <= set(partitions[1].names.values())


def test_cutting_leaves_the_model_and_the_random_generator_as_they_were(
    case: tuple[nn.Module, Tensor],
) -> None:
    model, x = case
    model.train()
    next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    partitions = edl.partition(model, 2, x, balance="time")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(one.costs.forward_seconds > 0 and one.costs.backward_seconds > 0 for one in partitions)


def test_pieces_without_parameters_belong_to_the_one_before() -> None:
    assert [piece.name for piece in pieces_of(_model("sequential")[0])] == ["1.0", "1.2.0", "1.2.1", "2"]


def test_an_unknown_name_gets_the_closest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean blocks\.2\?"):
        edl.partition(_model("gpt")[0], "block.2")


def test_more_partitions_than_pieces_with_parameters_are_refused() -> None:
    assert len(edl.partition(_model("vgg8b")[0], 8)) == 8
    with pytest.raises(ConfigError, match="1 to 8"):
        edl.partition(_model("vgg8b")[0], 9)
