"""The systems that benchmarks.local_learning compares: each trains the same model, by backprop or by local losses."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from efficient_dl.config import DataConfig, ModelConfig
from efficient_dl.data import Dataset
from efficient_dl.local_learning.heads import make_head
from efficient_dl.local_learning.learner import LocalLearner
from efficient_dl.local_learning.objectives import cross_entropy, make_objective
from efficient_dl.local_learning.partition import Partitions, partition
from efficient_dl.local_learning.saved import SavedTensors
from efficient_dl.local_learning.thrift import checkpointed
from efficient_dl.models import build_model

Batch = tuple[Tensor, Tensor]

WARMUP_SHARE = 0.1  # of the steps; then half a cosine to a tenth of the rate
CLIP = 1.0  # of a partition's gradient, or of the whole one's
PARTS = 4  # micro-batches of "accumulation"
HEAD_WEIGHT = 0.3  # of an auxiliary loss in deep supervision: Szegedy et al. 2015, arXiv 1409.4842
PROBE_STEPS = 2
TIMED_STEPS = 8  # of a stage; the first two are not counted


@dataclass(frozen=True)
class Case:
    """What all systems have in common. cuts: the pieces that begin partitions 1 to K - 1."""

    name: str
    model: ModelConfig
    data: DataConfig
    cuts: tuple[str, ...]
    heads: str
    steps: int
    lr: float
    eval_batches: int

    @property
    def title(self) -> str:
        window = f" x {self.model.context}" if self.model.name == "gpt" else ""
        return (
            f"{self.model.name}-{self.model.size} on {self.data.name}, {self.data.batch_size}{window} a batch, "
            f"{len(self.cuts) + 1} partitions, heads {self.heads}"
        )

    @property
    def training(self) -> str:
        return f"{self.title}, {self.steps} steps, adamw {self.lr:g}"


@dataclass(frozen=True)
class Costs:
    """Of one step, measured on a new model: a mean over stages for what trains one partition after the other.

    saved_bytes: the most that autograd held at once, parameters left out. memory_bytes: by how much the process grew
    at most, model and optimizer included, by the kernel's count.
    """

    flops: float
    saved_bytes: int
    memory_bytes: int


class Trainer:
    """A model and what a system does with it. stages: of training, which share its steps; most systems have one."""

    stages = 1

    def __init__(self, case: Case, data: Dataset, seed: int) -> None:
        self.case, self.seed, self.data = case, seed, data
        self.model = build_model(case.model, data.spec, seed)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.targets_are_tokens = data.spec.kind == "tokens"

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(list(parameters), self.case.lr, weight_decay=0.01, fused=True)
        self.optimizers.append(made)
        return made

    def cut(self) -> Partitions:
        return partition(self.model, self.case.cuts)

    def batch(self, step: int) -> Batch:
        return self.data.train_batch(step, batch_size=self.case.data.batch_size)

    def set_rate(self, step: int, steps: int) -> None:
        """Of all optimizers, for this step of this many."""
        warmup = max(1, round(WARMUP_SHARE * steps))
        t = min(1.0, max(0, step - warmup) / max(1, steps - 1 - warmup))
        rate = self.case.lr * min(1.0, (step + 1) / warmup) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t)))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def descend(self, loss: Tensor) -> None:
        """Backward pass and step of the only optimizer."""
        loss.backward()
        self.apply()

    def apply(self) -> None:
        (optimizer,) = self.optimizers
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One optimizer step."""
        raise NotImplementedError

    def train(self, steps: int) -> list[float]:
        """All steps; the seconds that each took, without the making of its batch."""
        self.model.train()
        seconds: list[float] = []
        for step in range(steps):
            inputs, targets = self.batch(step)
            began = time.perf_counter()
            self.set_rate(step, steps)
            self.step(inputs, targets)
            seconds.append(time.perf_counter() - began)
        return seconds

    def step_seconds(self) -> float:
        """A step's seconds on this machine now: the median of a few, a mean over stages."""
        seconds = self.train(self.stages * TIMED_STEPS)
        return statistics.mean(
            statistics.median(seconds[stage * TIMED_STEPS + 2 : (stage + 1) * TIMED_STEPS])
            for stage in range(self.stages)
        )


class Backprop(Trainer):
    """One loss for the whole model."""

    def __init__(self, case: Case, data: Dataset, seed: int) -> None:
        super().__init__(case, data, seed)
        self.optimizer(list(self.model.parameters()))

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        self.descend(cross_entropy(self.model(inputs), targets))


class Checkpointing(Backprop):
    """Backprop that keeps each piece's input alone and runs the piece again."""

    def __init__(self, case: Case, data: Dataset, seed: int) -> None:
        super().__init__(case, data, seed)
        pieces = self.cut().pieces
        for piece in pieces[:-1]:
            checkpointed(piece.module)
        self.chain = nn.Sequential(*(piece.module for piece in pieces))

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        self.descend(cross_entropy(self.chain(inputs), targets))


class Accumulation(Backprop):
    """Backprop over a quarter of the batch at a time."""

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        for x, y in zip(inputs.chunk(PARTS), targets.chunk(PARTS), strict=True):
            (cross_entropy(self.model(x), y) * (len(x) / len(inputs))).backward()
        self.apply()


class DeepSupervision(Trainer):
    """The same heads as local learning has, but one gradient through everything."""

    def __init__(self, case: Case, data: Dataset, seed: int) -> None:
        super().__init__(case, data, seed)
        self.partitions = self.cut()
        self.objective = make_objective(case.heads)
        heads: list[nn.Module] = []
        features, _ = self.batch(0)
        unit = "tokens" if self.targets_are_tokens else "samples"
        with torch.no_grad():
            self.model.eval()
            for part in self.partitions:
                features = part.module(features[:2])
                heads.append(
                    make_head(
                        case.heads, part.index, self.partitions, features, data.spec.classes, unit, seed
                    )
                )
        self.heads = nn.ModuleList(heads)
        self.optimizer([*self.model.parameters(), *self.heads.parameters()])

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        losses: list[Tensor] = []
        features = inputs
        for part, head in zip(self.partitions, self.heads, strict=True):
            features = part.module(features)
            losses.append(self.objective(features, features, head, targets))
        self.descend(losses[-1] + HEAD_WEIGHT * sum(losses[:-1], torch.zeros(())))


class Simultaneous(Trainer):
    """All partitions in every step, each by its own loss."""

    window = 1

    def __init__(self, case: Case, data: Dataset, seed: int) -> None:
        super().__init__(case, data, seed)
        self.learner = LocalLearner(
            self.cut(),
            self.batch(0),
            self.optimizer,
            heads=case.heads,
            classes=data.spec.classes,
            window=2 if self.window == 2 else 1,
            clip=CLIP,
            seed=seed,
        )

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        self.learner.step(inputs, targets)


class SimultaneousWindow2(Simultaneous):
    """The same, each partition also by the next one's loss."""

    window = 2


class FrozenRandom(Simultaneous):
    """Only the last partition is trained; those before stay as they began."""

    def __init__(self, case: Case, data: Dataset, seed: int) -> None:
        super().__init__(case, data, seed)
        self.learner.freeze(*range(len(case.cuts)))


class Sequential(Simultaneous):
    """One partition after the other, each for an equal share of the steps, then frozen."""

    def __init__(self, case: Case, data: Dataset, seed: int) -> None:
        super().__init__(case, data, seed)
        self.stages = len(case.cuts) + 1

    def train(self, steps: int) -> list[float]:
        share = steps // self.stages
        seconds: list[float] = []
        began = 0.0

        def batches() -> Iterator[Batch]:
            nonlocal began
            for step in range(share * self.stages):
                batch = self.batch(step)
                began = time.perf_counter()
                self.set_rate(step % share, share)
                yield batch

        def ended(index: int, step: int, loss: float) -> None:
            seconds.append(time.perf_counter() - began)

        self.learner.train_sequentially(batches(), share, progress=ended)
        return seconds


class _Stage(Simultaneous):
    """One stage of Sequential, to measure what it costs."""

    index = 0

    def __init__(self, case: Case, data: Dataset, seed: int) -> None:
        super().__init__(case, data, seed)
        self.learner.freeze(*(one for one in range(len(case.cuts) + 1) if one != self.index))


SYSTEMS: dict[str, type[Trainer]] = {
    "backprop": Backprop,
    "backprop, checkpointing": Checkpointing,
    "backprop, accumulation": Accumulation,
    "deep supervision": DeepSupervision,
    "frozen random": FrozenRandom,
    "sequential": Sequential,
    "simultaneous, window 1": Simultaneous,
    "simultaneous, window 2": SimultaneousWindow2,
}


class _Flops(TorchDispatchMode):
    """Counts with torch's formulas. Its own FlopCounterMode fails where autograd.grad asks for a leaf's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def measure_costs(case: Case, data: Dataset, system: str) -> Costs:
    """What a step costs; every probe is a process of its own, forked from this one."""
    if system != "sequential":
        return _probe(case, data, SYSTEMS[system])
    stages: list[Costs] = []
    for index in range(len(case.cuts) + 1):
        stage = type(f"Stage{index}", (_Stage,), {"index": index})
        stages.append(_probe(case, data, stage))
    return Costs(
        statistics.mean(one.flops for one in stages),
        max(one.saved_bytes for one in stages),
        max(one.memory_bytes for one in stages),
    )


@cache
def _load_lazily_imported() -> None:
    """torch imports much at the first step of an optimizer: here, not in every probe, whose memory it would fill."""
    layer = checkpointed(nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(1, 2, requires_grad=True)).sum().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _probe(case: Case, data: Dataset, kind: Callable[[Case, Dataset, int], Trainer]) -> Costs:
    _load_lazily_imported()
    flops, saved = _forked(lambda: _count(kind(case, data, 0)))
    (memory,) = _forked(lambda: [_growth(lambda: kind(case, data, 0))])
    return Costs(flops, int(saved), int(memory))


def _count(trainer: Trainer) -> list[float]:
    trainer.model.train()
    inputs, targets = trainer.batch(0)
    trainer.step(inputs, targets)  # the optimizer's state is there from now on
    parameters = nn.ParameterList(
        p for one in trainer.optimizers for group in one.param_groups for p in group["params"]
    )
    with _Flops() as flops:
        trainer.step(inputs, targets)
    with SavedTensors(trainer.model, parameters) as saved:
        trainer.step(inputs, targets)
    return [float(flops.total), float(saved.peak_bytes)]


def _growth(make: Callable[[], Trainer]) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    before = _status("VmRSS")
    trainer = make()
    trainer.model.train()
    for step in range(PROBE_STEPS):
        trainer.step(*trainer.batch(step))
    return _status("VmHWM") - before


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024.0 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def _forked(run: Callable[[], Sequence[float]]) -> list[float]:
    """run's numbers, from a process in which nothing else has happened."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            os.write(writer, " ".join(repr(float(one)) for one in run()).encode())
            code = 0
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as answers:
        answer = answers.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise RuntimeError(f"measuring costs failed: {answer or status}")
    return [float(one) for one in answer.split()]


def evaluate(trainer: Trainer) -> dict[str, float]:
    """Held-out loss, nats, with bits per byte for tokens and accuracy for images."""
    model, case = trainer.model.eval(), trainer.case
    loss = correct = count = 0.0
    with torch.no_grad():
        for x, y in trainer.data.eval_batches(case.eval_batches, case.data.batch_size):
            logits = model(x)
            loss += float(cross_entropy(logits, y)) * y.numel()
            correct += float((logits.argmax(-1) == y).sum())
            count += y.numel()
    found = {"val_loss": loss / count}
    if trainer.targets_are_tokens:
        return found | {"bits_per_byte": loss / count / math.log(2)}
    return found | {"accuracy": correct / count}


def shrunk(case: Case) -> Case:
    """A case of a few seconds, on data that needs no download."""
    small = replace(case.model, size="mini" if case.model.name == "mlp" else "nano", context=32)
    data = DataConfig(name="stdlib" if case.model.name == "gpt" else "digits", batch_size=16)
    return replace(case, model=small, data=data, steps=24, eval_batches=4)
