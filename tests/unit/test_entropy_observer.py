"""The entropy observer: what it sees, what it leaves alone, and what it leaves behind."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from efficient_dl.entropy import KINDS, EntropyObserver, frozen_entropy, range_entropy, rms_entropy
from efficient_dl.entropy import observer as observer_module
from efficient_dl.errors import ConfigError


class Scalars:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.values[tag, global_step] = scalar_value


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 40))


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        x = torch.randn(50, 32, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()


def test_rows_come_at_the_first_step_and_at_every_nth() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), 1e-2)
    with EntropyObserver(model, optimizer, every=3) as observer:
        train(model, optimizer, 7)
    assert [rows[0].step for rows in observer.history] == [1, 3, 6]
    found = {(row.kind, row.name) for row in observer.rows}
    assert found == {
        *(("weights", name) for name in ("0.weight", "2.weight")),
        *(("gradients", name) for name in ("0.weight", "2.weight")),
        *(("moments", f"{layer}.weight.{key}") for layer in "02" for key in ("exp_avg", "exp_avg_sq")),
        *(("activations", name) for name in "012"),
    }
    assert {row.kind for row in observer.rows} == set(KINDS)
    assert observer.seconds > 0


def test_entropies_are_those_of_the_whole_tensor_where_it_fits_the_sample() -> None:
    model = network()
    initial = model[0].weight.detach().clone()
    optimizer = SGD(model.parameters(), 0.1)
    with EntropyObserver(model, optimizer, kinds=["weights", "gradients"]) as observer:
        train(model, optimizer, 1)
    rows = {(row.kind, row.name): row for row in observer.rows}
    weight, grad = model[0].weight.detach(), model[0].weight.grad
    row = rows["weights", "0.weight"]
    assert isinstance(grad, Tensor)
    assert row.numel == weight.numel()
    assert row.range == pytest.approx(float(range_entropy(weight)), abs=1e-5)
    assert row.rms == pytest.approx(float(rms_entropy(weight)), abs=1e-5)
    assert row.frozen == pytest.approx(float(frozen_entropy(weight, initial)), abs=1e-5)
    row = rows["gradients", "0.weight"]
    assert row.range == pytest.approx(float(range_entropy(grad)), abs=1e-5)
    assert math.isnan(row.unchanged)


def test_the_share_of_unchanged_weights_is_between_two_consecutive_steps() -> None:
    model = nn.Linear(64, 64, bias=False)
    optimizer = SGD(model.parameters(), 1.0)
    with EntropyObserver(model, optimizer, every=1, kinds=["weights"]) as observer:
        change = torch.zeros(64, 64)
        change[:16] = 1.0  # a quarter moves by much
        change[16:32] = model.weight[16:32].detach().abs() * 2**-14  # and one by less than bf16 can show
        model.weight.grad = change
        optimizer.step()
    (row,) = observer.rows
    assert row.unchanged == pytest.approx(0.5)
    assert 0.7 < row.unchanged_bf16 <= 0.75


def test_training_is_the_same_with_and_without_an_observer() -> None:
    plain, watched = network(), network()
    optimizers = [AdamW(one.parameters(), 1e-2) for one in (plain, watched)]
    train(plain, optimizers[0], 5)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with EntropyObserver(watched, optimizers[1], every=2, sample=100):
        train(watched, optimizers[1], 5)
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, plain.state_dict().values(), watched.state_dict().values()))


def test_closing_removes_every_hook() -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    observer = EntropyObserver(model, optimizer, every=1)
    train(model, optimizer, 1)
    observer.close()
    observer.close()
    assert not any(module._forward_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    train(model, optimizer, 2)
    assert observer.step == 1
    copy.deepcopy(model)


def test_evaluations_are_not_mistaken_for_training() -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    with EntropyObserver(model, optimizer, kinds=["activations"], min_numel=1) as observer:
        with torch.no_grad():
            model(torch.randn(3, 32))
        train(model, optimizer, 1)
    assert {row.numel for row in observer.rows} == {50 * 64, 50 * 40}


def test_rows_go_to_a_file_and_a_writer(tmp_path: Path) -> None:
    model, writer = network(), Scalars()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    path = tmp_path / "entropy.jsonl"
    with EntropyObserver(model, optimizer, every=2, path=path, writer=writer) as observer:
        train(model, optimizer, 2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["step"] for row in rows} == {1, 2}
    assert len(rows) == sum(map(len, observer.history))
    last = observer.rows[0]
    assert rows[-len(observer.rows)]["range"] == last.range
    assert writer.values[f"entropy_weights_range/{last.name}", 2] == last.range
    assert writer.values["entropy/weights_range", 2] == observer.means()["weights"]["range"]
    assert not any(key.startswith("entropy_gradients_unchanged") for key, _ in writer.values)


def test_a_restored_observer_keeps_the_frozen_steps() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), 0.1)
    first = EntropyObserver(model, optimizer, every=2)
    train(model, optimizer, 2)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    again = copy.deepcopy(model)
    other = AdamW(again.parameters(), 0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    through = EntropyObserver(model, optimizer, every=2)
    through.load_state_dict(state)
    second = EntropyObserver(again, other, every=2)
    second.load_state_dict(state)
    train(again, other, 2)
    train(model, optimizer, 2)
    assert second.step == 4 and repr(second.rows) == repr(through.rows)  # NaN is not equal to itself
    fresh = EntropyObserver(again, other)
    assert fresh.state_dict()["frozen"] != second.state_dict()["frozen"]
    with pytest.raises(ConfigError, match="bits = 8"):
        EntropyObserver(again, bits=4).load_state_dict(state)


def test_without_an_optimizer_it_is_told_of_steps() -> None:
    model = network()
    initial = model[0].weight.detach().clone()
    observer = EntropyObserver(model, kinds=["weights"])
    observer.before_step()
    with torch.no_grad():
        model[0].weight.mul_(2)
    observer.after_step()
    rows = {row.name: row for row in observer.rows}
    assert rows["0.weight"].unchanged == 0 and rows["2.weight"].unchanged == 1
    assert rows["0.weight"].frozen == pytest.approx(float(frozen_entropy(2 * initial, initial)), abs=1e-5)
    assert rows["0.weight"].frozen > rows["0.weight"].range + 0.5


def test_tensors_without_an_entropy_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Embedding(100, 64, sparse=True)
    optimizer = SGD(model.parameters(), 0.1)
    observer = EntropyObserver(model, optimizer, every=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(torch.randint(100, (50,))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert "sparse" in observer.skipped["gradients", "weight"]
    assert caplog.text.count("entropy of gradients of weight is not observed") == 1


def test_nan_and_constant_tensors_have_rows() -> None:
    model = nn.Linear(64, 64)
    optimizer = SGD(model.parameters(), 0.0)
    with torch.no_grad():
        model.bias.zero_()
    with EntropyObserver(model, optimizer, every=1, min_numel=1) as observer:
        model.weight.grad = torch.full((64, 64), math.nan)
        model.bias.grad = torch.zeros(64)
        optimizer.step()
    rows = {(row.kind, row.name): row for row in observer.rows}
    assert math.isnan(rows["gradients", "weight"].range) and math.isnan(rows["gradients", "weight"].exponent)
    zeros = rows["gradients", "bias"]
    assert zeros.range == zeros.rms == zeros.exponent == 0 and math.isnan(zeros.frozen)


def test_history_is_thinned_instead_of_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer_module, "MAX_COLUMNS", 8)
    model = nn.Linear(4, 4)
    observer = EntropyObserver(model, every=1, kinds=["weights"], min_numel=1)
    for _ in range(100):
        observer.before_step()
        observer.after_step()
    steps = [rows[0].step for rows in observer.history]
    assert len(steps) <= 8 and steps[0] == 1 and steps[-1] == 100 and steps == sorted(steps)


def test_a_heat_map_is_drawn(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    with EntropyObserver(model, optimizer, every=1) as observer:
        with pytest.raises(ConfigError, match="nothing to draw"):
            observer.heat_map(tmp_path / "none.svg")
        train(model, optimizer, 3)
    observer.heat_map(tmp_path / "map.svg", "exponent")
    assert "<svg" in (tmp_path / "map.svg").read_text()


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="weight"):
        EntropyObserver(network(), kinds=["weight"])
    with pytest.raises(ConfigError, match="bits cannot be 16"):
        EntropyObserver(network(), bits=16)
    with pytest.raises(ConfigError, match="no rule 'rang'"):
        EntropyObserver(network()).heat_map("map.svg", "rang")
