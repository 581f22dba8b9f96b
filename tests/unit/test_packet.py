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
    ("identity", torch.float32): (560044, "84fc3ab8cbb948f1"),
    ("identity", torch.bfloat16): (280038, "2119b966a6c09108"),
    ("identity", torch.float16): (280038, "e20126b491f854a1"),
    ("identity", torch.float8_e4m3fn): (140035, "4322309174317474"),
    ("identity", torch.float8_e5m2): (140035, "b938424580c2a8a1"),
    ("lossless", torch.float32): (291284, "d083c1ec56387bff"),
    ("lossless", torch.bfloat16): (171444, "d86925dcb0f232f6"),
    ("lossless", torch.float16): (215004, "cecf64f3f4e3300b"),
    ("lossless", torch.float8_e4m3fn): (108824, "24411af349f6e4ca"),
    ("lossless", torch.float8_e5m2): (95624, "4220cbfb81eaed7c"),
    ("bits:2.0", torch.float32): (35392, "1f54e9b9a7e0a310"),
    ("bits:2.0", torch.bfloat16): (35356, "783d7af3c985abbc"),
    ("bits:2.0", torch.float16): (35392, "99e937ac7014d1eb"),
    ("bits:2.0", torch.float8_e4m3fn): (35400, "86d4a8dd8a84797a"),
    ("bits:2.0", torch.float8_e5m2): (35108, "07ca839fae36d929"),
    ("bits:4.0", torch.float32): (67576, "98632150a55d1eb5"),
    ("bits:4.0", torch.bfloat16): (67580, "32fec8d82cfb1da4"),
    ("bits:4.0", torch.float16): (67544, "f95058ed4de16208"),
    ("int8", torch.float32): (141135, "2c5a364c656b9a05"),
    ("int8", torch.bfloat16): (141135, "704deec7f6eb73ea"),
    ("int8", torch.float16): (141135, "433354e52b504d0b"),
    ("int4", torch.float32): (71134, "d7bed6a30cffd6b0"),
    ("int4", torch.bfloat16): (71134, "12ef4d54be040eec"),
    ("int4", torch.float16): (71134, "1358b882e2475699"),
    ("sign", torch.float32): (18633, "9ceebca213978540"),
    ("sign", torch.bfloat16): (18633, "012c3dd37b0898c7"),
    ("sign", torch.float16): (18633, "64f561ce7f3a48e7"),
    ("sign:tensor", torch.float32): (17541, "30079f29c69053d8"),
    ("sign:tensor", torch.bfloat16): (17541, "6796463545dda015"),
    ("sign:tensor", torch.float16): (17541, "b5406883e48f7e86"),
    ("topk:0.01", torch.float32): (7072, "ecbd73e52bdc4ce4"),
    ("topk:0.01", torch.bfloat16): (4276, "8a2b1c1fa4816597"),
    ("topk:0.01", torch.float16): (4272, "276350152a731039"),
    ("fp16", torch.float32): (280038, "8b5257904865384f"),
    ("fp16", torch.bfloat16): (280038, "0bca82a310c7de74"),
    ("fp16", torch.float16): (280038, "de4945bb1489dd46"),
    ("bf16", torch.float32): (280038, "5f3122eb993d4622"),
    ("bf16", torch.bfloat16): (280038, "0a94eda2f68d9b74"),
    ("bf16", torch.float16): (280038, "7c6eeab1fd487312"),
    ("grid:0.5", torch.float32): (9388, "7f3afbd6dbfb76ad"),
    ("grid:0.5", torch.bfloat16): (9348, "d4bc0e9504b1085a"),
    ("grid:0.5", torch.float16): (9388, "0e8c7564e7717fcb"),
    ("grid:0.5", torch.float8_e4m3fn): (7956, "f68bcd65fa1ba513"),
    ("grid:0.5", torch.float8_e5m2): (6768, "33e14a2793f29028"),
    ("grid:3.0", torch.float32): (53720, "70614fb2514d7db8"),
    ("grid:3.0", torch.bfloat16): (53712, "fb09c6d9eadb2459"),
    ("grid:3.0", torch.float16): (53720, "2d63b25abca0d409"),
    ("delta", torch.float32): (5244, "2a7e40a95786d89a"),
    ("delta", torch.bfloat16): (4836, "275afdcba165f5cf"),
    ("delta", torch.float16): (4832, "c2b84e9bc6f4c29e"),
    ("delta", torch.float8_e4m3fn): (4536, "bb683471d45cb0cf"),
    ("delta", torch.float8_e5m2): (4416, "18c1daafbf4e268f"),
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
    assert "expected: 1" in text and "found: 99" in text and "fix:" in text


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
