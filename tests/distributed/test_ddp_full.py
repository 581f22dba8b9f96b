"""What DDP is used for beside dense float32 models: each case trains as without us, and says what it cannot do."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import efficient_dl as edl
from tests.distributed.launch import run_failing_ranks, run_ranks

STEPS = 4
WORDS = 60


class Everything(nn.Module):
    """A sparse embedding, and layers of four dtypes, one of them complex."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32, sparse=True)
        self.single = nn.Linear(32, 300)
        self.brain = nn.Linear(300, 40, dtype=torch.bfloat16)
        self.exactly = nn.Linear(40, 20, dtype=torch.float64)
        self.phase = nn.Parameter(torch.randn(20, dtype=torch.complex64))

    def forward(self, words: Tensor) -> Tensor:
        x = self.brain(self.single(self.words(words)).relu().bfloat16())
        return (self.exactly(x.double()).float() * self.phase).abs()


class Tied(nn.Module):
    """An embedding that is the output layer too, as GPTs have it; `recompute` says how its middle is checkpointed."""

    def __init__(self, recompute: str = "no") -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 64)
        self.middle = nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 64))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.recompute = recompute

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        if self.recompute == "no":
            x = x + self.middle(x)
        else:
            x = x + checkpoint(self.middle, x, use_reentrant=self.recompute == "reentrant")
        return self.head(self.norm(x))


def compiled_inside(backend: str, **options: Any) -> nn.Module:
    return DistributedDataParallel(torch.compile(Tied(), backend=backend), **options)


def compiled_outside(backend: str, **options: Any) -> nn.Module:
    return torch.compile(DistributedDataParallel(Tied(), **options), backend=backend)  # type: ignore[return-value]


def ddp(net: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(net, bucket_cap_mb=0.05, **options)


CASES: dict[str, Callable[[], nn.Module]] = {
    "sparse, bf16, float64 and complex": lambda: ddp(Everything()),
    "sparse, as bucket views": lambda: ddp(Everything(), gradient_as_bucket_view=True),
    "tied": lambda: ddp(Tied()),
    "tied, static graph": lambda: ddp(Tied(), static_graph=True),
    "checkpointed": lambda: ddp(Tied("yes")),
    "checkpointed, reentrant": lambda: ddp(Tied("reentrant"), static_graph=True),
}
COMPILED: dict[str, Callable[[], nn.Module]] = {
    "DDP of compiled": lambda: compiled_inside("aot_eager"),
    "compiled DDP, inductor": lambda: compiled_outside("inductor"),
}


def original(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def train(
    rank: int, make: Callable[[], nn.Module], bits: str | float | None, accumulate: int = 1, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The parameters, the stats and what was logged; bits None leaves DDP alone."""
    torch.manual_seed(7)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    messages: list[str] = []
    with logged(messages):
        compression = bits and edl.compress(model, optimizer, bits, check_every=2, **options)
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for turn in range(accumulate):
            words = torch.randint(0, WORDS, (4, 6), generator=generator)
            waits = turn < accumulate - 1
            with original(model).no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                model(words).float().square().mean().backward()
        optimizer.step()
    parameters = {name: p.detach().clone() for name, p in original(model).module.named_parameters()}  # type: ignore[union-attr]
    stats: dict[str, Any] = {}
    if compression:
        compression.check()
        stats = compression.stats(all_ranks=True)
        compression.close()
    return parameters, stats, messages


@contextlib.contextmanager
def logged(messages: list[str]) -> Any:
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("efficient_dl").addHandler(handler)
    yield
    logging.getLogger("efficient_dl").removeHandler(handler)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained_alike(rank: int, name: str, accumulate: int = 1) -> tuple[bool, bool, int]:
    """Whether native, shadow and lossless runs have the same bits, and whether 2 bits send less."""
    make = {**CASES, **COMPILED}[name]
    native, _, _ = train(rank, make, None, accumulate)
    shadow, _, _ = train(rank, make, 2.0, accumulate, shadow=True)
    lossless, exact, _ = train(rank, make, "lossless", accumulate)
    _, lossy, _ = train(rank, make, 2.0, accumulate)
    sent = [row["values_sent"] > 0 for row in lossy["parameters"].values()]
    smaller = lossy["wire_bytes"] - lossy["native_bytes"] < (exact["wire_bytes"] - exact["native_bytes"]) / 3
    return same(native, lossless), same(native, shadow), all(sent) and smaller


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks_every_case_has_the_bits_of_native_ddp(name: str) -> None:
    assert run_ranks(trained_alike, 2, name) == [(True, True, True)] * 2


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models_have_the_bits_of_compiled_native_ddp(name: str) -> None:
    assert run_ranks(trained_alike, 2, name, timeout=280) == [(True, True, True)] * 2


def test_gradients_accumulated_without_synchronization_may_be_sparse() -> None:
    name = "sparse, bf16, float64 and complex"
    assert run_ranks(trained_alike, 2, name, 3) == [(True, True, True)] * 2


def counted_natively(rank: int) -> tuple[dict[str, Any], list[str], bool]:
    _, stats, messages = train(rank, CASES["sparse, bf16, float64 and complex"], 2.0)
    return stats, messages, True


def test_what_goes_natively_is_counted_and_logged_once_on_three_ranks() -> None:
    results = run_ranks(counted_natively, 3)
    stats, messages, _ = results[0]
    rows = stats["parameters"]
    # 24 words a rank and step, each an index of 8 bytes and 32 values of 4; to two other ranks, by three ranks
    assert rows["words.weight"]["wire_bytes_apportioned"] == STEPS * 3 * 2 * 24 * (8 + 32 * 4)
    assert rows["words.weight"]["values_sent"] == STEPS * 3 * 2 * 24 * 32
    assert rows["exactly.weight"]["wire_bytes_apportioned"] == pytest.approx(STEPS * 4 * 800 * 8, rel=0.01)
    assert rows["phase"]["wire_bytes_apportioned"] == pytest.approx(STEPS * 4 * 20 * 8, rel=0.03)
    natively = sum(
        rows[name]["wire_bytes_apportioned"]
        for name in ("words.weight", "exactly.weight", "exactly.bias", "phase")
    )
    assert stats["native_bytes"] == pytest.approx(natively, abs=8 * 3 * STEPS)
    assert 0 < stats["native_bytes"] < stats["wire_bytes"] < stats["raw_bytes"]
    assert len(messages) == 1
    assert "'words.weight': its gradients are sparse" in messages[0]
    assert "'exactly.bias': its gradients are float64" in messages[0]


def names_when_compiled(rank: int) -> bool:
    plain = train(rank, lambda: ddp(Tied()), 2.0)[1]["parameters"]
    inside = train(rank, COMPILED["DDP of compiled"], 2.0)[1]["parameters"]
    return plain.keys() == inside.keys()


@pytest.mark.slow
def test_parameters_have_the_same_names_with_and_without_compilation() -> None:
    assert run_ranks(names_when_compiled, 2) == [True, True]


def resumed_with_sparse(rank: int) -> bool:
    def steps(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + rank)
            model(torch.randint(0, WORDS, (4, 6), generator=generator)).square().mean().backward()
            optimizer.step()

    def make() -> tuple[nn.Module, Any, edl.Compression]:
        torch.manual_seed(7)
        model = ddp(Everything())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, edl.compress(model, optimizer, 2.0)

    straight, optimizer, compression = make()
    steps(straight, optimizer, 0, 4)
    weights, state = {n: v.clone() for n, v in straight.state_dict().items()}, compression.state_dict()
    steps(straight, optimizer, 4, 7)
    model, optimizer, compression = make()
    model.load_state_dict(weights)
    compression.load_state_dict(state)
    steps(model, optimizer, 4, 7)
    return same(straight.state_dict(), model.state_dict())


def test_a_resumed_run_with_native_buckets_is_one_that_was_never_interrupted() -> None:
    assert run_ranks(resumed_with_sparse, 2) == [True, True]


def scaled(rank: int, autocast: bool, clip: bool) -> list[tuple[float, bool, int]]:
    """By step: the scaler's scale afterwards, whether the parameters moved, the optimizer steps counted."""
    torch.manual_seed(7)
    model = ddp(nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 5)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compression = edl.compress(model, optimizer, 2.0, check_every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
    seen = []
    for step in range(6):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = model(torch.randn(8, 20)).float().square().mean()
        if (step, rank) in ((1, 1), (4, 0)):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        moved = not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        seen.append((scaler.get_scale(), moved, compression.stats()["checks"]))
    return seen


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_that_overflows_on_one_rank_is_skipped_by_every_scaler(autocast: bool, clip: bool) -> None:
    seen = run_ranks(scaled, 3, autocast, clip)
    assert seen[0] == seen[1] == seen[2]
    assert [moved for _, moved, _ in seen[0]] == [True, False, True, True, False, True]
    assert [scale for scale, _, _ in seen[0]] == [64, 32, 32, 64, 32, 32]
    assert [checks for _, _, checks in seen[0]] == [1, 1, 2, 3, 3, 4]


def unfrozen(rank: int) -> None:
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))
    net[0].requires_grad_(False)
    model = ddp(net)
    edl.compress(model, bits=2.0)
    for step in range(3):
        if step == 1:
            net[0].requires_grad_(True)
        model(torch.randn(8, 20)).square().mean().backward()


def joining(rank: int) -> None:
    model = DistributedDataParallel(nn.Linear(20, 5))
    edl.compress(model, bits=2.0)
    with model.join():
        for _ in range(2 + rank):
            model(torch.randn(8, 20)).square().mean().backward()


def stepping_in_backward(rank: int) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    net = nn.Linear(20, 5)
    _apply_optimizer_in_backward(torch.optim.SGD, net.parameters(), {"lr": 0.1})
    edl.compress(DistributedDataParallel(net))


def python_reducer(rank: int) -> None:
    torch._dynamo.config.optimize_ddp = "python_reducer"
    edl.compress(DistributedDataParallel(nn.Linear(20, 5)))


def compressed_twice(rank: int) -> None:
    model = DistributedDataParallel(nn.Linear(20, 5))
    edl.compress(model, bits=2.0)
    edl.compress(model, bits=2.0)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        (unfrozen, "parameter '0.weight' was frozen when DDP was made"),
        (joining, "gradients cannot be compressed inside of DDP's join()"),
        (stepping_in_backward, "the optimizer steps inside of the backward pass"),
        (python_reducer, "python_reducer"),
        (compressed_twice, "the model has a communication hook already"),
    ],
)
def test_what_cannot_work_is_an_error_on_every_rank(ranks: Callable[[int], None], text: str) -> None:
    for outcome in run_failing_ranks(ranks, 2):
        assert text in str(outcome.error), outcome.trace


def frozen_later(rank: int) -> tuple[int, bool]:
    """DDP takes a parameter that is frozen later for an unused one, and keeps sending zeros for it."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))
    model = ddp(net, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compression = edl.compress(model, optimizer, 2.0, check_every=1)
    for step in range(3):
        if step == 1:
            net[0].requires_grad_(False)
            kept = net[0].weight.detach().clone()
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
    return compression.stats()["checks"], torch.equal(kept, net[0].weight)


def test_parameters_may_be_frozen_later() -> None:
    assert run_ranks(frozen_later, 2) == [(3, True)] * 2


class ToyModel(nn.Module):
    """As in PyTorch's tutorial "Getting Started with Distributed Data Parallel"."""

    def __init__(self) -> None:
        super().__init__()
        self.net1 = nn.Linear(10, 10)
        self.relu = nn.ReLU()
        self.net2 = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net2(self.relu(self.net1(x)))


def tutorial(rank: int, path: str) -> tuple[bool, int]:
    """The tutorial's demo_checkpoint, and one line of ours."""
    model = ToyModel()
    ddp_model = DistributedDataParallel(model)
    loss_fn = nn.MSELoss()
    optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.001)
    compression = edl.compress(ddp_model, optimizer, bits=2.0)
    if rank == 0:
        torch.save(ddp_model.state_dict(), path)
    dist.barrier()
    ddp_model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    optimizer.zero_grad()
    outputs = ddp_model(torch.randn(20, 10))
    labels = torch.randn(20, 5)
    loss_fn(outputs, labels).backward()
    optimizer.step()
    compression.check()
    return bool(outputs.isfinite().all()), compression.stats()["steps"]


def test_the_tutorial_of_ddp_runs_with_one_more_line(tmp_path: Any) -> None:
    assert run_ranks(tutorial, 2, str(tmp_path / "model.checkpoint")) == [(True, 1)] * 2
