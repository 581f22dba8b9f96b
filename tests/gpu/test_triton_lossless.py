"""The exact codec's GPU kernels against the reference: the same packets, the same values, the same refusals.

They run on a GPU, and on the CPU in Triton's interpreter (see tests/gpu/conftest.py).
"""

from __future__ import annotations

import struct

import pytest
import torch

from efficient_dl.codec import Codec, PacketStats, make_codec
from efficient_dl.errors import CorruptPacket

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, *FLOAT8)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
TILE = 32768
REFERENCE = make_codec("lossless", kernel="reference", checksum=False)


def codec_on(device: str) -> Codec:
    codec = make_codec("lossless", kernel="triton" if device == "cpu" else "auto", checksum=False)
    assert codec.kernel_for(torch.device(device)) == "triton"
    return codec


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().view(INTEGERS[x.element_size()])


def gradient(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Scales that differ from block to block, zeros of both signs, and blocks of zeros."""
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator)
    scale = torch.exp(3 * torch.randn(numel // 256 + 1, generator=generator))
    scale[2::5] = 0
    x = x * scale.repeat_interleave(256)[:numel] * 1e-2
    x[torch.rand(numel, generator=generator) < 0.05] = 0
    return x.to(dtype)


def any_bits(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Every pattern may occur: tiles that are not worth coding."""
    generator = torch.Generator().manual_seed(numel)
    info = torch.iinfo(INTEGERS[dtype.itemsize])
    patterns = torch.randint(info.min, info.max + 1, (numel,), generator=generator, dtype=torch.int64)
    return patterns.to(INTEGERS[dtype.itemsize]).view(dtype)


def spread(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Escapes, infinities, NaNs with payloads and denormals among ordinary values."""
    x = gradient(numel, dtype)
    bits = bits_of(x)
    info = torch.iinfo(bits.dtype)
    top = info.max if dtype not in FLOAT8 else 127
    bits[3::97] = top  # a NaN with all payload bits
    bits[5::101] = top - (top >> 3)
    bits[7::103] = 1  # the smallest denormal
    bits[numel - 1] = 3
    bits[512:768] = torch.arange(1, 257).to(bits.dtype)  # nothing but denormals, or tiny numbers
    return bits.view(dtype)


def several_tiles(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """One that is coded, one without rows, one with a block only, and a short one that ends within a row."""
    x = torch.zeros(numel, dtype=torch.float32)
    x[1024:4000] = gradient(2976, torch.float32)
    x[2 * TILE + 300] = -1.5
    x[3 * TILE :] = gradient(numel - 3 * TILE, torch.float32)
    return x.to(dtype)


def dense(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """No zeros in the first eight blocks: their bytes in a plane are one run."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    x[:2048] += torch.where(x[:2048] < 0, -0.01, 0.01)
    x[2048::3] = 0
    x[numel - 20] = 1e-4
    return x.to(dtype)


def empty_tail(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """The last block with rows, whose plane travels in the states, is not the last block."""
    x = gradient(numel, dtype)
    x.view(INTEGERS[dtype.itemsize])[numel // 2 :] = 0
    return x


CASES = {
    "gradient": (gradient, 3 * 1024 + 77),
    "any bits": (any_bits, 3000),
    "spread": (spread, 3000),
    "several tiles": (several_tiles, 3 * TILE + 1333),
    "dense": (dense, 2999),
    "empty tail": (empty_tail, 5000),
    "two rows": (gradient, 256),
    "one value": (gradient, 1),
    "zeros": (lambda numel, dtype: torch.zeros(numel, dtype=dtype), 1111),
}


def check_same(x: torch.Tensor, device: str) -> torch.Tensor:
    """Both encoders give one packet, and the kernels decode it to the same bits; returns the packet."""
    codec = codec_on(device)
    packet = REFERENCE.encode(x)
    found = codec.encode(x.to(device))
    assert torch.equal(found.cpu(), packet)
    out = torch.full((x.numel(),), 0x55, dtype=INTEGERS[x.element_size()], device=device).view(x.dtype)
    codec.decode(found, out)
    assert torch.equal(bits_of(out), bits_of(x))
    return packet


TABLE_AT = 40  # in a packet


def directory_of(packet: torch.Tensor) -> list[tuple[int, ...]]:
    """(bytes, words, info) of every tile."""
    data = packet.numpy().tobytes()
    num_tiles, table_bytes = struct.unpack_from("<II", data, 32)
    first = TABLE_AT + table_bytes
    return [struct.unpack_from("<III", data, first + 12 * i) for i in range(num_tiles)]


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        pytest.param(dtype, case, marks=[pytest.mark.slow] if case == "several tiles" else [])
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e5m2)
        for case in CASES
    ]
    + [(dtype, case) for dtype in (torch.float16, torch.float8_e4m3fn) for case in ("gradient", "spread")],
    ids=str,
)
def test_the_packet_is_the_references(device: str, dtype: torch.dtype, case: str) -> None:
    make, numel = CASES[case]
    packet = check_same(make(numel, dtype), device)
    info = [entry[2] for entry in directory_of(packet)]
    # What the cases are for has to happen in them.
    if case in ("any bits", "one value", "zeros"):
        assert not any(info)
    if case in ("gradient", "several tiles", "empty tail") and dtype not in FLOAT8:
        assert info[0] & 1
    if case == "spread" and dtype not in FLOAT8:
        assert info[0] & 1 and info[0] >> 12
    if case == "several tiles":
        assert [entry[0] == 0 for entry in directory_of(packet)] == [False, True, False, False]


def test_low_planes_are_left_out_by_block(device: str) -> None:
    x = gradient(2500, torch.bfloat16).to(torch.float32)
    assert directory_of(check_same(x, device))[0][2] >> 8 & 15 == 0
    bits = x.view(torch.int32)
    bits[bits != 0] |= 0x100
    assert directory_of(check_same(x, device))[0][2] >> 8 & 15 == 1
    bits[1024:1100] |= 0x21
    bits[2400] |= 0x40
    assert directory_of(check_same(x, device))[0][2] >> 8 & 15 == 1 | 2 << 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulating_rounds_the_float32_sum(device: str, dtype: torch.dtype) -> None:
    codec, x = codec_on(device), spread(4000, dtype)
    packet = codec.encode(x.to(device))
    # Neighbours in size, so that sums need rounding, and every kind of value.
    before = torch.where(torch.arange(4000) % 3 == 0, any_bits(4000, dtype).to(torch.float32), 1.37)
    before = (before * x.to(torch.float32).abs().clamp(1e-6, 1e4)).to(dtype)
    for out_dtype in {dtype, torch.float32}:
        start = before.to(out_dtype)
        expected = (start.to(torch.float32) + x.to(torch.float32)).to(out_dtype)
        out = start.to(device)
        codec.decode(packet, out, accumulate=True)
        check_equal_numbers(out, expected)


@pytest.mark.parametrize("dtype", (pytest.param(torch.float16, marks=pytest.mark.slow), *FLOAT8), ids=str)
def test_every_value_decodes_to_float32(device: str, dtype: torch.dtype) -> None:
    count = 1 << 8 * dtype.itemsize
    x = torch.arange(count, dtype=torch.int32).to(INTEGERS[dtype.itemsize]).view(dtype)
    out = torch.zeros(count, device=device)
    codec_on(device).decode(REFERENCE.encode(x).to(device), out)
    check_equal_numbers(out, x.to(torch.float32))


def check_equal_numbers(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, but any NaN is a NaN."""
    nan = expected.to(torch.float32).isnan()
    assert torch.equal(found.cpu().to(torch.float32).isnan(), nan)
    assert torch.equal(bits_of(found)[~nan], bits_of(expected)[~nan])


def outcome(codec: Codec, packet: torch.Tensor, x: torch.Tensor, device: str) -> torch.Tensor | None:
    """The decoded bits, None if the packet was refused; memory around the output must be as it was."""
    guard = 4096
    room = torch.full((2 * guard + x.numel(),), 0x33, dtype=INTEGERS[x.element_size()], device=device)
    out = room[guard:-guard].view(x.dtype)
    try:
        codec.decode(packet.to(device), out)
        result = bits_of(out)
    except CorruptPacket:
        result = None
    assert bool((room[:guard] == 0x33).all()) and bool((room[-guard:] == 0x33).all())
    return result


def check_same_outcome(packet: torch.Tensor, x: torch.Tensor, device: str, where: str) -> bool:
    """Both decoders refuse the packet, or both decode it to the same bits; returns whether they refused."""
    expected = outcome(REFERENCE, packet, x, "cpu")
    found = outcome(codec_on(device), packet, x, device)
    assert (found is None) == (expected is None), where
    assert found is None or expected is None or torch.equal(found, expected), where
    return expected is None


def with_total(packet: torch.Tensor) -> torch.Tensor:
    """The packet, saying its own length."""
    packet = packet.clone()
    packet[16:24] = torch.tensor(list(struct.pack("<Q", packet.numel())), dtype=torch.uint8)
    return packet


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "has_escapes"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float8_e4m3fn, False)],
    ids=str,
)
def test_corrupt_packets_are_refused_as_by_the_reference(
    device: str, dtype: torch.dtype, has_escapes: bool
) -> None:
    x = gradient(2200, torch.float32)
    if has_escapes:
        x[300:310] = 1e30
        x[310:320] = 1e-36
    x = x.to(dtype)
    if dtype == torch.float32:
        x.view(torch.int32)[:] &= ~0xFF
        x.view(torch.int32)[256:512] |= 0x11
    packet = REFERENCE.encode(x)
    directory = TABLE_AT + int.from_bytes(packet[36:40].numpy().tobytes(), "little")
    tile = directory + 12
    _, num_words, info = directory_of(packet)[0]
    assert info & 1 and (info >> 12 > 0) == has_escapes
    width = int(packet[tile + 1])
    states = tile + 4 + -(-9 * width // 32) * 4  # 9 blocks: mostly there are bits behind the last field
    assert width > 0 or dtype in FLOAT8
    behind = states + 512 + -(-2 * num_words // 4) * 4
    fields = [at + byte for at in (32, 36, directory, directory + 4, directory + 8) for byte in (0, 3)]
    if dtype != torch.float32:
        fields = fields[::2]
    end = packet.numel()
    places = [*fields, TABLE_AT, TABLE_AT + 33, *range(tile, states), states, states + 3, states + 514]
    places += [behind - 2, behind - 1, min(behind, end - 1), *range(end - 5, end)]
    refused = 0
    for place in places:
        damaged = packet.clone()
        damaged[place] ^= 1 if place % 4 == 0 else 0x80
        refused += check_same_outcome(damaged, x, device, f"byte {place}")
    assert refused > len(places) // 2
    for field, value in ((0, 0), (0, 255), (1, 9), (1, 255), (2, 2), (3, 1)):  # of the codes' head
        damaged = packet.clone()
        damaged[tile + field] = value
        above_255 = value == 255 and field == 0
        assert check_same_outcome(damaged, x, device, f"{value} in the head") or (above_255 and width == 0)
    for length in (32, 39, directory + 3, tile, tile + 3, states, states + 511, behind - 4, end - 4):
        assert check_same_outcome(with_total(packet[:length]), x, device, f"{length} bytes")
    longer = with_total(torch.cat([packet, packet.new_zeros(4)]))
    assert check_same_outcome(longer, x, device, "four bytes more")


def test_values_behind_the_end_are_refused(device: str) -> None:
    """A packet of 2100 values, said to hold 2099: the one behind them is not zero."""
    x = dense(2100, torch.bfloat16)
    x[2050:] = 1.0
    packet = REFERENCE.encode(x)
    assert directory_of(packet)[0][2] & 1
    packet[8:12] = torch.tensor(list(struct.pack("<I", 2099)), dtype=torch.uint8)
    assert check_same_outcome(packet, x[:2099], device, "2099 values")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float8_e5m2), ids=str)
def test_packets_lie_anywhere(device: str, dtype: torch.dtype) -> None:
    x, codec = gradient(1500, dtype), codec_on(device)
    room = torch.full((3 + codec.max_bytes(1500, dtype) + 64,), 0x33, dtype=torch.uint8, device=device)
    count = codec.encode_into(x.to(device), room[3:-64])
    assert count.dtype == torch.int64 and count.dim() == 0 and count.device.type == device
    packet = room[3 : 3 + int(count)]
    assert torch.equal(packet.cpu(), REFERENCE.encode(x))
    assert bool((room[:3] == 0x33).all()) and bool((room[-64:] == 0x33).all())
    larger = torch.full((3 + codec.max_bytes(1500, dtype) + 64,), 0x33, dtype=torch.uint8, device=device)
    assert int(codec.encode_into(x.to(device), larger[3:])) == int(count)
    assert bool((larger[-64:] == 0x33).all())
    out = torch.zeros(1500, dtype=dtype, device=device)
    codec.decode(packet, out)
    assert torch.equal(bits_of(out), bits_of(x))


def test_stats_are_the_references(device: str) -> None:
    x = spread(4000, torch.bfloat16)
    expected, found = PacketStats(), PacketStats()
    REFERENCE.encode(x, stats=expected)
    codec_on(device).encode(x.to(device), stats=found)
    assert found.kernel == "triton" and expected.escapes > 0
    found.kernel = expected.kernel
    assert found == expected


@pytest.mark.parametrize("dtype", (torch.float32, torch.float8_e5m2), ids=str)
def test_encoding_never_waits_for_the_device(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(*_: object) -> None:
        raise AssertionError("the host asked for a tensor's value")

    codec, x = codec_on(device), gradient(1500, dtype).to(device)
    out = torch.zeros(codec.max_bytes(1500, dtype), dtype=torch.uint8, device=device)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "__int__", "__bool__", "__index__", "nonzero"):
            patch.setattr(torch.Tensor, name, wait)
        count = codec.encode_into(x, out)
    assert torch.equal(out[: int(count)].cpu(), REFERENCE.encode(x.cpu()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_holds_encoding_and_decoding(dtype: torch.dtype) -> None:
    codec, numel = codec_on("cuda"), 3 * TILE + 1333
    x = torch.zeros(numel, device="cuda").to(dtype)
    packet = torch.zeros(codec.max_bytes(numel, dtype), dtype=torch.uint8, device="cuda")
    count = codec.encode_into(x, packet)  # compiles the kernels
    first = several_tiles(numel, dtype)
    length = REFERENCE.encode(first).numel()
    received = torch.zeros(length, dtype=torch.uint8, device="cuda")
    out = torch.zeros_like(x)
    received.copy_(REFERENCE.encode(first))
    codec.decode(received, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count = codec.encode_into(x, packet)
        codec.decode(received, out)
    for values in (first, spread(numel, dtype)):
        x.copy_(values)
        out.zero_()
        graph.replay()
        assert torch.equal(packet[: int(count)].cpu(), REFERENCE.encode(values))
        assert torch.equal(bits_of(out), bits_of(first))
    received[36] ^= 4
    graph.replay()
    assert bool(out.to(torch.float32).isnan().all())
