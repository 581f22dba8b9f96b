"""LocalLearner: the numbers of local training written by hand, the memory of one partition, and no surprises."""

from __future__ import annotations

import copy
import gc
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efficient_dl as edl
from efficient_dl.coordinator.plateau import PlateauRule
from efficient_dl.errors import CheckpointError, ConfigError
from efficient_dl.local_learning.feature_cache import CacheStats, FeatureCache
from efficient_dl.local_learning.heads import make_head
from efficient_dl.local_learning.recompute import checkpointed
from efficient_dl.local_learning.saved import SavedTensors

CUTS = ["1.0", "2"]


def chain(seed: int = 3, dropout: float = 0.0) -> nn.Sequential:
    """Three pieces with batch norm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(dropout)),
            nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Tanh()),
            nn.Linear(12, 4),
        ]
        return nn.Sequential(*layers)


def batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator), torch.randint(4, (size,), generator=generator)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-2)


def learner_of(model: nn.Module, optimizer: Any = sgd, **options: Any) -> edl.LocalLearner:
    return edl.LocalLearner(
        edl.partition(model, CUTS), batch(0), optimizer, **{"heads": "linear", "seed": 5} | options
    )


class ByHand:
    """The same training, written for three blocks: `window` 1 or 2, every gradient clipped where `clip` > 0."""

    def __init__(self, model: nn.Sequential, window: int, clip: float = 0.0) -> None:
        cut = edl.partition(model, CUTS)
        features = [batch(0)[0][:2]]
        with torch.no_grad():
            for block in copy.deepcopy(model).eval():
                features.append(block(features[-1]))
        self.blocks = list(model)
        self.heads = [make_head("linear", k, cut, features[k + 1], 4, "samples", 5) for k in range(3)]
        self.parameters = [
            [*block.parameters(), *head.parameters()]
            for block, head in zip(self.blocks, self.heads, strict=True)
        ]
        self.optimizers = [sgd(one) for one in self.parameters]
        self.window, self.clip = window, clip

    def step(self, inputs: Tensor, targets: Tensor) -> list[float]:
        x, entering, losses, outputs = inputs, [], [], []
        for k in range(3):
            entering.append(x.detach().requires_grad_(k > 0))
            outputs.append(self.blocks[k](entering[k]))
            losses.append(F.cross_entropy(self.heads[k](outputs[k]), targets))
            x = outputs[k]
        for k in range(3):
            if self.window == 2 and k < 2:
                (back,) = torch.autograd.grad(losses[k + 1], entering[k + 1], retain_graph=True)
                torch.autograd.backward([losses[k], outputs[k]], [None, back])  # type: ignore[list-item]
            else:
                losses[k].backward()
        for parameters, optimizer in zip(self.parameters, self.optimizers, strict=True):
            if self.clip:
                nn.utils.clip_grad_norm_(parameters, self.clip)
            optimizer.step()
            optimizer.zero_grad()
        return [one.item() for one in losses]


def same(one: nn.Module, other: nn.Module) -> None:
    for (name, left), right in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_step_has_the_bits_of_local_training_by_hand(window: int, clip: float) -> None:
    mine, by_hand = chain(), chain()
    learner, reference = learner_of(mine, window=window, clip=clip), ByHand(by_hand, window, clip)
    for step in range(5):
        assert learner.step(*batch(step)) == reference.step(*batch(step))
    same(mine, by_hand)
    assert not torch.equal(mine[0][0].weight, chain()[0][0].weight)


def test_windows_and_clipping_make_a_difference() -> None:
    """So that the test above compares four different trainings."""
    results = []
    for window, clip in itertools.product((1, 2), (0.0, 0.05)):
        model = chain()
        learner_of(model, window=window, clip=clip).step(*batch(1))
        results.append(model[0][0].weight.detach().clone())
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(results, 2))


@pytest.mark.parametrize("window", [1, 2])
def test_accumulation_is_a_larger_batch(window: int) -> None:
    def without_norm() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 9), nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), nn.Linear(9, 4)
        )

    large, small = without_norm(), without_norm()
    inputs, targets = batch(1, 12)
    whole, parts = learner_of(large, window=window), learner_of(small, window=window)
    for _ in range(3):
        expected = whole.step(inputs, targets)
        losses = parts.accumulate(list(zip(inputs.chunk(3), targets.chunk(3), strict=True)))
        assert losses == pytest.approx(expected)
    for left, right in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_window_2_over_one_cut_descends_the_sum_of_both_losses(penalty: float) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    inputs, targets = batch(1)
    mine = copy.deepcopy(model)
    learner = edl.LocalLearner(
        edl.partition(mine, 2), (inputs, targets), lambda p: torch.optim.SGD(p, 1.0), heads="linear",
        window=2, penalty=penalty,
    )  # fmt: skip
    head = copy.deepcopy(learner.block(0).head)
    features = model[0](inputs)
    moved = (features - inputs).square().sum() / len(inputs)
    loss = F.cross_entropy(head(features), targets) + penalty * moved / 2
    (loss + F.cross_entropy(model[1](features), targets)).backward()
    learner.step(inputs, targets)
    for before, after in zip(model.parameters(), mine.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(before - after, before.grad)


def test_with_window_2_no_head_waits_for_the_next_partition() -> None:
    """Heads of four times the width: with window 2 the peak grows by a body, not by a head."""
    model, (inputs, targets) = wide(4), (torch.randn(256, 64), torch.randint(4, (256,)))
    cut = edl.partition(model, ["1.0", "2.0", "3"])
    peaks: list[int] = []
    for window in (1, 2):
        learner = edl.LocalLearner(cut, (inputs, targets), sgd, heads="linear", window=window)  # type: ignore[arg-type]
        for index in (0, 1, 2):
            block = learner.block(index)
            block.head = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 4))
        with SavedTensors(model, *(learner.block(index).head for index in range(4))) as saved:
            learner.step(inputs, targets)
        peaks.append(saved.peak_bytes)
    one, two = peaks
    head = 256 * 256 * 4
    assert one > head
    assert one < two < one + head / 2


def test_with_window_2_a_head_learns_on_a_body_that_does_not() -> None:
    """The user has frozen the first layers."""
    model = chain()
    model[0].requires_grad_(False)
    learner = learner_of(model, window=2)
    before = [copy.deepcopy(module.state_dict()) for module in (learner.block(0).head, model[1])]
    assert all(math.isfinite(loss) for loss in learner.step(*batch(1)))
    after = (learner.block(0).head.state_dict(), model[1].state_dict())
    for old, new in zip(before, after, strict=True):
        assert not all(torch.equal(old[key], new[key]) for key in old)
    assert learner.train_sequentially(itertools.repeat(batch(2)), 2) == [2, 2, 2]


def wide(num_pieces: int) -> nn.Sequential:
    torch.manual_seed(0)
    pieces = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(num_pieces - 1)]
    return nn.Sequential(*pieces, nn.Linear(64, 4))


def peak_of(window: int, num_pieces: int) -> int:
    model = wide(num_pieces)
    inputs, targets = torch.randn(256, 64), torch.randint(4, (256,))
    cut = edl.partition(model, [*(f"{index}.0" for index in range(1, num_pieces - 1)), str(num_pieces - 1)])
    learner = edl.LocalLearner(cut, (inputs, targets), sgd, heads="linear", window=window)  # type: ignore[arg-type]
    heads = [one.block.head for one in learner._trained.values()]
    with SavedTensors(model, *heads) as saved:
        learner.step(inputs, targets)
    assert saved.bytes == 0
    return saved.peak_bytes


def test_the_peak_of_saved_tensors_is_that_of_one_window_however_deep_the_model() -> None:
    one, two = peak_of(1, 4), peak_of(2, 4)
    assert peak_of(1, 12) == one
    assert peak_of(2, 12) == two
    # An activation is 64 kB: a partition keeps its input, its output, and what its head makes of it first.
    assert 3 * 65536 <= one < 3.5 * 65536
    assert one < two < 2 * one
    model, inputs = wide(12), torch.randn(256, 64)
    with SavedTensors(model) as saved:
        loss = model(inputs).sum()
    assert saved.bytes > 3 * one
    loss.backward()


def test_a_frozen_partition_does_not_change_and_has_no_gradients() -> None:
    model = chain()
    learner = learner_of(model)
    learner.step(*batch(0))
    learner.freeze(0)
    before = copy.deepcopy(model)
    for step in range(3):
        model.eval()
        model(batch(7)[0])
        model.train()  # as loops do after an evaluation
        losses = learner.step(*batch(step))
    same(model[0], before[0])  # its batch norm, too
    assert not torch.equal(model[1][0].weight, before[1][0].weight)
    assert math.isnan(losses[0])
    assert math.isfinite(losses[1])
    assert learner.training == (1, 2)
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize("frozen", [1, 2])
def test_window_2_trains_what_is_followed_by_a_frozen_partition_by_its_own_loss(frozen: int) -> None:
    results = []
    for window in (1, 2):
        model = chain()
        learner = learner_of(model, window=window)
        learner.freeze(frozen)
        learner.step(*batch(1))
        results.append(model)
    same(results[0][frozen - 1], results[1][frozen - 1])
    assert not torch.equal(results[0][0][0].weight, chain()[0][0].weight)


def test_training_goes_on_in_training_mode_after_an_evaluation() -> None:
    straight, evaluated = chain(dropout=0.5), chain(dropout=0.5)
    for model in (straight, evaluated):
        learner = learner_of(model)
        torch.manual_seed(1)
        for step in range(3):
            learner.step(*batch(step))
            if model is evaluated:
                model.eval()
                model(batch(9)[0])
    same(straight, evaluated)


def test_parameters_that_wanted_no_gradient_are_not_trained() -> None:
    model = chain()
    model[1][0].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    learner = learner_of(model)
    learner.step(*batch(0))
    learner.train_sequentially((batch(step) for step in itertools.count()), 2)
    assert torch.equal(model[1][0].weight, before[1][0].weight)
    assert not torch.equal(model[1][0].bias, before[1][0].bias)


def test_sequential_training_holds_the_state_of_one_partition_alone() -> None:
    model = chain()
    learner = learner_of(model, adamw)
    seen: list[tuple[int, int]] = []

    def look(index: int, step: int, loss: float) -> None:
        seen.append((index, step))
        optimizers = [one for one in gc.get_objects() if type(one) is torch.optim.AdamW]
        stepped = {id(parameter) for one in optimizers for parameter in one.state}
        own = {id(parameter) for parameter in model[index].parameters()}
        assert own <= stepped
        others = [one for k in range(3) if k != index for one in model[k].parameters()]
        assert not stepped & {id(one) for one in others}
        assert all(one.grad is None for one in model.parameters())
        assert all(not one.requires_grad for one in others)

    taken = learner.train_sequentially((batch(step) for step in itertools.count()), 2, progress=look)
    assert taken == [2, 2, 2]
    assert seen == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert learner.training == ()
    assert not any(module.training for module in model.modules() if not [*module.children()])
    with pytest.raises(ConfigError, match="partitions in training: 0"):
        learner.step(*batch(0))


def test_sequential_training_is_that_of_each_block_by_hand() -> None:
    mine, by_hand = chain(), chain()
    learner_of(mine).train_sequentially((batch(step) for step in itertools.count()), 3)
    reference = ByHand(by_hand, 1)
    for k in range(3):
        for step in range(3 * k, 3 * k + 3):
            x, targets = batch(step)
            with torch.no_grad():
                for before in reference.blocks[:k]:
                    x = before.eval()(x)
            F.cross_entropy(reference.heads[k](reference.blocks[k](x)), targets).backward()
            reference.optimizers[k].step()
            reference.optimizers[k].zero_grad()
    same(mine, by_hand)


def test_kept_features_train_as_computed_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[CacheStats] = []
    close = FeatureCache.close

    def closing(cache: FeatureCache) -> None:
        caches.append(cache.stats)
        close(cache)

    monkeypatch.setattr(FeatureCache, "close", closing)
    computed, read = chain(), chain()
    learner_of(computed).train_sequentially(itertools.cycle([batch(0), batch(1)]), 6)
    learner_of(read).train_sequentially(itertools.cycle([batch(0), batch(1)]), 6, features=tmp_path)
    same(computed, read)
    assert [(one.misses, one.hits) for one in caches] == [(2, 4), (2, 4)]
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("window", [1, 2])
def test_checkpointed_pieces_train_as_they_are(window: int) -> None:
    plain, thrifty = chain(dropout=0.3), chain(dropout=0.3)
    for model in (plain, thrifty):
        learner = learner_of(model, window=window)
        if model is thrifty:
            for piece in learner.partitions.pieces:
                checkpointed(piece.module)
        torch.manual_seed(4)
        for step in range(3):
            learner.step(*batch(step))
    same(plain, thrifty)


def test_sequential_training_goes_on_with_the_partition_of_a_saved_state() -> None:
    model = chain()
    learner = learner_of(model)
    learner.freeze(0, 2)
    again = chain()
    again.load_state_dict(model.state_dict())
    other = learner_of(again)
    other.load_state_dict(learner.state_dict())
    before = copy.deepcopy(other.partitions[0].module.state_dict())
    assert other.train_sequentially(itertools.repeat(batch(0)), 2) == [0, 2, 2]
    after = other.partitions[0].module.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_plateau_ends_a_partition_early() -> None:
    def standing(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.0)

    learner = learner_of(chain(), standing)
    taken = learner.train_sequentially(
        itertools.repeat(batch(0)), 50, plateau=PlateauRule(patience=2), stage_steps=4
    )
    assert taken == [12, 12, 12]


def test_too_few_batches_are_an_error() -> None:
    with pytest.raises(ConfigError, match="step 1 of partition 1"):
        learner_of(chain()).train_sequentially([batch(0)] * 4, 3)


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to take a step with"):
        learner_of(chain()).accumulate([])


@pytest.mark.parametrize("frozen", [(), (0,)])
def test_a_saved_state_goes_on_as_if_nothing_had_been(frozen: tuple[int, ...]) -> None:
    whole, stopped = chain(dropout=0.3), chain(dropout=0.3)
    learner, first = learner_of(whole, adamw, window=2), learner_of(stopped, adamw, window=2)
    torch.manual_seed(2)
    for step in range(4):
        learner.step(*batch(step))
        if step == 1:
            learner.freeze(*frozen)
    torch.manual_seed(2)
    for step in range(2):
        first.step(*batch(step))
    first.freeze(*frozen)
    saved = copy.deepcopy((stopped.state_dict(), first.state_dict()))
    model = chain(seed=8, dropout=0.3)
    second = learner_of(model, adamw, window=2, seed=1)
    model.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    for step in range(2, 4):
        second.step(*batch(step))
    assert second.losses[1:] == learner.losses[1:]
    assert second.training == learner.training
    same(whole, model)


def test_a_state_of_other_partitions_is_refused() -> None:
    state = learner_of(chain()).state_dict()
    model = chain()
    two = edl.LocalLearner(edl.partition(model, ["2"]), batch(0), sgd, heads="linear")
    with pytest.raises(CheckpointError, match="not a state of this learner"):
        two.load_state_dict(state)


def test_the_learning_rate_is_the_optimizers_own() -> None:
    model = chain()
    learner = learner_of(model)
    for optimizer in learner.optimizers.values():
        optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(model)
    learner.step(*batch(0))
    for left, right in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_partition_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="no loss of its own"):
        learner_of(chain(), heads="deep")


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.Sequential(
            nn.Embedding(7, 5), nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 7, bias=False))
        )
        self.layers[2][1].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_shared_weight_is_trained_by_its_owner_alone() -> None:
    """So the owner's weights do not depend on whether the borrower trains."""
    tokens = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(1))
    weights = []
    for frozen in ((), (2,)):
        model = Tied().layers
        cut = edl.partition(model, ["1", "2.0"], tied="share")
        learner = edl.LocalLearner(cut, (tokens, tokens), sgd, heads="linear", clip=0.1)
        learner.freeze(*frozen)
        for _ in range(3):
            learner.accumulate([(tokens, tokens)] * 2)
        assert all(one.grad is None for one in model.parameters())
        weights.append(model[0].weight.detach().clone())
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], Tied().layers[0].weight)


def residual_features(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_no_hook_of_a_penalty_outlives_its_partition() -> None:
    model = chain()
    learner = learner_of(model, penalty=0.1)
    learner.train_sequentially(itertools.repeat(batch(0)), 1)
    del learner
    gc.collect()
    assert residual_features(model) == 0


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    return (batch(step) for step in range(3))


def test_the_documented_example_runs_as_written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = edl.LocalLearner.__doc__
    assert text is not None
    lines = text.splitlines()
    first = next(index for index, line in enumerate(lines) if "edl.partition(" in line)
    code = "\n".join(line[8:] for line in itertools.takewhile(str.strip, lines[first:]))
    monkeypatch.chdir(tmp_path)
    inputs, targets = batch(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 4))
    exec(
        code,
        {
            "edl": edl,
            "torch": torch,
            "model": model,
            "inputs": inputs,
            "targets": targets,
            "batches": batches(),
        },
    )
    saved = torch.load(tmp_path / "model.pt")
    assert saved.keys() == model.state_dict().keys()
