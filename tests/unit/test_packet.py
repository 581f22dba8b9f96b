"""The wire format, byte by byte: a change of these needs a new format version."""

from __future__ import annotations

import struct

import pytest
import torch
import xxhash

from efficient_dl.codec import FORMAT_VERSION, Side, make_codec
from efficient_dl.errors import CorruptPacket, EdlError


def golden_tensor(dtype: torch.dtype) -> torch.Tensor:
    """140,003 values made by integer arithmetic only, so that every platform has the same ones."""
    state = torch.arange(140_003, dtype=torch.int64)
    state = (state * 6364136223846793005 + 1442695040888963407) >> 20 & 0xFFFFF
    magnitude = (state % 1021 - 510) * (state // 1021 % 7)
    return (magnitude.to(torch.float32) / 4096).to(dtype)


# (spec, dtype): (bytes, xxh3-64 of the packet)
GOLDEN = {
    ("identity", torch.float32): (560044, "b5e85fdf30aeb563"),
    ("identity", torch.bfloat16): (280038, "c36419608c2d9131"),
    ("identity", torch.float16): (280038, "7d6a4b1b570b1205"),
    ("identity", torch.float8_e4m3fn): (140035, "6fe0076527db94b6"),
    ("identity", torch.float8_e5m2): (140035, "eb889ba8f6f95fd1"),
    ("lossless", torch.float32): (290756, "45a1f9756b323b57"),
    ("lossless", torch.bfloat16): (170916, "d1e05ecdb475c1c1"),
    ("lossless", torch.float16): (214616, "536ed05113239570"),
    ("lossless", torch.float8_e4m3fn): (108296, "bb6399737d1a12be"),
    ("lossless", torch.float8_e5m2): (95096, "42e51aae05eae492"),
    ("bits:2.0", torch.float32): (35392, "b965cc1e7d672c92"),
    ("bits:2.0", torch.bfloat16): (35356, "faaf603b6b01d3ba"),
    ("bits:2.0", torch.float16): (35392, "82af1c167a321048"),
    ("bits:2.0", torch.float8_e4m3fn): (35400, "b6d6f61ac3a621b6"),
    ("bits:2.0", torch.float8_e5m2): (35108, "330f5caa94d0e3c8"),
    ("bits:4.0", torch.float32): (67576, "71063d466a9ccc95"),
    ("bits:4.0", torch.bfloat16): (67580, "bd525c8f4da6a07d"),
    ("bits:4.0", torch.float16): (67544, "7262779f51d1801f"),
    ("int8", torch.float32): (141135, "a78d24190a3e9220"),
    ("int8", torch.bfloat16): (141135, "eaa5f90de7b3f549"),
    ("int8", torch.float16): (141135, "544d17b58b109606"),
    ("int4", torch.float32): (71134, "8192b82a95b9f25f"),
    ("int4", torch.bfloat16): (71134, "3d20c1887a5c1b54"),
    ("int4", torch.float16): (71134, "0451b7b3181ed32b"),
    ("sign", torch.float32): (18633, "2fec6064321264fe"),
    ("sign", torch.bfloat16): (18633, "73865390e106a2b3"),
    ("sign", torch.float16): (18633, "2c2d50b11935ec9a"),
    ("sign:tensor", torch.float32): (17541, "e28d9875ac3ffbcf"),
    ("sign:tensor", torch.bfloat16): (17541, "1a9b6b9b36aa943e"),
    ("sign:tensor", torch.float16): (17541, "526ed3e7ca54e9ad"),
    ("topk:0.01", torch.float32): (7072, "4f5abbddbc307479"),
    ("topk:0.01", torch.bfloat16): (4276, "610e5e58ff7887b0"),
    ("topk:0.01", torch.float16): (4272, "7eabb59de9e5d029"),
    ("fp16", torch.float32): (280038, "791614585a20b532"),
    ("fp16", torch.bfloat16): (280038, "289bd1c65aae0c48"),
    ("fp16", torch.float16): (280038, "c467244c4f0ae89a"),
    ("bf16", torch.float32): (280038, "5ca3ba59ad960969"),
    ("bf16", torch.bfloat16): (280038, "230af1ad09b1df7a"),
    ("bf16", torch.float16): (280038, "56dacb2e1f1c575e"),
    ("grid:0.5", torch.float32): (9388, "8801df8f04ee3190"),
    ("grid:0.5", torch.bfloat16): (9348, "e5d7e9bbdd64a653"),
    ("grid:0.5", torch.float16): (9388, "d7022f811d0a886f"),
    ("grid:0.5", torch.float8_e4m3fn): (7956, "ae1dc8bd71c420b6"),
    ("grid:0.5", torch.float8_e5m2): (6768, "5e234b8efbe8b637"),
    ("grid:3.0", torch.float32): (53720, "71291d7d2238e253"),
    ("grid:3.0", torch.bfloat16): (53712, "32e60057480e0fa2"),
    ("grid:3.0", torch.float16): (53720, "be706992d426d8c0"),
    ("delta", torch.float32): (5244, "1bef9b1759e23f4f"),
    ("delta", torch.bfloat16): (4836, "082ba61e4786cf71"),
    ("delta", torch.float16): (4832, "3eb2ebefa53ccfbf"),
    ("delta", torch.float8_e4m3fn): (4536, "f050756a298c700f"),
    ("delta", torch.float8_e5m2): (4416, "aad77f353b188f42"),
}


def golden_side(spec: str, x: torch.Tensor) -> Side:
    """Two segments; for "delta" a reference whose every 37th value is some units in the last place away."""
    if spec != "delta":
        return Side(segments=(100_000, 40_003))
    reference = x.clone()
    bits = reference.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])
    bits[::37] += (torch.arange(bits[::37].numel()) % 5 - 2).to(bits.dtype)
    return Side(segments=(100_000, 40_003), reference=reference)


@pytest.mark.parametrize(("spec", "dtype"), GOLDEN, ids=str)
def test_packets_are_the_golden_bytes(spec: str, dtype: torch.dtype) -> None:
    x = golden_tensor(dtype)
    packet = make_codec(spec).encode(x, golden_side(spec, x))
    digest = xxhash.xxh3_64_hexdigest(packet.numpy().data)
    assert (packet.numel(), digest) == GOLDEN[spec, dtype]


@pytest.mark.parametrize("spec", ["zstd", "lz4"])
def test_compressed_packets_decode_whatever_the_compressors_version(spec: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, out = golden_tensor(dtype), torch.empty(140_003, dtype=dtype)
        make_codec(spec).decode(make_codec(spec).encode(x), out)
        assert torch.equal(out, x)


def test_the_header_is_what_the_document_says() -> None:
    x = torch.tensor([1.0, -2.0])
    packet = make_codec("identity").encode(x, Side(segments=(1, 1))).numpy().tobytes()
    body = struct.pack("<2f", 1.0, -2.0)
    fingerprint = xxhash.xxh3_64_intdigest(b"segments" + struct.pack("<2q", 1, 1)) & 0xFFFFFFFF
    header = struct.pack(
        "<4sBBBBIIQQ", b"EDLP", FORMAT_VERSION, 0, 0, 1, 2, fingerprint, 40, xxhash.xxh3_64_intdigest(body)
    )
    assert packet == header + body


def test_the_fingerprint_is_that_of_the_documents_canonical_bytes() -> None:
    reference = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    content = b"segments" + struct.pack("<2q", 1, 1) + b"step" + struct.pack("<f", 0.1)
    digest = xxhash.xxh3_64_intdigest(struct.pack("<2H", 0x3F80, 0xC000))
    content += b"reference" + struct.pack("<BqQ", 1, 2, digest)
    side = Side(segments=(1, 1), reference=reference, step_size=0.1)
    assert side.fingerprint == xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF
    packet = make_codec("identity").encode(reference, side)
    assert int(packet[12:16].view(torch.int32)) & 0xFFFFFFFF == side.fingerprint


def test_an_empty_tensor_is_a_header() -> None:
    for spec in (
        "identity",
        "lossless",
        "bits:2.0",
        "int8",
        "int4",
        "sign",
        "topk:0.01",
        "bf16",
        "zstd",
        "lz4",
    ):
        packet = make_codec(spec).encode(torch.empty(0))
        assert packet.numel() == 32
        make_codec(spec).decode(packet, torch.empty(0))


def test_an_error_names_the_field_and_the_fix() -> None:
    codec = make_codec("identity")
    packet = codec.encode(torch.ones(3))
    packet[4] = 99
    with pytest.raises(CorruptPacket, match="format version is wrong") as caught:
        codec.decode(packet, torch.empty(3))
    text = str(caught.value)
    assert f"expected: {FORMAT_VERSION}" in text and "found: 99" in text and "fix:" in text


def test_codec_names_are_checked() -> None:
    for spec, message in {
        "losless": "did you mean 'lossless'",
        "bits:99": "0.1 to 7.0 bits",
        "bits:": "0.1 to 7.0 bits",
        "bits:nan": "0.1 to 7.0 bits",
    }.items():
        with pytest.raises(EdlError, match=message):
            make_codec(spec)
    assert make_codec("bits:2").name == "bits:2.0"
