"""A script's own messages in the process group that a model is compressed on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from tests.distributed.launch import run_ranks


def with_messages(rank: int) -> tuple[Tensor, float]:
    """A receive that is outstanding while a step is reduced, agreed on and compared; it is answered afterwards."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(30, 40))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compression = edl.compress(model, optimizer, 2.0, check_every=1)
    received = torch.zeros(1000)
    work = dist.irecv(received, src=1) if rank == 0 else None
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 30) * (rank + step)).square().mean().backward()
        optimizer.step()
    if rank == 1:
        dist.send(torch.arange(1000.0), dst=0)
    if work is not None:
        work.wait()
    compression.close()
    return received, float(model.module.weight.detach().sum())


def test_an_outstanding_receive_of_the_script_gets_the_script_s_message() -> None:
    (received, first), (_, second) = run_ranks(with_messages, 2)
    assert torch.equal(received, torch.arange(1000.0))
    assert first == second
