"""Examples that partitions hand on: the hardest ones by the local loss, and only those are learned from after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efficient_dl as edl
from efficient_dl.config import Config, with_overrides
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.selection import Selection
from efficient_dl.training.local_checks import check_local
from efficient_dl.training.stage import selection_of

CLASSES, BATCH = 3, 8


def chain() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 7), nn.ReLU()),
        nn.Sequential(nn.Linear(7, 7), nn.ReLU()),
        nn.Linear(7, CLASSES),
    )


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 5, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1)


def learner_of(model: nn.Module, **options: Any) -> edl.LocalLearner:
    partitions = edl.partition(model, ["1.0", "2"])
    return edl.LocalLearner(partitions, batch(0), sgd, heads="linear", seed=2, **options)


def test_the_hardest_examples_are_chosen_in_their_order_and_ties_go_to_the_first() -> None:
    logits = torch.tensor([[0.0, 9.0], [0.0, 0.0], [0.0, -9.0], [0.0, 0.0]])
    targets = torch.tensor([1, 1, 1, 1])
    assert Selection(0.5).hardest(logits, targets, 2).tolist() == [1, 2]
    assert Selection(0.75).hardest(logits, targets, 3).tolist() == [1, 2, 3]


def test_a_sequence_counts_by_the_mean_over_its_tokens() -> None:
    logits = torch.zeros(2, 3, 2)
    logits[0, 0, 1] = 5.0  # one wrong token
    logits[1, :, 1] = 3.0  # three wrong ones
    assert Selection(0.5).hardest(logits, torch.zeros(2, 3, dtype=torch.int64), 1).tolist() == [1]


@pytest.mark.parametrize("keep_by", ["loss", "random"])
def test_each_partition_learns_from_a_smaller_share(keep_by: Any) -> None:
    learner = learner_of(chain(), keep_examples=0.5, keep_by=keep_by)
    seen: list[int] = []
    for partition in learner.partitions:
        partition.module.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    learner.step(*batch(1))
    assert seen == [8, 4, 2]


def test_the_second_partition_takes_exactly_the_step_of_the_hardest_half() -> None:
    model, by_hand = chain(), chain()
    learner = learner_of(model, keep_examples=0.5)
    inputs, targets = batch(1)
    heads = [copy.deepcopy(learner.block(index).head) for index in (0, 1)]
    with torch.no_grad():
        features = by_hand[0](inputs)
        losses = F.cross_entropy(heads[0](features), targets, reduction="none")
        chosen = losses.topk(4).indices.sort().values
    loss = F.cross_entropy(heads[1](by_hand[1](features[chosen])), targets[chosen])
    loss.backward()
    expected = by_hand[1][0].weight - 0.1 * by_hand[1][0].weight.grad
    learner.step(inputs, targets)
    torch.testing.assert_close(model[1][0].weight, expected)


def test_keeping_all_is_the_training_without_selection_bit_for_bit() -> None:
    plain, kept = chain(), chain()
    one, other = learner_of(plain), learner_of(kept, keep_examples=1.0)
    for seed in range(3):
        assert one.step(*batch(seed)) == other.step(*batch(seed))
    for mine, theirs in zip(plain.parameters(), kept.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_saved_learner_goes_on_bit_for_bit() -> None:
    through, resumed = chain(), chain()
    one = learner_of(through, keep_examples=0.5)
    for seed in range(2):
        one.step(*batch(seed))
    other = learner_of(resumed, keep_examples=0.5)
    resumed.load_state_dict(through.state_dict())
    other.load_state_dict(one.state_dict())
    for seed in range(2, 5):
        assert one.step(*batch(seed)) == other.step(*batch(seed))


@pytest.mark.parametrize("options", [{"keep_examples": 0.0}, {"keep_examples": 0.5, "window": 2}])
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        learner_of(chain(), **options)


def test_partitions_one_after_the_other_have_nothing_to_choose_by() -> None:
    learner = learner_of(chain(), keep_examples=0.5)
    with pytest.raises(ConfigError, match="one after the other"):
        learner.train_sequentially(iter([]), 1)


@pytest.mark.parametrize(
    "settings",
    [
        ["local.mode=end-to-end"],
        ["local.mode=partitionwise"],
        ["local.mode=layerwise", "local.schedule=sequential"],
        ["local.mode=layerwise", "local.window=2"],
    ],
)
def test_a_run_that_would_leave_out_nothing_is_refused(settings: list[str]) -> None:
    config = with_overrides(Config(), [*settings, "local.keep_examples=0.5"])
    with pytest.raises(ConfigError, match="keep_examples"):
        check_local(config, "images")
    check_local(with_overrides(config, ["local.keep_examples=1.0"]), "images")


def test_a_run_that_keeps_all_has_no_selection() -> None:
    assert selection_of(Config()) is None
