"""What a step's computation is like before it communicates."""

from __future__ import annotations

import torch
from torch import nn

from efficient_dl.training.measure import compute

CPU = torch.device("cpu")


def test_gradients_are_there_from_the_last_layer_to_the_first_and_nothing_is_left_behind() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    unused = nn.Parameter(torch.ones(3))
    model.register_parameter("unused", unused)
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    model.register_parameter("frozen", frozen)
    x = torch.randn(512, 256)

    found = compute(model, CPU, lambda: model(x).square().sum().backward())

    shares = [found.ready[f"{index}.weight"] for index in range(4)]
    assert 1 >= shares[0] > shares[1] > shares[2] > shares[3] > 0
    assert found.ready["unused"] == 1.0 and "frozen" not in found.ready
    assert found.seconds > 0
    assert all(one.grad is None and not one._post_accumulate_grad_hooks for one in model.parameters())


def test_what_is_accumulated_is_there_after_the_last_part() -> None:
    model = nn.Linear(256, 256, bias=False)
    x = torch.randn(512, 256)

    def two_parts() -> None:
        for _ in range(2):
            model(x).square().sum().backward()

    assert compute(model, CPU, two_parts).ready["weight"] > 0.5
