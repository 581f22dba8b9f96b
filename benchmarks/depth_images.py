"""Perceptrons on images, by backprop and block by block: which regularizer closes the gap between the two?"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.closed_form_data import DATA, Split
from benchmarks.rows import Row
from efficient_dl.depth import EndToEndPreconditioner, effective_rank, factorize, fold, schatten_penalty
from efficient_dl.local_learning.objectives import TransportPenalty

BACKPROP, LOCAL = "backprop", "local"
FIRST_TUNING_SEED = 1000
BATCH, MOMENTUM = 32, 0.9
WIDTH, NUM_BLOCKS = 96, 3


@dataclass(frozen=True)
class Method:
    """local: each block by a head of its own. factors: of every weight of the blocks. Strengths are tried in turn."""

    local: bool = True
    factors: int = 1
    preconditioner: int = 1
    head_layers: int = 1
    decay: tuple[float, ...] = (0.0,)
    schatten: tuple[float, ...] = (0.0,)
    transport: tuple[float, ...] = (0.0,)  # 1/τ
    dropout: tuple[float, ...] = (0.0,)


METHODS = {
    BACKPROP: Method(local=False),
    LOCAL: Method(),
    f"{LOCAL} + factors, n = 2": Method(factors=2, decay=(0.0, 1e-3)),
    f"{LOCAL} + factors, n = 3": Method(factors=3, decay=(0.0, 1e-3)),
    f"{LOCAL} + preconditioner, n = 2": Method(preconditioner=2, decay=(0.0, 2e-3)),
    f"{LOCAL} + Schatten penalty, n = 2": Method(schatten=(1e-4, 1e-3)),
    f"{LOCAL} + two more linear layers in heads": Method(head_layers=3),
    f"{LOCAL} + TRGL": Method(transport=(1e-3, 1e-2)),
    f"{LOCAL} + dropout": Method(dropout=(0.1, 0.3)),
    f"{LOCAL} + weight decay": Method(decay=(1e-3, 1e-2)),
    f"{BACKPROP} + factors, n = 2": Method(local=False, factors=2, decay=(0.0, 1e-3)),
}
QUICK = (
    BACKPROP,
    LOCAL,
    f"{LOCAL} + factors, n = 2",
    f"{LOCAL} + preconditioner, n = 2",
    f"{LOCAL} + dropout",
)


@dataclass(frozen=True)
class Trial:
    """One choice of what is tuned."""

    rate: float
    decay: float
    schatten: float
    transport: float
    dropout: float


def image_rows(quick: bool, seeds: int) -> Iterator[Row]:
    """Accuracies on both sides, their difference, effective ranks; the choices by validation."""
    sizes = {"digits": (100, 400) if quick else (100, 400, 1000)}
    if not quick and "fashion-mnist" in DATA:
        sizes["fashion-mnist"] = (600, 6000, 60_000)
    methods = {one: METHODS[one] for one in QUICK} if quick else METHODS
    for name, numbers in sizes.items():
        for rows in numbers:
            steps = (200 if quick else 600) if name == "digits" else 2000
            for system, how in methods.items():
                yield from method_rows(name, rows, system, how, seeds, steps, quick)


def method_rows(
    name: str, rows: int, system: str, how: Method, seeds: int, steps: int, quick: bool
) -> Iterator[Row]:
    """One method on one number of rows: tuned, then measured by seed."""
    trial = tuned(name, rows, how, steps, quick)
    for seed in range(seeds):
        split = DATA[name](seed).first(rows)
        blocks, heads = trained(split, how, trial, seed, steps)
        train_share, test_share = (accuracy(split, part, blocks, heads) for part in ("train", "test"))
        ranks = [effective_rank(one.weight) for one in blocks.modules() if isinstance(one, nn.Linear)]
        for metric, value, unit, higher in (
            ("test_accuracy", test_share, "%", True),
            ("train_accuracy", train_share, "%", True),
            ("generalization_gap", train_share - test_share, "points", False),
            ("effective_rank", statistics.mean(ranks), "mean over blocks", False),
            ("learning_rate", trial.rate, "", False),
            ("strength", trial.decay + trial.schatten + trial.transport + trial.dropout, "", False),
        ):
            yield Row("depth", f"{name}, {rows} rows, seed {seed}", system, metric, value, unit, higher)


def tuned(name: str, rows: int, how: Method, steps: int, quick: bool) -> Trial:
    """The choice with the best accuracy on validation rows that are neither trained on nor in the test."""
    rates = (0.03, 0.1) if quick else (0.01, 0.03, 0.1)
    strengths = itertools.product(how.decay, how.schatten, how.transport, how.dropout)
    trials = [Trial(rate, *strength) for strength in strengths for rate in rates]
    few = quick or name == "fashion-mnist"  # whose 12,000 validation rows tell choices apart in one run
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + (1 if few else 2))

    def score(trial: Trial) -> float:
        values: list[float] = []
        for seed in seeds:
            split = DATA[name](seed).inner().first(rows)
            values.append(accuracy(split, "test", *trained(split, how, trial, seed, steps)))
        return statistics.mean(values)

    return max(trials, key=score)


def trained(
    split: Split, how: Method, trial: Trial, seed: int, steps: int
) -> tuple[nn.Sequential, nn.ModuleList]:
    """SGD with momentum on every block's loss; blocks are folded at the end, and in eval mode."""
    torch.manual_seed(seed)
    blocks, heads = network(split, how, trial.dropout)
    optimizer = torch.optim.SGD(
        [*blocks.parameters(), *heads.parameters()], trial.rate, momentum=MOMENTUM, weight_decay=trial.decay
    )
    if how.preconditioner > 1:
        EndToEndPreconditioner(blocks, optimizer, how.preconditioner, every=10)
    penalties = [TransportPenalty([block], 1 / trial.transport) for block in blocks if trial.transport]
    x, y = prepared(split, "train")
    for _ in range(steps):
        rows = torch.randint(len(x), (min(BATCH, len(x)),))
        optimizer.zero_grad()
        losses = local_losses(blocks, heads, penalties, x[rows], y[rows], how.local)
        if trial.schatten:
            losses = losses + trial.schatten * schatten_penalty(blocks, 2)
        if not bool(losses.isfinite()):
            break  # a rate that is too large: its accuracy says so
        losses.backward()
        optimizer.step()
    return (fold(blocks) if how.factors > 1 else blocks).eval(), heads.eval()  # type: ignore[return-value]


def network(split: Split, how: Method, dropout: float) -> tuple[nn.Sequential, nn.ModuleList]:
    """Blocks of a linear layer, ReLU and dropout; a head for each block, of which backprop uses the last."""
    blocks, heads = nn.Sequential(), nn.ModuleList()
    inputs = split.inputs
    for index in range(NUM_BLOCKS):
        blocks.append(nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Dropout(dropout)))
        last = index == NUM_BLOCKS - 1
        extra = 0 if last else how.head_layers - 1  # what is deployed stays the same
        head = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH) for _ in range(extra)), nn.Linear(WIDTH, split.classes)
        )
        heads.append(head)
        inputs = WIDTH
    if how.factors > 1:
        factorize(blocks, how.factors)
    return blocks, heads


def local_losses(
    blocks: nn.Sequential,
    heads: nn.ModuleList,
    penalties: list[TransportPenalty],
    x: Tensor,
    y: Tensor,
    local: bool,
) -> Tensor:
    """The sum of all blocks' losses, each of which reaches its own block only; of backprop the last one's."""
    total = torch.zeros(())
    for index, (block, head) in enumerate(zip(blocks, heads, strict=True)):
        features = block(x)
        if local or index == NUM_BLOCKS - 1:
            total = total + F.cross_entropy(head(features), y)
        if penalties:
            total = total + penalties[index](x, features, head, y)
        x = features.detach() if local else features
    return total


def prepared(split: Split, part: str) -> tuple[Tensor, Tensor]:
    x, y = split.tensors("train" if part == "train" else "test")
    return split.scale()(x), y


@torch.no_grad()
def accuracy(split: Split, part: str, blocks: nn.Sequential, heads: nn.ModuleList) -> float:
    """In percent, of the last block's head."""
    x, y = prepared(split, part)
    return 100 * float((heads[-1](blocks(x)).argmax(1) == y).float().mean())
