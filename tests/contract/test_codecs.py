"""One suite over all codecs and all their CPU kernels: what `efficient_dl.codec.Codec` promises."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_dl.codec import Codec, PacketStats, Side, make_codec, registry
from efficient_dl.codec.kernels.native.library import available_isas
from efficient_dl.errors import ConfigError, CorruptPacket, SideMismatch, UnsupportedTensor

QUANTIZERS = ("bits:0.5", "bits:2.0", "bits:4.0", "bits:7.0")
BLOCKWISE = ("int8", "int4", "int4:64", "sign", "sign:tensor")
GRID = ("grid:0.15", "grid:1.0", "grid:3.0")
EXACT = ("identity", "lossless", "delta", "zstd", "lz4")
SPECS = (*EXACT, *QUANTIZERS, *GRID, *BLOCKWISE, "topk:0.01", "topk:0.3", "fp16", "bf16")
BLOCKS_OF_256 = (*QUANTIZERS, "int8", "int4", "sign")
KERNELS = ("reference", *available_isas())
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
ONE_KERNEL = ("identity", "zstd", "lz4")  # whatever is asked for
MANY_KERNELS = tuple(spec for spec in SPECS if spec not in ONE_KERNEL)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
SIZES = (0, 1, 127, 128, 129, 255, 256, 257, 1000, 33000, 70001)


def with_kernels(*specs: str) -> list[tuple[str, str]]:
    return [(spec, kernel) for spec in specs for kernel in (KERNELS if spec in MANY_KERNELS else ("auto",))]


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(INTEGERS[x.element_size()])


def any_bits(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern may occur: NaNs with payloads, infinities, denormals, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    width = INTEGERS[dtype.itemsize]
    info = torch.iinfo(width)
    return (
        torch.randint(info.min, info.max + 1, (numel,), generator=generator, dtype=torch.int64)
        .to(width)
        .view(dtype)
    )


def gradient_like(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Heavy tails, scales that differ from block to block, some exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * torch.randn(numel, generator=generator)
    scale = torch.exp(3 * torch.randn(numel // 256 + 1, generator=generator)).repeat_interleave(256)[:numel]
    x = x * scale * 1e-3
    x[torch.rand(numel, generator=generator) < 0.05] = 0
    return x.to(dtype)


def segments_of(numel: int, parts: int) -> Side:
    cuts = sorted({(numel * i * i) // (parts * parts) for i in range(parts + 1)})
    return Side(segments=tuple(b - a for a, b in itertools.pairwise(cuts)) or (numel,))


def side_for(spec: str, x: torch.Tensor, side: Side | None = None) -> Side | None:
    """side, and for "delta" a reference from which a twentieth of x's values differ, by a few units."""
    if spec != "delta":
        return side
    generator = torch.Generator().manual_seed(x.numel())
    reference = x.clone()
    bits = bits_of(reference.view(-1))
    changed = torch.rand(x.numel(), generator=generator) < 0.05
    bits[changed] += torch.randint(-9, 10, (int(changed.sum()),), generator=generator).to(bits.dtype)
    return Side(segments=None if side is None else side.segments, reference=reference)


def decoded(codec: Codec, packet: torch.Tensor, like: torch.Tensor, side: Side | None = None) -> torch.Tensor:
    out = torch.full(like.shape, 7.0).to(like.dtype)
    codec.decode(packet, out, side=side)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", MANY_KERNELS)
def test_all_kernels_write_the_same_bytes_and_read_each_others(spec: str, dtype: torch.dtype) -> None:
    codecs = [make_codec(spec, kernel=kernel) for kernel in KERNELS]
    # Several tiles are slow in the reference: one dtype of each width has more of them, the others the size before.
    skipped = 33000 if dtype in (torch.float32, torch.bfloat16, torch.float8_e5m2) else 70001
    for seed, numel in enumerate(SIZES):
        if numel == skipped:
            continue
        tensors = [gradient_like(numel, dtype, seed), any_bits(numel, dtype, seed)]
        # Every tensor one way, and the other way in the next dtype and at the next size.
        sides = [None, segments_of(numel, 5)][:: 1 if (seed + DTYPES.index(dtype)) % 2 else -1]
        for x, segments in zip(tensors, sides, strict=True):
            side = side_for(spec, x, segments)
            packets = [codec.encode(x, side) for codec in codecs]
            values = [decoded(codec, packets[0], x, side) for codec in codecs]
            for kernel, packet, value in zip(KERNELS, packets, values, strict=True):
                assert torch.equal(packet, packets[0]), (kernel, numel, side)
                assert torch.equal(bits_of(value), bits_of(values[0])), (kernel, numel, side)


@pytest.mark.parametrize(("spec", "kernel"), with_kernels(*EXACT))
@settings(max_examples=40, deadline=None)
@given(
    numel=st.integers(0, 70000),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    wild=st.booleans(),
)
def test_exact_codecs_return_every_bit(
    spec: str, kernel: str, numel: int, seed: int, dtype: torch.dtype, wild: bool
) -> None:
    codec = make_codec(spec, kernel=kernel)
    x = any_bits(numel, dtype, seed) if wild else gradient_like(numel, dtype, seed)
    side = side_for(spec, x)
    out = decoded(codec, codec.encode(x, side), x, side)
    assert torch.equal(bits_of(out), bits_of(x))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spec", QUANTIZERS)
@settings(max_examples=25, deadline=None)
@given(
    numel=st.integers(1, 40000),
    seed=st.integers(0, 2**32),
    parts=st.integers(1, 9),
    exponent=st.integers(-100, 80),
)
def test_the_error_of_a_block_is_at_most_half_its_step(
    spec: str, kernel: str, numel: int, seed: int, parts: int, exponent: int
) -> None:
    codec, stats = make_codec(spec, kernel=kernel), PacketStats()
    x = gradient_like(numel, torch.float32, seed).clamp(-1e3, 1e3) * 2.0**exponent
    side = segments_of(numel, parts)
    error = (decoded(codec, codec.encode(x, side, stats), x, side).double() - x.double()).abs()
    start = 0
    for length in side.segments or ():
        for block, err in zip(
            x[start : start + length].split(256), error[start : start + length].split(256), strict=True
        ):
            rms = block.double().square().mean().sqrt()
            # The step is rounded to a quarter octave, by at most 12.5 %; a clamped or vanishing block is tiny.
            bound = max(0.5 * 1.125 * stats.relative_step * rms, 2.0**-125, x.abs().max().double() * 2.0**-55)
            assert err.max() <= bound * (1 + 1e-5)
        start += length


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("spec", "most"), [("bits:1.0", 0.8), ("bits:2.0", 0.5), ("bits:4.0", 0.15), ("bits:7.0", 0.06)]
)
def test_small_tensors_are_not_rounded_away(spec: str, most: float, kernel: str) -> None:
    codec = make_codec(spec, kernel=kernel)
    for numel in (1, 2, 3, 4, 10, 16, 17, 44, 64, 200, 256, 1000, 3000):
        for seed in range(10):
            x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
            error = (decoded(codec, codec.encode(x), x) - x).norm() / x.norm()
            assert error < (most if numel > 16 else 0.06), (numel, seed)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spec", QUANTIZERS)
def test_scalars_beside_a_large_parameter_are_unbiased(spec: str, kernel: str) -> None:
    codec = make_codec(spec, kernel=kernel)
    x = torch.randn(60_400, generator=torch.Generator().manual_seed(3))
    side = Side(segments=(60_000, *[1] * 400))
    ratio = decoded(codec, codec.encode(x, side), x, side)[60_000:] / x[60_000:]
    assert abs(ratio.mean() - 1) < 0.01 and ratio.std() < 0.04


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spec", "kernel"), with_kernels(*SPECS))
def test_accumulate_adds_in_float32(spec: str, kernel: str, dtype: torch.dtype) -> None:
    codec = make_codec(spec, kernel=kernel)
    x = gradient_like(3000, dtype, 3)
    side = side_for(spec, x, segments_of(3000, 3))
    packet = codec.encode(x, side)
    wide = torch.zeros(3000)
    codec.decode(packet, wide, side=side)
    start = gradient_like(3000, torch.float32, 4)
    total = start.clone()
    codec.decode(packet, total, accumulate=True, side=side)
    assert torch.equal(total, start + wide)
    narrow = gradient_like(3000, dtype, 5)
    expected = (narrow.float() + wide).to(dtype)
    codec.decode(packet, narrow, accumulate=True, side=side)
    # + 0: whether -0 stays beside a decoded zero is the codec's choice.
    assert torch.equal(narrow.float() + 0.0, expected.float() + 0.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spec", BLOCKS_OF_256)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_nonfinite_value_makes_its_block_nan_and_no_other(spec: str, kernel: str, bad: float) -> None:
    codec, stats = make_codec(spec, kernel=kernel), PacketStats()
    x = gradient_like(2000, torch.float32, 6)
    x[300] = bad
    out = decoded(codec, codec.encode(x, stats=stats), x)
    assert out[256:512].isnan().all()
    assert out[:256].isfinite().all() and out[512:].isfinite().all()
    assert stats.nonfinite_blocks == 1


@pytest.mark.parametrize(("spec", "kernel"), with_kernels(*SPECS))
def test_packets_fit_max_bytes_even_for_the_worst_tensors(spec: str, kernel: str) -> None:
    codec = make_codec(spec, kernel=kernel)
    numel = 2000 if kernel == "reference" else 5000
    spikes = torch.zeros(numel)
    spikes[::37] = torch.logspace(-30, 30, len(spikes[::37]))
    for x in (spikes, any_bits(numel, torch.float32, 1), torch.full((numel,), 1e-45), torch.ones(numel)):
        for segments in (None, Side(segments=(1,) * numel)):
            side = side_for(spec, x, segments)
            assert codec.encode(x, side).numel() <= codec.max_bytes(numel, torch.float32, side)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spec", QUANTIZERS)
def test_the_rate_is_what_was_asked_for(spec: str, kernel: str) -> None:
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    packet = make_codec(spec, kernel=kernel).encode(x)
    asked = float(spec.partition(":")[2])
    assert abs(8 * packet.numel() / x.numel() - asked) < 0.03 * asked + 0.03


@pytest.mark.parametrize(("spec", "kernel"), with_kernels(*SPECS))
def test_the_packet_is_little_more_than_its_parts(spec: str, kernel: str) -> None:
    stats = PacketStats()
    x = torch.randn(500_000, generator=torch.Generator().manual_seed(2))
    packet = make_codec(spec, kernel=kernel).encode(x, side_for(spec, x), stats=stats)
    parts = stats.model_bits + stats.scale_bits + stats.header_bits
    assert stats.packet_bytes == packet.numel() and stats.numel == 500_000
    # In a small packet of contexts the lanes' states, of symbols and of classes, are a larger part.
    allowed = 1.1 if 8 * packet.numel() < 0.5 * x.numel() else 1.06
    assert parts * 0.999 <= 8 * packet.numel() <= parts * allowed
    assert stats.order0_bits > 0 and stats.kernel
    for numel, side in ((20, None), (1500, Side(segments=(3,) * 500))):
        stats = PacketStats()
        part = x[:numel].clone()
        packet = make_codec(spec, kernel=kernel).encode(part, side_for(spec, part, side), stats=stats)
        parts = stats.model_bits + stats.scale_bits + stats.header_bits
        # Contexts carry nothing in the lanes' first states.
        paddings, lane_states = 8 * 16, (32 if spec in (*GRID, "delta") else 24) * 128
        assert parts <= 8 * packet.numel() <= parts + paddings + (lane_states if numel > 20 else 0)


@pytest.mark.parametrize("spec", MANY_KERNELS)
def test_all_kernels_report_the_same_stats(spec: str) -> None:
    reports: list[PacketStats] = []
    for kernel in KERNELS:
        stats = PacketStats()
        x = gradient_like(100_000, torch.float32, 9)
        make_codec(spec, kernel=kernel).encode(x, side_for(spec, x), stats=stats)
        reports.append(stats)
    for report in reports[1:]:
        assert report.order0_bits == pytest.approx(reports[0].order0_bits, rel=1e-9)
        assert report.model_bits == pytest.approx(reports[0].model_bits, rel=1e-9)
        assert report.scale_bits == pytest.approx(reports[0].scale_bits, rel=1e-9)
        assert report.header_bits == reports[0].header_bits
        assert (report.escapes, report.empty_blocks) == (reports[0].escapes, reports[0].empty_blocks)
        assert report.nonfinite_blocks == reports[0].nonfinite_blocks
        assert report.relative_step == reports[0].relative_step


@pytest.mark.parametrize(("spec", "kernel"), with_kernels(*SPECS))
def test_every_cut_and_every_flipped_byte_raises(spec: str, kernel: str) -> None:
    codec = make_codec(spec, kernel=kernel)
    x = gradient_like(3000, torch.float32, 7)
    side = side_for(spec, x)
    packet = codec.encode(x, side)
    for length in [*range(0, 60), packet.numel() - 1, packet.numel() // 2]:
        with pytest.raises(CorruptPacket):
            codec.decode(packet[:length].clone(), torch.empty_like(x), side=side)
    for position in range(0, packet.numel(), max(1, packet.numel() // 200)):
        damaged = packet.clone()
        damaged[position] ^= 0x41
        with pytest.raises(CorruptPacket):
            codec.decode(damaged, torch.empty_like(x), side=side)


@pytest.mark.parametrize(("spec", "kernel"), with_kernels(*SPECS))
@settings(max_examples=15, deadline=None)
@given(numel=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_damage_without_a_checksum_never_leaves_the_output(
    spec: str, kernel: str, numel: int, seed: int
) -> None:
    codec, draw = make_codec(spec, kernel=kernel, checksum=False), random.Random(seed)
    x = gradient_like(numel, torch.float32, 8)
    side = side_for(spec, x)
    # All kernels write these bytes, and the reference takes the most time.
    whole = make_codec(spec, checksum=False).encode(x, side)
    for _ in range(4):
        packet = whole.clone()
        for _ in range(draw.randint(1, 4)):
            reach = draw.choice((100, packet.numel()))  # half of the damage is where the sizes are written
            packet[draw.randrange(min(reach, packet.numel()))] = draw.choice((0, 255, draw.randrange(256)))
        room = torch.full((numel + 512,), 3.0)
        try:
            codec.decode(packet, room[256:-256], side=side)
        except CorruptPacket:
            pass
        assert (room[:256] == 3).all() and (room[-256:] == 3).all()


@pytest.mark.parametrize("spec", SPECS)
def test_another_side_is_refused(spec: str) -> None:
    codec = make_codec(spec)
    x = torch.randn(1000)
    packet = codec.encode(x, side_for(spec, x, Side(segments=(400, 600))))
    with pytest.raises(SideMismatch):
        codec.decode(packet, torch.empty(1000), side=side_for(spec, x, Side(segments=(600, 400))))
    with pytest.raises(SideMismatch):
        codec.decode(packet, torch.empty(1000))
    with pytest.raises(ValueError, match="sums to 999"):
        codec.encode(x, Side(segments=(400, 599)))


@pytest.mark.parametrize("kernel", [kernel for kernel in registry.KERNELS if kernel != "triton"])
def test_a_kernel_is_what_was_asked_for_or_refused(kernel: str) -> None:
    native = [f"native-{isa}" for isa in available_isas()]
    cpu = torch.device("cpu")
    if kernel in ("auto", "native"):
        assert make_codec("bits:2.0", kernel=kernel).kernel_for(cpu) == native[0]
    elif kernel == "reference" or f"native-{kernel}" in native:
        assert make_codec("bits:2.0", kernel=kernel).kernel_for(cpu).removeprefix("native-") == kernel
    else:
        with pytest.raises(ConfigError, match="cannot use the instruction set"):
            make_codec("bits:2.0", kernel=kernel)


def test_triton_on_cpu_tensors_needs_the_interpreter() -> None:
    program = """
import torch
from efficient_dl.codec import make_codec
from efficient_dl.errors import ConfigError
for spec in ("bits:2.0", "lossless", "int8"):
    try:
        make_codec(spec, kernel="triton")
    except ConfigError as error:
        print(str(error).replace("\\n", " "))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("TRITON_INTERPRET=1" in line for line in lines[:2])
    assert "no Triton kernel" in lines[2]


@pytest.mark.parametrize("spec", SPECS)
def test_wrong_tensors_are_refused_with_a_reason(spec: str) -> None:
    codec = make_codec(spec)
    with pytest.raises(UnsupportedTensor, match="float64"):
        codec.encode(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(UnsupportedTensor, match="contiguous"):
        codec.encode(torch.zeros(4, 4).t())
    with pytest.raises(ValueError, match="max_bytes"):
        codec.encode_into(torch.zeros(4), torch.empty(3, dtype=torch.uint8))
    with pytest.raises(CorruptPacket, match="numel"):
        codec.decode(codec.encode(torch.zeros(4), side_for(spec, torch.zeros(4))), torch.empty(5))


@pytest.mark.parametrize("spec", SPECS)
def test_encode_into_writes_what_encode_returns(spec: str) -> None:
    codec = make_codec(spec)
    x = gradient_like(5000, torch.bfloat16, 2).view(50, 100)
    room = torch.full((codec.max_bytes(5000, torch.bfloat16) + 64,), 9, dtype=torch.uint8)
    side = side_for(spec, x)
    count = codec.encode_into(x, room, side)
    assert count.dtype == torch.int64 and count.dim() == 0
    assert torch.equal(room[: int(count)], codec.encode(x, side))
    assert (room[-64:] == 9).all()
