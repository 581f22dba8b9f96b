"""Local losses: their values, their gradients, and what they may cost."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.block import LocalBlock
from efficient_dl.local_learning.heads import PredSimHead
from efficient_dl.local_learning.objectives import (
    CrossEntropy,
    PredSim,
    Sum,
    TaskLoss,
    TransportPenalty,
    make_objective,
    similarities,
)
from efficient_dl.objectives import exp_gb


class Residual(nn.Module):
    """x + branch(x), counting its forward passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Linear(width, width)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.branch(x)


def test_cross_entropy_is_the_mean_over_tokens_in_float32() -> None:
    logits, targets = torch.randn(2, 5, 7, dtype=torch.bfloat16), torch.randint(7, (2, 5))
    loss = CrossEntropy()(logits, logits, nn.Identity(), targets)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    probabilities = logits.float().log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(loss, -probabilities.mean())


def test_wrong_targets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(2, 7\) for targets of shape \(3,\)"):
        CrossEntropy()(torch.randn(2, 7), torch.randn(2, 7), nn.Identity(), torch.randint(7, (3,)))


def test_similarities_are_cosines_of_centred_rows() -> None:
    x = torch.randn(4, 6)
    centred = (x - x.mean(1, keepdim=True)).double()
    expected = [[float(a @ b / (a.norm() * b.norm())) for b in centred] for a in centred]
    torch.testing.assert_close(similarities(x), torch.tensor(expected, dtype=torch.float32))


def test_similarities_of_one_hot_rows_tell_classes_apart() -> None:
    same = similarities(torch.eye(10)[torch.tensor([0, 0, 3])])
    torch.testing.assert_close(same[0], torch.tensor([1.0, 1.0, -1 / 9]))


def test_predsim_falls_when_samples_of_a_class_become_alike() -> None:
    torch.manual_seed(0)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    features = torch.randn(6, 8, 4, 4, requires_grad=True)
    head, objective = PredSimHead((8, 4, 4), 3), PredSim()
    optimizer = torch.optim.Adam([features, *head.parameters()], 0.05)
    losses = []
    for _ in range(40):
        loss = objective(features, features, head, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 1.5 and losses[-1] < 0.3 * losses[0]


def test_predsim_weighs_both_branches_as_published() -> None:
    targets, features, head = torch.tensor([0, 1, 0]), torch.randn(3, 5), PredSimHead((5,), 2)
    logits, matching = head(features)
    assert torch.equal(logits, head.output.bias.expand(3, 2))  # its weights begin at zero
    expected = nn.functional.mse_loss(similarities(matching), similarities(torch.eye(2)[targets]))
    cross_entropy = nn.functional.cross_entropy(logits, targets)
    loss = PredSim()(features, features, head, targets)
    torch.testing.assert_close(loss, 0.99 * expected + 0.01 * cross_entropy)


def test_predsim_refuses_a_head_with_one_branch() -> None:
    with pytest.raises(ConfigError, match="two branches"):
        PredSim()(torch.randn(2, 3), torch.randn(2, 3), nn.Linear(3, 2), torch.tensor([0, 1]))


def test_the_last_partition_has_the_tasks_loss_under_predsim() -> None:
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert PredSim()(logits, logits, nn.Identity(), targets) == CrossEntropy()(
        logits, logits, nn.Identity(), targets
    )


def test_the_penalty_is_the_mean_square_of_residual_branches() -> None:
    pieces = [nn.Linear(3, 5), Residual(5), Residual(5)]
    penalty = TransportPenalty(pieces, tau=4.0)
    body, x = nn.Sequential(*pieces), torch.randn(7, 3)
    features = body(x)
    loss = penalty(x, features, nn.Identity(), torch.zeros(7))
    with torch.no_grad():
        first = pieces[0](x)
        second = first + pieces[1].branch(first)  # type: ignore[operator]
        branches = (pieces[1].branch(first), pieces[2].branch(second))  # type: ignore[operator]
        expected = sum(one.square().sum(1).mean() for one in branches) / (2 * 4.0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert pieces[1].branch.weight.grad is not None  # type: ignore[union-attr]


def test_the_penalty_runs_no_piece_twice() -> None:
    pieces = [Residual(5), Residual(5)]
    block = LocalBlock(
        nn.Sequential(*pieces), nn.Linear(5, 2), Sum(CrossEntropy(), TransportPenalty(pieces, 1.0))
    )
    _, loss, _ = block(torch.randn(4, 5), torch.tensor([0, 1, 0, 1]))
    loss.backward()
    assert [piece.runs for piece in pieces] == [1, 1]


def test_the_penalty_ignores_earlier_passes_and_copies() -> None:
    pieces = [Residual(5)]
    penalty = TransportPenalty(pieces, tau=1.0)
    x = torch.randn(4, 5)
    copied = copy.deepcopy(pieces[0])
    pieces[0](100 * x)  # a pass whose loss was never asked for
    with torch.no_grad():
        pieces[0](50 * x)
    y = pieces[0](x)
    copied(100 * x)
    loss = penalty(x, y, nn.Identity(), torch.zeros(4))
    torch.testing.assert_close(loss, (y - x).square().sum(1).mean() / 2)
    assert penalty(x, y, nn.Identity(), torch.zeros(4)) == 0  # what was reported is used once


def test_the_penalty_of_tokens_is_a_mean_over_positions() -> None:
    piece = Residual(5)
    penalty = TransportPenalty([piece], tau=1.0, unit="tokens")
    x = torch.randn(2, 3, 5)
    y = piece(x)
    torch.testing.assert_close(
        penalty(x, y, nn.Identity(), torch.zeros(2, 3)), (y - x).square().sum(-1).mean() / 2
    )


def test_a_piece_is_observed_no_longer_than_the_penalty_exists() -> None:
    piece = Residual(5)
    objective = make_objective("linear", [piece], tau=1.0)
    assert len(piece._forward_hooks) == 1
    piece(torch.randn(2, 5))
    del objective
    assert len(piece._forward_hooks) == 0


def test_a_penalty_without_tau_is_refused() -> None:
    with pytest.raises(ConfigError, match="positive tau"):
        TransportPenalty([], tau=0.0)


def test_objectives_follow_the_heads_kind() -> None:
    assert isinstance(make_objective("predsim"), PredSim)
    assert isinstance(make_objective("auglocal:3"), CrossEntropy)
    assert isinstance(make_objective("linear", [Residual(2)], tau=0.5), Sum)


def test_uniform_logits_cost_the_logarithm_of_the_classes() -> None:
    features = torch.zeros(3, 4)
    loss = CrossEntropy()(features, features, nn.Identity(), torch.tensor([0, 1, 2]))
    assert loss.item() == pytest.approx(math.log(4))


def test_a_partition_may_learn_by_another_loss_than_cross_entropy() -> None:
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = exp_gb(logits.flatten(0, 1), targets.flatten())
    objective = make_objective("causal:1", task_loss="expgb")
    assert isinstance(objective, TaskLoss)
    torch.testing.assert_close(objective(logits, logits, nn.Identity(), targets), expected)
    of_last = make_objective("predsim", task_loss="expgb")
    torch.testing.assert_close(of_last(logits, logits, nn.Identity(), targets), expected)
    with pytest.raises(ValueError, match="for targets of shape"):
        objective(logits, logits, nn.Identity(), targets[:1])
