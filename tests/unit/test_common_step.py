"""One step size for all packets of a model: unequal rates by tensor, the average kept, the same on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_dl.codec import PacketStats
from efficient_dl.comm import BucketLayout, Compressor, Plan, Transport, all_reduce, since, summary
from efficient_dl.comm.common_step import CommonStep, Leg
from efficient_dl.comm.meter import Tally
from efficient_dl.errors import SideMismatch
from tests.unit.ranks import on_ranks

SPREADS = {"small": 0.1, "middle": 1.0, "large": 4.0}  # one bucket each
NUMEL = 16_384
STEPS, SETTLED = 14, 8


def gradient(name: str, step: int, rank: int) -> Tensor:
    seed = 1000 * step + 10 * rank + list(SPREADS).index(name)
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed)) * SPREADS[name]


def trained(transport: Transport, bits: float, agrees: bool) -> dict[str, Any]:
    """Reduces the gradients of some steps; returns what the last of them cost and erred."""
    compressor = Compressor(Plan.of(bits, scale="global"), list(SPREADS))
    assert compressor.common_step is not None
    squares, x = 0.0, torch.empty(0)
    before = compressor.meter.state_dict()
    for step in range(STEPS):
        if step == SETTLED:
            before = compressor.meter.state_dict()
        compressor.begin_step()
        for name in SPREADS:
            layout = BucketLayout.of([name], [NUMEL], transport.world_size)
            x = gradient(name, step, transport.rank)
            all_reduce(x, layout, compressor, transport)
            if step >= SETTLED:
                everyone = [gradient(name, step, rank) for rank in range(transport.world_size)]
                squares += float((x - sum(everyone) / transport.world_size).square().sum())
        compressor.end_step(0.0)
        if agrees:
            compressor.agree(transport)
    found = summary(since(compressor.meter.state_dict(), before))
    return {
        "bits": {name: row["bits_per_value"] for name, row in found["parameters"].items()},
        "mean": found["encoded_bits"] - found["header_bits"],
        "bytes": found["wire_bytes"],
        "squares": squares,
        "steps": [compressor.common_step.step(leg) for leg in (Leg.CONTRIBUTION, Leg.RESULT)],
        "x": x,
    }


@pytest.mark.parametrize("bits", [1.0, 2.0])
@pytest.mark.parametrize("world_size", [2, 3])
def test_tensors_of_a_larger_rms_get_more_bits_and_the_average_stays(world_size: int, bits: float) -> None:
    results = on_ranks(world_size, lambda transport: trained(transport, bits, agrees=True))
    for found in results:
        assert found["bits"]["small"] + 0.4 < found["bits"]["middle"] + 0.3 < found["bits"]["large"]
        assert found["mean"] == pytest.approx(bits, abs=0.04)  # headers and tables come on top
        assert found["steps"] == results[0]["steps"] and None not in found["steps"]
        assert torch.equal(found["x"], results[0]["x"])


def test_a_common_step_errs_less_with_no_more_bits() -> None:
    own, common = (
        on_ranks(2, lambda transport, agrees=agrees: trained(transport, 2.0, agrees))
        for agrees in (False, True)
    )
    assert all(one["steps"] == [None, None] for one in own)
    for before, after in zip(own, common, strict=True):
        assert after["squares"] < 0.6 * before["squares"]
        assert after["bytes"] < 1.01 * before["bytes"]


def counted(packet_bits: float, step_size: float = 0.0, nonfinite: int = 0, peak: int = 0) -> PacketStats:
    return PacketStats(
        numel=10_000,
        order0_bits=packet_bits * 10_000,
        packet_bytes=round(packet_bits * 1250),
        step_size=step_size,
        nonfinite_blocks=nonfinite,
        largest_escape=peak,
    )


def after(common: CommonStep, stats: PacketStats) -> float | None:
    common.count(stats, Leg.CONTRIBUTION)
    with common._lock:
        total = [n for d in common._directions for n in (d.values, d.bits, d.placed, d.places)]
        total.append(common._nonfinite)
        peaks = [d.peak for d in common._directions]
        common._forget()
    common.agreed(total, peaks)
    return common.step(Leg.CONTRIBUTION)


def test_a_step_follows_the_missed_rate_and_no_step_that_is_not_finite() -> None:
    common = CommonStep(2.0)
    assert after(common, counted(2.0, step_size=0.5)) == 0.5
    assert after(common, counted(2.0)) == 0.5
    assert after(common, counted(3.0)) == pytest.approx(0.5 * 2**0.75, rel=1e-3)
    assert after(common, counted(0.0, nonfinite=1)) == pytest.approx(0.5 * 2**0.75, rel=1e-3)
    assert after(common, counted(1.0)) == 0.5
    assert after(common, counted(6.0)) == 0.5 * 2**3
    assert after(common, counted(200.0)) == 0.5 * 2**11  # eight octaves coarser at most
    assert common.step(Leg.RESULT) is None


def test_packets_of_zeros_have_no_say_in_the_first_step() -> None:
    common = CommonStep(2.0)
    common.count(counted(0.0, step_size=1.0), Leg.CONTRIBUTION)
    assert after(common, counted(2.0, step_size=2.0**-20)) == 2.0**-20


def test_bits_that_zeros_leave_over_do_not_make_steps_ever_finer() -> None:
    common = CommonStep(2.0)
    assert after(common, counted(0.1, step_size=1.0)) == 1.0
    assert after(common, counted(0.1, peak=2000)) == 0.5
    assert after(common, counted(0.1, peak=4000)) == 0.25
    assert after(common, counted(0.1, peak=8000)) == 0.25  # 13 bits
    assert after(common, counted(0.1, peak=16_000)) == 0.5
    assert after(common, counted(0.1, peak=32_767)) == 32.0  # clamped: nobody knows how large it was


def test_a_spike_that_clamps_integers_leaves_no_coarse_steps_behind() -> None:
    common = CommonStep(2.0)
    assert after(common, counted(2.0, step_size=1.0)) == 1.0
    assert after(common, counted(2.0, peak=32_767)) == 64.0
    assert after(common, counted(0.0)) == 1.0
    assert after(common, counted(2.0, peak=32_767)) == 64.0
    assert after(common, counted(2.0, peak=600)) == 64.0  # still as large: no spike


def relative_error_of_a_large_tensor_beside_zeros(transport: Transport) -> float:
    """Of a network whose residual branches begin at zero, and which start to train after six steps."""
    compressor = Compressor(Plan.of(2.0, scale="global"), ["early", "late"])
    square = signal = 0.0
    for step in range(12):
        compressor.begin_step()
        for name, numel, size in (("early", 2_000, 1e3), ("late", 100_000, float(step >= 6))):
            ranks = range(transport.world_size)
            gradients = [
                torch.randn(numel, generator=torch.Generator().manual_seed(100 * step + r)) for r in ranks
            ]
            x, mean = size * gradients[transport.rank], size * torch.stack(gradients).mean(0)
            all_reduce(x, BucketLayout.of([name], [numel], transport.world_size), compressor, transport)
            if name == "early" and step >= 5:  # when zeros alone have left bits over for some steps
                square, signal = (
                    square + float((x - mean).square().sum()),
                    signal + float(mean.square().sum()),
                )
        compressor.end_step(0.0)
        compressor.agree(transport)
    return (square / signal) ** 0.5


def test_a_large_tensor_is_not_lost_beside_one_of_zeros() -> None:
    assert max(on_ranks(2, relative_error_of_a_large_tensor_beside_zeros)) < 0.03


def test_a_step_follows_the_loss_scale() -> None:
    common = CommonStep(2.0)
    common.begin(1024.0)
    assert after(common, counted(2.0, step_size=1024.0)) == 1024.0
    common.begin(512.0)
    assert common.step(Leg.CONTRIBUTION) == 512.0


def test_few_values_keep_their_own_steps() -> None:
    common = CommonStep(2.0)
    assert after(common, PacketStats(numel=100, packet_bytes=500, step_size=1.0)) is None


def test_a_restored_step_goes_on_exactly() -> None:
    common, again = CommonStep(2.0), CommonStep(2.0)
    after(common, counted(2.0, step_size=0.5))
    common.count(counted(3.1), Leg.CONTRIBUTION)
    again.load_state_dict(common.state_dict())
    assert again.state_dict() == common.state_dict()
    assert after(again, counted(2.5)) == after(common, counted(2.5))


def test_a_packet_with_another_step_is_refused() -> None:
    layout = BucketLayout.of(["large"], [NUMEL], 1)
    sender, receiver = (Compressor(Plan.of(2.0, scale="global"), ["large"]) for _ in range(2))
    shard, x = layout.shards[0], gradient("large", 0, 0)
    for compressor, step_size in ((sender, 0.5), (receiver, 0.25)):
        assert compressor.common_step is not None
        after(compressor.common_step, counted(2.0, step_size=step_size))
    room = torch.empty(sender.max_bytes(shard, x.dtype), dtype=torch.uint8)
    message = sender.encode(x, room, shard, Tally(layout), copies=1)
    with pytest.raises(SideMismatch):
        receiver.decode(message, torch.empty_like(x), shard, Tally(layout))
