"""A parameter's share of a packet's entropies adds up to the packet's, and says which parameter needs what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficient_dl.codec import PacketStats, SegmentBits, make_codec, segment_bits
from efficient_dl.codec.contract import Side
from efficient_dl.comm import (
    BucketLayout,
    Compressor,
    Plan,
    Transport,
    all_reduce,
    parameter_scalars,
    summary,
)
from tests.unit.ranks import on_ranks

SEGMENTS = (8192, 4096, 700, 40)


def values(dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, values that are mostly small, and two short parameters."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(SEGMENTS), generator=generator)
    x[8192:12288] *= torch.randn(4096, generator=generator).abs() ** 3
    return x.to(dtype)


def measured(spec: str, x: Tensor) -> tuple[list[SegmentBits], PacketStats]:
    codec, stats = make_codec(spec), PacketStats()
    codec.encode(x, Side(SEGMENTS), stats)
    return segment_bits(codec, x, SEGMENTS, stats), stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["bits:2.0", "bits:4.0", "grid:1.0", "lossless", "int8"])
def test_the_bits_of_segments_add_up_to_the_packet_s(spec: str, dtype: torch.dtype) -> None:
    found, stats = measured(spec, values(dtype))
    assert [one.numel for one in found] == list(SEGMENTS)
    packet = stats.model_bits + (stats.scale_bits if spec.startswith("grid") else 0)
    tolerance = 0.002 if spec.startswith("bits") else 0.08  # the others have tables of their own
    assert sum(one.model_bits for one in found) == pytest.approx(packet, rel=tolerance)
    # Four memoryless coders know more than one.
    assert sum(one.order0_bits for one in found) < 1.001 * stats.order0_bits


@pytest.mark.parametrize(("spec", "fewer"), [("bits:2.0", True), ("grid:1.0", False)])
def test_peaked_values_take_fewer_bits_with_local_steps_and_their_tails_more_with_one(
    spec: str, fewer: bool
) -> None:
    (normal, peaked, *_), _ = measured(spec, values())
    for name in ("order0_bits", "model_bits"):
        ratio = getattr(peaked, name) / peaked.numel / (getattr(normal, name) / normal.numel)
        assert ratio < 0.9 if fewer else ratio > 1.1


@pytest.mark.parametrize("spec", ["bits:2.0", "grid:1.0", "lossless"])
def test_a_sample_of_a_long_segment_has_its_entropy(spec: str) -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    codec, stats = make_codec(spec), PacketStats()
    codec.encode(x, Side((len(x),)), stats)
    for turn in (0, 1, 99):
        (found,) = segment_bits(codec, x, (len(x),), stats, turn)
        assert 8192 <= found.numel < 16_384
        for name in ("order0_bits", "model_bits"):
            whole = getattr(stats, name) / stats.numel
            assert getattr(found, name) / found.numel == pytest.approx(whole, abs=0.05)


@pytest.mark.parametrize("wish", [2.0, "lossless"])
def test_statistics_tell_the_entropies_of_every_parameter(wish: float | str) -> None:
    names = ["normal", "peaked", "short", "tiny", "unused"]

    def rank(transport: Transport) -> dict[str, dict[str, float]]:
        compressor = Compressor(Plan.of(wish), names)
        all_reduce(values(), BucketLayout.of(names[:4], SEGMENTS, 2), compressor, transport)
        compressor.end_step(0.0)
        stats = summary(compressor.meter.state_dict())
        assert not stats["parameters"]["unused"]["entropy_sampled"]
        return parameter_scalars(stats)

    for rows in on_ranks(2, rank):
        assert rows.keys() == set(names[:4])
        shown = [row for row in rows.values() if "order0_bits" in row]
        assert len(shown) >= 3 and all(row["order0_bits"] > 0.5 for row in shown)
