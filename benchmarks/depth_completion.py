"""Completing a low-rank matrix from some of its entries: what depth, its preconditioner and penalties find."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.rows import Row
from efficient_dl.depth import EndToEndPreconditioner, effective_rank, factorize, schatten_penalty

SIZE, RANK, SHARE = 30, 2, 0.4  # 360 of 900 entries; a matrix of rank 2 has 116 degrees of freedom
CASE = f"completion of {SIZE} × {SIZE}, rank {RANK}, {SHARE:.0%} seen"
INITIAL = 1e-3  # the singular values at the beginning, of a matrix whose own are near SIZE
STOP = 1e-6  # of the mean squared error on what is seen, whose scale is 1


@dataclass(frozen=True)
class Method:
    """factors: of the weight. preconditioner: n instead. penalty: a strength of the Schatten penalty, n = 3."""

    rate: float
    factors: int = 1
    preconditioner: int = 1
    penalty: float = 0.0
    initial: float = INITIAL
    adam: bool = False


# Rates: the largest of 1, 3, 10 … times which all seeds of a first look were stable.
METHODS = {
    "1 factor": Method(100.0),
    "2 factors": Method(3.0, factors=2),
    "3 factors": Method(1.0, factors=3, initial=1e-2),
    "preconditioner, n = 2": Method(3.0, preconditioner=2),
    "preconditioner, n = 3": Method(1.0, preconditioner=3, initial=1e-2),
    "Schatten penalty, n = 2": Method(30.0, penalty=1e-2),
    "2 factors, large initialization": Method(3.0, factors=2, initial=3.0),
    "2 factors, Adam": Method(0.01, factors=2, adam=True),
}
QUICK = ("1 factor", "2 factors", "preconditioner, n = 2")


def completion_rows(quick: bool, seeds: int) -> Iterator[Row]:
    """Relative error on entries that were not seen, the error on those that were, and the effective rank."""
    for system in QUICK if quick else METHODS:
        for seed in range(seeds):
            seen, unseen, rank = complete(METHODS[system], seed, steps=1200 if quick else 3000)
            for metric, value, unit in (
                ("test_error", 100 * unseen, "% of the unseen entries' rms"),
                ("train_error", 100 * seen, "% of the seen entries' rms"),
                ("effective_rank", rank, ""),
                ("learning_rate", METHODS[system].rate, ""),
            ):
                yield Row("depth", f"{CASE}, seed {seed}", system, metric, value, unit, False)


def complete(how: Method, seed: int, steps: int) -> tuple[float, float, float]:
    """Gradient descent on the seen entries: relative errors on seen and unseen entries, effective rank."""
    generator = torch.Generator().manual_seed(seed)
    target, mask = problem(generator)
    layer = nn.Linear(SIZE, SIZE, bias=False)
    start = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0]
    with torch.no_grad():
        layer.weight.copy_(how.initial * start)
    model: nn.Module = factorize(layer, how.factors) if how.factors > 1 else layer
    kind = torch.optim.Adam if how.adam else torch.optim.SGD
    optimizer = kind(model.parameters(), how.rate)
    if how.preconditioner > 1:
        EndToEndPreconditioner(model, optimizer, how.preconditioner, every=2)
    for _ in range(steps):
        weight = model.get_parameter("weight") if how.factors == 1 else model.weight
        assert isinstance(weight, Tensor)
        loss = (weight - target)[mask].square().mean()
        if float(loss.detach()) < STOP or not math.isfinite(float(loss.detach())):
            break
        if how.penalty:
            loss = loss + how.penalty * schatten_penalty(model, 2) / SIZE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = model.weight
    assert isinstance(weight, Tensor)
    found = weight.detach()
    return relative(found, target, mask), relative(found, target, ~mask), effective_rank(found)


def problem(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A matrix of the rank, entries of variance 1, and which of them are seen."""
    left = torch.randn(SIZE, RANK, generator=generator)
    right = torch.randn(RANK, SIZE, generator=generator)
    return left @ right / RANK**0.5, torch.rand(SIZE, SIZE, generator=generator) < SHARE


def relative(found: Tensor, target: Tensor, mask: Tensor) -> float:
    return float((found - target)[mask].norm() / target[mask].norm())
