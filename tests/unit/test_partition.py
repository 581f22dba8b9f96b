"""partition: a model's pieces compute what it does, and its partitions hold all of it, each part once."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import efficient_dl as edl
from efficient_dl.config import DataSpec, ModelConfig
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning import pieces as pieces_module
from efficient_dl.local_learning.partition import Partitions
from efficient_dl.local_learning.pieces import pieces_of, register_adapter
from efficient_dl.local_learning.saved import SavedTensors
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
        assert torch.equal(_chain(edl.partition(model, 3, x), x), before)
        assert torch.equal(model(x), before)


def test_every_parameter_belongs_to_one_partition(case: tuple[nn.Module, Tensor]) -> None:
    model, _ = case
    partitions = edl.partition(model, 3)
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


@given(st.lists(st.integers(1, 4), min_size=2, max_size=6), st.data())
@settings(max_examples=20)
def test_any_cut_of_any_sequential_computes_what_it_computes(widths: list[int], data: st.DataObject) -> None:
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(widths)]
    model = nn.Sequential(*layers)
    n = data.draw(st.integers(1, len(layers)))
    x = torch.randn(2, widths[0])
    partitions = edl.partition(
        model, n, x, balance=data.draw(st.sampled_from(["time", "memory", "parameters"]))
    )
    assert torch.equal(_chain(partitions, x), model(x))
    assert len(partitions) == n
    assert sum(len(part.owned_parameters()) for part in partitions) == 2 * len(layers)
    assert edl.partition(model, partitions.cuts).cuts == partitions.cuts


def test_named_pieces_begin_the_partitions() -> None:
    partitions = edl.partition(_model("vgg8b")[0], ["features.2", "hidden"])
    assert [part.name for part in partitions] == [
        "features.0..features.1",
        "features.2..features.9",
        "hidden..head",
    ]
    assert partitions.cuts == ("features.2", "hidden")


@pytest.mark.parametrize("names", [["hidden", "features.2"], ["features.0"], ["hidden", "hidden"]])
def test_names_out_of_order_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="out of order"):
        edl.partition(_model("vgg8b")[0], names)


def test_a_partition_without_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'features\.2' has no parameters"):
        edl.partition(_model("vgg8b")[0], ["features.2", "features.3"])


def test_costs_are_those_of_the_partition_run_alone() -> None:
    model, x = _model("resnet18")
    for part in edl.partition(model, 4, x, balance="memory"):
        inputs = x.detach().requires_grad_(part.index > 0)
        with SavedTensors(part.module) as saved:
            x = part.module(inputs)
        assert part.costs.activation_bytes == saved.bytes
        assert part.costs.output_bytes == 4 * x.numel()
        assert part.costs.parameter_bytes == sum(4 * one.numel() for one in part.module.parameters())
        assert part.costs.name == part.name


def test_measuring_holds_the_activations_of_one_piece_alone() -> None:
    alive: list[int] = []
    outputs: list[weakref.ref[torch.UntypedStorage]] = []

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        alive.append(sum(one() is not None for one in outputs))
        outputs.append(weakref.ref(output.untyped_storage()))

    layers = [nn.Linear(8, 8) for _ in range(12)]
    for layer in layers:
        layer.register_forward_hook(watch)
    edl.partition(nn.Sequential(*layers), 3, torch.randn(4, 8), balance="memory")
    assert len(alive) > len(layers) and max(alive) <= 1


def test_by_memory_the_dearest_partition_is_cheaper_than_by_parameters() -> None:
    model, x = _model("resnet18")
    dearest = {
        by: max(
            part.costs.parameter_bytes + part.costs.activation_bytes
            for part in edl.partition(model, 4, x, balance=by)
        )
        for by in ("memory", "parameters")
    }
    assert dearest["memory"] < dearest["parameters"]


def test_a_tied_weight_across_a_cut_becomes_two_and_is_told() -> None:
    model, x = _model("gpt")
    partitions = edl.partition(model, 3, x)
    (tied,) = partitions.tied
    assert (tied.name, tied.shared_with) == ("head.weight", "embedding.weight")
    assert (tied.partition, tied.owner, tied.untied) == (2, 0, True)
    assert "head.weight (partition 2) was embedding.weight" in str(partitions)
    with torch.no_grad():
        partitions[2].module[-1][-1].weight.add_(1)
    state = model.state_dict()
    assert torch.equal(state["head.weight"], state["embedding.weight"] + 1)
    untied = build_model(replace(MODELS["gpt"], tie_weights=False), TOKENS, seed=5)  # pyright: ignore
    untied.load_state_dict(state)
    assert torch.equal(untied.eval()(x), model.eval()(x))


def test_a_tied_weight_in_one_partition_stays_tied() -> None:
    model, x = _model("gpt")
    assert edl.partition(model, 1, x).tied == ()
    assert model.head.weight is model.embedding.weight


def test_a_shared_weight_is_owned_by_the_first_of_its_users() -> None:
    model, _ = _model("gpt")
    partitions = edl.partition(model, 3, tied="share")
    assert model.head.weight is model.embedding.weight
    assert [part.borrowed for part in partitions] == [
        set(),
        set(),
        {f"{len(partitions[2].module) - 1}.1.weight"},
    ]
    owned = [id(one) for part in partitions for one in part.owned_parameters()]
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))
    assert not partitions.tied[0].untied


def test_a_module_on_both_sides_of_a_cut_is_refused_unless_it_is_shared() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Linear(4, 4), layer)
    with pytest.raises(ConfigError, match=r"the module that holds '0\.weight' is used on both sides"):
        edl.partition(model, ["1"])
    assert edl.partition(model, ["1"], tied="share")[1].borrowed == {"1.weight", "1.bias"}


def test_a_buffer_on_both_sides_of_a_cut_is_refused() -> None:
    norms = [nn.BatchNorm1d(4), nn.BatchNorm1d(4)]
    norms[1].running_mean = norms[0].running_mean
    with pytest.raises(ConfigError, match=r"the buffer '3\.running_mean' is also '1\.running_mean'"):
        edl.partition(nn.Sequential(nn.Linear(4, 4), norms[0], nn.Linear(4, 4), norms[1]), ["2"])


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        return self.up(self.middle(fine) + fine)


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class _Recurrent(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (_UNet(), "the output of down skips middle to add"),
        (_Branching(), "branches or loops on the values of its data"),
        (_Recurrent(), "layer is called 2 times"),
        (nn.Bilinear(2, 2, 2), "it takes several inputs: input1, input2"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_no_chain_is_refused_with_the_reason(model: nn.Module, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        edl.partition(model, 2)


def test_a_subclass_with_its_own_forward_is_not_taken_for_its_base() -> None:
    class Doubled(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(ConfigError, match="Doubled cannot be cut"):
        edl.partition(Doubled(nn.Linear(2, 2), nn.Linear(2, 2)), 2)


def test_a_wrapped_model_is_refused_with_the_way_to_the_one_inside() -> None:
    class DistributedDataParallel(nn.Module):  # the real one needs a process group
        pass

    with pytest.raises(ConfigError, match=r"partition\(model\.module"):
        edl.partition(DistributedDataParallel(), 2)


class _Scaled(nn.Module):
    """A chain with something between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x) * self.scale))


class _First(nn.Module):
    def __init__(self, model: _Scaled) -> None:
        super().__init__()
        self.first, self.scale = model.first, model.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.scale


@pytest.fixture
def adapters() -> Iterator[None]:
    """Takes back what a test registers."""
    before = list(pieces_module._registered)
    yield
    pieces_module._registered[:] = before


@pytest.mark.usefixtures("adapters")
def test_an_adapter_of_the_users_own_cuts_their_model() -> None:
    register_adapter(
        _Scaled,
        lambda model: [("first", _First(model)), ("second", model.second), ("third", model.third)],
        "Scaled",
    )
    partitions = edl.partition(_Scaled(), ["second"], torch.randn(2, 4))
    assert dict(partitions[0].names) == {
        "0.scale": "scale", "0.first.weight": "first.weight", "0.first.bias": "first.bias"
    }  # fmt: skip


@pytest.mark.usefixtures("adapters")
def test_a_chain_that_computes_something_else_is_refused_where_it_parts() -> None:
    class Forgets(_First):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    register_adapter(
        _Scaled,
        lambda model: [("first", Forgets(model)), ("second", model.second), ("third", model.third)],
        "Scaled",
    )
    with pytest.raises(ConfigError, match="second: second is given another input than in the model"):
        edl.partition(_Scaled(), 2, torch.randn(2, 4))


@pytest.mark.usefixtures("adapters")
def test_a_chain_that_forgets_dropout_is_refused() -> None:
    class Dropping(_Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.third(
                nn.functional.dropout(self.second(self.first(x) * self.scale), 0.5, self.training)
            )

    register_adapter(
        Dropping,
        lambda model: [("first", _First(model)), ("second", model.second), ("third", model.third)],
        "Dropping",
    )
    with pytest.raises(ConfigError, match=r"in training(.|\n)*third: third is given another input"):
        edl.partition(Dropping(), 2, torch.randn(2, 4))


@pytest.mark.parametrize("balance", ["time", "memory"])
def test_under_autocast_all_parameters_still_get_gradients(balance: Any) -> None:
    model, x = _model("mlp")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        partitions = edl.partition(model, 2, x, balance=balance)
        partitions[1].module(partitions[0].module(x)).float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("adapters")
def test_pieces_that_leave_parameters_out_are_refused() -> None:
    register_adapter(_Scaled, lambda model: [("first", model.first), ("second", model.second)], "Scaled")
    with pytest.raises(ConfigError, match=r"no piece holds 3 .*: scale, third\.weight, third\.bias"):
        edl.partition(_Scaled(), 2)


@pytest.mark.usefixtures("adapters")
def test_pieces_with_parameters_of_their_own_are_refused() -> None:
    register_adapter(_Scaled, lambda model: [("first", _First(model)), ("new", nn.Linear(4, 4))], "Scaled")
    with pytest.raises(ConfigError, match="the piece 'new' holds 'weight', which is not the model's"):
        edl.partition(_Scaled(), 2)


def test_an_example_that_batch_norm_cannot_train_on_is_refused() -> None:
    model, x = _model("vgg8b")
    with pytest.raises(ConfigError, match="batch norm needs two samples"):
        edl.partition(model, 2, x[:1])


def test_the_table_says_what_each_partition_holds() -> None:
    model, x = _model("mlp")
    table = str(edl.partition(model, 2, x, balance="memory"))
    assert "MLP in 2 partitions, cut by memory" in table
    assert all(word in table for word in ("layers.0", "layers.1..head", "32,896", "kB", "ms", "%"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"balance": "time"}, "time is measured on a batch"),
        ({"balance": "flops"}, "balance cannot be 'flops'"),
        ({"tied": "copy"}, "tied cannot be 'copy'"),
    ],
)
def test_impossible_choices_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        edl.partition(_model("mlp")[0], 2, **arguments)


def test_a_forward_of_the_users_own_is_measured_as_it_is() -> None:
    """As tools do that wrap a module in place: it is not taken for a checkpointed one."""
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrapped = copy.deepcopy(plain)
    inner = wrapped[0].forward
    wrapped[0].forward = lambda x: inner(x)
    bare = nn.Sequential(nn.Linear(4, 4), nn.Module())
    bare[1].weight = nn.Parameter(torch.eye(4))
    bare[1].forward = lambda x: x @ bare[1].weight
    x = torch.randn(3, 4)
    assert edl.partition(bare, 2, x).cuts == ("1",)
    bytes_of = [
        [one.costs.activation_bytes for one in edl.partition(model, 2, x)] for model in (plain, wrapped)
    ]
    assert bytes_of[0] == bytes_of[1]
    assert [one.again_bytes for one in edl.partition(wrapped, 2, x).measured] == [0, 0]
