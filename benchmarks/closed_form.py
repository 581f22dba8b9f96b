"""Does an MLP fitted in closed form beat backprop with SGD on toy problems, and is it capacity-hungry on real data?

python -m benchmarks.closed_form --out benchmarks/results/closed_form.jsonl                # minutes on one core
python -m benchmarks.closed_form --quick                                                   # under a minute
Every SGD network has as many parameters as the closed-form one (drawn ones counted), and the CPU seconds that its fit
took, or up to FACTOR times as many (a row says how many); its learning rate is chosen on seeds of its own, at no cost.
Strengths of the ridge come from the training rows alone (generalized cross-validation). The last line is the verdict,
computed from the rows.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.closed_form_data import DATA, SWEEP_ROWS, Split
from benchmarks.rows import Row, RowFile
from benchmarks.studies import StudyRow, as_dicts, cases_of, listed, paired, seeds_of, systems_of
from benchmarks.verdicts import says, span
from efficient_dl import closed_form as cf
from efficient_dl.closed_form.base import Classifier
from efficient_dl.closed_form.gram import Strength

BENCH = "closed_form"
TOYS = ("xor", "spirals", "rings")
FACTOR = 30  # the patient SGD network's CPU seconds in units of the closed form's, up to a cap
CAP_SECONDS, QUICK_CAP_SECONDS = 20.0, 1.0
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
TUNING_SECONDS, QUICK_TUNING_SECONDS = (
    120.0,
    0.5,
)  # a rate is chosen by runs as long as those it is for, up to this
BATCH, MOMENTUM = 32, 0.9
FIRST_TUNING_SEED = 1000
SGD, PATIENT = "sgd mlp, equal seconds", "sgd mlp, patient"
BEST = "boosted"  # the closed form whose parameters and seconds are the yardstick
FIELDS = "sampled, fields"  # likewise of Fashion-MNIST
WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
DIGITS_TARGET = 98.5
FASHION_TARGET, FASHION_HYBRID_TARGET = 89.0, 90.0
HYBRID_RATES = (1e-4, 1e-3, 3e-3, 1e-2)
HYBRID_BATCH = 128
SHARPNESS = (
    10.0  # scores of a fit to one-hot targets lie between 0 and 1: as logits they would say next to nothing
)

Make = Callable[[int], Classifier]


@dataclass(frozen=True)
class Sizes:
    """Of the networks for one data set: width of a layer; SGD epochs on top of the closed form."""

    width: int
    boosted: int
    layers: int = 3
    hybrid_epochs: int = 100


SIZES = {
    "xor": Sizes(128, 32),
    "spirals": Sizes(256, 64),
    "rings": Sizes(128, 32),
    "digits": Sizes(1024, 256, hybrid_epochs=30),
    "fashion-mnist": Sizes(8192, 768, hybrid_epochs=4),
}


def systems(name: str) -> dict[str, Make]:
    """The closed forms for a data set, by name, made from a seed."""
    size = SIZES[name]
    boosted: dict[str, Any] = {
        "width": size.boosted,
        "num_layers": size.layers,
        "new_features": size.boosted,
    }
    made: dict[str, Make] = {
        BEST: lambda seed: cf.BoostedFeaturesClassifier(**boosted, random_state=seed),
        "sampled, swim": lambda seed: cf.SampledFeaturesClassifier(size.width, random_state=seed),
        "sampled, random": lambda seed: cf.SampledFeaturesClassifier(
            size.width, features="random", random_state=seed
        ),
    }
    if name == "fashion-mnist":
        fields: dict[str, Any] = {"features": "fields", "image_shape": (28, 28)}
        return {
            "sampled, swim": lambda seed: cf.SampledFeaturesClassifier(size.width // 4, random_state=seed),
            "sampled, few fields": lambda seed: cf.SampledFeaturesClassifier(
                size.width // 4, random_state=seed, **fields
            ),
            FIELDS: lambda seed: cf.SampledFeaturesClassifier(size.width, random_state=seed, **fields),
        }
    return made | {
        "forward projection": lambda seed: cf.ForwardProjectionClassifier(size.width // 2, random_state=seed),
        "boosted, 1 AGOP round": lambda seed: cf.BoostedFeaturesClassifier(
            **boosted, agop_rounds=1, random_state=seed
        ),
        "boosted, 2 sweeps": lambda seed: cf.BoostedFeaturesClassifier(
            **boosted, sweeps=2, random_state=seed
        ),
    }


def yardstick(name: str) -> str:
    """The closed form for a data set whose parameters and CPU seconds the SGD networks get."""
    return FIELDS if name == "fashion-mnist" else BEST


def run_study(
    *, quick: bool, seeds: int = 5, file: RowFile | None = None, only: str = ""
) -> list[dict[str, Any]]:
    """All rows. quick: toys, digits and a short sweep of widths, 3 seeds, in under a minute on one core.

    only: one data set, without the sweep.
    """
    torch.set_num_threads(1)
    file = file or RowFile(None)
    start = len(file.rows)
    seeds = min(seeds, 3) if quick else seeds
    names = [*TOYS, "digits"] + ([] if quick else ["fashion-mnist"] * ("fashion-mnist" in DATA))
    for name in [only] if only else names:
        few = min(seeds, 3) if name == "fashion-mnist" else seeds
        compare(file, name, few, quick)
    if not only:
        sweep_widths(file, WIDTHS[::2] if quick else WIDTHS, seeds, quick)
    return as_dicts(file.rows[start:])


def compare(file: RowFile, name: str, seeds: int, quick: bool) -> None:
    """Every closed form, then SGD networks with the yardstick's parameters and seconds, and SGD after it."""
    chosen, best = systems(name), yardstick(name)
    if quick:
        chosen = {one: make for one, make in chosen.items() if one in (BEST, "sampled, swim")}
    fitted: dict[int, tuple[Classifier, float]] = {}
    for system, make in chosen.items():
        for seed in range(seeds):
            split = DATA[name](seed)
            seconds, estimator = timed(lambda make=make, seed=seed, split=split: make(seed).fit(*split.train))
            report(
                file, name, system, seed, 100 * estimator.score(*split.test), seconds, estimator.to_torch()
            )
            if system == best:
                fitted[seed] = estimator, seconds
    budget = statistics.mean(seconds for _, seconds in fitted.values())
    count = parameters(fitted[0][0].to_torch())
    patient = min(FACTOR * budget, QUICK_CAP_SECONDS if quick else CAP_SECONDS)
    for system, allowed in ((SGD, budget), (PATIENT, patient)):
        if system == PATIENT and patient < budget:
            continue
        seconds = min(allowed, QUICK_TUNING_SECONDS if quick else TUNING_SECONDS)
        rate = best_rate(name, count, seconds, 1 if quick or name == "fashion-mnist" else 2)
        for seed in range(seeds):
            split = DATA[name](seed)
            model, seconds = train(split, mlp(split, count, seed), rate, seed, seconds=allowed)
            report(file, name, system, seed, accuracy(model, *split.test), seconds, model)
            file.add(Row(BENCH, f"{name}, seed {seed}", system, "learning_rate", rate, "", False))
    rate = hybrid_rate(name, chosen[best])
    hybrid = f"{best}, then sgd"
    for seed, (estimator, seconds) in fitted.items():
        model, more = go_on(estimator, DATA[name](seed), rate, seed, SIZES[name].hybrid_epochs)
        report(file, name, hybrid, seed, accuracy(model, *DATA[name](seed).test), seconds + more, model)
        file.add(Row(BENCH, f"{name}, seed {seed}", hybrid, "learning_rate", rate, "", False))


def hybrid_rate(name: str, make: Make) -> float:
    """Of SGD after the closed form: the best on a fifth of at most 10,000 training rows of a seed of its own."""
    split = DATA[name](FIRST_TUNING_SEED).first(10_000).inner()
    estimator = make(FIRST_TUNING_SEED).fit(*split.train)

    def score(rate: float) -> float:
        model, _ = go_on(estimator, split, rate, FIRST_TUNING_SEED, SIZES[name].hybrid_epochs)
        return accuracy(model, *split.test)

    return max(HYBRID_RATES, key=score)


def go_on(
    estimator: Classifier, split: Split, rate: float, seed: int, epochs: int
) -> tuple[nn.Module, float]:
    """SGD of the layers under the closed form's head, which stays; the module, and the CPU seconds on top.

    The head's weights are what makes a step unstable: its features are many, and far from independent.
    """
    start = time.process_time()
    torch.manual_seed(seed)
    model = estimator.to_torch()
    x, y = split.tensors("train")
    layers = [one for name, one in model.named_parameters() if not name.startswith("head.")]
    optimizer = torch.optim.SGD(layers, rate, momentum=MOMENTUM)
    steps = epochs * -(-len(x) // HYBRID_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(HYBRID_BATCH):
            loss = F.cross_entropy(SHARPNESS * model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model, time.process_time() - start


def sweep_widths(file: RowFile, widths: tuple[int, ...], seeds: int, quick: bool) -> None:
    """Digits, few rows: accuracies on both sides, by width, for a ridge of nothing, one by GCV, and an SGD network."""
    for width in widths:
        for seed in range(seeds):
            split = DATA["digits"](seed).first(SWEEP_ROWS)
            strengths: dict[str, Strength] = {"no ridge": 1e-10, "gcv": "gcv"}
            for system, strength in strengths.items():
                estimator = cf.SampledFeaturesClassifier(
                    width, features="random", ridge=strength, random_state=seed
                ).fit(*split.train)
                add_sweep(
                    file, width, system, seed, estimator.score(*split.train), estimator.score(*split.test)
                )
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(split.inputs, width), nn.ReLU(), nn.Linear(width, split.classes))
            model, _ = train(split, model, 0.03, seed, epochs=15 if quick else 60)
            add_sweep(
                file,
                width,
                "sgd mlp",
                seed,
                accuracy(model, *split.train) / 100,
                accuracy(model, *split.test) / 100,
            )


def add_sweep(
    file: RowFile, width: int, system: str, seed: int, train_share: float, test_share: float
) -> None:
    case = f"digits, {SWEEP_ROWS} rows, width {width}, seed {seed}"
    file.add(Row(BENCH, case, system, "train_accuracy", 100 * train_share, "%", True))
    file.add(Row(BENCH, case, system, "accuracy", 100 * test_share, "%", True))


def timed(make: Callable[[], Classifier]) -> tuple[float, Classifier]:
    """CPU seconds of this process, and the result."""
    start = time.process_time()
    result = make()
    return time.process_time() - start, result


def report(
    file: RowFile, name: str, system: str, seed: int, value: float, seconds: float, model: nn.Module
) -> None:
    case = f"{name}, seed {seed}"
    file.add(Row(BENCH, case, system, "accuracy", value, "%", True))
    file.add(Row(BENCH, case, system, "cpu_seconds", seconds, "s", False))
    file.add(Row(BENCH, case, system, "parameters", float(parameters(model)), "numbers", False))


def parameters(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


def mlp(split: Split, count: int, seed: int) -> nn.Module:
    """Two hidden layers of ReLU, as wide as `count` parameters allow, inputs scaled by the training rows."""
    torch.manual_seed(seed)
    d, c = split.inputs, split.classes
    width = next(h for h in range(1, 10_000) if (h + 1) * (h + 1 + d + c + 1) > count)
    layers = [nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, c)]
    return nn.Sequential(*layers)


def best_rate(name: str, count: int, seconds: float, num_seeds: int) -> float:
    """The rate with the best accuracy on a fifth of the training rows, over seeds that the comparison does not use."""
    scores: dict[float, float] = {}
    for rate in RATES:
        values: list[float] = []
        for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + num_seeds):
            split = DATA[name](seed).inner()
            model, _ = train(split, mlp(split, count, seed), rate, seed, seconds=seconds)
            values.append(accuracy(model, *split.test))
        scores[rate] = statistics.mean(values)
    return max(scores, key=lambda rate: scores[rate])


def train(
    split: Split,
    model: nn.Module,
    rate: float,
    seed: int,
    *,
    seconds: float = float("inf"),
    epochs: float = float("inf"),
) -> tuple[nn.Module, float]:
    """SGD with momentum until the CPU seconds or the epochs are over; the rate falls with them, as a cosine."""
    start = time.process_time()
    whole = nn.Sequential(split.scale(), model)
    x, y = split.tensors("train")
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(seed)
    step, per_epoch = 0, max(len(x) // BATCH, 1)
    order = torch.randperm(len(x), generator=generator)
    while (done := max(step / (epochs * per_epoch), (time.process_time() - start) / seconds)) < 1:
        optimizer.param_groups[0]["lr"] = 0.5 * rate * (1 + math.cos(math.pi * done))
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator)
        rows = order[step % per_epoch * BATCH :][:BATCH]
        loss = F.cross_entropy(whole(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    return whole, time.process_time() - start


@torch.no_grad()
def accuracy(model: nn.Module, x: NDArray[Any], y: NDArray[Any]) -> float:
    """In percent."""
    scores = [model(part) for part in torch.tensor(x, dtype=torch.float32).split(4096)]
    return 100 * float(np.mean(torch.cat(scores).argmax(1).numpy() == y))


def verdict(rows: list[dict[str, Any]] | list[StudyRow]) -> str:
    """One sentence a claim, computed from the rows. Conditions are of both: better on toys, and hungry on real data."""
    won, patient = [], []
    for name in TOYS:
        best = seeds_of(rows, name, BEST, "accuracy")
        for system, wins in ((SGD, won), (PATIENT, patient)):
            if paired(best, seeds_of(rows, name, system, "accuracy")).above:
                wins.append(name)
    if len(won) == len(TOYS):
        toys = "beating SGD on toys holds at equal parameters and CPU seconds"
    elif won:
        toys = f"beating SGD on toys holds, at equal parameters and CPU seconds, only on {listed(won)}"
    else:
        toys = "beating SGD on toys does not hold here"
    factors = [
        statistics.mean(seeds_of(rows, name, PATIENT, "cpu_seconds").values())
        / statistics.mean(seeds_of(rows, name, BEST, "cpu_seconds").values())
        for name in TOYS
    ]
    toys += f", against {span(factors, '.0f')} × the seconds of SGD on {listed(patient)}"
    digits = {
        system: statistics.mean(seeds_of(rows, "digits", system, "accuracy").values())
        for system in systems_of(rows, "digits")
        if "sgd" not in system
    }
    best_digits = max(digits, key=lambda one: digits[one])
    reached = "holds" if digits[best_digits] >= DIGITS_TARGET else "does not hold here"
    real = f"digits ≥ {DIGITS_TARGET} % {reached} ({best_digits}: {digits[best_digits]:.2f} %)" + _fashion(
        rows
    )
    hunger, missing = _hunger(rows)
    found = f"{toys}; {real}; {hunger}"
    if not won:
        return says(None, found)
    conditions = [] if len(won) == len(TOYS) else [f"the toy problem is {' or '.join(won)}"]
    if not set(won) <= set(patient):
        conditions.append("SGD has no more than equal CPU seconds")
    return says([*conditions, *missing], found)


def _fashion(rows: list[dict[str, Any]] | list[StudyRow]) -> str:
    """What is to be said of Fashion-MNIST, if it was run."""
    said = ""
    for system, target, what in (
        (FIELDS, FASHION_TARGET, "closed form"),
        (f"{FIELDS}, then sgd", FASHION_HYBRID_TARGET, "hybrid"),
    ):
        if values := seeds_of(rows, "fashion-mnist", system, "accuracy"):
            mean = statistics.mean(values.values())
            reached = "holds" if mean >= target else "does not hold here"
            said += f"; Fashion-MNIST ≥ {target:.0f} % ({what}) {reached} ({mean:.2f} %)"
    if said and (values := seeds_of(rows, "fashion-mnist", SGD, "accuracy")):
        said += f", SGD at equal parameters and CPU seconds {statistics.mean(values.values()):.2f} %"
    return said


def _hunger(rows: list[dict[str, Any]] | list[StudyRow]) -> tuple[str, list[str]]:
    """What the sweep of widths says, and under which conditions that is what the claim says."""
    cases = cases_of(rows, f"digits, {SWEEP_ROWS} rows, width ")
    mean = {
        (case, system, metric): statistics.mean(seeds_of(rows, case, system, metric).values())
        for case in cases
        for system in ("no ridge", "gcv", "sgd mlp")
        for metric in ("accuracy", "train_accuracy")
    }
    widths = {case: int(case.rpartition(" ")[2]) for case in cases}
    falls = [
        (widths[one], widths[other])
        for one, other in itertools.pairwise(cases)
        if paired(*(seeds_of(rows, case, "no ridge", "accuracy") for case in (other, one))).below
        and mean[other, "no ridge", "train_accuracy"] >= mean[one, "no ridge", "train_accuracy"]
    ]
    reaches = {
        system: next((widths[case] for case in cases if mean[case, system, "accuracy"] >= 90.0), None)
        for system in ("gcv", "sgd mlp")
    }
    hungry = reaches["sgd mlp"] is not None and (
        reaches["gcv"] is None or reaches["gcv"] > reaches["sgd mlp"]
    )
    first = (
        f"overfitting holds without a ridge (a wider layer is worse from {falls[0][0]} to {falls[-1][1]})"
        if falls
        else "overfitting does not hold here"
    )
    needs = f"90 % at width {reaches['gcv'] or f'above {max(widths.values())}'}, SGD at {reaches['sgd mlp']}"
    text = f"{first}, capacity-hungry {'holds' if hungry else 'does not hold here'} ({needs})"
    if not falls and not hungry:
        return text, ["it is said of toy problems only"]
    overfits = "overfitting is said of fits without a ridge" if falls else "overfitting is left out of it"
    return text, [overfits, *([] if hungry else ["the need of capacity is left out of it"])]


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    quick: Annotated[bool, typer.Option(help="toys, digits and a short sweep, 3 seeds")] = False,
    only: Annotated[str, typer.Option(help="one data set, such as fashion-mnist, without the sweep")] = "",
) -> None:
    """Fit, train, compare."""
    if only and only not in DATA:
        raise typer.BadParameter(f"there is no data set {only!r} here; there are {', '.join(DATA)}")
    rows = run_study(quick=quick, seeds=seeds, file=RowFile(out), only=only)
    table = Table("data", "system", "accuracy, %", "CPU seconds", "parameters", "yardstick − it")
    for case in cases_of(rows):
        for system in systems_of(rows, case):
            values = {
                metric: seeds_of(rows, case, system, metric)
                for metric in ("accuracy", "cpu_seconds", "parameters")
            }
            best = seeds_of(rows, case, yardstick(case), "accuracy")
            difference = paired(best, values["accuracy"]) if best and system != yardstick(case) else None
            table.add_row(
                case,
                system,
                f"{statistics.mean(values['accuracy'].values()):.2f}",
                *(f"{statistics.mean(one.values()):.3g}" if one else "" for one in list(values.values())[1:]),
                f"{difference.mean:+.2f} ± {difference.half_width:.2f}" if difference else "",
            )
    Console(width=130).print(table)
    if not only:
        print(verdict(rows))


if __name__ == "__main__":
    typer.run(main)
