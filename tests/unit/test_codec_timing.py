"""What the planner hears of a codec's packets: they keep to the rate, with error feedback and a common step, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efficient_dl.codec import Codec
from efficient_dl.comm import codec_timing
from efficient_dl.comm.codec_timing import codec_speed, copy_seconds, packet_cost
from efficient_dl.comm.packing import Packing

NUMEL = 1 << 17


def gradient() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(NUMEL // 256, generator=generator).exp().repeat_interleave(256)
    return torch.randn(NUMEL, generator=generator) * scale


@pytest.mark.parametrize("feeds_back", [False, True])
@pytest.mark.parametrize("codec", ["bits:4.0", "bits:2.0", "grid:4.0", "grid:2.0", "grid:1.0"])
def test_packets_keep_to_the_rate(codec: str, feeds_back: bool) -> None:
    packet = packet_cost(codec, gradient(), feeds_back=feeds_back)
    found = codec_speed(codec, gradient(), [NUMEL // 2, NUMEL // 2], 2, packet, feeds_back=feeds_back)
    assert found.codec == codec
    assert 8 * found.bytes_per_value == pytest.approx(float(codec.partition(":")[2]), rel=0.08)
    assert found.encode_seconds > 0 and found.decode_seconds > 0
    assert packet.encode_seconds > 0 and 16 <= packet.num_bytes < 1024


@pytest.mark.parametrize("feeds_back", [False, True])
@pytest.mark.parametrize("codec", ["lossless", "bits:2.0", "grid:2.0"])
def test_what_is_lossy_is_timed_with_feedback_and_the_step_that_training_knows(
    codec: str, feeds_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    write = Packing.write

    def watched(packing: Packing, codec: Codec, residual: Tensor | None = None) -> int:
        seen.append((residual is not None, packing.section.side.step_size is not None))
        return write(packing, codec, residual)

    monkeypatch.setattr(Packing, "write", watched)
    cost = packet_cost(codec, gradient(), feeds_back=feeds_back)
    feeds, steps = feeds_back and codec != "lossless", codec.startswith("grid")
    assert set(seen[-codec_timing._PACKET_TRIES :]) == {(feeds, steps)}
    seen.clear()
    codec_speed(codec, gradient(), [NUMEL], 2, cost, feeds_back=feeds_back, tries=2)
    assert set(seen[-4:]) == {(feeds, steps)}


def test_copies_are_timed_where_there_are_any() -> None:
    assert copy_seconds(gradient(), 0) == 0.0
    assert copy_seconds(gradient(), 2) > 0
