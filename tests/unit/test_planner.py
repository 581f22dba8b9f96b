"""What the planner promises: never slower than native, monotone in links and codecs, reproducible, with reasons."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_dl.comm.measurements import (
    CodecSpeed,
    Line,
    Measurements,
    NodeLink,
    PacketCost,
    assumed_network,
    extrapolated,
)
from efficient_dl.comm.planner import Decision, PlannerOptions, Shapes, bucket_numels, plan_for, predict
from efficient_dl.comm.probe import _has_full_machine, codecs_for, link_turns, sample_gradient
from efficient_dl.comm.routes import gradual
from efficient_dl.errors import ConfigError
from tests.unit.simulated_step import compressed, step_seconds

MEGABIT = 1e6 / 8
MODEL = Shapes((1_000_000,) * 10)


def codecs(slowness: float = 1.0) -> tuple[CodecSpeed, ...]:
    return (
        CodecSpeed("lossless", 2e-9 * slowness, 1.5e-9 * slowness, 3.39),
        CodecSpeed("bits:4.0", 2.5e-9 * slowness, 1.6e-9 * slowness, 0.501),
        CodecSpeed("bits:2.0", 3e-9 * slowness, 1.7e-9 * slowness, 0.2505),
    )


def network(megabits: float, backward: float = 0.3, slowness: float = 1.0, hosts: int = 2) -> Measurements:
    speed = megabits * MEGABIT
    return Measurements(
        ranks_per_node=(1,) * hosts,
        native=Line(2e-4, speed),
        exchange=Line(2e-4, speed),
        between=None,
        inside=None,
        links=(NodeLink(0, 1, 2e-4, speed), NodeLink(1, 0, 2e-4, speed)),
        codecs=codecs(slowness),
        backward_seconds=backward,
        contended=True,
    )


# Compression in this order: the rank in a decision's predictions.
def compression(decision: Decision) -> int:
    return [one.bits for one in decision.predictions].index(decision.bits)


seconds = st.floats(1e-11, 1e-6)


@st.composite
def measured(draw: st.DrawFn, ordered: bool = False) -> Measurements:
    """Anything that a probe could find. ordered: more compression costs at least as much codec time."""
    times = [(draw(seconds), draw(seconds)) for _ in range(3)]
    if ordered:
        times = list(zip(*(sorted(column) for column in zip(*times, strict=True)), strict=True))
    sizes = (draw(st.floats(2.5, 3.9)), draw(st.floats(0.45, 0.6)), draw(st.floats(0.2, 0.35)))
    names = ("lossless", "bits:4.0", "bits:2.0")
    speed = draw(st.floats(1e5, 1e11))
    latency = draw(st.floats(1e-6, 0.05))
    hosts = draw(st.integers(2, 64))
    return Measurements(
        (1,) * hosts,
        native=Line(latency * draw(st.floats(0.1, 2.0)), speed * draw(st.floats(0.3, 1.5))),
        exchange=Line(latency, speed),
        between=None,
        inside=None,
        links=(NodeLink(0, 1, latency, speed),),
        codecs=tuple(
            CodecSpeed(name, *one, size) for name, one, size in zip(names, times, sizes, strict=True)
        ),
        backward_seconds=draw(st.floats(0.0, 10.0)),
        contended=draw(st.booleans()),
        packet=PacketCost(draw(st.floats(0, 1e-3)), draw(st.floats(0, 1e-3)), draw(st.floats(0, 1000))),
        copy_seconds=draw(st.floats(0.0, 1e-8)),
    )


models = st.lists(st.integers(1, 30_000_000), min_size=1, max_size=12).map(
    lambda numels: Shapes(tuple(numels))
)
floors = st.sampled_from([1.0, 2.0, 3.0, 5.0])
ways = st.sampled_from(
    [PlannerOptions(), PlannerOptions(one_way=True), PlannerOptions(one_way=True, native_one_way=True)]
)


@given(measured(), models, floors, ways)
@settings(max_examples=100, deadline=None)
def test_what_is_chosen_is_never_predicted_slower_than_native_nor_under_the_floor(
    found: Measurements, model: Shapes, floor: float, options: PlannerOptions
) -> None:
    decision = plan_for(found, model, floor, options)
    steps = {one.bits: one.step_seconds for one in decision.predictions}
    assert steps[decision.bits] <= steps["none"]
    assert steps[decision.bits] <= 1.02 * min(steps.values())
    assert decision.bits in ("none", "lossless") or float(decision.bits) >= floor
    assert decision == plan_for(found, model, floor, options)


@given(measured(), models, st.floats(1.0, 1e4), ways, st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_a_faster_link_never_leads_to_more_compression(
    found: Measurements, model: Shapes, factor: float, options: PlannerOptions, begin: float
) -> None:
    # Were native's messages the slower ones (ours go two ways, or one), a fast link could prefer ours for that.
    latency = min(
        found.native.latency_seconds, (1 if options.one_way else 2) * found.exchange.latency_seconds
    )
    native = replace(found.native, latency_seconds=latency)
    found = replace(found, native=native, ready=gradual(model.numels, begin))
    slow = plan_for(found, model, options=options)
    fast = plan_for(found.with_faster_links(factor), model, options=options)
    assert compression(fast) <= compression(slow)


@given(measured(ordered=True), models, st.floats(1.0, 1e4))
@settings(max_examples=150, deadline=None)
def test_slower_codecs_never_lead_to_more_compression(
    found: Measurements, model: Shapes, factor: float
) -> None:
    slower = tuple(
        replace(one, encode_seconds=factor * one.encode_seconds, decode_seconds=factor * one.decode_seconds)
        for one in found.codecs
    )
    assert compression(plan_for(replace(found, codecs=slower), model)) <= compression(plan_for(found, model))


@given(measured(), models, st.integers(0, 2), st.floats(1.0, 1e4))
@settings(max_examples=100, deadline=None)
def test_no_codec_is_chosen_because_it_became_slower(
    found: Measurements, model: Shapes, which: int, factor: float
) -> None:
    one = found.codecs[which]
    slower = list(found.codecs)
    slower[which] = replace(one, encode_seconds=factor * one.encode_seconds)
    before, after = plan_for(found, model), plan_for(replace(found, codecs=tuple(slower)), model)
    name = before.predictions[1 + which].bits
    assert after.bits != name or before.bits == name


@given(measured(), models)
@settings(max_examples=150, deadline=None)
def test_at_its_break_even_link_a_codec_is_as_fast_as_native(found: Measurements, model: Shapes) -> None:
    for one in plan_for(found, model).predictions[1:]:
        if 0 < one.break_even < math.inf:
            there = plan_for(found.with_faster_links(one.break_even / found.slowest_link), model)
            steps = {other.bits: other.step_seconds for other in there.predictions}
            assert steps[one.bits] == pytest.approx(steps["none"], rel=1e-6)


@pytest.mark.parametrize(("megabits", "bits"), [(100, "2.0"), (900, "4.0"), (100_000, "none")])
def test_known_links_lead_to_known_choices(megabits: float, bits: str) -> None:
    decision = plan_for(network(megabits), MODEL)
    assert decision.bits == bits
    for number in (
        f"{decision.chosen.step_seconds * 1000:.3g}"[:3],
        "native",
        "backward takes 300 ms",
        "2 bits",
    ):
        assert number in decision.reason


def test_a_step_without_overlap_is_backward_plus_codec_plus_transfer() -> None:
    """One bucket: nothing can hide. Two ranks send each value once: half of them up, half of the sums down."""
    model = Shapes((250_000,))
    predictions = plan_for(network(100, backward=0.5), model).predictions
    native = predictions[0].step_seconds
    assert native == pytest.approx(0.5 + 2e-4 + 250_000 * 4 / (100 * MEGABIT))
    coded = 250_000 * (3e-9 + 1.5 * 1.7e-9)
    two = predictions[3].step_seconds
    assert two == pytest.approx(0.5 + 4e-4 + coded + 250_000 * 0.2505 / (100 * MEGABIT))


def test_copies_into_buckets_take_every_way_the_same_time_and_are_exposed() -> None:
    found = network(1000, backward=0.2)
    copying = replace(found, copy_seconds=2e-9)
    for without, with_copies in zip(predict(found, MODEL), predict(copying, MODEL), strict=True):
        longer = with_copies.exposed_seconds - without.exposed_seconds
        assert 0 < longer <= MODEL.numel * 2e-9 * (1 + 1e-9)
        assert with_copies.step_seconds - with_copies.exposed_seconds == pytest.approx(0.2)


def test_a_bucket_leaves_when_its_last_gradient_is_there() -> None:
    """Buckets in the order of arrival: 200,000 and 300,000 values, more than 1 MiB; then the others."""
    model, speed = Shapes((500_000, 200_000, 300_000)), 100 * MEGABIT
    found = replace(network(100, backward=1.0), ready=(0.95, 0.7, 0.9))
    native = plan_for(found, model, options=PlannerOptions(bucket_bytes=1 << 20)).predictions[0]
    told = 2 * 2e-4
    assert native.step_seconds == pytest.approx(told + max(0.9 + 4_000_000 / speed, 1.0 + 2_000_000 / speed))
    even = plan_for(replace(found, ready=()), model, options=PlannerOptions(bucket_bytes=1 << 20))
    first = 1 / 3 + 0.3 * 2 / 3
    assert even.predictions[0].step_seconds == pytest.approx(
        told + max(first + 4_000_000 / speed, 1.0 + 2_800_000 / speed)
    )


@given(
    st.lists(st.integers(100_000, 8_000_000), min_size=1, max_size=20),
    st.floats(0.02, 0.4),
    st.floats(0.1, 0.6),
    st.floats(0.02, 3.0),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_steps_are_those_of_simulated_threads_that_share_a_core(
    numels: list[int], codec: float, begin: float, transfer: float, random: Random
) -> None:
    """codec, transfer: seconds for all values, where backward takes one. Each parameter is a bucket."""
    model = Shapes(tuple(numels))
    rest = sorted(random.uniform(begin, 1.0) for _ in numels[1:])
    ready = (*rest, 1.0)  # of the last parameter first
    sizes = [numel / model.numel for numel in reversed(numels)]
    encode, decode = 0.4 * codec / model.numel, 0.4 * codec / model.numel
    line = Line(0.0, 2.0 * model.numel / 8 / transfer)
    found = replace(
        network(100, backward=1.0),
        native=line,
        exchange=line,
        codecs=(CodecSpeed("bits:2.0", encode, decode, 2.0 / 8),),
        ready=tuple(reversed(ready)),
    )
    prediction = predict(found, model, 2.0, PlannerOptions(bucket_bytes=1))[1]
    threads = compressed(1.0, ready, sizes, 0.4 * codec, 0.4 * codec, transfer)
    assert prediction.step_seconds == pytest.approx(step_seconds(1, threads), rel=0.15)


def test_times_of_another_models_gradients_are_refused() -> None:
    with pytest.raises(ConfigError, match="another model"):
        plan_for(replace(network(100), ready=(0.5, 1.0)), MODEL)


def test_gradients_that_travel_one_way_are_half_the_bytes_and_codec_time() -> None:
    found = network(100, backward=0.0, hosts=2)
    there_and_back = plan_for(found, MODEL).predictions
    one_way = plan_for(found, MODEL, options=PlannerOptions(one_way=True, native_one_way=True)).predictions
    for one, both in zip(one_way, there_and_back, strict=True):
        assert one.sent_bytes == both.sent_bytes / 2
    # Of ten million values half are encoded for the other rank, and as many decoded.
    assert one_way[-1].codec_seconds == pytest.approx(5e6 * (3e-9 + 1.7e-9))
    # DeepSpeed's own collective is an all-reduce even then.
    native = plan_for(found, MODEL, options=PlannerOptions(one_way=True)).predictions[0]
    assert native.sent_bytes == there_and_back[0].sent_bytes


def test_what_packets_cost_ends_the_one_shot_exchange_among_many_ranks() -> None:
    packet = PacketCost(20e-6, 10e-6, 100.0)
    sent: dict[int, float] = {}
    for hosts in (2, 10_000):
        found = replace(assumed_network(network(1000), 1000 * MEGABIT, hosts, 1, 1e-5), packet=packet)
        decision = plan_for(found, MODEL)
        sent[hosts] = decision.predictions[-1].sent_bytes
        assert (decision.bits == "none") == (hosts == 10_000)
    buckets = len(bucket_numels(MODEL.numels))
    overhead = sent[10_000] - 2 * 0.9999 * MODEL.numel * 0.2505
    assert overhead == pytest.approx(buckets * 2 * 9_999 * 100)


def test_communication_hides_behind_a_long_backward() -> None:
    hidden = plan_for(network(1000, backward=20.0), Shapes((1_000_000,) * 60)).predictions[0]
    assert hidden.transfer_seconds > 1.5
    assert hidden.exposed_seconds < 0.3 * hidden.transfer_seconds


@pytest.mark.parametrize("numels", [[7_000_000, 6_000_000, 1_000_000, 300_000], [100], [200_000] * 90 + [7]])
def test_buckets_are_those_that_ddp_builds(numels: list[int]) -> None:
    last_first = [torch.empty(numel) for numel in reversed(numels)]
    for bucket_bytes, limits in ((0, [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 << 20]), (4 << 20, [4 << 20])):
        buckets, _ = dist._compute_bucket_assignment_by_size(last_first, limits)
        expected = [sum(last_first[index].numel() for index in bucket) for bucket in buckets]
        assert bucket_numels(numels, bucket_bytes=bucket_bytes) == expected


def test_one_rank_has_nothing_to_plan_and_no_choice_is_an_error() -> None:
    alone = replace(network(100), ranks_per_node=(1,), links=())
    assert plan_for(alone, MODEL).bits == "none"
    lossy = replace(network(100), codecs=codecs()[1:])
    with pytest.raises(ConfigError, match="nothing to choose from"):
        plan_for(lossy, MODEL, 5.0, PlannerOptions(native=False))


def test_a_hierarchy_is_chosen_where_the_ranks_of_a_node_share_a_slow_link() -> None:
    shared = assumed_network(network(100), 100 * MEGABIT, nodes=4, ranks_per_node=8, latency_seconds=1e-4)
    assert plan_for(shared, MODEL, options=PlannerOptions(hierarchy=True)).hierarchy
    assert not plan_for(shared, MODEL).hierarchy
    fast = shared.with_faster_links(1e5)
    flat_only = plan_for(fast, MODEL, options=PlannerOptions(hierarchy=True, native=False))
    assert not flat_only.hierarchy


def test_measurements_survive_json_and_refuse_what_they_are_not() -> None:
    shared = assumed_network(network(100), 50 * MEGABIT, nodes=2, ranks_per_node=2, latency_seconds=1e-4)
    for one in (network(123.4), shared, replace(shared, ready=(0.25, 1.0))):
        assert Measurements.from_json(json.loads(json.dumps(one.to_json()))) == one
    older = network(1).to_json()
    del older["ready"], older["told_seconds"]
    assert Measurements.from_json(older) == network(1)
    for broken in ({"version": 99}, {**network(1).to_json(), "links": [{}]}, {}):
        with pytest.raises(ConfigError, match="no measurements of this version"):
            Measurements.from_json(broken)
    decision = plan_for(network(100), MODEL)
    assert json.loads(json.dumps(decision.to_json(), allow_nan=False))["bits"] == "2.0"


@pytest.mark.parametrize("nodes", range(2, 12))
def test_every_pair_of_nodes_is_measured_once_and_no_node_does_two_things_at_once(nodes: int) -> None:
    turns = [turn for shift in range(1, nodes) for turn in link_turns(nodes, shift)]
    for turn in turns:
        busy = [node for pair in turn for node in pair]
        assert len(busy) == len(set(busy))
    pairs = [pair for turn in turns for pair in turn]
    assert sorted(pairs) == [(a, b) for a in range(nodes) for b in range(nodes) if a != b]


@pytest.mark.parametrize(
    ("ranks", "full"),
    [
        ([("a", [0, 1], 1)], False),
        ([("a", [0, 1], 2)], True),
        ([("a", [0, 1], 1), ("a", [0, 1], 1)], True),  # two hosts, emulated on one machine
        ([("a", [0, 1], 1), ("b", [0, 1], 1)], False),
        (
            [("a", [0], 1), ("a", list(range(8)), 1)],
            True,
        ),  # the first is bound to the core that it computes on
    ],
)
def test_cores_are_idle_where_a_machines_ranks_leave_some(
    ranks: list[tuple[str, list[int], int]], full: bool
) -> None:
    told = [{"machine": one, "cores": cores, "threads": threads} for one, cores, threads in ranks]
    assert _has_full_machine(told) == full


def test_the_floor_is_among_the_codecs_and_nothing_lies_under_it() -> None:
    assert codecs_for(2.0) == ("lossless", "bits:4.0", "bits:2.0")
    assert codecs_for(1.0, "grid") == ("lossless", "grid:4.0", "grid:2.0", "grid:1.0")
    assert codecs_for(3.9) == ("lossless", "bits:3.9")
    assert codecs_for(6) == ("lossless", "bits:6.0")


def test_messages_are_bounded_where_telling_their_sizes_takes_more_than_the_tolerance() -> None:
    options = PlannerOptions(bounded=True)
    slow = Line(0.06, 100 * MEGABIT)
    cheap = replace(network(100), told_seconds=1e-5)
    dear = replace(network(100), exchange=slow, told_seconds=0.05)
    assert not plan_for(cheap, MODEL, options=options).bounded
    decision = plan_for(dear, MODEL, options=options)
    assert decision.bounded and decision.bits == "2.0"
    assert "with bounded messages" in decision.reason
    told = [one.bits for one in decision.predictions if one.bounded_seconds]
    assert told == ["4.0", "2.0"]  # the native all-reduce tells no sizes, and lossless packets have to
    assert not plan_for(dear, MODEL).bounded
    assert json.loads(json.dumps(decision.to_json()))["bounded"] is True


@given(measured(), models, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_bounded_messages_are_only_ever_chosen_for_less_time(
    found: Measurements, model: Shapes, share: float
) -> None:
    told = share * found.exchange.latency_seconds
    options = PlannerOptions(bounded=True, native=False)
    allowed = plan_for(replace(found, told_seconds=told), model, options=options)
    exact = plan_for(found, model, options=PlannerOptions(native=False))
    assert allowed.plan == exact.plan  # what travels does not depend on it
    if allowed.bounded:
        assert allowed.chosen.bounded_seconds * 1.02 < allowed.chosen.step_seconds
        assert told > 0


def many(hosts: int, latency: float = 5e-4, megabits: float = 1000.0) -> Measurements:
    found = replace(network(megabits), packet=PacketCost(4e-5, 3e-5, 144.0))
    return assumed_network(found, megabits * MEGABIT, hosts, 1, latency)


@given(st.sampled_from([4, 6, 8, 12, 64, 1000, 10_000]), st.floats(1e-6, 0.05), models)
@settings(max_examples=60, deadline=None)
def test_groups_are_chosen_only_where_they_win_by_more_than_the_tolerance(
    hosts: int, latency: float, model: Shapes
) -> None:
    """They round a value once more; and what is chosen is the fastest size, of as many bytes but for headers."""
    found = many(hosts, latency)
    flat = plan_for(found, model, options=PlannerOptions(native=False))
    both = plan_for(found, model, options=PlannerOptions(native=False, groups=True))
    for one, other in zip(flat.predictions, both.predictions, strict=True):
        if other.group_size:
            assert other.step_seconds * 1.02 < one.step_seconds
            assert hosts % other.group_size == 0 and 1 < other.group_size < hosts
            assert other.sent_bytes <= one.sent_bytes
        else:
            assert other == one


def test_groups_of_many_hosts_are_chosen_with_a_reason_and_come_back_from_json() -> None:
    decision = plan_for(many(100, megabits=50), MODEL, options=PlannerOptions(groups=True))
    assert decision.group_size == 10 and decision.bits == "2.0"
    assert "2.0 bits in groups of 10" in decision.reason
    assert "groups of 10 need 36 messages a rank and bucket instead of 198" in decision.reason
    assert json.loads(json.dumps(decision.to_json()))["group_size"] == 10
    assert plan_for(many(100, megabits=50), MODEL).group_size == 0


def test_nodes_of_several_ranks_and_numbers_that_cannot_be_divided_get_no_groups() -> None:
    shared = assumed_network(network(100), 100 * MEGABIT, nodes=8, ranks_per_node=4, latency_seconds=0.01)
    for found in (shared, many(7), many(3)):
        decision = plan_for(found, MODEL, options=PlannerOptions(groups=True, hierarchy=False))
        assert all(one.group_size == 0 for one in decision.predictions)
    only = PlannerOptions(flat=False, groups=True, group_size=4)
    assert {one.group_size for one in plan_for(shared, MODEL, options=only).predictions} == {0, 4}


def test_two_hosts_extrapolated_are_many_with_as_much_latency_for_each_message() -> None:
    two = replace(network(100), packet=PacketCost(4e-5, 3e-5, 144.0))
    eight = extrapolated(two, 8, contention=4.0)
    assert eight.world_size == 8 and eight.exchange.bytes_per_second == two.exchange.bytes_per_second
    assert eight.exchange.latency_seconds == pytest.approx(7 * 4 * two.exchange.latency_seconds)
    assert eight.codecs[0].encode_seconds == 4 * two.codecs[0].encode_seconds
    assert eight.packet == PacketCost(1.6e-4, 1.2e-4, 144.0)
    assert replace(extrapolated(two, 2), assumed="") == two


def test_a_gradient_of_exactly_zero_is_no_sample_of_what_is_to_come() -> None:
    """As before the first step of a network whose residual branches end in norms that begin at zero."""
    first, branch, last = (torch.nn.Parameter(torch.zeros(2000)) for _ in range(3))
    first.grad, branch.grad, last.grad = torch.randn(2000) * 0.3, torch.zeros(2000), torch.randn(2000) * 0.1
    sample, segments = sample_gradient([first, branch, last])
    assert segments == [2000] * 3
    assert torch.equal(sample[:2000], last.grad) and torch.equal(sample[4000:], first.grad)
    assert 0.15 < float(sample[2000:4000].std()) < 0.25  # an average gradient's
    assert torch.equal(sample, sample_gradient([first, branch, last])[0])

    first.grad = last.grad = None
    assert float(sample_gradient([first, branch, last])[0].std()) == pytest.approx(2000**-0.5, rel=0.1)
