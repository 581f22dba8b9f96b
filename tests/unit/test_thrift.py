"""Checkpointed and chunked pieces: the same training with less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.pieces import pieces_of
from efficient_dl.local_learning.recompute import checkpointed, chunked, plain, treats_samples_apart
from efficient_dl.local_learning.thrift import choose_thrift, economize


class Wide(nn.Module):
    """A piece whose inner activations are eight times its input."""

    def __init__(self, norm: Callable[[], nn.Module] = nn.Identity, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 128), norm(), nn.Linear(128, 16)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(torch.relu(self.norm(self.up(x)))))


def train(module: nn.Module, steps: int = 3) -> list[Tensor]:
    """Every tensor of the module after a few steps, and the losses."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = module(torch.randn(12, 16, requires_grad=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *module.state_dict().values()]


def live_bytes(module: nn.Module, x: Tensor) -> int:
    """What the graph of a forward pass holds, the parameters left out."""
    own = {one.untyped_storage().data_ptr() for one in module.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
    del out
    return sum(held.values())


@pytest.mark.parametrize(
    "norm", [nn.Identity, lambda: nn.BatchNorm1d(128), lambda: nn.BatchNorm1d(128, momentum=None)]
)
def test_checkpointing_changes_no_bit(norm: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = Wide(norm, dropout=0.3)
    frugal = checkpointed(copy.deepcopy(module))
    for a, b in zip(train(module), train(frugal), strict=True):
        assert torch.equal(a, b)


def test_a_checkpointed_piece_saves_its_input_alone() -> None:
    module, x = Wide(), torch.randn(32, 16, requires_grad=True)
    x.sum().backward()  # what a first backward allocates is not the module's
    before = live_bytes(module, x)
    assert before >= 32 * (16 + 128) * 4
    assert live_bytes(checkpointed(module), x) <= 32 * 16 * 4


def test_chunks_change_gradients_by_no_more_than_rounding() -> None:
    torch.manual_seed(0)
    module = Wide()
    frugal = chunked(copy.deepcopy(module), 5)
    for a, b in zip(train(module), train(frugal), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_chunk_at_a_time_is_alive_in_backward() -> None:
    rows: list[int] = []
    module = Wide()
    module.up.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    chunked(module, 4)(torch.randn(10, 16, requires_grad=True)).sum().backward()
    assert sorted(rows) == [2, 2, 2, 2, 3, 3, 3, 3]  # once forward and once backward


def test_batch_norm_is_not_chunked_in_training() -> None:
    module = Wide(lambda: nn.BatchNorm1d(128))
    with pytest.raises(ConfigError, match="statistics over all of it"):
        chunked(module, 2)
    frozen = chunked(module.eval(), 2)
    x = torch.randn(6, 16)
    torch.testing.assert_close(frozen(x), plain(copy.deepcopy(module))(x))
    with pytest.raises(ConfigError, match="statistics over all of it"):
        frozen.train()(x)


def test_names_and_parameters_stay() -> None:
    module = Wide()
    keys, ids = list(module.state_dict()), [id(parameter) for parameter in module.parameters()]
    for frugal in (checkpointed(module), chunked(plain(module), 3)):
        assert list(frugal.state_dict()) == keys
        assert [id(parameter) for parameter in frugal.parameters()] == ids


def test_a_copy_runs_its_own_parameters() -> None:
    module = checkpointed(Wide())
    clone = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(clone(torch.randn(2, 16)), torch.zeros(2, 16))


def test_a_module_is_not_made_frugal_twice() -> None:
    with pytest.raises(ConfigError, match="replaced already"):
        chunked(checkpointed(Wide()), 2)


@pytest.mark.parametrize("num_chunks", [0, -1])
def test_a_batch_has_at_least_one_part(num_chunks: int) -> None:
    with pytest.raises(ConfigError, match="at least one part"):
        chunked(Wide(), num_chunks)


def costs(*activations: int) -> list[PartitionCosts]:
    return [
        PartitionCosts(f"layer{i}", 1.0, 2.0, 0, activation_bytes=one, output_bytes=10)
        for i, one in enumerate(activations)
    ]


def test_nothing_is_repeated_where_the_goal_is_met() -> None:
    choice = choose_thrift(costs(100, 50), input_bytes=10, goal_bytes=150)
    assert choice.num_chunks == {} and choice.peak_bytes == 150 and choice.extra_seconds == 0


def test_repeated_layers_share_the_peak() -> None:
    # Both repeated: the inputs of both, and the activations of the larger while its backward runs.
    choice = choose_thrift(costs(100, 100), input_bytes=10, goal_bytes=120)
    assert choice.num_chunks == {"layer0": 1, "layer1": 1} and choice.peak_bytes == 120
    assert choice.extra_seconds == 2.0


def test_a_layer_that_dominates_is_chunked() -> None:
    choice = choose_thrift(costs(1000, 50), 10, 330, may_chunk=lambda name: name == "layer0")
    assert choice.num_chunks == {"layer0": 4} and choice.peak_bytes == 10 + 50 + 250


def test_a_goal_out_of_reach_is_refused_with_what_can_be_reached() -> None:
    with pytest.raises(ConfigError, match="1,020 with layer0, layer1"):
        choose_thrift(costs(1000, 50), input_bytes=10, goal_bytes=500)


def test_a_model_is_brought_below_a_goal_and_computes_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Wide() for _ in range(4)), nn.Linear(16, 2))
    x = torch.randn(64, 16, requires_grad=True)
    expected, before = model(x), live_bytes(model, x)
    choice = economize(model, pieces_of(model), x.detach(), goal_bytes=before // 3)
    assert choice.num_chunks and choice.peak_bytes <= before // 3
    assert live_bytes(model, x) <= choice.peak_bytes
    torch.testing.assert_close(model(x), expected)


def test_batch_norm_ties_samples_together() -> None:
    assert treats_samples_apart(Wide()) and not treats_samples_apart(Wide(lambda: nn.BatchNorm1d(128)))
