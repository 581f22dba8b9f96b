"""The compiled kernels: equal bytes on every instruction set, exact arithmetic, safe with any bytes."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from efficient_dl.codec import PacketStats
from efficient_dl.codec.kernels.native import library
from efficient_dl.codec.kernels.native.bodies import NativeBlock, NativeSplit
from efficient_dl.codec.kernels.native.interface import NativeLibrary, float_array
from efficient_dl.codec.kernels.native.library import available_isas, load_library
from efficient_dl.codec.kernels.reference.bodies import ReferenceBlock, ReferenceSplit
from efficient_dl.codec.steps import STEPS
from efficient_dl.errors import ConfigError, CorruptPacket, NativeLibraryMissing
from tests.unit.native_build import (
    DRIVERS,
    NATIVE,
    Sanitized,
    compiler,
    run,
    vector_flags,
)

ISAS = available_isas()

Body = NativeSplit | NativeBlock | ReferenceSplit | ReferenceBlock


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def laplace_like(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=seeded(seed)) * torch.randn(numel, generator=seeded(seed + 1))


def encoded(kernel: Body, x: Tensor, segments: tuple[int, ...] | None = None) -> Tensor:
    segments = segments or (x.numel(),)
    room = torch.full((kernel.max_bytes(x.numel(), x.dtype, len(segments)),), 0xEE, dtype=torch.uint8)
    return room[: kernel.encode(x, segments, room, None)]


def decoded(kernel: Body, body: Tensor, like: Tensor, segments: tuple[int, ...] | None = None) -> Tensor:
    out = torch.full_like(like, 3.0)
    kernel.decode(body, like.dtype, segments or (like.numel(),), out, False)
    return out


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def exponents_of_both_halves() -> Tensor:
    """Values whose exponent bytes share low 7 bits: small and huge ones, and zeros."""
    exponent = torch.randint(-60, 60, (40_000,), generator=seeded(1)).float()
    x = torch.ldexp(laplace_like(40_000), torch.where(exponent < -40, -127 - exponent, exponent))
    x[::7] = 0
    return x


def widely_scaled() -> Tensor:
    """Blocks whose steps are too far apart for one byte: the finest become empty."""
    scale = torch.linspace(-110, 110, 600).repeat_interleave(256)
    return torch.ldexp(laplace_like(600 * 256), scale.round())


def spiky() -> Tensor:
    x = laplace_like(70_000) * 1e-3
    x[::50] *= 1e4
    return x


def special_tensors() -> Iterator[tuple[str, Tensor]]:
    yield "exponents of both halves", exponents_of_both_halves()
    yield "scales far apart", widely_scaled()
    yield "many escapes", spiky()
    yield "one symbol", torch.full((33_000,), -0.0)
    yield "denormals", (torch.arange(40_000) % 1000).int().view(torch.float32)
    yield "two planes", (laplace_like(40_000).view(torch.int32) & ~0xFF).view(torch.float32)
    yield "one plane", laplace_like(40_000).bfloat16().float()
    yield "bfloat16", laplace_like(70_000).bfloat16()
    yield "float16 with denormals", (laplace_like(70_000) * 1e-4).half()
    yield "dominated by one symbol", laplace_like(100_000) * (torch.rand(100_000, generator=seeded(2)) < 0.02)


@pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in special_tensors()])
def test_special_tensors_give_the_reference_bytes(x: Tensor) -> None:
    pairs: list[tuple[Body, list[Body]]] = [(ReferenceSplit(), [NativeSplit(isa) for isa in ISAS])]
    for bits in (0.5, 2.0, 4.0):
        pairs.append((ReferenceBlock(bits), [NativeBlock(bits, isa) for isa in ISAS]))
    for reference, natives in pairs:
        expected = encoded(reference, x)
        values = decoded(reference, expected, x)
        for native in natives:
            assert torch.equal(encoded(native, x), expected)
            assert torch.equal(bits_of(decoded(native, expected, x)), bits_of(values))


def test_many_short_segments_give_the_reference_bytes() -> None:
    segments = (0, 1, 2, 255, 256, 257, 0, 1000, *([3] * 2000), 70_000, 0)
    x = laplace_like(sum(segments))
    for bits in (1.0, 3.0):
        expected = encoded(ReferenceBlock(bits), x, segments)
        for native in (NativeBlock(bits, isa) for isa in ISAS):
            assert torch.equal(encoded(native, x, segments), expected)
            out = decoded(native, expected, x, segments)
            assert torch.equal(out, decoded(ReferenceBlock(bits), expected, x, segments))


def test_a_caller_that_flushes_denormals_changes_nothing() -> None:
    x = (torch.arange(40_000) % 5000).int().view(torch.float32) * 2.0**4
    quiet = [encoded(kernel, x) for kernel in (NativeSplit(), NativeBlock(2.0))]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert all(
            torch.equal(encoded(kernel, x), body)
            for kernel, body in zip((NativeSplit(), NativeBlock(2.0)), quiet, strict=True)
        )
        out = decoded(NativeBlock(2.0), quiet[1], x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out, decoded(NativeBlock(2.0), quiet[1], x))


@pytest.mark.parametrize(
    ("dtype", "nan"), [(torch.float32, 0x7FC00000), (torch.bfloat16, 0x7FC0), (torch.float16, 0x7E00)]
)
def test_a_nonfinite_block_has_one_bit_pattern(dtype: torch.dtype, nan: int) -> None:
    x = laplace_like(1000).to(dtype)
    x[300] = -torch.inf
    for kernel in (NativeBlock(2.0, isa) for isa in ISAS):
        out = decoded(kernel, encoded(kernel, x), x)
        assert (bits_of(out[256:512]) == nan).all()
        out = torch.zeros_like(x)
        kernel.decode(encoded(kernel, x), dtype, (1000,), out, True)
        assert (bits_of(out[256:512]) == nan).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [NativeSplit, NativeBlock])
def test_every_instruction_set_rounds_sums_alike(
    kernel: type[NativeSplit] | type[NativeBlock], dtype: torch.dtype
) -> None:
    x, start = laplace_like(5000, 3).to(dtype), (laplace_like(5000, 5) * 1e-3).to(dtype)
    totals: list[Tensor] = []
    for isa in ISAS:
        body_kernel = NativeSplit(isa) if kernel is NativeSplit else NativeBlock(2.0, isa)
        for out in (start.clone(), start.to(torch.float32, copy=True)):
            body_kernel.decode(encoded(body_kernel, x), dtype, (5000,), out, True)
            totals.append(out)
    for i, total in enumerate(totals):
        assert torch.equal(total, totals[i % 2])


def test_stats_agree_between_instruction_sets_and_with_the_packet() -> None:
    x = spiky()
    reports: list[PacketStats] = []
    for isa in ISAS:
        for kernel in (NativeSplit(isa), NativeBlock(2.0, isa)):
            stats = PacketStats()
            room = torch.empty(kernel.max_bytes(x.numel(), x.dtype, 1), dtype=torch.uint8)
            body_bytes = kernel.encode(x, (x.numel(),), room, stats)
            assert 8 * body_bytes >= stats.model_bits + stats.header_bits
            reports.append(stats)
    assert all(report == reports[i % 2] for i, report in enumerate(reports))
    assert reports[1].escapes > 0


@pytest.mark.parametrize("isa", ISAS)
def test_every_cut_raises_and_no_byte_crashes(isa: str) -> None:
    x = torch.cat([laplace_like(700), torch.zeros(300), spiky()[:2000]])
    for kernel in (NativeSplit(isa), NativeBlock(2.0, isa), NativeBlock(4.0, isa)):
        body = encoded(kernel, x)
        for length in range(0, body.numel(), 1 if body.numel() < 1500 else 7):
            with pytest.raises(CorruptPacket):
                decoded(kernel, body[:length].clone(), x)
        with pytest.raises(CorruptPacket, match="left over"):
            decoded(kernel, torch.cat([body, body[:4]]), x)
        for position in range(body.numel()):
            damaged = body.clone()
            damaged[position] ^= 0x55
            try:
                decoded(kernel, damaged, x)
            except CorruptPacket:
                pass


def test_stored_symbols_outside_of_the_alphabet_are_refused() -> None:
    x = laplace_like(100)
    body = encoded(NativeBlock(2.0), x)
    # 28 bytes of parameters, a code and padding, no table; the directory's only entry says: stored.
    assert body[36] & 1 == 0
    body[40] = 122
    for kernel in (NativeBlock(2.0, isa) for isa in ISAS):
        with pytest.raises(CorruptPacket, match="alphabet"):
            decoded(kernel, body, x)


def test_the_instruction_set_belongs_to_the_codec_not_to_the_process() -> None:
    x = laplace_like(300_000)
    kernels = [NativeBlock(2.0, isa) for isa in ("auto", *ISAS)] * 2
    assert [kernel.name for kernel in kernels] == [f"native-{isa}" for isa in (ISAS[0], *ISAS)] * 2
    expected = encoded(kernels[0], x)
    with ThreadPoolExecutor(4) as pool:
        assert all(
            torch.equal(body, expected) for body in pool.map(lambda kernel: encoded(kernel, x), kernels)
        )


def test_wrong_arguments_are_refused() -> None:
    native = load_library()
    x, room = laplace_like(5000), torch.zeros(30_000, dtype=torch.uint8)
    with pytest.raises(ValueError, match="too small"):
        native.split_encode(x.data_ptr(), 5000, 0, room.data_ptr(), 100)
    with pytest.raises(ValueError, match="argument"):
        native.split_encode(x.data_ptr(), 5000, 5, room.data_ptr(), 30_000)
    with pytest.raises(ValueError, match="argument"):
        native.split_max_bytes(2**31, 0)
    with pytest.raises(ValueError, match="argument"):
        native.block_decode(room.data_ptr(), 100, 0, 5000, (4000, 999), x.data_ptr(), 0, False)
    with pytest.raises(ConfigError, match=f"instruction set 'sse9'(.|\n)*kernels up to '{ISAS[0]}'"):
        load_library("sse9")


@pytest.mark.parametrize("isa", ISAS)
def test_rates_outside_of_the_block_quantizers_range_are_refused(isa: str) -> None:
    native, steps = load_library(isa), float_array(STEPS)
    x, room = laplace_like(5000), torch.zeros(60_000, dtype=torch.uint8)

    def encode(bits_q16: int) -> int:
        return native.block_encode(
            x.data_ptr(), 5000, 0, None, (5000,), bits_q16, steps, None, room.data_ptr(), 60_000
        )

    for bits_q16 in (-1, 0, 16, 6553, 2**21 + 1):
        with pytest.raises(ValueError, match="argument"):
            native.block_max_bytes(5000, 1, bits_q16)
        with pytest.raises(ValueError, match="argument"):
            native.block_fixed_bytes(5000, (5000,), bits_q16)
        with pytest.raises(ValueError, match="argument"):
            encode(bits_q16)
    for bits_q16 in (6554, 2**21):
        body_bytes = encode(bits_q16)
        assert native.block_fixed_bytes(5000, (5000,), bits_q16) <= native.block_max_bytes(5000, 1, bits_q16)
        assert body_bytes <= native.block_max_bytes(5000, 1, bits_q16)
        native.block_decode(room.data_ptr(), body_bytes, 0, 5000, (5000,), x.data_ptr(), 0, False)


def test_an_empty_cast_has_an_empty_body() -> None:
    native = load_library()
    assert native.cast_encode(0, 0, 0, 1, 0, 0) == 0
    native.cast_decode(0, 0, 1, 0, 0, 0, False)
    rest = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(CorruptPacket, match="left over"):
        native.cast_decode(rest.data_ptr(), 4, 1, 0, 0, 0, False)


def test_the_instruction_sets_are_those_of_this_processor() -> None:
    flags = Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" else ""
    assert ISAS[-1] == "portable"
    assert ("avx2" in ISAS) == (" avx2 " in flags)
    assert ("avx512" in ISAS) == (" avx512_vbmi2 " in flags)


def test_a_missing_or_foreign_library_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NativeLibraryMissing, match=r"build\.sh"):
        load_library("auto", tmp_path / "nothing.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(NativeLibraryMissing, match="cannot be loaded"):
        load_library("auto", tmp_path / "text.so")
    for name, wanted in (("ABI_VERSION", "interface 999"), ("FORMAT_VERSION", "packets of version 999")):
        copy = shutil.copy(library.find_library(), tmp_path / f"{name}.so")
        with monkeypatch.context() as patched, pytest.raises(NativeLibraryMissing, match=wanted):
            patched.setattr(library, name, 999)
            load_library("auto", Path(copy))


@pytest.mark.slow
def test_division_by_every_frequency_is_exact(tmp_path: Path) -> None:
    # Of this machine's sets alone: the compiler uses what it may wherever it likes.
    vector = [flag for isa in ISAS if isa != "portable" for flag in vector_flags(Path(f"rans_{isa}.cpp"))]
    program = tmp_path / "division"
    flags = ["-O3", "-std=c++20", "-pthread", "-ffp-contract=off", "-w", *vector]
    run(compiler(), *flags, DRIVERS / "division.cpp", NATIVE / "tables.cpp", "-o", program)
    assert run(program, *ISAS).startswith("ok ")


@pytest.mark.slow
@pytest.mark.xdist_group("built")
def test_build_script_builds_a_working_library(built_library: Path) -> None:
    built: NativeLibrary = load_library("auto", built_library)
    assert built.isa == load_library().isa
    x, room = laplace_like(5000), torch.empty(30_000, dtype=torch.uint8)
    size = built.split_encode(x.data_ptr(), 5000, 0, room.data_ptr(), 30_000)
    assert torch.equal(room[:size], encoded(NativeSplit(), x))


@pytest.mark.slow
@pytest.mark.xdist_group("sanitizers")
@pytest.mark.timeout(900)
def test_damaged_packets_are_harmless_under_sanitizers(sanitized: Sanitized, tmp_path: Path) -> None:
    program = sanitized.linked(DRIVERS / "fuzz.cpp", tmp_path / "fuzz")
    outcomes = {run(program, isa, "200", "7") for isa in ISAS}
    assert len(outcomes) == 1 and outcomes.pop().startswith("ok refused ")
