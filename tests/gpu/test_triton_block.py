"""The block quantizer's GPU kernels against the reference: the same packets, residuals, values and refusals.

They run on a GPU, and on the CPU in Triton's interpreter (see tests/gpu/conftest.py), which is slow: small tensors.
"""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys

import pytest
import torch

from efficient_dl.codec import Codec, PacketStats, Side, make_codec
from efficient_dl.codec.kernels.reference import block
from efficient_dl.codec.kernels.reference.block_grid import BlockGrid
from efficient_dl.codec.kernels.reference.symbols import PAIRS, SINGLES, Mode
from efficient_dl.codec.packet import write_header
from efficient_dl.errors import CorruptPacket, SideMismatch

SPECS = ("bits:2.0", "bits:7.0")  # pairs and single values, both with escapes
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
SIDE = Side(segments=(3000, 0, 1, 700, 16, 17, 2266, 100))
NUMEL = 6100


def codec_on(device: str, spec: str) -> Codec:
    codec = make_codec(spec, kernel="triton" if device == "cpu" else "auto", checksum=False)
    assert codec.kernel_for(torch.device(device)) == "triton"
    return codec


def reference(spec: str) -> Codec:
    return make_codec(spec, kernel="reference", checksum=False)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().view(INTEGERS[x.element_size()])


def mixed(numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Heavy tails that need escapes, blocks of zeros and of denormals, values that are not finite."""
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator) * torch.randn(numel, generator=generator)
    x *= torch.exp(torch.randn(numel // 256 + 1, generator=generator)).repeat_interleave(256)[:numel]
    x[5::211] *= 30
    x[1024:1536] = 0
    x[2048:2304] *= 1e-44
    x[400:700:150] = torch.tensor([float("inf"), float("nan")])
    x[numel // 3] = -0.0
    return x.to(dtype)


def wide(numel: int) -> torch.Tensor:
    """Scales 170 octaves apart: the blocks more than 63 under the largest are not sent."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(3))
    x[7::100] *= 50
    return x * torch.logspace(-110, 60, numel // 256 + 1, base=2.0).repeat_interleave(256)[:numel]


def sparse(numel: int, live: tuple[int, ...]) -> torch.Tensor:
    """Zeros but for some blocks."""
    x = torch.zeros(numel)
    for b in live:
        part = x[256 * b : 256 * (b + 1)]
        part.copy_(torch.randn(part.numel(), generator=torch.Generator().manual_seed(b)) * (1 + b % 7))
    return x


def check_same(spec: str, device: str, x: torch.Tensor, side: Side | None = None) -> torch.Tensor:
    """Both encoders give one packet, and the kernels decode it to the same bits; returns it, on the CPU."""
    codec = codec_on(device, spec)
    expected = reference(spec).encode(x, side)
    packet = codec.encode(x.to(device), side)
    assert torch.equal(packet.cpu(), expected)
    values, out = torch.empty_like(x), torch.full_like(x, 7.0).to(device)
    reference(spec).decode(expected, values, side=side)
    codec.decode(packet, out, side=side)
    assert torch.equal(bits_of(out), bits_of(values))
    return expected


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        *((spec, torch.float32) for spec in SPECS),
        *zip(SPECS, (torch.bfloat16, torch.float16), strict=True),
        *zip(SPECS, FLOAT8, strict=True),
    ],
)
def test_packets_are_those_of_the_reference(spec: str, dtype: torch.dtype, device: str) -> None:
    check_same(spec, device, mixed(NUMEL, dtype), SIDE)


@pytest.mark.parametrize("spec", ["bits:0.3", "bits:2.0", "bits:7.0"])
@pytest.mark.parametrize("numel", [1, 16, 300, 1000])
def test_tiny_tensors_are_stored_alike(spec: str, numel: int, device: str) -> None:
    check_same(spec, device, torch.randn(numel, generator=torch.Generator().manual_seed(numel)))


def test_tensors_without_a_coded_block(device: str) -> None:
    check_same("bits:2.0", device, torch.zeros(700))
    check_same("bits:2.0", device, torch.full((700,), float("nan"), dtype=torch.bfloat16))
    check_same("bits:2.0", device, torch.empty(0))


@pytest.mark.parametrize("spec", SPECS)
def test_blocks_out_of_the_codes_range_are_taken_back(spec: str, device: str) -> None:
    x, r = wide(1700), wide(1700).flip(0) * 2.0**-40
    check_same(spec, device, x)
    for residual in (torch.zeros(1700), r):
        check_residual(spec, device, x, residual, None)


def check_residual(
    spec: str,
    device: str,
    x: torch.Tensor,
    residual: torch.Tensor,
    capacity: int | None,
    side: Side | None = None,
) -> torch.Tensor:
    packets: list[torch.Tensor] = []
    residuals: list[torch.Tensor] = []
    for codec, where in ((reference(spec), "cpu"), (codec_on(device, spec), device)):
        room_bytes = codec.max_bytes(x.numel(), x.dtype, side) if capacity is None else capacity
        room = torch.zeros(room_bytes, dtype=torch.uint8, device=where)
        left = residual.to(where, copy=True)
        count = codec.encode_into(x.to(where), room, side, residual=left, capacity=capacity)
        assert count.dtype == torch.int64 and count.dim() == 0 and count.device == room.device
        packets.append(room[: int(count)].cpu())
        residuals.append(left)
    assert torch.equal(packets[0], packets[1])
    assert torch.equal(bits_of(residuals[0]), bits_of(residuals[1]))
    return packets[1]


@pytest.mark.parametrize(("spec", "dtype"), [("bits:2.0", torch.float32), ("bits:4.0", torch.bfloat16)])
def test_residuals_are_those_of_the_reference(spec: str, dtype: torch.dtype, device: str) -> None:
    residual = torch.randn(NUMEL, generator=torch.Generator().manual_seed(8)) * 0.1
    check_residual(spec, device, mixed(NUMEL, dtype), residual, None, SIDE)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "tile"), [("bits:2.0", 512), ("bits:4.0", 256)])
def test_tiles_that_do_not_fit_are_dropped(spec: str, tile: int, device: str) -> None:
    numel = 256 * tile + 3000
    x = sparse(numel, (1, 2, 3, 40, *range(60, 70), *range(tile, tile + 11)))
    fixed, whole = reference(spec).fixed_bytes(numel), reference(spec).encode(x).numel()
    dropped: list[int] = []
    for capacity in (fixed, fixed + (whole - fixed) * 2 // 3):
        packet = check_residual(spec, device, x, torch.zeros(numel), capacity)
        room = torch.zeros(capacity, dtype=torch.uint8)
        room[: packet.numel()] = packet
        values, out = torch.empty(numel), torch.empty(numel, device=device)
        reference(spec).decode(room, values)
        codec_on(device, spec).decode(room.to(device), out)
        assert torch.equal(bits_of(out), bits_of(values))
        dropped.append(int.from_bytes(packet[56:60].numpy().tobytes(), "little"))
    assert dropped[0] > dropped[1]


@pytest.mark.parametrize("mode", [PAIRS, SINGLES], ids=["pairs", "singles"])
def test_tiles_of_any_size_are_decoded(mode: Mode, device: str) -> None:
    x = mixed(70 * 256 + 77)
    small = dataclasses.replace(mode, fewest_tile_blocks=64)
    body = block.encode(x, BlockGrid((x.numel(),), x.device), small, 16 << 16, None)
    packet = torch.cat([torch.zeros(32, dtype=torch.uint8), body])
    write_header(packet, body.numel(), 2, 0, x.numel(), None, False)
    values, out = torch.empty_like(x), torch.empty_like(x, device=device)
    reference("bits:2.0").decode(packet, values)
    codec_on(device, "bits:2.0").decode(packet.to(device), out)
    assert torch.equal(bits_of(out), bits_of(values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, *FLOAT8])
def test_decoding_adds_and_widens(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(1500, generator=torch.Generator().manual_seed(1)).to(dtype)
    packet, codec = reference("bits:2.0").encode(x), codec_on(device, "bits:2.0")
    for start in (torch.randn(1500), torch.randn(1500).to(dtype)):
        expected, out = start.clone(), start.to(device, copy=True)
        reference("bits:2.0").decode(packet, expected, accumulate=True)
        codec.decode(packet.to(device), out, accumulate=True)
        assert torch.equal(bits_of(out), bits_of(expected))


def test_buffers_may_begin_anywhere(device: str) -> None:
    x, codec = mixed(1500), codec_on(device, "bits:2.0")
    room = torch.zeros(codec.max_bytes(1500, x.dtype) + 1, dtype=torch.uint8, device=device)
    count = int(codec.encode_into(x.to(device), room[1:]))
    assert torch.equal(room[1 : 1 + count].cpu(), reference("bits:2.0").encode(x))
    out, values = torch.empty(1500, device=device), torch.empty(1500)
    codec.decode(room[1 : 1 + count], out)
    reference("bits:2.0").decode(room[1 : 1 + count].cpu(), values)
    assert torch.equal(bits_of(out), bits_of(values))


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_damaged_packets_are_refused_or_decode_alike(spec: str, device: str) -> None:
    x, draw = mixed(2600), random.Random(spec)
    packet, codec = reference(spec).encode(x), codec_on(device, spec)
    fields = [*range(32, 60), 60, 64, 70, 72, 80, 110, 200, 900, packet.numel() - 1]
    refused = 0
    for position in [*draw.sample(fields, 14), *draw.choices(range(packet.numel()), k=4)]:
        damaged = packet.clone()
        damaged[position] ^= draw.choice((1, 2, 64, 255))
        values, room = torch.empty_like(x), torch.full((x.numel() + 512,), 3.0, device=device)
        try:
            reference(spec).decode(damaged, values)
        except CorruptPacket:
            refused += 1
            with pytest.raises(CorruptPacket):
                codec.decode(damaged.to(device), room[256:-256])
        else:
            codec.decode(damaged.to(device), room[256:-256])
            assert torch.equal(bits_of(room[256:-256]), bits_of(values)), position
        assert (room[:256] == 3).all() and (room[-256:] == 3).all()
    assert refused > 4


def test_headers_and_checksums_are_verified(device: str) -> None:
    x, codec = torch.randn(1000), codec_on(device, "bits:2.0")
    packet, out = make_codec("bits:2.0", kernel="reference").encode(x), torch.empty(1000, device=device)
    codec.decode(packet.to(device), out)
    for position in (0, 4, 5, 6, 7, 8, 16, 24, 31, packet.numel() - 1):
        damaged = packet.clone()
        damaged[position] ^= 0x41
        with pytest.raises(CorruptPacket):
            codec.decode(damaged.to(device), out)
    with pytest.raises(CorruptPacket):
        codec.decode(packet[:-4].to(device), out)
    with pytest.raises(SideMismatch):
        codec.decode(packet.to(device), out, side=Side(segments=(400, 600)))


@pytest.mark.parametrize("spec", SPECS)
def test_stats_are_those_of_the_reference(spec: str, device: str) -> None:
    x, expected, found = mixed(NUMEL), PacketStats(), PacketStats()
    reference(spec).encode(x, SIDE, stats=expected)
    codec_on(device, spec).encode(x.to(device), SIDE, stats=found)
    for field in dataclasses.fields(PacketStats):
        if field.name != "kernel":
            assert getattr(found, field.name) == pytest.approx(getattr(expected, field.name)), field.name
    assert found.kernel == "triton" and found.escapes > 0


def run_python(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_is_imported_only_when_it_is_used() -> None:
    code = "import sys, torch; from efficient_dl.codec import make_codec; "
    code += "make_codec('bits:2.0', kernel='reference').encode(torch.ones(9)); print('triton' in sys.modules)"
    assert run_python(code).strip() == "False"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, *FLOAT8])
@pytest.mark.parametrize("spec", ["bits:0.5", "bits:1.0", "bits:2.0", "bits:4.0", "bits:7.0"])
def test_many_tiles_on_a_gpu(spec: str, dtype: torch.dtype) -> None:
    check_same(spec, "cuda", mixed(3_000_001, dtype))
    check_residual(spec, "cuda", wide(400_000), wide(400_000).flip(0), None)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*SPECS, "lossless", "identity"])
def test_encoding_does_not_wait_for_the_device(spec: str) -> None:
    codec, side = make_codec(spec), Side(segments=(70_000, 1, 29_999))
    x = mixed(100_000).cuda()
    room = torch.empty(codec.max_bytes(x.numel(), x.dtype, side), dtype=torch.uint8, device="cuda")
    codec.encode_into(x, room, side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        count = codec.encode_into(x, room, side)
        other_side = Side(segments=(50_000, 50_000))
        codec.encode_into(x, room[: room.numel()], other_side)
        count = codec.encode_into(x, room, side)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = make_codec(spec, kernel="reference", checksum=False).encode(x.cpu(), side)
    assert torch.equal(room[: int(count)].cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*SPECS, "lossless"])
def test_a_cuda_graph_encodes_and_decodes_what_is_new(spec: str) -> None:
    codec, side = make_codec(spec), Side(segments=(70_000, 1, 29_999))
    x, out = mixed(100_000).cuda(), torch.empty(100_000, device="cuda")
    room = torch.empty(codec.max_bytes(x.numel(), x.dtype, side), dtype=torch.uint8, device="cuda")
    residual = None if codec.exact else torch.zeros_like(x)
    codec.encode_into(x, room, side, residual=residual)
    packet = codec.encode(x, side)
    codec.decode(packet, out, side=side)
    encoding, decoding = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(encoding):
        count = codec.encode_into(x, room, side, residual=residual)
    with torch.cuda.graph(decoding):
        codec.decode(packet, out, side=side)
    for seed in range(3):
        x.copy_(torch.randn(100_000, generator=torch.Generator().manual_seed(seed)) * (seed + 1))
        if residual is not None:
            residual.zero_()
        encoding.replay()
        expected = make_codec(spec, kernel="reference", checksum=False).encode(x.cpu(), side)
        assert torch.equal(room[: int(count)].cpu(), expected)
    decoding.replay()
    values = torch.empty(100_000)
    make_codec(spec, kernel="reference", checksum=False).decode(packet.cpu(), values, side=side)
    assert torch.equal(bits_of(out), bits_of(values))
    packet[9] ^= 1
    decoding.replay()
    assert out.isnan().all()
