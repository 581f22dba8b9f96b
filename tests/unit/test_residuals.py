"""Error feedback: nothing is lost, skipped steps leave no trace, scales and world sizes may change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficient_dl.comm import BucketLayout, Compressor, Plan, Residuals, Transport, all_reduce
from efficient_dl.comm.plan import Scale
from efficient_dl.comm.residuals import redistributed
from efficient_dl.errors import PlanMismatch
from tests.unit.ranks import on_ranks

NAMES, NUMELS = ["weight", "bias", "head"], [3000, 70, 1000]


def compressor(bits: str | float = 0.5, kernel: str = "reference", **wishes: object) -> Compressor:
    plan = Plan.of(bits, error_feedback=True, **wishes)  # type: ignore[arg-type]
    numels = dict(zip(NAMES, NUMELS, strict=True))
    return Compressor(plan, NAMES, kernel, Residuals(numels, torch.device("cpu")))


def gradient(step: int, rank: int) -> Tensor:
    return torch.randn(sum(NUMELS), generator=torch.Generator().manual_seed(100 * step + rank))


def flat(residuals: dict[str, Tensor]) -> Tensor:
    return torch.cat([residuals[name] for name in NAMES])


def steps_on(transport: Transport, one: Compressor, steps: range, scale: float = 1.0) -> Tensor:
    """The sum of the averages of so many steps."""
    layout = BucketLayout.of(NAMES, NUMELS, transport.world_size)
    total = torch.zeros(sum(NUMELS))
    for step in steps:
        x = gradient(step, transport.rank) * scale
        one.begin_step(scale)
        all_reduce(x, layout, one, transport)
        one.end_step(0.0)
        one.commit_step()
        total += x
    return total


@pytest.mark.parametrize("bits", [0.5, "grid:0.5", "sign", "topk:0.05"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_was_not_sent_is_in_the_residuals(bits: str | float, world_size: int) -> None:
    """Applied averages plus the mean of all ranks' residuals are the exact averages."""

    def rank(transport: Transport) -> tuple[Tensor, Tensor]:
        one = compressor(bits)
        total = steps_on(transport, one, range(6))
        assert one.residuals is not None
        return total, flat(one.residuals.state_dict()["parameters"])

    results = on_ranks(world_size, rank)
    exact = sum(gradient(step, r) for step in range(6) for r in range(world_size)) / world_size
    assert all(torch.equal(results[0][0], total) for total, _ in results)
    missing = sum(residual for _, residual in results) / world_size
    assert float(missing.norm()) > 0.1 * float(exact.norm())  # at half a bit much is missing
    torch.testing.assert_close(results[0][0] + missing, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", ["local", "global"])
def test_native_kernels_feed_back_the_reference_bytes(scale: Scale) -> None:
    def rank(transport: Transport, kernel: str) -> Tensor:
        one = compressor(1.0, kernel, scale=scale)
        total = steps_on(transport, one, range(4))
        assert one.residuals is not None
        return torch.cat([total, flat(one.residuals.state_dict()["parameters"])])

    native, reference = (on_ranks(2, lambda t, k=k: rank(t, k))[0] for k in ("native", "reference"))
    assert torch.equal(native, reference)


@pytest.mark.parametrize("passes", [1, 3])
def test_what_no_rank_has_used_keeps_its_residual(passes: int) -> None:
    """Nothing that was sent of it has changed anything, so nothing of it counts."""

    def rank(transport: Transport) -> tuple[Tensor, Tensor, Tensor]:
        one, layout = compressor(), BucketLayout.of(NAMES, NUMELS, 2)
        steps_on(transport, one, range(2))
        assert one.residuals is not None
        before = one.residuals.state_dict()["parameters"]
        for number in range(passes):
            x = gradient(9 + number, transport.rank)
            x[:3000] = 0  # as DDP sends it
            one.begin_step()
            all_reduce(x, layout, one, transport)
            one.end_step(0.0)
        one.residuals.unapplied(["weight", "of another model"])
        one.commit_step()
        after = one.residuals.state_dict()["parameters"]
        return before["weight"], after["weight"], (before["head"] - after["head"]).abs().max()

    for before, after, change in on_ranks(2, rank):
        assert torch.equal(before, after) and float(before.norm()) > 0
        assert float(change) > 0


def test_overrides_feed_back_only_what_is_lossy() -> None:
    def rank(transport: Transport) -> dict[str, Tensor]:
        one = compressor(0.5, overrides={"bias": "none", "head": "lossless"})
        steps_on(transport, one, range(2))
        assert one.residuals is not None
        return one.residuals.state_dict()["parameters"]

    assert all(set(kept) == {"weight"} for kept in on_ranks(2, rank))


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("is_told", [False, True])
def test_a_skipped_step_leaves_no_trace(passes: int, is_told: bool) -> None:
    """passes: synchronized ones of the skipped step. is_told: or the loss scale that falls tells."""

    def rank(transport: Transport, skip: bool) -> tuple[Tensor, Tensor]:
        one, layout = compressor(), BucketLayout.of(NAMES, NUMELS, 2)
        total = steps_on(transport, one, range(3))
        if skip:
            for number in range(passes):
                x = gradient(50 + number, transport.rank)
                if number == passes - 1:
                    x[7] = float("inf")
                one.begin_step(1.0)
                all_reduce(x, layout, one, transport)
                one.end_step(0.0)
            if is_told:
                one.discard_step()
        total += steps_on(transport, one, range(3, 6), scale=0.5 if skip else 1.0) * (2.0 if skip else 1.0)
        assert one.residuals is not None
        kept = flat(one.residuals.state_dict()["parameters"]) * (2.0 if skip else 1.0)
        assert torch.isfinite(kept).all()
        return total, kept

    with_skip, without = (on_ranks(2, lambda t, s=s: rank(t, s))[0] for s in (True, False))
    assert torch.equal(with_skip[0], without[0]) and torch.equal(with_skip[1], without[1])


def test_several_reductions_before_one_optimizer_step_lose_nothing() -> None:
    """As DDP without no_sync(): what the first left out goes into the second, and so on."""

    def rank(transport: Transport) -> tuple[Tensor, Tensor]:
        one, layout = compressor(), BucketLayout.of(NAMES, NUMELS, 2)
        total = torch.zeros(sum(NUMELS))
        for step in range(6):
            x = gradient(step, transport.rank)
            one.begin_step()
            all_reduce(x, layout, one, transport)
            one.end_step(0.0)
            total += x
            if step % 3 == 2:
                one.commit_step()
        assert one.residuals is not None
        return total, flat(one.residuals.state_dict()["parameters"])

    results = on_ranks(2, rank)
    exact = sum(gradient(step, r) for step in range(6) for r in range(2)) / 2
    missing = sum(residual for _, residual in results) / 2
    torch.testing.assert_close(results[0][0] + missing, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [0.5, "grid:0.5"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_without_values_have_no_residuals(world_size: int, bits: str | float) -> None:
    def rank(transport: Transport) -> Tensor:
        plan = Plan.of(bits, error_feedback=True)
        one = Compressor(plan, ["a"], "reference", Residuals({"a": 5}, torch.device("cpu")))
        x = torch.arange(5.0) + transport.rank
        one.begin_step()
        all_reduce(x, BucketLayout.of(["a"], [5], world_size), one, transport)
        one.commit_step()
        return x

    results = on_ranks(world_size, rank)
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_residuals_follow_the_loss_scale(factor: float) -> None:
    """A power of two scales everything exactly, so the second half must be the unscaled one times the factor."""

    def rank(transport: Transport, scale: float) -> Tensor:
        one = compressor()
        steps_on(transport, one, range(3), scale=1.0)
        return steps_on(transport, one, range(3, 6), scale=scale)

    scaled, plain = (on_ranks(2, lambda t, s=s: rank(t, s))[0] for s in (factor, 1.0))
    assert torch.equal(scaled, plain * factor)


def test_a_residual_never_holds_a_non_finite_value() -> None:
    def rank(transport: Transport) -> bool:
        one, layout = compressor(), BucketLayout.of(NAMES, NUMELS, 2)
        x = gradient(0, transport.rank)
        x[:: 300 + transport.rank] = float("nan")
        one.begin_step()
        all_reduce(x, layout, one, transport)
        one.commit_step()
        assert one.residuals is not None
        return bool(torch.isfinite(flat(one.residuals.state_dict()["parameters"])).all()) and bool(
            x.isnan().any()
        )

    assert all(on_ranks(2, rank))


def test_a_restart_continues_bit_for_bit() -> None:
    def rank(transport: Transport, restart: bool) -> Tensor:
        one = compressor()
        total = steps_on(transport, one, range(3))
        if restart:
            state, one = one.state_dict(), compressor()
            one.load_state_dict(state)
        return total + steps_on(transport, one, range(3, 6))

    restarted, whole = (on_ranks(3, lambda t, r=r: rank(t, r))[0] for r in (True, False))
    assert torch.equal(restarted, whole)


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 4), (4, 1)])
def test_a_change_of_world_size_loses_nothing(before: int, after: int) -> None:
    def first(transport: Transport) -> dict[str, object]:
        one = compressor()
        steps_on(transport, one, range(3))
        return one.state_dict()

    states = on_ranks(before, first)
    missing = sum(flat(state["residuals"]["parameters"]) for state in states) / before  # type: ignore[index]
    now = [compressor() for _ in range(after)]
    for one in now:
        one.load_state_dicts(states)
    kept = [flat(one.state_dict()["residuals"]["parameters"]) for one in now]
    torch.testing.assert_close(sum(kept) / after, missing, rtol=0, atol=1e-5)


def test_states_of_some_ranks_alone_start_counters_and_residuals_from_zero() -> None:
    def used(transport: Transport) -> Compressor:
        one = compressor()
        steps_on(transport, one, range(3))
        return one

    one, other = on_ranks(2, used)
    one.load_state_dicts([other.state_dict()], residuals=False)
    fresh = compressor().state_dict()
    assert one.meter_state() == fresh["meter"]
    assert one.state_dict()["residuals"] == fresh["residuals"]


def auto_compressor(keeps: bool) -> Compressor:
    """One that bits="auto" has set to the native all-reduce, in a run with or without error feedback."""
    numels = dict(zip(NAMES, NUMELS, strict=True))
    residuals = Residuals(numels, torch.device("cpu")) if keeps else None
    one = Compressor(Plan.of(2.0, error_feedback=keeps), NAMES, "reference", residuals)
    one.follow(Plan.of("none"))
    return one


def test_what_waits_is_not_dropped_by_a_run_without_error_feedback() -> None:
    drained, waiting = auto_compressor(keeps=True), auto_compressor(keeps=True)
    assert waiting.residuals is not None
    waiting.residuals.load_state_dict({"scale": 1.0, "parameters": {"bias": torch.ones(70)}})
    for restore in (
        lambda one, state: one.load_state_dict(state),
        lambda one, state: one.load_state_dicts([state] * 2),
    ):
        with pytest.raises(PlanMismatch, match="bias"):
            restore(auto_compressor(keeps=False), waiting.state_dict())
        restore(auto_compressor(keeps=False), drained.state_dict())
        restore(auto_compressor(keeps=True), auto_compressor(keeps=False).state_dict())


def test_redistribution_respects_each_rank_s_scale() -> None:
    states = [
        {"scale": 1.0, "parameters": {"a": torch.ones(3)}},
        {"scale": 4.0, "parameters": {"a": torch.ones(3) * 4}},
    ]
    assert torch.equal(redistributed(states)["parameters"]["a"], torch.ones(3))


def test_shards_are_drained_parameter_by_parameter_and_states_know_which_still_wait() -> None:
    """What has no gradient keeps its residual; a step that is skipped drains nothing."""
    numels = dict(zip(NAMES, NUMELS, strict=True))
    kept = {name: torch.randn(numel) for name, numel in numels.items()}
    one = Residuals(numels, torch.device("cpu"))
    one.load_state_dict({"scale": 2.0, "parameters": kept})
    one.start_draining(each=True)
    assert one.waits(NAMES) and one.waits(["bias"])
    layout = BucketLayout.of(NAMES[:2], NUMELS[:2], 2)
    for scale, skipped in ((4.0, True), (2.0, False)):
        one.begin(scale)
        x = torch.zeros(layout.numel)
        for shard in layout.shards:
            one.drain_shard(shard, x[shard.start : shard.stop])
        assert torch.equal(x, torch.cat([kept["weight"], kept["bias"]]) * (scale / 2.0))
        if not skipped:
            one.commit()
    assert one.draining and not one.waits(NAMES[:2]) and one.waits(["head"])
    again = Residuals(numels, torch.device("cpu"))
    again.load_state_dict(one.state_dict())
    for residuals in (one, again):
        assert residuals.norm("weight") == residuals.norm("bias") == 0.0 < residuals.norm("head")
        residuals.begin(2.0)
        y = torch.zeros(1000)
        residuals.drain_shard(BucketLayout.of(["head"], [1000], 1).shards[0], y)
        assert torch.equal(y, kept["head"])
        residuals.commit()
        assert not residuals.draining and residuals.norm("head") == 0.0


def test_packets_take_along_again_what_was_not_drained() -> None:
    one = Residuals({"head": 3}, torch.device("cpu"))
    one.load_state_dict(
        {"scale": 1.0, "parameters": {"head": torch.ones(3)}, "draining": True, "waiting": ["head"]}
    )
    assert one.draining and one.waits(["head"])
    one.start_draining(each=True, keep=lambda name: True)
    assert not one.draining and not one.waits(["head"]) and one.norm("head") > 0


def test_only_what_is_kept_and_not_taken_along_waits_to_be_drained() -> None:
    """A frozen parameter has nothing to drain; one that stays lossy needs no draining."""
    one = Residuals({"exact": 3, "lossy": 3, "frozen": 3}, torch.device("cpu"))
    one.load_state_dict({"scale": 1.0, "parameters": {"exact": torch.ones(3), "lossy": torch.ones(3)}})
    one.start_draining(each=True, keep=lambda name: name == "lossy")
    assert [one.waits([name]) for name in ("exact", "lossy", "frozen")] == [True, False, False]


def test_what_is_drained_in_one_of_several_passes_goes_out_once_and_is_back_if_the_step_is_skipped() -> None:
    shard = BucketLayout.of(["head"], [3], 1).shards[0]
    one = Residuals({"head": 3}, torch.device("cpu"))
    one.load_state_dict({"scale": 4.0, "parameters": {"head": torch.ones(3)}})
    one.start_draining(each=True)
    for scale, drained in ((4.0, 1.0), (4.0, 0.0), (2.0, 0.5), (2.0, 0.0)):  # skipped after the second
        x = torch.zeros(3)
        one.begin(scale)
        one.drain_shard(shard, x)
        assert torch.equal(x, torch.full((3,), drained))
        assert one.norm("head") > 0 and one.waits(["head"])
    one.commit()
    assert one.norm("head") == 0 and not one.draining
