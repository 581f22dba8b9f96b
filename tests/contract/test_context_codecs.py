"""What only the codecs of integers with contexts promise: steps, references, few bits for few changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_dl.codec import PacketStats, Side, make_codec
from efficient_dl.codec.kernels.native.library import set_num_threads
from efficient_dl.errors import ConfigError, CorruptPacket, SideMismatch

KERNELS = ("reference", "portable", "native")
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(INTEGERS[x.dtype])


def sparse(numel: int, seed: int) -> torch.Tensor:
    """Clusters of large values between small ones, a few of them huge."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(2 * torch.randn(numel // 256 + 1, generator=generator)).repeat_interleave(256)[:numel]
    x = torch.randn(numel, generator=generator) * scale
    x[::9973] *= 1e4
    return x


def changed(x: torch.Tensor, fraction: float, seed: int, wild: bool = False) -> torch.Tensor:
    """x with this fraction of its values moved by one or two units in the last place, or anywhere."""
    generator = torch.Generator().manual_seed(seed)
    result = x.clone()
    bits = bits_of(result)
    places = torch.rand(x.numel(), generator=generator) < fraction
    steps = torch.randint(-2, 3, (int(places.sum()),), generator=generator)
    if wild:
        steps = torch.randint(-(2**31), 2**31, (int(places.sum()),), generator=generator)
    bits[places] += steps.to(bits.dtype)
    return result


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25, deadline=None)
@given(
    numel=st.integers(1, 40_000),
    seed=st.integers(0, 2**32),
    step=st.sampled_from([2.0**-126, 1e-3, 0.1, 1.0, 7.5, 1e4, 2.0**99]),
)
def test_the_error_is_within_the_dead_zone_of_the_step(
    kernel: str, numel: int, seed: int, step: float
) -> None:
    x, side = sparse(numel, seed), Side(step_size=step)
    codec, out = make_codec("grid:1.0", kernel=kernel), torch.empty(numel)
    codec.decode(codec.encode(x, side), out, side=side)
    step32 = float(torch.tensor(step))
    expected = (
        torch.sign(x) * torch.floor(x.abs() * (1 / torch.tensor(step)) + 0.375).clamp(max=32767) * step32
    )
    assert torch.equal(out + 0, expected + 0)
    fits = x.abs() < 32767 * step
    assert ((out - x).abs()[fits] <= 0.6251 * step).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_blocks", [1, 40, 3000])
@pytest.mark.parametrize("zeros", [0.9, 0.99, 0.9999])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e20])
def test_bits_that_zeros_leave_over_are_not_spent_on_steps_that_clamp_all_others(
    kernel: str, num_blocks: int, zeros: float, size: float
) -> None:
    numel = 256 * num_blocks
    x = size * torch.randn(numel, generator=torch.Generator().manual_seed(num_blocks))
    x[: round(zeros * numel)] = 0  # of 3000 blocks no sampled one need hold a value
    codec, out, stats = make_codec("grid:3.0", kernel=kernel), torch.empty(numel), PacketStats()
    codec.decode(codec.encode(x, stats=stats), out)
    assert float((out - x).norm() / size) <= 1e-3 * float((x / size).norm())
    assert stats.largest_escape < 32767


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.024, 0.3, 1.0])
@pytest.mark.parametrize("wild", [False, True])
def test_a_delta_is_exact_and_never_longer_than_lossless(
    kernel: str, dtype: torch.dtype, fraction: float, wild: bool
) -> None:
    for numel in (1, 300, 50_001):
        reference = sparse(numel, 1).to(dtype)
        x = changed(reference, fraction, 2, wild)
        side, codec = Side(reference=reference), make_codec("delta", kernel=kernel)
        packet, out = codec.encode(x, side), torch.empty_like(x)
        codec.decode(packet, out, side=side)
        assert torch.equal(bits_of(out), bits_of(x))
        assert packet.numel() <= make_codec("lossless", kernel=kernel).encode(x).numel() + 4


def test_zeros_and_constants_take_the_shorter_method() -> None:
    reference = sparse(70_000, 3).bfloat16()
    for x in (torch.zeros_like(reference), torch.ones_like(reference), reference):
        side, codec = Side(reference=reference), make_codec("delta")
        packet, out = codec.encode(x, side), torch.empty_like(x)
        codec.decode(packet, out, side=side)
        assert torch.equal(out, x)
        assert packet.numel() <= make_codec("lossless").encode(x).numel() + 4


def test_a_delta_may_be_decoded_into_its_reference() -> None:
    reference = sparse(30_000, 4)
    x = changed(reference, 0.05, 5)
    side = Side(reference=reference)
    packet = make_codec("delta").encode(x, side)
    make_codec("delta").decode(packet, reference, side=side)
    assert torch.equal(bits_of(reference), bits_of(x))


def test_few_changes_cost_few_bits() -> None:
    reference = torch.randn(1 << 20, generator=torch.Generator().manual_seed(6)).bfloat16()
    x = reference.clone()
    places = torch.rand(x.numel(), generator=torch.Generator().manual_seed(7)) < 0.02
    bits_of(x)[places] += 1
    packet = make_codec("delta").encode(x, Side(reference=reference))
    assert 8 * packet.numel() / int(places.sum()) < 10


def test_contexts_beat_the_order0_entropy_of_clustered_values() -> None:
    x = sparse(500_000, 8)
    stats = PacketStats()
    packet = make_codec("grid:0.3").encode(x, stats=stats)
    assert 8 * packet.numel() < 0.85 * stats.order0_bits


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("spec", ["grid:0.15", "grid:3.0", "delta"])
def test_threads_do_not_change_the_bytes(spec: str) -> None:
    x = sparse(1_500_000, 9)
    side = Side(segments=(400_000, 77, 1_099_923), reference=changed(x, 0.1, 10))
    packets: list[torch.Tensor] = []
    for threads in (1, 3):
        set_num_threads(threads)
        packets.append(make_codec(spec).encode(x, side))
        out = torch.empty_like(x)
        make_codec(spec).decode(packets[0], out, side=side)
        assert spec != "delta" or torch.equal(out, x)
    assert torch.equal(*packets)


@pytest.mark.parametrize("spec", ["grid:0.5", "grid:4.0", "delta"])
def test_many_short_segments_give_the_reference_bytes(spec: str) -> None:
    segments = (0, 1, 2, 255, 256, 257, 0, 1000, *([3] * 900), 70_000, 0)
    x = sparse(sum(segments), 12)
    side = Side(segments=segments, reference=changed(x, 0.1, 13))
    packets = [make_codec(spec, kernel=kernel).encode(x, side) for kernel in KERNELS]
    outs = [torch.empty_like(x) for _ in KERNELS]
    for kernel, packet, out in zip(KERNELS, packets, outs, strict=True):
        make_codec(spec, kernel=kernel).decode(packets[0], out, side=side)
        assert torch.equal(packet, packets[0]) and torch.equal(out, outs[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_map_of_tables_that_fits_no_class_is_refused(kernel: str) -> None:
    x, side = sparse(5000, 14), Side(step_size=1.0)
    packet = make_codec("grid:1.0", checksum=False).encode(x, side)
    class_bytes = int(packet[48:52].view(torch.int32))
    table_map = packet[56 + class_bytes : 72 + class_bytes]
    assert table_map[0] == 255 and (table_map != 255).sum() > 3
    codec, out = make_codec("grid:1.0", kernel=kernel, checksum=False), torch.empty(5000)
    codec.decode(packet, out, side=side)
    for c in range(16):
        for index in (0, 1, 7, 255):
            if table_map[c] == index:
                continue
            before = int(table_map[c])
            table_map[c] = index
            with pytest.raises(CorruptPacket):
                codec.decode(packet, out, side=side)
            table_map[c] = before


def test_sides_are_compared_without_looking_at_values() -> None:
    reference = torch.ones(3)
    side = Side(reference=reference)
    assert side == Side(reference=reference) and hash(side) == hash(Side(reference=reference))
    assert side != Side(reference=reference.clone()) and side != Side(step_size=0.5)
    assert side.fingerprint == Side(reference=reference.clone()).fingerprint
    assert side.fingerprint != Side(reference=reference + 1).fingerprint
    assert Side(step_size=0.1).fingerprint == Side(step_size=float(torch.tensor(0.1))).fingerprint
    assert Side().fingerprint == 0


def test_wrong_sides_are_refused_with_a_reason() -> None:
    x, codec = torch.randn(100), make_codec("delta")
    with pytest.raises(ValueError, match="needs Side"):
        codec.encode(x)
    for reference in (x.bfloat16(), x[:99].clone()):
        with pytest.raises(ValueError, match=r"Side\.reference has"):
            codec.encode(x, Side(reference=reference))
    packet = codec.encode(x, Side(reference=x.clone()))
    with pytest.raises(SideMismatch):
        codec.decode(packet, torch.empty(100), side=Side(reference=x + 1))
    for step in (0.0, -1.0, float("nan"), float("inf"), 2.0**100, 1e-40):
        with pytest.raises(ValueError, match="step_size"):
            Side(step_size=step)
    with pytest.raises(ValueError, match="contiguous"):
        Side(reference=torch.zeros(4, 4).t())
    for spec in ("grid:0.01", "grid:8", "grid:x"):
        with pytest.raises(ConfigError, match=r"0\.02 to"):
            make_codec(spec)


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_tile_sizes_are_read(kernel: str) -> None:
    """A decoder takes every T that the document allows: here one tile of 2^20 instead of 2^16 blocks."""
    x, side = sparse(5000, 11), Side(step_size=1.0)
    packet = make_codec("grid:1.0", checksum=False).encode(x, side)
    expected, out = torch.empty(5000), torch.empty(5000)
    codec = make_codec("grid:1.0", kernel=kernel, checksum=False)
    codec.decode(packet, expected, side=side)
    tile_blocks = packet[40:44].view(torch.int32)
    for wanted, allowed in ((64, True), (1 << 20, True), (96, False), (32, False), (1 << 21, False)):
        tile_blocks.fill_(wanted)
        if allowed:
            codec.decode(packet, out, side=side)
            assert torch.equal(out, expected)
        else:
            with pytest.raises(CorruptPacket):
                codec.decode(packet, out, side=side)
