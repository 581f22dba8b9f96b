"""The systems that benchmarks.local_learning compares: each trains the same model, by backprop or by local losses."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from efficient_dl.config import DataConfig, ModelConfig
from efficient_dl.data import Dataset
from efficient_dl.local_learning.heads import make_head
from efficient_dl.local_learning.learner import LocalLearner
from efficient_dl.local_learning.objectives import cross_entropy, make_objective
from efficient_dl.local_learning.partition import Partitions, partition
from efficient_dl.local_learning.recompute import checkpointed
from efficient_dl.local_learning.saved import SavedTensors
from efficient_dl.models import build_model

Batch = tuple[Tensor, Tensor]

WARMUP_SHARE = 0.1  # of the steps; then half a cosine to a tenth of the rate
CLIP = 1.0  # of a partition's gradient, or of the whole one's
PARTS = 4  # micro-batches of "accumulation"
HEAD_WEIGHT = 0.3  # of an auxiliary loss in deep supervision: Szegedy et al. 2015, arXiv 1409.4842
CALIBRATION_BATCHES = 20  # for the running statistics of what is frozen at random: the momentum is a tenth
AHEAD_BATCHES = 40  # to choose a learning rate by
TIMED_STEPS = 8  # of a stage; the first two are not counted


@dataclass(frozen=True)
class Case:
    """What all systems have in common. cuts: the pieces that begin partitions 1 to K - 1.

    lr: of AdamW; tuned: each system has one of its own, found from this one on.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    cuts: tuple[str, ...]
    heads: str
    steps: int
    lr: float
    eval_batches: int
    tuned: bool = True

    @property
    def title(self) -> str:
        window = f" x {self.model.context}" if self.model.name == "gpt" else ""
        return (
            f"{self.model.name}-{self.model.size} on {self.data.name}, {self.data.batch_size}{window} a batch, "
            f"partitions from {' and '.join(self.cuts)}, heads {self.heads}"
        )

    @property
    def training(self) -> str:
        rate = "tuned" if self.tuned else f"{self.lr:g}"
        return f"{self.title}, {self.steps} steps, adamw {rate}, {self.eval_batches} batches held out"


@dataclass(frozen=True)
class Costs:
    """Of one step: a mean (flops) or the most over stages for what trains one partition after the other.

    saved_bytes: the most that autograd held at once, parameters left out. live_bytes: the most by which the bytes of
    all tensors grew during the step: what is saved, gradients, what is computed again, and work spaces.
    state_bytes: of parameters, heads and the optimizers' state, between steps.
    """

    flops: float
    saved_bytes: int
    live_bytes: int
    state_bytes: int


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
            x = (
                x.clone()
            )  # a part of the batch, as a loader would hand it over, not a view that holds all of it
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


class SimultaneousThrifty(Simultaneous):
    """The same as window 1, bit for bit, in less memory: each piece keeps its input alone and runs again."""

    def __init__(self, case: Case, data: Dataset, seed: int) -> None:
        super().__init__(case, data, seed)
        for piece in self.learner.partitions.pieces:
            checkpointed(piece.module)


class FrozenRandom(Simultaneous):
    """Only the last partition is trained; those before stay as they began, but for batch norm's statistics."""

    def __init__(self, case: Case, data: Dataset, seed: int) -> None:
        super().__init__(case, data, seed)
        with torch.no_grad():
            self.model.train()
            for step in range(CALIBRATION_BATCHES if self.has_statistics() else 0):
                self.model(self.batch(step)[0])
        self.learner.freeze(*range(len(case.cuts)))

    def has_statistics(self) -> bool:
        return any(name.endswith("running_mean") for name, _ in self.model.named_buffers())


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
    "simultaneous, window 1, checkpointing": SimultaneousThrifty,
}
SAME = {  # what computes the same bits as another system in the same steps
    "backprop, checkpointing": "backprop",
    "simultaneous, window 1, checkpointing": "simultaneous, window 1",
}


class _Flops(TorchDispatchMode):
    """Counts with torch's formulas. Its own FlopCounterMode fails where autograd.grad asks for a leaf's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(_ATTENTION.get(func.overloadpacket, func.overloadpacket))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


_ATEN = torch.ops.aten
_ATTENTION = {  # torch has the formula for GPUs alone
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}


def measure_costs(case: Case, data: Dataset, system: str) -> Costs:
    """What a step costs; every probe is a process of its own, forked from this one."""
    kinds = [SYSTEMS[system]]
    if system == "sequential":
        kinds = [type(f"Stage{index}", (_Stage,), {"index": index}) for index in range(len(case.cuts) + 1)]
    measured = [_forked(lambda kind=kind: _count(kind(case, data, 0))) for kind in kinds]
    flops, saved, live, state = zip(*measured, strict=True)
    return Costs(statistics.mean(flops), int(max(saved)), int(max(live)), int(max(state)))


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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer.step(inputs, targets)
    held = {id(one): one for one in [*trainer.model.parameters(), *trainer.model.buffers(), *parameters]}
    states = [
        value
        for one in trainer.optimizers
        for state in one.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    state_bytes = sum(one.numel() * one.element_size() for one in [*held.values(), *states])
    return [float(flops.total), float(saved.peak_bytes), _live_peak(profiled), float(state_bytes)]


def _live_peak(profiled: profile) -> float:
    """By how many bytes more tensors were held at most than at the beginning, from the allocator's events."""
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events: Any = profiled.profiler.kineto_results.events()  # the stub lacks a method
    changes = [(one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"]
    assert changes, "the profiler has recorded no allocation"
    held = most = 0
    for _, change in sorted(changes, key=lambda one: one[0]):
        held += change
        most = max(most, held)
    return float(most)


def _forked(run: Callable[[], Sequence[float]]) -> list[float]:
    """run's numbers, from a process in which nothing else has happened."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the profiler's own lines; errors go the other way
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
    case = trainer.case
    return _evaluated(trainer, trainer.data.eval_batches(case.eval_batches, case.data.batch_size))


def loss_ahead(trainer: Trainer) -> float:
    """The loss on training data that the next steps of the case would take: to choose by, before they do."""
    steps = trainer.case.steps
    return _evaluated(trainer, map(trainer.batch, range(steps, steps + AHEAD_BATCHES)))["val_loss"]


def _evaluated(trainer: Trainer, batches: Iterable[Batch]) -> dict[str, float]:
    model = trainer.model.eval()
    loss = correct = count = 0.0
    with torch.no_grad():
        for x, y in batches:
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
    return replace(case, model=small, data=data, steps=24, eval_batches=4, tuned=False)
