"""Parameters with wishes of their own: which codec each gets, and that they travel together unharmed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efficient_dl.comm import BucketLayout, Compressor, Plan, Transport, all_reduce, summary
from efficient_dl.comm.meter import Tally
from efficient_dl.comm.sections import sections_of, split_message
from efficient_dl.errors import ConfigError, CorruptPacket, PlanMismatch
from tests.unit.ranks import on_ranks

NAMES = ["embed.weight", "block.weight", "block.bias", "head.weight", "head.bias"]
NUMELS = [900, 1500, 70, 1000, 10]
OVERRIDES: dict[str, str | float] = {"*.bias": "none", "head.*": 4.0, "embed.*": "lossless"}


def reduced(values: list[Tensor], plan: Plan) -> tuple[list[Tensor], list[dict[str, Any]]]:
    layout = BucketLayout.of(NAMES, NUMELS, len(values))

    def rank(transport: Transport) -> tuple[Tensor, dict[str, Any]]:
        x = values[transport.rank].clone()
        compressor = Compressor(plan, NAMES, "reference")
        all_reduce(x, layout, compressor, transport)
        return x, summary(compressor.meter.state_dict())

    results = on_ranks(len(values), rank)
    return [x for x, _ in results], [stats for _, stats in results]


def gradients(world_size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(world_size)
    return [torch.randn(sum(NUMELS), generator=generator).to(dtype) for _ in range(world_size)]


def test_the_first_matching_pattern_decides() -> None:
    plan = Plan.of(2.0, overrides=OVERRIDES)
    assert [plan.codec_for(name) for name in NAMES] == [
        "lossless",
        "bits:2.0",
        "identity",
        "bits:4.0",
        "identity",
    ]


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="matches no parameter"):
        Compressor(Plan.of(2.0, overrides={"lm_head.*": 4.0}), NAMES, "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_each_parameter_is_reduced_by_its_own_codec(world_size: int, dtype: torch.dtype) -> None:
    values = gradients(world_size, dtype)
    results, stats = reduced(values, Plan.of(2.0, overrides=OVERRIDES))
    exact, _ = reduced(values, Plan.of("identity"))
    assert all(torch.equal(results[0], other) for other in results[1:])
    errors: dict[str, float] = {}
    for name, ours, theirs in zip(NAMES, results[0].split(NUMELS), exact[0].split(NUMELS), strict=True):
        errors[name] = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    assert errors["embed.weight"] == errors["block.bias"] == errors["head.bias"] == 0
    assert 0 < 2 * errors["head.weight"] < errors["block.weight"] < 0.5
    rows = stats[0]["parameters"]
    assert rows["block.weight"]["bits_per_value"] < rows["head.weight"]["bits_per_value"] < 16
    for row in stats:
        assert sum(one["values_sent"] for one in row["parameters"].values()) == row["values_sent"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 700), st.sampled_from("abc")), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_sections_hold_every_value_of_a_shard_once(
    parameters: list[tuple[int, str]], world_size: int
) -> None:
    names = [f"{kind}.{number}" for number, (_, kind) in enumerate(parameters)]
    plan = Plan.of(2.0, overrides={"a.*": 4.0, "b.*": "lossless"})
    layout = BucketLayout.of(names, [numel for numel, _ in parameters], world_size)
    for shard in layout.shards:
        x = torch.arange(shard.numel)
        sections = sections_of(shard, plan)
        assert len({section.codec for section in sections}) == len(sections)
        assert sorted(torch.cat([section.gather(x) for section in sections]).tolist()) == x.tolist()
        back = torch.full_like(x, -1)
        for section in sections:
            begin, _ = section.pieces[0]
            values = section.gather(back)
            values.copy_(section.gather(x))
            section.scatter(values, back)
            assert sum(section.segments) == section.numel and begin >= 0
            assert all(plan.codec_for(name) == section.codec for name in section.names)
        assert torch.equal(back, x)


def test_a_damaged_directory_is_a_corrupt_packet() -> None:
    layout = BucketLayout.of(NAMES, NUMELS, 2)
    compressor = Compressor(Plan.of(2.0, overrides=OVERRIDES), NAMES, "reference")
    shard, tally = layout.shards[0], Tally(layout)
    x = torch.randn(shard.numel)
    room = torch.empty(compressor.max_bytes(shard, x.dtype), dtype=torch.uint8)
    message = compressor.encode(x, room, shard, tally, copies=1).clone()
    out = torch.empty_like(x)
    compressor.decode(message, out, shard, tally)
    for length in (0, 7, 20, message.numel() // 2):
        with pytest.raises(CorruptPacket):
            compressor.decode(message[:length], out, shard, tally)
    for wrong in (-1, 2**40, message.numel()):
        message[:8] = torch.tensor([wrong]).view(torch.uint8)
        with pytest.raises(CorruptPacket):
            compressor.decode(message, out, shard, tally)
    assert split_message(message, 1) == [message]


def test_a_state_of_other_overrides_is_refused() -> None:
    state = Compressor(Plan.of(2.0, overrides={"*.bias": "none"}), NAMES, "reference").state_dict()
    with pytest.raises(PlanMismatch, match="overrides"):
        Compressor(Plan.of(2.0), NAMES, "reference").load_state_dict(state)


@pytest.mark.parametrize(
    "wishes",
    [
        {"max_error": 0.1, "bytes_per_step": 1000, "values_per_step": 100},
        {"bits": 2.0, "max_error": 0.1},
        {"bits": 2.0, "bytes_per_step": 1000, "values_per_step": 100},
        {"bits": "none", "overrides": {"*": 2.0}},
        {"bits": "none", "error_feedback": True},
        {"max_error": 0.001},
        {"max_error": 1.0},
        {"max_error": float("nan")},
        {"bytes_per_step": 10, "values_per_step": 1_000_000},
        {"bits": 2.0, "overrides": {"*": "auto"}},
        {"bits": 2.0, "overrides": {"*": 99}},
    ],
)
def test_contradictory_wishes_are_refused(wishes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Plan.of(**wishes)
