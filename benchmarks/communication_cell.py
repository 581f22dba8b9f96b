"""One cell of benchmarks.communication: every system trains the same model, a step each in turn, on this network.

Steps of all systems are interleaved, so that whatever disturbs the machine disturbs all of them. A step begins on all
ranks together and lasts until the slowest has ended it: forward, backward with communication, the optimizer's step.
"compute" is such a step under DDP's no_sync(): the same work on all ranks at once, and nothing to send. All begin with
a model that has trained for some steps already: the first gradients of a network are no typical ones (a ResNet's are
zero in most layers, as its residual branches end in norms that begin at zero).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from benchmarks import hivemind_hook
from benchmarks.engines import torch_optimizer
from benchmarks.nic import sent_bytes
from benchmarks.peers import PEERS, POWERSGD_BUCKET_MB, register_peer
from efficient_dl.comm import ProcessGroupTransport
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.planner import Decision
from efficient_dl.config import Config, with_overrides
from efficient_dl.data import Dataset, load_data
from efficient_dl.integrations.auto import DDP_COPIES, AutoOptions, decide, planned_bucket_bytes
from efficient_dl.models import build_model
from efficient_dl.training import Worker
from efficient_dl.training.end_to_end import sync_buffers_argument
from efficient_dl.training.measure import compute
from efficient_dl.training.task import task_for

COMPUTE, NATIVE, AUTO = "compute", "native fp32", "auto"
OURS = ("identity", "lossless", "4.0", "2.0", AUTO)
SYSTEMS = (
    NATIVE, "bf16 hook", "fp16 hook", "PowerSGD 4", "PowerSGD 16", hivemind_hook.NAME, *OURS,
)  # fmt: skip
MODELS = {
    "gpt-small": ("model.name=gpt", "model.size=small", "data.name=stdlib", "data.batch_size=4"),
    "gpt-base": ("model.name=gpt", "model.size=base", "data.name=stdlib", "data.batch_size=2"),
    "resnet18-base": (
        "model.name=resnet18", "model.size=base", "data.name=fashion-mnist", "data.batch_size=4",
        "optimizer.name=sgd", "optimizer.lr=0.05",
    ),
    "gpt-micro": ("model.name=gpt", "model.size=micro", "data.name=stdlib", "data.batch_size=4"),
}  # fmt: skip
_SETTLING = 30  # steps of one model alone, before all begin with it
_WARM_UP = 4  # DDP rebuilds its buckets after the first step, PowerSGD compresses from the third on
_POWERSGD_START = 2
_FEWEST_ROUNDS = 5


@dataclass
class Measured:
    """Of one system. seconds: of each step. nic_bytes: of all steps, all ranks. reason: why auto chose what it did."""

    seconds: list[float] = field(default_factory=list)
    nic_bytes: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Cell:
    """All systems of a cell. exposed: seconds, as the planner predicts them for its choices, by their bits."""

    systems: dict[str, Measured]
    exposed: dict[str, float]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(line: str) -> Cell:
        """Undoes `to_json`."""
        found = json.loads(line)
        return Cell({name: Measured(**one) for name, one in found["systems"].items()}, found["exposed"])


State = dict[str, Tensor]  # of a model


class Contestant:
    """A model of its own, in training with one system. state: what it begins with; None: its initial values."""

    def __init__(
        self,
        name: str,
        config: Config,
        data: Dataset,
        state: State | None = None,
        measurements: Measurements | None = None,
    ) -> None:
        model = _model(config, data, state)
        buckets: dict[str, Any] = {"bucket_cap_mb": POWERSGD_BUCKET_MB} if name.startswith("PowerSGD") else {}
        if name == AUTO and measurements is not None:  # as `edl train` builds them
            size = planned_bucket_bytes(dict(model.named_parameters()), measurements, AutoOptions())
            buckets = {"bucket_cap_mb": size / 2**20} if size else {}
        self.ddp = DistributedDataParallel(model, **sync_buffers_argument(False), **buckets)
        self.optimizer = torch_optimizer(model, config.optimizer)
        self._loss = task_for(data.spec.kind).loss
        self._synchronizes = name != COMPUTE
        self._closing: list[Callable[[], object]] = []
        self.reason = ""
        if name in PEERS:
            register_peer(self.ddp, name, seed=0, start_powersgd=_POWERSGD_START)
        elif name == hivemind_hook.NAME:
            transport = ProcessGroupTransport(_world()).sibling()
            self._closing += [hivemind_hook.HivemindHook(self.ddp, transport).close, transport.close]
        elif name in OURS:
            compression = edl.compress(
                self.ddp, self.optimizer, name, check_every=0, measurements=measurements
            )
            self.reason = str(compression.stats()["reason"])
            self._closing.append(compression.close)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step of this rank."""
        with contextlib.nullcontext() if self._synchronizes else self.ddp.no_sync():
            self._loss(self.ddp(inputs), targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Ends its threads and groups."""
        for close in self._closing:
            close()


def run_cell(worker: Worker, model: str, systems: list[str], steps: int, seconds: float) -> Cell:
    """One rank's part; all ranks get the same.

    steps: of each system; fewer, but five, where all of them would take longer than `seconds`.
    """
    config = with_overrides(Config(), [*MODELS[model], "run.threads=1"])
    worker.start(config.run)
    data = load_data(config.data, context=config.model.context, seed=0)
    state = _settled(config, data)
    measurements, decision = _predicted(worker, config, data, state)
    contestants = {name: Contestant(name, config, data, state, measurements) for name in (COMPUTE, *systems)}
    measured = {name: Measured(reason=one.reason) for name, one in contestants.items()}
    names = list(contestants)
    begin = time.perf_counter()
    for turn in range(_WARM_UP + steps):
        if turn == _WARM_UP:
            begin = time.perf_counter()
        inputs, targets = data.train_batch(_SETTLING + turn, worker.rank, worker.size, config.data.batch_size)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody is always the first
            dist.barrier()
            sent, start = sent_bytes(worker.rank), time.perf_counter()
            contestants[name].step(inputs, targets)
            took = time.perf_counter() - start
            dist.barrier()  # what others still send is counted, too
            if turn >= _WARM_UP:
                found = torch.tensor([took, float(sent_bytes(worker.rank) - sent)], dtype=torch.float64)
                dist.all_reduce(found[:1], dist.ReduceOp.MAX)
                dist.all_reduce(found[1:])
                measured[name].seconds.append(float(found[0]))
                measured[name].nic_bytes += float(found[1])
        if turn - _WARM_UP >= _FEWEST_ROUNDS and _slowest(time.perf_counter() - begin) > seconds:
            break
    for one in contestants.values():
        one.close()
    return Cell(measured, {one.bits: one.exposed_seconds for one in decision.predictions})


def _model(config: Config, data: Dataset, state: State | None) -> nn.Module:
    model = build_model(config.model, data.spec, seed=0)
    if state is not None:
        model.load_state_dict(state)
    return model


def _settled(config: Config, data: Dataset) -> State:
    """What a model has come to that trains alone, the same samples on all ranks."""
    model = _model(config, data, None)
    optimizer, loss = torch_optimizer(model, config.optimizer), task_for(data.spec.kind).loss
    for step in range(_SETTLING):
        inputs, targets = data.train_batch(step, 0, 1, config.data.batch_size)
        loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def _predicted(worker: Worker, config: Config, data: Dataset, state: State) -> tuple[Measurements, Decision]:
    """What the planner knows, and its predictions for DistributedDataParallel's own buckets."""
    model = _model(config, data, state)
    loss = task_for(data.spec.kind).loss
    inputs, targets = data.train_batch(0, worker.rank, worker.size, config.data.batch_size)
    alone = compute(model, torch.device("cpu"), lambda: loss(model(inputs), targets).backward())
    loss(model(inputs), targets).backward()  # codecs are measured on a real gradient
    transport = ProcessGroupTransport(_world()).sibling()
    try:
        is_sgd = config.optimizer.name == "sgd"
        family = "grid" if is_sgd else "bits"
        options = AutoOptions(
            backward_seconds=alone.seconds,
            ready=alone.ready,
            family=family,
            feeds_back=is_sgd,
            bucket_copies=DDP_COPIES,
        )
        found = decide(dict(model.named_parameters()), transport, transport, None, options)
        dist.barrier()
    finally:
        transport.close()
    return found


def _slowest(seconds: float) -> float:
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world
