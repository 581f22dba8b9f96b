"""The thesis's claims, the study of each, and where its rows and its picture come from."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

RESULTS = Path(__file__).parent / "results"


class Study(Protocol):
    """What a study's module has; see benchmarks.verdicts."""

    def run_study(self, *, quick: bool) -> list[dict[str, Any]]: ...
    def verdict(self, rows: list[dict[str, Any]]) -> str: ...


class NotHere(Exception):
    """A study or its rows are not in this checkout."""


@dataclass(frozen=True)
class Claim:
    """words: what the thesis's abstract, or its author's talk, says, in ours. anchor: the published number next to it.

    module: of the study. results: of the committed rows, in benchmarks/results. plot: a module with main(rows, out)
    that draws a file of rows.
    """

    key: str
    title: str
    words: str
    anchor: str
    module: str
    results: str
    plot: str = "benchmarks.plot_rows"

    def study(self) -> Study:
        """The study's module. Raises NotHere."""
        try:
            return importlib.import_module(self.module)  # type: ignore[return-value]
        except ModuleNotFoundError as error:
            if error.name != self.module:
                raise
            raise NotHere(f"{self.key} is not in this checkout: there is no {self.module}") from None

    def committed_rows(self) -> list[dict[str, Any]]:
        """The rows in benchmarks/results. Raises NotHere."""
        path = RESULTS / self.results
        if not path.exists():
            raise NotHere(f"{self.key} has no committed rows: there is no benchmarks/results/{self.results}")
        return [json.loads(line) for line in path.read_text().splitlines()]


CLAIMS: dict[str, Claim] = {
    claim.key: claim
    for claim in (
        Claim(
            "T1",
            "Weight entropy",
            "The entropy of the weights decreases in training, so they become highly compressible, which cuts the "
            "communication of distributed training considerably.",
            "almost 10 x less communication (ICASSP 2015)",
            "benchmarks.weight_exchange",
            "weight_exchange.jsonl",
            "benchmarks.plot_weight_exchange",
        ),
        Claim(
            "T2",
            "Objectives that do not squash",
            "Squashing output functions such as softmax weaken the gradient; others improve the rate of convergence.",
            "33 % faster, segmentation (arXiv 1707.04199)",
            "benchmarks.objectives",
            "objectives.jsonl",
            "benchmarks.plot_objectives",
        ),
        Claim(
            "T3",
            "Layer-wise training",
            "Layer-wise training can match backprop through the full model with considerably less memory.",
            "70 % less memory in most experiments (talk); 4.65 % error against 4.53 % (predsim, VGG8B, Fashion-MNIST)",
            "benchmarks.local_learning",
            "local_learning.jsonl",
            "benchmarks.plot_local_learning",
        ),
        Claim(
            "T4",
            "Interlayer regularization",
            "Depth regularizes implicitly, between layers; that can be simulated in a few simple steps.",
            "none published",
            "benchmarks.depth",
            "depth.jsonl",
            "benchmarks.plot_depth",
        ),
        Claim(
            "T5",
            "Partition-wise training",
            "Partition-wise training is faster, through larger batches and better model parallelism.",
            "30 to 55 % faster on ImageNet (talk)",
            "benchmarks.partitionwise",
            "partitionwise.jsonl",
            "benchmarks.plot_partitionwise",
        ),
        Claim(
            "T6",
            "Closed form",
            "A perceptron with hidden layers can be fitted in closed form: better than SGD on toy problems, it "
            "overfits and needs much capacity on real data.",
            ".8534, XGBoost .8532, 57 OpenML sets (RFRBoost, ICML 2025)",
            "benchmarks.closed_form",
            "closed_form.jsonl",
            "benchmarks.plot_closed_form",
        ),
        Claim(
            "redundancy",
            "Redundant examples",
            "In layer-wise training examples become increasingly redundant, so that much of the data can be left out.",
            "no number (talk)",
            "benchmarks.redundancy",
            "redundancy.jsonl",
            "benchmarks.plot_redundancy",
        ),
    )
}
