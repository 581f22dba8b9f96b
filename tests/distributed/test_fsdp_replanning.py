"""A sharded model's plans change by themselves, each on all ranks after the same step; nothing is lost meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import efficient_dl as edl
from efficient_dl.comm import look
from efficient_dl.comm.look import Allowance
from efficient_dl.comm.measurements import CodecSpeed, Line, Measurements
from efficient_dl.comm.replanning import Hysteresis
from efficient_dl.errors import ConfigError, TransportError
from efficient_dl.integrations import fsdp_replanning
from efficient_dl.integrations.plan_watch import ReplanOptions
from tests.distributed.launch import run_failing_ranks, run_ranks
from tests.distributed.measured_links import measuring, network
from tests.distributed.rules import log_lines
from tests.distributed.sharded_model import full, same_bits, sharded, step

EAGER = ReplanOptions(hysteresis=Hysteresis(distance_steps=0), allowance=Allowance(share=1000.0))
NEVER = ReplanOptions(allowance=Allowance(share=0.0, looks=0.0))
SLOW = network((1, 1), 0.5, backward=0.5, family="bits")
FAST = network((1, 1), 1e6, family="bits")


def started(
    model: Any, links: Measurements, options: ReplanOptions | bool, optimizer: Any = None, **more: Any
) -> tuple[Any, Any]:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    with measuring(links):
        return optimizer, edl.compress(model, optimizer, **{"check_every": 10, "replan": options, **more})


def mesh_of(replicas: int) -> Any:
    if replicas == 1:
        return None
    return init_device_mesh("cpu", (replicas, 2), mesh_dim_names=("replicas", "shards"))


def bits_by(plans: Sequence[dict[str, Any]], about: str) -> list[str]:
    return [row["bits"] for row in plans if row["about"] == about]


# -------------------------------------------------------------------- by measurements
def measured(rank: int, replicas: int) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Tensor]]:
    """Planned for a slow link, and looked at as it is."""
    model = sharded(mesh=mesh_of(replicas))
    optimizer, compression = started(model, SLOW, EAGER)
    for number in range(40):
        step(rank, number, model, optimizer)
    state, stats, weights = compression.state_dict()["replanner"], compression.stats(), full(model)
    compression.close()
    assert stats["looks"] >= len(state)
    return stats["plans"], state, weights


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_look_finds_for_each_axis_what_the_link_is_like_the_same_on_all_ranks(replicas: int) -> None:
    (plans, state, weights), *others = run_ranks(measured, 2 * replicas, replicas)
    assert len(state) == (2 if replicas == 1 else 3)
    for one in state.values():
        assert one["looks"] >= 1 and one["allowance"]["cost"] != EAGER.allowance.cost
        found = one["measurements"]
        for line in ("native", "exchange"):
            assert found[line]["bytes_per_second"] > 4 * SLOW.native.bytes_per_second
        assert all(codec["encode_seconds"] > SLOW.codecs[0].encode_seconds for codec in found["codecs"])
    for their_plans, their_state, their_weights in others:
        assert their_plans == plans and their_state == state
        assert same_bits(weights, their_weights)


class Scripted:
    """Looks that find what a test says, by what is looked at; nothing is measured."""

    def __init__(self, found: dict[str, Line]) -> None:
        self.found = found
        self.seen: list[str] = []

    def __call__(self, known: Measurements, *rest: Any, **_: Any) -> Measurements:
        one_way = rest[-1]
        about = "weights" if len(known.codecs) == 1 else "gradients" if one_way else "replicas"
        self.seen.append(about)
        line = self.found.get(about, known.exchange)
        return replace(known, native=line, exchange=line)


def scripted(
    rank: int, replicas: int, links: Measurements, found: dict[str, Line], options: Any
) -> dict[str, Any]:
    fsdp_replanning.look = Scripted(found)
    model = sharded(mesh=mesh_of(replicas))
    optimizer, compression = started(model, links, options)
    before = []
    with log_lines() as lines:
        for number in range(80):
            step(rank, number, model, optimizer)
            if number % 10 == 9:
                before.append(compression.stats()["wire_bytes"])
    stats, weights = compression.stats(), full(model)
    seen = {"stats": stats, "weights": weights, "bytes": before, "lines": lines}
    seen["seen"] = fsdp_replanning.look.seen
    compression.close()
    return seen


def test_a_link_that_became_fast_takes_all_ranks_to_native_after_the_same_step() -> None:
    fast = Line(1e-4, 1e11)
    first, other = run_ranks(scripted, 2, 1, SLOW, {"gradients": fast, "weights": fast}, EAGER)
    stats = first["stats"]
    assert stats["plans"] == other["stats"]["plans"] and stats["looks"] == other["stats"]["looks"] >= 4
    assert bits_by(stats["plans"], "gradients") == ["2.0", "none"]
    assert bits_by(stats["plans"], "weights") == ["lossless", "none"]
    for row in stats["plans"][2:]:
        assert row["step"] > 0 and row["step"] % 10 == 0
        assert row["reason"].startswith("switched from "), row
    assert (stats["bits"], stats["weights_bits"]) == ("none", "none")
    assert stats["bytes_source"] == "counted, analytic"
    assert stats["steps"] == 80 and 0 < stats["gradients"]["native_bytes"] < stats["gradients"]["wire_bytes"]
    assert first["bytes"] == sorted(set(first["bytes"]))
    for rank, one in enumerate((first, other)):
        said = [line for line in one["lines"] if "bits auto, gradients, from step" in line]
        assert len(said) == (rank == 0), one["lines"]
    assert same_bits(first["weights"], other["weights"])


def test_a_link_between_replicas_that_became_slow_changes_their_plan_alone() -> None:
    ranks = run_ranks(scripted, 4, 2, FAST, {"replicas": Line(1e-4, 1e4)}, EAGER)
    first = ranks[0]["stats"]
    assert bits_by(first["plans"], "replicas") == ["none", "2.0"], first["plans"]
    assert bits_by(first["plans"], "gradients") == bits_by(first["plans"], "weights") == ["none"]
    assert first["replicas"]["wire_bytes"] > 0 and first["replicas"]["native_bytes"] == 0
    assert first["replica_wire_bytes"] > 0  # before
    for one in ranks:
        assert one["stats"]["plans"] == first["plans"] and one["stats"]["looks"] == first["looks"]
        assert same_bits(one["weights"], ranks[0]["weights"])
        assert one["bytes"] == sorted(one["bytes"])
        assert one["stats"]["steps"] == 80 and set(one["seen"]) == {"gradients", "replicas", "weights"}


@pytest.mark.parametrize("options", [NEVER, False], ids=["no allowance", "replan=False"])
def test_nothing_is_looked_at_without_an_allowance_or_with_replan_false(options: Any) -> None:
    for one in run_ranks(scripted, 2, 1, FAST, {}, options):
        assert one["seen"] == [] and one["stats"]["looks"] == 0
        assert [row["bits"] for row in one["stats"]["plans"]] == ["none", "none"]


def planned_once(rank: int) -> tuple[list[str], str, int]:
    """Where there is nothing that could drive a change."""
    model = sharded()
    with log_lines() as lines, measuring(SLOW):
        compression: Any = edl.compress(model, None, "auto")
        compression.check()
        looks = compression.stats()["looks"]
        compression.close()
    error = ""
    try:
        started(sharded(), SLOW, EAGER, check_every=0)
    except ConfigError as found:
        error = str(found)
    return lines, error, looks


def test_without_an_optimizer_plans_stay_which_is_logged_and_refused_if_asked_for() -> None:
    for rank, (lines, error, looks) in enumerate(run_ranks(planned_once, 2)):
        said = [line for line in lines if "planned once, because of no optimizer" in line]
        assert len(said) == (rank == 0) and looks == 0, lines
        assert "plans cannot change during this run" in error


def broken_look(rank: int, replicas: int) -> None:
    model = sharded(mesh=mesh_of(replicas))
    optimizer, _ = started(model, SLOW, EAGER, timeout=300.0)
    if rank == 1:
        look.codec_speed = no_memory
    for number in range(80):
        step(rank, number, model, optimizer)


def no_memory(*arguments: object) -> CodecSpeed:
    raise MemoryError("a test")


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_rank_that_fails_in_a_look_ends_all_long_before_the_time_out(replicas: int) -> None:
    failed = run_failing_ranks(broken_look, 2 * replicas, replicas, timeout=150.0)
    assert isinstance(failed[1].error, MemoryError), failed[1]
    for rank in set(range(2 * replicas)) - {1}:
        assert isinstance(failed[rank].error, TransportError), failed[rank]
    assert "rank 1" in str(failed[0].error)


# -------------------------------------------------------------------- residuals
class Constant(nn.Module):
    """Gradients that are always the same, the inputs; `rare` has one in every third step only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3001))
        self.rare = nn.Parameter(torch.zeros(2000))

    def forward(self, x: Tensor, number: int) -> Tensor:
        loss = (self.weight * x[:3001]).sum()
        return loss + (self.rare * x[3001:]).sum() if number % 3 == 0 else loss


def row(about: str, after: int, bits: str) -> dict[str, Any]:
    return {"about": about, "step": after, "bits": bits, "reason": "a test"}


def drained(
    rank: int, replicas: int, plans: list[dict[str, Any]], steps: int, **more: Any
) -> tuple[Any, ...]:
    model: Any = Constant()
    fully_shard(model, **({"mesh": mesh_of(replicas)} if replicas > 1 else {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    _, compression = started(model, SLOW, NEVER, optimizer, check_every=1, error_feedback=True, **more)
    compression.replay(plans, 100)
    inputs = [torch.randn(5001, generator=torch.Generator().manual_seed(one)) for one in range(2 * replicas)]
    mean = torch.stack(inputs).mean(0)
    missing = mean.clone().zero_()
    largest, final = 0.0, 0.0
    for number in range(1, steps + 1):
        optimizer.zero_grad()
        model(inputs[rank], number).backward()
        optimizer.step()
        missing[:3001] += mean[:3001]
        missing[3001:] += mean[3001:] * (number % 3 == 0)
        whole = torch.cat([p.detach().full_tensor() for p in (model.weight, model.rare)])
        final = float((missing + whole).norm() / mean.norm())
        largest = max(largest, final)
    stats = compression.stats(all_ranks=True)
    norms = {name: values["residual_norm"] for name, values in stats["parameters"].items()}
    told = stats["error_feedback"], stats["steps"], [one["bits"] for one in stats["plans"]]
    compression.close()
    return largest, final, norms, told


@pytest.mark.parametrize(
    ("replicas", "plans"),
    [
        (1, [row("gradients", 4, "none")]),
        (1, [row("gradients", 4, "lossless")]),
        (1, [row("gradients", 3, "4.0"), row("gradients", 7, "none")]),
        (1, [row("gradients", 3, "none"), row("gradients", 4, "2.0"), row("gradients", 7, "none")]),
        (2, [row("gradients", 4, "none"), row("replicas", 4, "none")]),
        (2, [row("replicas", 4, "lossless"), row("gradients", 7, "lossless")]),
        (2, [row("gradients", 4, "none"), row("replicas", 7, "none")]),
    ],
    ids=["native", "lossless", "another rate", "to and fro", "both axes", "replicas first", "replicas last"],
)
def test_after_a_switch_no_part_of_any_gradient_is_missing(
    replicas: int, plans: list[dict[str, Any]]
) -> None:
    """While 2 bits are sent, something is; each parameter's next gradient after the switch brings its part."""
    for largest, final, norms, told in run_ranks(drained, 2 * replicas, replicas, plans, 10):
        assert largest > 0.01
        assert final < 1e-5
        assert norms == {"weight": 0.0, "rare": 0.0}
        assert told[:2] == (False, 10) and len(told[2]) == 1 + replicas + len(plans)


def overridden(rank: int) -> dict[str, float]:
    """After the switch one parameter stays lossy by the user's wish."""
    _, _, norms, told = drained(rank, 1, [row("gradients", 4, "lossless")], 10, overrides={"rare": 2.0})
    assert told[0] is True  # packets feed back still
    return norms


def test_what_becomes_exact_is_drained_beside_what_stays_lossy() -> None:
    for norms in run_ranks(overridden, 2):
        assert norms["weight"] == 0.0 < norms["rare"]


def unfinished(rank: int) -> tuple[float, float, dict[str, float]]:
    """The same before `rare` has had a gradient again, and after a restart there."""
    plans = [row("gradients", 4, "none")]
    largest, final, norms, _ = drained(rank, 1, plans, 5)
    return largest, final, norms


def test_a_parameter_without_a_gradient_keeps_its_residual_until_it_has_one() -> None:
    for _, final, norms in run_ranks(unfinished, 2):
        assert norms["weight"] == 0.0 < norms["rare"]
        assert final > 1e-3


# -------------------------------------------------------------------- resumes
def counted(stats: dict[str, Any]) -> list[Any]:
    """What does not depend on when weights were encoded, as sampled entropies do."""
    keys = ("wire_bytes", "raw_bytes", "native_bytes", "steps", "values_sent", "replica_wire_bytes")
    rows = stats["parameters"].values()
    return [stats[key] for key in keys] + [(one["values_sent"], one["residual_norm"]) for one in rows]


def resumed(rank: int, links: Measurements, replicas: int) -> list[tuple[int, bool, bool, bool]]:
    """From every fifth step: whether weights, plans and counts are those of the run that went on."""
    plans = [
        row("gradients", 10, "4.0"),
        row("weights", 10, "none" if links is SLOW else "lossless"),
        row("gradients", 20, "none"),
        row("gradients", 30, "2.0"),
        row("gradients", 40, "lossless"),
        *([row("replicas", 20, "2.0"), row("replicas", 30, "none")] if replicas > 1 else []),
    ]
    options: dict[str, Any] = {"error_feedback": True}

    def made(found: Measurements) -> tuple[Any, Any, Any]:
        model = sharded(mesh=mesh_of(replicas))
        return model, *started(model, found, NEVER, **options)

    model, optimizer, compression = made(links)
    compression.replay(plans, 50)
    saved = {}
    for number in range(50):
        step(rank, number, model, optimizer)
        if number % 5 == 4:
            shards = {name: p.to_local().detach().clone() for name, p in model.named_parameters()}
            saved[number + 1] = copy.deepcopy((shards, optimizer.state_dict(), compression.state_dict()))
    whole, stats = full(model), compression.stats()
    compression.close()
    seen = []
    for after in (5, 10, 15, 20, 30, 35, 40) if replicas == 1 else (20, 30):
        model, optimizer, compression = made(FAST if links is SLOW else SLOW)  # it would be another plan
        shards, moments, state = saved[after]
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.to_local().copy_(shards[name])
        optimizer.load_state_dict(moments)
        compression.load_state_dict(state)
        compression.replay([one for one in plans if one["step"] > after], 50)
        for number in range(after, 50):
            step(rank, number, model, optimizer)
        again = compression.stats()
        told = [
            [(one["about"], one["step"], one["bits"]) for one in found["plans"]] for found in (again, stats)
        ]
        counts = [counted(again), counted(stats)]
        seen.append((after, same_bits(full(model), whole), told[0] == told[1], counts[0] == counts[1]))
        compression.close()
    return seen


@pytest.mark.parametrize(
    ("links", "replicas"),
    [(SLOW, 1), (FAST, 1), (SLOW, 2)],
    ids=["from 2 bits", "from native", "with replicas"],
)
def test_a_run_resumed_before_or_after_any_switch_is_one_that_never_stopped(
    links: Measurements, replicas: int
) -> None:
    for seen in run_ranks(resumed, 2 * replicas, links, replicas):
        assert all(weights and plans and counts for _, weights, plans, counts in seen), seen


def old(rank: int) -> tuple[list[Any], str, int]:
    """A state from before plans changed during a run."""
    model = sharded()
    optimizer, compression = started(model, SLOW, NEVER, error_feedback=True)
    for number in range(10):
        step(rank, number, model, optimizer)
    state = compression.state_dict()
    compression.close()
    del state["replanner"], state["gradients"]["residuals"]["waiting"]
    state["replicas"]["residuals"] = state["weights"]["residuals"] = None
    model = sharded()
    optimizer, compression = started(model, FAST, NEVER, error_feedback=True)
    compression.load_state_dict(state)
    for number in range(10, 20):
        step(rank, number, model, optimizer)
    stats = compression.stats()
    compression.close()
    return [(one["about"], one["step"], one["bits"]) for one in stats["plans"]], stats["bits"], stats["steps"]


def test_a_state_without_the_new_keys_is_still_loaded() -> None:
    for found in run_ranks(old, 2):
        assert found == ([("gradients", 10, "2.0"), ("weights", 10, "lossless")], "2.0", 20)


# -------------------------------------------------------------------- beside other things that a run may do
def with_scaler(rank: int) -> tuple[float, float, float]:
    """The first step after the switch overflows on rank 0: what it drained comes with the next one."""
    model: Any = Constant()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    wishes: dict[str, Any] = {"check_every": 1, "error_feedback": True, "scaler": scaler}
    _, compression = started(model, SLOW, NEVER, optimizer, **wishes)
    compression.replay([row("gradients", 4, "none")], 100)
    inputs = [torch.randn(5001, generator=torch.Generator().manual_seed(one)) for one in range(2)]
    mean, seen = torch.stack(inputs).mean(0)[:3001], []
    for number in range(1, 8):
        is_poisoned = number == 5
        optimizer.zero_grad()
        loss = model(inputs[rank], 1) * (torch.inf if is_poisoned and rank == 0 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps = number - (number >= 5)
        missing = model.weight.detach().full_tensor() + steps * mean
        seen.append(float(missing.norm() / mean.norm()))
    assert scaler.get_scale() == 32.0
    compression.close()
    return seen[3], seen[4], seen[5]


def test_a_step_that_the_scaler_skips_drains_nothing() -> None:
    for before, skipped, after in run_ranks(with_scaler, 2):
        assert before == skipped > 0.01 and after < 1e-5


def accumulated(rank: int, dtype: torch.dtype) -> tuple[float, dict[str, float]]:
    """HSDP, in two passes a step of which the first is not all-reduced; both axes go native after the same step."""
    model: Any = Constant().to(dtype)
    fully_shard(model, mesh=mesh_of(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-4)
    _, compression = started(model, SLOW, NEVER, optimizer, check_every=1, error_feedback=True)
    compression.replay([row("gradients", 4, "none"), row("replicas", 4, "none")], 100)
    inputs = [torch.randn(5001, generator=torch.Generator().manual_seed(one)).to(dtype) for one in range(4)]
    for _ in range(6):
        optimizer.zero_grad()
        for last in (False, True):
            model.set_requires_all_reduce(last)
            model(inputs[rank], 0).backward()
        optimizer.step()
    mean = torch.stack(inputs).float().mean(0)
    weights = torch.cat([p.detach().full_tensor().float() for p in (model.weight, model.rare)])
    rows = compression.stats(all_ranks=True)["parameters"]
    compression.close()
    missing = weights + 6 * 2 * 2.0**-4 * mean
    return float(missing.norm() / mean.norm()), {name: one["residual_norm"] for name, one in rows.items()}


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
def test_what_both_axes_left_out_arrives_in_an_accumulated_step(dtype: torch.dtype, rounding: float) -> None:
    for error, norms in run_ranks(accumulated, 4, dtype):
        assert error < rounding and norms == {"weight": 0.0, "rare": 0.0}


def bounded_and_disabled(rank: int) -> tuple[list[str], bool, Any, dict[str, Tensor]]:
    model = sharded()
    optimizer, compression = started(model, SLOW, NEVER, check_every=2, messages="bounded")
    compression.replay(
        [row("gradients", 2, "lossless"), row("gradients", 4, "4.0"), row("gradients", 6, "none")], 10
    )
    kinds = []
    for number in range(8):
        kinds.append(compression.stats()["messages"])
        step(rank, number, model, optimizer)
    assert compression.plan.codec == "none"
    if rank == 1:
        compression.disable("a test")
    for number in range(8, 14):
        step(rank, number, model, optimizer)
    stats, weights = compression.stats(), full(model)
    compression.close()
    return kinds, stats["weights_codec"] == "lossless", stats["disabled"], weights


def test_bounded_messages_come_and_go_with_plans_and_disable_ends_them_all() -> None:
    (kinds, lossless, disabled, weights), other = run_ranks(bounded_and_disabled, 2)
    assert kinds == ["bounded"] * 2 + ["exact"] * 2 + ["bounded"] * 2 + ["exact"] * 2
    assert lossless and disabled == other[2] == {"step": 10, "reason": "rank 1: a test"}
    assert same_bits(weights, other[3])


def own_axis(rank: int) -> tuple[list[tuple[str, str]], str]:
    """Bits of one's own on one axis are not planned, nor changed."""
    fsdp_replanning.look = Scripted({"gradients": Line(1e-4, 1e4)})
    model = sharded(mesh=mesh_of(2))
    optimizer, compression = started(model, FAST, EAGER, axes={"replicate": 4.0}, weights="lossless")
    for number in range(70):
        step(rank, number, model, optimizer)
    stats = compression.stats()
    assert set(fsdp_replanning.look.seen) == {"gradients"}
    compression.close()
    return [(one["about"], one["bits"]) for one in stats["plans"]], stats["replicas_bits"]


def test_what_the_user_has_decided_stays() -> None:
    for plans, replicas in run_ranks(own_axis, 4):
        assert plans == [("gradients", "none"), ("gradients", "2.0")] and replicas == "4.0"


def several_meshes(rank: int) -> tuple[list[str], list[Any], str]:
    torch.manual_seed(7)
    model: Any = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40))
    fully_shard(model[0], mesh=mesh_of(2))
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    with log_lines() as lines:
        optimizer, compression = started(model, SLOW, True, check_every=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(3, 40)).square().mean().backward()
        optimizer.step()
    stats = compression.stats()
    compression.close()
    return lines, stats["plans"], stats["bits"]


def test_with_modules_on_several_meshes_plans_stay_which_is_logged() -> None:
    for rank, (lines, plans, bits) in enumerate(run_ranks(several_meshes, 4)):
        said = [line for line in lines if "planned once, because of modules on several meshes" in line]
        assert len(said) == (rank == 0) and plans == [] and bits == "2.0", lines
