"""DDP with wishes for single parameters, bounds on error and bytes, and error feedback."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from efficient_dl.comm import Plan
from efficient_dl.errors import CheckpointError, ConfigError
from efficient_dl.integrations.second_moment import SecondMoment
from tests.distributed.launch import run_ranks

OVERRIDES = {"*.bias": "none", "4.*": 4.0}
LOCAL: dict[str, Any] = {"scale": "local", "error_feedback": False}  # not SGD's default
WISHES: dict[str, dict[str, Any]] = {
    "sgd's default": {"bits": 1.0},
    "overrides": {"bits": 2.0, "overrides": OVERRIDES, **LOCAL},
    "bounded error": {"max_error": 0.1, **LOCAL},
    "bounded error, sgd's default": {"max_error": 0.1},
    "budget": {"bytes_per_step": 9000, **LOCAL},
    "error feedback": {"bits": 0.5, "error_feedback": True, "scale": "local"},
    "all": {"max_error": 0.3, "overrides": OVERRIDES, "error_feedback": True},
    "global step": {"bits": "grid:1.0", "error_feedback": False},
    "second moment": {"bits": 2.0, "scale": "second_moment", "overrides": {"*.bias": "none"}},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 5))


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(10 * step + rank))


class Run:
    """A model in training, with a GradScaler if `scale` is given."""

    def __init__(self, wishes: dict[str, Any], scale: float | None = None, fused: bool = False) -> None:
        self.model = DistributedDataParallel(network(), bucket_cap_mb=0.01)
        if wishes.get("scale") == "second_moment":
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        self.compression = edl.compress(
            self.model, self.optimizer, check_every=1, scaler=self.scaler, **wishes
        )

    def step(self, step: int, rank: int, overflow: bool = False) -> None:
        self.optimizer.zero_grad()
        loss = (self.model(batch(step, rank)) - 1).square().mean()
        if overflow and rank == 0:
            loss = loss * float("inf")
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone()


def divisors(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Of a bucket, and what they should be, by where the gradient's values lie in it."""
    torch.manual_seed(0)
    module = nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last)
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(model.parameters())
    edl.compress(model, optimizer, 2.0, scale="second_moment")
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 8, 5, 5)).square().mean().backward()
        optimizer.step()
    parameters = dict(module.named_parameters())
    second = SecondMoment(optimizer, parameters, Plan.of(2.0, scale="second_moment"))
    second.begin_step()
    found = []
    for name, one in parameters.items():
        assert one.grad is not None
        where = torch.as_strided(torch.arange(one.numel(), dtype=torch.float32), one.shape, one.grad.stride())
        wanted = torch.empty(one.numel())
        wanted[where.flatten().long()] = optimizer.state[one]["exp_avg_sq"].sqrt().flatten()
        found.append((second.of([name], [one.numel()], wanted), wanted))
    return found


def test_divisors_lie_as_the_gradients_do_in_memory() -> None:
    for rank in run_ranks(divisors, 2):
        for found, wanted in rank:
            least = float(found.min())  # smaller ones are kept apart from zero
            torch.testing.assert_close(found, wanted.clamp(min=least), rtol=1e-5, atol=0.0)
            assert (wanted > least).float().mean() > 0.5


def trained(rank: int, wishes: dict[str, Any]) -> tuple[Tensor, float, dict[str, Any]]:
    run = Run(wishes)
    for step in range(20):
        run.step(step, rank)
    stats = run.compression.stats()
    loss = float((run.model(batch(99, 99)) - 1).square().mean().detach())
    run.compression.close()
    return run.weights(), loss, stats


@functools.cache
def trained_by_ranks(world_size: int, name: str) -> list[tuple[Tensor, float, dict[str, Any]]]:
    """What every rank returns; several tests look at one run."""
    return run_ranks(trained, world_size, WISHES.get(name, {"bits": name}))


# All on three ranks; two have the same code, and the tests below look at these.
ON_TWO = ["sgd's default", "overrides", "bounded error"]


@pytest.mark.parametrize(
    ("world_size", "name"), [*((3, name) for name in WISHES), *((2, name) for name in ON_TWO)]
)
def test_ranks_stay_equal_and_learn(world_size: int, name: str) -> None:
    """The parameters are compared after every step (check_every=1)."""
    wishes, results = WISHES[name], trained_by_ranks(world_size, name)
    _, exact, _ = trained_by_ranks(world_size, "identity")[0]
    assert all(torch.equal(results[0][0], weights) for weights, _, _ in results)
    assert results[0][1] < 0.5 and results[0][1] < 2 * exact + 0.1
    stats = results[0][2]
    assert stats["checks"] == 20 and stats["ratio"] > 1.5
    expected = ("global", True) if "scale" not in wishes else (wishes["scale"], False)
    norms = [row.get("residual_norm", 0.0) for row in stats["parameters"].values()]
    assert (max(norms) > 0) == stats["error_feedback"]
    assert (stats["transport"], stats["hierarchy"]) == ("process_group", None)
    assert all(row["model_bits"] > 0 for row in stats["parameters"].values() if row["values_sent"] > 500)
    assert (stats["scale"], stats["error_feedback"]) == (
        expected[0],
        wishes.get("error_feedback", expected[1]),
    )


def test_overrides_decide_what_each_parameter_costs() -> None:
    rows = trained_by_ranks(2, "overrides")[0][2]["parameters"]
    assert rows["2.bias"]["bits_per_value"] >= 32 > 8 > rows["2.weight"]["bits_per_value"]
    assert rows["2.bias"]["relative_error"] == 0 < rows["4.weight"]["relative_error"]
    assert rows["4.weight"]["relative_error"] < 0.5 * rows["2.weight"]["relative_error"]


def test_a_bounded_error_holds_for_the_applied_gradients() -> None:
    stats = trained_by_ranks(2, "bounded error")[0][2]
    assert 0 < stats["relative_error"] <= 0.1 and stats["bound_misses"] == 0


def refused(rank: int, wishes: dict[str, Any]) -> str:
    try:
        edl.compress(DistributedDataParallel(network()), None, **wishes)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("wishes", "problem"),
    [
        ({"bits": 2.0, "overrides": {"head.*": 4.0}}, "matches no parameter"),
        ({"bytes_per_step": 10}, "bytes_per_step is too small"),
        ({"bits": 2.0, "max_error": 0.1}, "decide the rate themselves"),
        ({"bits": 2.0, "scale": "second_moment"}, "needs an optimizer with a second moment"),
        ({"bits": "lossless", "scale": "second_moment"}, "goes with a number of bits"),
        ({"bits": 2.0, "scale": "gobal"}, "unknown scale"),
        ({"bits": 2.0, "error_feedback": "on"}, "unknown error_feedback"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused_on_every_rank(wishes: dict[str, Any], problem: str) -> None:
    assert all(problem in text for text in run_ranks(refused, 2, wishes))


def with_overflow(rank: int, overflows: bool, fused: bool) -> tuple[Tensor, dict[str, Any]]:
    """Six steps that count; with an overflow, that step is skipped and halves the scale for those behind it."""
    run = Run(WISHES["error feedback"], scale=1024.0, fused=fused)
    for step in range(3):
        run.step(step, rank)
    before = run.weights()
    if overflows:
        run.step(77, rank, overflow=True)
        assert torch.equal(run.weights(), before)
        assert run.scaler.get_scale() == 512.0
    for step in range(3, 6):
        run.step(step, rank)
    return run.weights(), run.compression.state_dict()["compressor"]["residuals"]


@pytest.mark.parametrize(("world_size", "fused"), [(3, False), (2, True)])
def test_a_step_that_the_scaler_skips_leaves_the_state_as_if_it_had_not_run(
    world_size: int, fused: bool
) -> None:
    skipped, straight = (
        run_ranks(with_overflow, world_size, overflows, fused) for overflows in (True, False)
    )
    for (weights, kept), (expected, residuals) in zip(skipped, straight, strict=True):
        assert torch.equal(weights, expected)
        assert (kept["scale"], residuals["scale"]) == (512.0, 1024.0)
        for name, values in residuals["parameters"].items():
            assert torch.equal(2 * kept["parameters"][name], values)


def interrupted(rank: int, wishes: dict[str, Any]) -> bool:
    whole = Run(wishes)
    for step in range(8):
        whole.step(step, rank)
    first = Run(wishes)
    for step in range(5):
        first.step(step, rank)
    resumed = Run(wishes)
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    resumed.compression.load_state_dict(first.compression.state_dict())
    for step in range(5, 8):
        resumed.step(step, rank)
    return torch.equal(resumed.weights(), whole.weights())


@pytest.mark.parametrize("name", ["bounded error", "budget", "error feedback", "all", "second moment"])
def test_resuming_equals_never_stopping(name: str) -> None:
    assert run_ranks(interrupted, 2, WISHES[name]) == [True, True]


def state_after(rank: int, steps: int) -> dict[str, Any]:
    run = Run(WISHES["error feedback"])
    for step in range(steps):
        run.step(step, rank)
    return run.compression.state_dict()


def missing(states: list[dict[str, Any]]) -> Tensor:
    kept = [one["compressor"]["residuals"]["parameters"] for one in states]
    return torch.stack([torch.cat([one[name] for name in sorted(one)]) for one in kept]).mean(0)


def kept_by_resized(rank: int, states: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    run = Run(WISHES["error feedback"])
    try:
        run.compression.load_state_dict(states[:2])
    except CheckpointError as error:
        problem = error.problem
    else:
        problem = ""
    run.compression.load_state_dict(states)
    state = run.compression.state_dict()
    run.step(50, rank)
    return state, problem


def test_residuals_are_redistributed_at_another_world_size() -> None:
    states = run_ranks(state_after, 3, 4)
    results = run_ranks(kept_by_resized, 2, states)
    assert all(
        problem.startswith("the compression states are not those of all ranks") for _, problem in results
    )
    torch.testing.assert_close(missing([state for state, _ in results]), missing(states))


class ZeroBranch(nn.Module):
    """A branch whose last layer starts at zero: what comes before it has no gradient at first, and no second moment."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(20, 50), nn.Linear(20, 50), nn.Linear(50, 50)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.b(self.a(x))


def zero_branch(rank: int) -> tuple[float, Tensor]:
    torch.set_num_threads(1 + rank)  # nothing that is applied may depend on it
    torch.manual_seed(0)
    model = DistributedDataParallel(ZeroBranch())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    edl.compress(model, optimizer, bits=2.0, scale="second_moment", check_every=1)
    before = model.module.a.weight.detach().clone()
    for step in range(15):
        optimizer.zero_grad()
        (model(batch(step, rank)) - 1).square().mean().backward()
        optimizer.step()
    weight = model.module.a.weight.detach()
    return float((weight - before).norm()), weight.clone()


def test_parameters_without_a_second_moment_train_beside_those_that_have_one() -> None:
    (moved, weight), (_, other) = run_ranks(zero_branch, 2)
    assert moved > 0.5
    assert torch.equal(weight, other)


def small(rank: int) -> bool:
    model = DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    edl.compress(model, optimizer, 2.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    return True


def test_a_model_smaller_than_a_block_trains_with_sgd_by_default() -> None:
    assert run_ranks(small, 3) == [True, True, True]


def chosen(rank: int) -> list[tuple[str, str, bool]]:
    choices = []
    for optimizer_class, bits in [
        (torch.optim.SGD, 2.0),
        (torch.optim.SGD, "lossless"),
        (torch.optim.AdamW, 0.5),
    ]:
        model = DistributedDataParallel(network())
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        stats = edl.compress(model, optimizer, bits).stats()
        choices.append((stats["codec"], stats["scale"], stats["error_feedback"]))
    torch.distributed.barrier()  # a rank that leaves early breaks the other's first connection to it
    return choices


def test_sgd_gets_one_global_step_and_error_feedback_and_adam_local_steps() -> None:
    expected = [("grid:2.0", "global", True), ("lossless", "global", False), ("bits:0.5", "local", False)]
    assert run_ranks(chosen, 2) == [expected] * 2
