"""Going over to another plan: all ranks drain together, also what only some of them have left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import efficient_dl as edl
from efficient_dl.comm.look import Allowance
from efficient_dl.integrations.plan_watch import ReplanOptions
from tests.distributed.launch import run_ranks
from tests.distributed.measured_links import measuring, network


class Row(nn.Module):
    """One row, which the first rank keeps alone: it sends nothing of its gradient, and leaves nothing out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 3000))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


class Rows(nn.Module):
    """A module of its own for a row, beside one that all ranks have a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.row = Row()
        self.weight = nn.Parameter(torch.zeros(3000))

    def forward(self, x: Tensor) -> Tensor:
        return self.row(x) + (self.weight * x).sum()


def drained(rank: int, bits: str) -> tuple[float, float]:
    model: Any = Rows()
    fully_shard(model.row)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    never = ReplanOptions(allowance=Allowance(share=0.0, looks=0.0))
    with measuring(network((1, 1), 0.5, family="bits")):
        compression: Any = edl.compress(
            model, optimizer, "auto", weights="none", error_feedback=True, check_every=1, replan=never
        )
    compression.replay([{"about": "gradients", "step": 2, "bits": bits, "reason": "a test"}], 10)
    inputs = [torch.randn(3000, generator=torch.Generator().manual_seed(one)) for one in range(2)]
    mean, missing = torch.stack(inputs).mean(0), []
    for number in range(1, 5):
        optimizer.zero_grad()
        model(inputs[rank]).backward()
        optimizer.step()
        whole = torch.stack([p.detach().full_tensor().view(-1) for p in model.parameters()])
        missing.append(float((whole + number * mean).norm() / mean.norm()))
    waits = compression.state_dict()["gradients"]["residuals"]["waiting"]
    compression.close()
    assert waits == []
    return missing[1], missing[-1]


@pytest.mark.parametrize("bits", ["lossless", "none"])
def test_what_one_rank_alone_keeps_is_drained_on_all(bits: str) -> None:
    for before, after in run_ranks(drained, 2, bits):
        assert before > 0.01 and after < 1e-5
