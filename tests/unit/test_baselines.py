"""The baselines: what each loses, what it keeps, and which bytes it refuses."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc

import lz4.block
import pytest
import torch
import zstandard
from torch import Tensor

from efficient_dl.codec import Codec, PacketStats, Side, codec_names, make_codec
from efficient_dl.codec.kernels.native.library import available_isas, set_num_threads
from efficient_dl.errors import ConfigError, CorruptPacket, PackageMissing

KERNELS = ("reference", "portable", "native")
HEADER_BYTES = 32


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decoded(codec: Codec, packet: Tensor, like: Tensor) -> Tensor:
    out = torch.full_like(like, 7.0)
    codec.decode(packet, out)
    return out


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def body_of(packet: Tensor) -> bytes:
    return packet[HEADER_BYTES:].numpy().tobytes()


def with_body(packet: Tensor, body: bytes) -> Tensor:
    """A packet without checksum whose body is replaced and whose length is right."""
    head = bytearray(packet[:HEADER_BYTES].numpy().tobytes())
    head[16:24] = struct.pack("<Q", HEADER_BYTES + len(body))
    return torch.frombuffer(head + body, dtype=torch.uint8)


def rounded_up_to_16_bits(step: Tensor) -> Tensor:
    return ((step.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("spec", "level"), [("int8", 127), ("int4", 7), ("int8:16", 127), ("int4:2048", 7)])
def test_integers_are_within_half_a_step_of_the_blocks_maximum(spec: str, level: int, kernel: str) -> None:
    block_values = int(spec.partition(":")[2] or 256)
    for exponent in (-100, 0, 100):
        x = torch.ldexp(torch.randn(5000, generator=seeded(1)), torch.tensor(exponent))
        codec = make_codec(spec, kernel=kernel)
        out = decoded(codec, codec.encode(x), x)
        for block, result in zip(x.split(block_values), out.split(block_values), strict=True):
            step = rounded_up_to_16_bits(block.abs().max() / level)
            assert ((result - block).abs() <= step / 2 * (1 + 1e-5)).all()
            assert torch.equal(result, (block / step).round() * step)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spec", ["int8", "int4", "sign"])
def test_the_largest_and_smallest_numbers_stay_finite(spec: str, kernel: str) -> None:
    codec = make_codec(spec, kernel=kernel)
    largest = torch.finfo(torch.float32).max
    for top in (largest, largest * 0.999, largest / 2):
        x = torch.tensor([top, -top, top])
        out = decoded(codec, codec.encode(x), x)
        assert out.isfinite().all() and torch.equal(out.sign(), x.sign())
        assert ((out / x - 1).abs() < 0.01).all()
    for tiny in (1e-45, 1e-38, 1.2e-38):
        x = torch.tensor([tiny, 0.0, -tiny])
        assert (decoded(codec, codec.encode(x), x) - x).abs().max() <= 2 * tiny


def test_int4_and_sign_pack_as_the_document_says() -> None:
    x = torch.tensor([7.0, -7.0, 0.0, 3.0, -1.0])
    assert body_of(make_codec("int4").encode(x)) == struct.pack("<IH", 256, 0x3F80) + bytes(
        [0x1F, 0xB8, 0x87]
    )
    assert body_of(make_codec("int8:8").encode(x * 127 / 7))[4:6] == struct.pack("<H", 0x3F80)
    x = torch.tensor([1.0, -1.0, -0.0, 0.0, -2.0, 2.0, 1.0, 1.0, -1.0])
    assert body_of(make_codec("sign").encode(x)) == struct.pack("<IH", 256, 0x3F80) + bytes([0b10110, 1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_sign_keeps_the_mean_magnitude(kernel: str) -> None:
    x = torch.randn(10_000, generator=seeded(2))
    for spec, blocks in (("sign", x.split(256)), ("sign:tensor", [x])):
        codec = make_codec(spec, kernel=kernel)
        for block, result in zip(
            blocks, decoded(codec, codec.encode(x), x).split(len(blocks[0])), strict=True
        ):
            mean = block.double().abs().mean().float()
            assert torch.equal(result, torch.copysign(mean.bfloat16().float(), block))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fraction", [1e-4, 0.003, 0.01, 0.2, 0.7, 1.0])
def test_topk_keeps_the_largest_and_of_equal_ones_the_first(
    fraction: float, dtype: torch.dtype, kernel: str
) -> None:
    codec = make_codec(f"topk:{fraction}", kernel=kernel)
    for x in (
        torch.randn(20_001, generator=seeded(3)).to(dtype),
        torch.randint(-3, 4, (20_001,), generator=seeded(4)).to(dtype),
        torch.full((20_001,), -1.5, dtype=dtype),
    ):
        count = max(1, round(fraction * 20_001))
        order = x.float().abs().sort(descending=True, stable=True).indices[:count]
        expected = torch.zeros_like(x)
        expected[order] = x[order]
        assert torch.equal(bits_of(decoded(codec, codec.encode(x), x)), bits_of(expected))


@pytest.mark.parametrize("kernel", KERNELS)
def test_topk_takes_the_smallest_form_of_positions(kernel: str) -> None:
    def mode_and_bytes(fraction: float, x: Tensor) -> tuple[int, int]:
        codec = make_codec(f"topk:{fraction}", kernel=kernel)
        packet = codec.encode(x)
        assert torch.equal(decoded(codec, packet, x).nonzero(), x.nonzero())
        return struct.unpack_from("<4xII", body_of(packet))

    x = torch.zeros(200_000)
    x[torch.arange(0, 200_000, 100)] = 1.0
    assert mode_and_bytes(0.01, x) == (0, 2000)
    x = torch.zeros(200_000)
    x[torch.arange(999, 200_000, 1000)] = 1.0
    assert mode_and_bytes(0.001, x) == (1, 400)
    x = torch.zeros(200_000)
    x[::4] = 1.0
    assert mode_and_bytes(0.25, x) == (2, 25_000)
    # Gaps of 65,535 and more, and of exactly 255 and 65,535 places.
    for last in (255, 256, 65_535, 65_536, 131_071, 199_999):
        x = torch.zeros(200_000)
        x[[0, last]] = 1.0
        assert mode_and_bytes(2 / 200_000, x)[0] in (0, 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_topk_keeps_nonfinite_values_bit_for_bit(kernel: str) -> None:
    x = torch.randn(1000, generator=seeded(5))
    x[[10, 500]] = torch.tensor([float("inf"), float("-inf")])
    bits_of(x)[700] = 0x7F812345
    codec = make_codec("topk:0.003", kernel=kernel)
    out = decoded(codec, codec.encode(x), x)
    assert torch.equal(bits_of(out)[[10, 500, 700]], bits_of(x)[[10, 500, 700]])
    assert out.count_nonzero() == 3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("spec", "wire"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_casts_round_as_torch_does(spec: str, wire: torch.dtype, kernel: str) -> None:
    codec = make_codec(spec, kernel=kernel)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ldexp(torch.randn(5000, generator=seeded(6)), torch.arange(5000) % 60 - 40).to(dtype)
        x[:4] = torch.tensor([float("inf"), float("-inf"), 65519.0, 65520.0]).to(dtype)
        packet = codec.encode(x)
        assert body_of(packet) == bits_of(x.to(wire)).numpy().tobytes()
        assert torch.equal(decoded(codec, packet, x), x.to(wire).to(dtype))
    x = torch.full((300,), float("nan"))
    bits_of(x)[::3] = -1
    assert set(bits_of(decoded(codec, codec.encode(x), x)).tolist()) == {0x7FC00000}


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("spec", ["int8", "int4:64", "sign", "sign:tensor", "topk:0.01", "bf16"])
def test_the_number_of_threads_changes_nothing(spec: str) -> None:
    x = torch.randn(700_000, generator=seeded(7))
    side = Side(segments=(1, 99_999, *[7] * 10_000, 130_000, 400_000))
    results: list[tuple[Tensor, Tensor]] = []
    for count in (1, 3):
        set_num_threads(count)
        codec, out = make_codec(spec, kernel="native"), torch.empty_like(x)
        packet = codec.encode(x, side)
        codec.decode(packet, out, side=side)
        results.append((packet, out))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    reference = make_codec(spec, kernel="reference").encode(x, side)
    assert torch.equal(reference, results[0][0])


def damaged_bodies(spec: str) -> list[bytes]:
    if spec in ("int8", "int4", "sign"):
        x = torch.randn(301, generator=seeded(8))
        body = bytearray(body_of(make_codec(spec).encode(x)))
        scales, values = 4, 4 + 2 * 2
        bad: list[bytes] = [body + b"\0", bytes(body[:-1])]
        edits = [(0, 255), (scales + 1, 0xBF), (scales + 1, 0x7F)]  # block size, negative, infinite
        edits += {"int8": [(values, 0x80)], "int4": [(values, 0x70), (len(body) - 1, 0x18)]}.get(
            spec, [(len(body) - 1, 0x20)]
        )
        for position, value in edits:
            copy = bytearray(body)
            copy[position] = value
            if value == 0x7F:
                copy[scales] = 0x80
            bad.append(bytes(copy))
        return bad
    # topk:0.01 of 301 values: 3 positions.
    values = struct.pack("<3f", 1, 2, 3)

    def body(count: int, mode: int, positions: bytes, num_bytes: int | None = None) -> bytes:
        head = struct.pack("<III", count, mode, len(positions) if num_bytes is None else num_bytes)
        return head + positions + bytes(-len(positions) % 4) + values

    bitmap = bytes([7]) + bytes(37)
    return [
        body(2, 0, bytes([1, 2])),  # another count
        body(3, 3, bytes([1, 2, 3])),  # no such mode
        body(3, 0, bytes([1, 2])),  # too few
        body(3, 0, bytes([1, 2, 3, 4])),  # too many
        body(3, 0, bytes([1, 2, 255, 255, 3])),  # behind the end
        body(3, 0, bytes([1, 2, 3, 255])),  # ends with a skip
        body(3, 0, b""),
        body(3, 1, bytes([1, 0, 2, 0, 3])),  # half a word
        body(3, 0, bytes([1, 2, 3]), 2**32 - 1),  # longer than the packet
        body(3, 0, bytes([1, 2, 3]))[:15] + b"\1" + values,  # padding
        body(3, 2, bitmap[:-1]),  # a short bitmap
        body(3, 2, bytes([3]) + bitmap[1:]),  # too few bits
        body(3, 2, bytes([3]) + bitmap[1:-1] + b"\x20"),  # a bit behind the end
        body(3, 2, bytes(38)),
    ]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spec", ["int8", "int4", "sign", "topk:0.01"])
def test_bytes_that_no_encoder_writes_are_refused(spec: str, kernel: str) -> None:
    codec = make_codec(spec, kernel=kernel, checksum=False)
    x = torch.randn(301, generator=seeded(8))
    packet = codec.encode(x)
    codec.decode(with_body(packet, body_of(packet)), torch.empty(301))
    for body in damaged_bodies(spec):
        with pytest.raises(CorruptPacket):
            codec.decode(with_body(packet, body), torch.empty(301))


@pytest.mark.parametrize("kernel", ["reference", *available_isas()])
@pytest.mark.parametrize(("spec", "other"), [("int8", 0x01), ("int4", 0x89), ("sign", 0x01)])
def test_values_in_a_block_without_a_scale_are_refused(spec: str, other: int, kernel: str) -> None:
    codec = make_codec(spec, kernel=kernel, checksum=False)
    # An empty block between two others, and a short non-finite one.
    x = torch.cat([torch.randn(256, generator=seeded(10)), torch.zeros(256), torch.full((45,), 2.0)])
    x[520] = float("inf")
    packet = codec.encode(x)
    body = body_of(packet)
    assert struct.unpack_from("<3H", body, 4)[1:] == (0, 0x7FC0)
    out = decoded(codec, with_body(packet, body), x)
    assert (out[256:512] == 0).all() and out[512:].isnan().all()
    values_per_byte = {"int8": 1, "int4": 2, "sign": 8}[spec]
    for position in range(10 + 256 // values_per_byte, len(body)):
        damaged = bytearray(body)
        assert damaged[position] == (0x88 if spec == "int4" else 0)
        damaged[position] = other
        with pytest.raises(CorruptPacket):
            codec.decode(with_body(packet, damaged), torch.empty_like(x))


def piece(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content


@pytest.mark.parametrize("spec", ["zstd", "lz4"])
def test_compressed_packets_cannot_claim_more_than_their_tensor(spec: str) -> None:
    codec = make_codec(spec, checksum=False)
    x = torch.zeros(100_000)
    packet = codec.encode(x)
    bomb = bytes(200_000_000)
    if spec == "zstd":
        bombs = [zstandard.ZstdCompressor().compress(bomb)]
        stream = zstandard.ZstdCompressor(write_content_size=False)
        bombs += [stream.compress(bomb), stream.compress(bytes(400_000))]
        bombs.append(zstandard.ZstdCompressor().compress(bytes(400_000)) + b"\0")
    else:
        bombs = [lz4.block.compress(bomb, store_size=False), lz4.block.compress(bytes(400_000))]
    bombs.append(zstandard.ZstdCompressor().compress(bytes(399_996)))
    bombs.append(lz4.block.compress(bytes(399_996), store_size=False))
    del bomb
    out = torch.empty_like(x)
    bodies = [piece(content) for content in bombs]
    good = body_of(packet)
    bodies += [good[:-1], good + b"\0", b"", good[:3], struct.pack("<I", 1 << 31) + bytes(399_999)]
    tracemalloc.start()
    try:
        for body in bodies:
            with pytest.raises(CorruptPacket):
                codec.decode(with_body(packet, body), out)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4_000_000


@pytest.mark.parametrize("spec", ["zstd", "zstd:1", "zstd:19", "lz4"])
def test_compressors_shrink_what_repeats_and_store_what_does_not(spec: str) -> None:
    codec, stats = make_codec(spec), PacketStats()
    noise = torch.randint(-(2**31), 2**31, (20_000,), generator=seeded(9)).to(torch.int32).view(torch.float32)
    assert codec.encode(noise, stats=stats).numel() == HEADER_BYTES + 4 + 80_000
    repeats = torch.arange(20_000).remainder(50).float()
    assert codec.encode(repeats).numel() < 8_000


def test_importing_the_codecs_loads_no_compressor_and_a_missing_one_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = "import sys, efficient_dl.codec; print({'zstandard', 'lz4', 'lz4.block'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "lz4.block", None)
    for spec, package in (("zstd", "zstandard"), ("lz4", "lz4")):
        with pytest.raises(PackageMissing, match=f"pip install {package}"):
            make_codec(spec)
    make_codec("int8")


def test_specs_have_one_canonical_name_and_bad_ones_name_the_rule() -> None:
    canonical = {
        "int8:256": "int8",
        "int4:64": "int4:64",
        "sign:tensor": "sign:tensor",
        "topk:.5": "topk:0.5",
        "topk:1": "topk:1.0",
        "zstd:3": "zstd",
        "zstd:19": "zstd:19",
    }
    for spec, name in canonical.items():
        assert make_codec(spec).name == name
        assert make_codec(make_codec(spec).name).name == name
    for spec, message in {
        "int8:0": "multiple of 8",
        "int8:12": "multiple of 8",
        "int4:-8": "multiple of 8",
        "sign:99999999999": "multiple of 8",
        "sign:": "multiple of 8",
        "topk": "at most 1",
        "topk:0": "at most 1",
        "topk:1.5": "at most 1",
        "topk:nan": "at most 1",
        "zstd:0": "1 to 22",
        "zstd:23": "1 to 22",
        "zstd:fast": "1 to 22",
        "fp16:3": "takes no parameter",
        "lz4:": "takes no parameter",
        "int9": "did you mean 'int",
        "top:0.1": "did you mean 'topk:0.01'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            make_codec(spec)
    for name in ("int8", "int4:BLOCK", "topk:FRACTION", "sign", "fp16", "bf16", "zstd:LEVEL", "lz4"):
        assert name in codec_names()
