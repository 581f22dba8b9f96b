"""The end-to-end preconditioner in front of torch's optimizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficient_dl.depth import EndToEndPreconditioner, factorize, folded_state_dict
from efficient_dl.errors import CheckpointError, ConfigError


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 4, 3)).double()


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64), torch.arange(8) % 3


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x, y = _batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("n", [2, 3])
def test_sgd_behind_it_follows_sgd_on_the_factors(n: int) -> None:
    rate, steps = 1e-3, 50
    plain, factored = _net(), factorize(_net(), n)
    optimizer = torch.optim.SGD(plain.parameters(), rate)
    EndToEndPreconditioner(plain, optimizer, n)
    _train(plain, optimizer, range(steps))
    _train(factored, torch.optim.SGD(factored.parameters(), rate), range(steps))
    start, expected = _net().state_dict(), folded_state_dict(factored)
    for name, value in plain.state_dict().items():
        moved = (expected[name] - start[name]).norm()
        assert (value - expected[name]).norm() < 0.01 * moved, name


@pytest.mark.parametrize("every", [1, 4])
def test_a_run_resumes_bit_for_bit(every: int) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, EndToEndPreconditioner]:
        model = _net()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        return model, optimizer, EndToEndPreconditioner(model, optimizer, 3, every=every)

    model, optimizer, preconditioner = make()
    _train(model, optimizer, range(6))
    states: list[Any] = copy.deepcopy([one.state_dict() for one in (model, optimizer, preconditioner)])
    _train(model, optimizer, range(6, 12))
    again = make()
    for one, state in zip(again, states, strict=True):
        one.load_state_dict(state)
    _train(again[0], again[1], range(6, 12))
    for value, expected in zip(again[0].state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(value, expected)


def test_only_matrices_that_the_optimizer_steps_are_touched_until_it_is_removed() -> None:
    model = _net()
    optimizer = torch.optim.SGD([*model[3].parameters(), model[0].bias], 0.1)
    preconditioner = EndToEndPreconditioner(model, optimizer, 2)
    assert list(preconditioner.weights) == ["3"]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        F.cross_entropy(model(_batch(0)[0]), _batch(0)[1]).backward()
        before = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        optimizer.step()
        return {
            name: one.grad - before[name] for name, one in model.named_parameters() if one.grad is not None
        }

    assert [name for name, change in gradients().items() if bool(change.any())] == ["3.weight"]
    preconditioner.remove()
    assert not any(bool(change.any()) for change in gradients().values())


def test_gradients_that_are_not_finite_pass_through() -> None:
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    EndToEndPreconditioner(model, optimizer, 2)
    for one in model.parameters():
        one.grad = torch.full_like(one, float("nan"))
    optimizer.step()
    assert all(bool(one.isnan().all()) for one in model.parameters())


def test_schedulers_go_on_working() -> None:
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    EndToEndPreconditioner(model, optimizer, 2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    _train(model, optimizer, range(1))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_wrong_uses_are_errors() -> None:
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigError, match="set up"):
        EndToEndPreconditioner(model, optimizer, 0)
    with pytest.raises(ConfigError, match="none of these weights"):
        EndToEndPreconditioner(model, torch.optim.SGD([model[0].bias], 0.1))
    preconditioner = EndToEndPreconditioner(model, optimizer, 2, every=2)
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(CheckpointError, match="another preconditioner"):
        preconditioner.load_state_dict({**preconditioner.state_dict(), "n": 3})
    with pytest.raises(CheckpointError, match="not a state"):
        preconditioner.load_state_dict({})
