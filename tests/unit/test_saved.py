"""SavedTensors: what autograd keeps for backward, to the byte."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from efficient_dl.local_learning.saved import SavedTensors, saved_bytes

BATCH = 3
INPUT_BYTES, HIDDEN_BYTES = 4 * BATCH * 4, 4 * BATCH * 8


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_activations_count_once_and_parameters_not_at_all(model: nn.Sequential) -> None:
    x = torch.randn(BATCH, 4)
    with SavedTensors(model) as saved:
        output = model(x)  # ReLU's output is saved by ReLU and by the next layer
    assert saved.bytes == INPUT_BYTES + HIDDEN_BYTES
    assert sum(saved.storages.values()) == saved.bytes
    assert saved_bytes(lambda: model(x), without=[model]) == saved.bytes
    assert output.requires_grad


def test_parameters_count_where_they_are_not_left_out(model: nn.Sequential) -> None:
    last = model[2].weight
    with SavedTensors() as saved:
        output = model(torch.randn(BATCH, 4))
    assert (
        saved.bytes == INPUT_BYTES + HIDDEN_BYTES + 4 * last.numel()
    )  # the first layer's input needs no gradient
    del output


def test_two_views_of_a_storage_count_as_the_whole_storage_once() -> None:
    x = torch.randn(10, 4, requires_grad=True)
    with SavedTensors() as saved:
        output = x[:2] * x[5:6]
    assert saved.bytes == 4 * 40
    del output


def test_backward_and_dropping_the_graph_release_what_was_saved(model: nn.Sequential) -> None:
    with SavedTensors(model) as saved:
        model(torch.randn(BATCH, 4)).sum().backward()
        assert saved.bytes == 0
        output = model(torch.randn(BATCH, 4))
        assert saved.bytes == INPUT_BYTES + HIDDEN_BYTES
    del output
    assert saved.bytes == 0 and not saved.storages


def test_the_peak_is_what_was_alive_at_once(model: nn.Sequential) -> None:
    with SavedTensors(model) as saved:
        for _ in range(3):
            model(torch.randn(BATCH, 4)).sum().backward()
        assert saved.peak_bytes == INPUT_BYTES + HIDDEN_BYTES
        both = [model(torch.randn(BATCH, 4)) for _ in range(2)]
    assert saved.peak_bytes == 2 * (INPUT_BYTES + HIDDEN_BYTES)
    del both


def test_saved_outputs_do_not_keep_themselves_alive() -> None:
    gc.disable()
    try:
        with SavedTensors() as saved:
            output = torch.randn(5, requires_grad=True).exp()  # saves its own output
        assert saved.bytes == 20
        del output
        assert saved.bytes == 0
    finally:
        gc.enable()


def test_gradients_are_the_same_with_the_meter(model: nn.Sequential) -> None:
    x = torch.randn(BATCH, 4)
    expected = torch.autograd.grad(model(x).exp().sum(), list(model.parameters()))
    with SavedTensors(model):
        found = torch.autograd.grad(model(x).exp().sum(), list(model.parameters()))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("what", ["activation", "parameter"])
def test_a_change_in_place_is_refused_as_without_the_meter(model: nn.Sequential, what: str) -> None:
    x = torch.randn(BATCH, 4)
    with SavedTensors(model):
        output = model(x)
    with torch.no_grad():
        (x if what == "activation" else model[2].weight).add_(1)
    with pytest.raises(RuntimeError, match="in place"):
        output.sum().backward()


@pytest.mark.slow  # torch imports its compiler for it
def test_a_checkpointed_layer_saves_its_input_only(model: nn.Sequential) -> None:
    x = torch.randn(BATCH, 4, requires_grad=True)
    with SavedTensors(model) as saved:
        output = checkpoint(model, x, use_reentrant=False)
        assert saved.bytes == INPUT_BYTES
    assert isinstance(output, torch.Tensor)
