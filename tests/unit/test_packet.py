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
    ("identity", torch.float32): (560044, "d37a817ff81cc752"),
    ("identity", torch.bfloat16): (280038, "1418c21f77307094"),
    ("identity", torch.float16): (280038, "3fa4c34346511a88"),
    ("identity", torch.float8_e4m3fn): (140035, "a8505f2cea54f052"),
    ("identity", torch.float8_e5m2): (140035, "15f61779cb654859"),
    ("lossless", torch.float32): (291284, "15791e65aef185c4"),
    ("lossless", torch.bfloat16): (171444, "46c9f19fbb1b8133"),
    ("lossless", torch.float16): (215004, "39c8212ffc93336e"),
    ("lossless", torch.float8_e4m3fn): (108824, "43ee9233fe5f3c51"),
    ("lossless", torch.float8_e5m2): (95624, "de3e415a640b2b32"),
    ("bits:2.0", torch.float32): (35388, "70d6e39e6b6f058d"),
    ("bits:2.0", torch.bfloat16): (35352, "ee60150cf806c07e"),
    ("bits:2.0", torch.float16): (35388, "e90adb8c4539a9ba"),
    ("bits:4.0", torch.float32): (67572, "54d0cdb53ae984d7"),
    ("bits:4.0", torch.bfloat16): (67576, "ef561d05521ec702"),
    ("bits:4.0", torch.float16): (67540, "0a7214b213995743"),
    ("int8", torch.float32): (141135, "7d37f02dd741a854"),
    ("int8", torch.bfloat16): (141135, "5076ad308e096ac1"),
    ("int8", torch.float16): (141135, "e9f0b87f20fed3f6"),
    ("int4", torch.float32): (71134, "1eb89a05e255c8a6"),
    ("int4", torch.bfloat16): (71134, "22f744239178b1bd"),
    ("int4", torch.float16): (71134, "87dd885961c383ba"),
    ("sign", torch.float32): (18633, "115ffbba853e400f"),
    ("sign", torch.bfloat16): (18633, "a436a412e9daf9fa"),
    ("sign", torch.float16): (18633, "61bdaaaf2bb47365"),
    ("sign:tensor", torch.float32): (17541, "0d3739a8f6eb3a56"),
    ("sign:tensor", torch.bfloat16): (17541, "cb5e9a226f7800bb"),
    ("sign:tensor", torch.float16): (17541, "2dbcd4d1f9cff0da"),
    ("topk:0.01", torch.float32): (7072, "e77ce910734d10ef"),
    ("topk:0.01", torch.bfloat16): (4276, "dc6b55978aabef2b"),
    ("topk:0.01", torch.float16): (4272, "edab3c47cdf02f2a"),
    ("fp16", torch.float32): (280038, "e3976194fd31fcb0"),
    ("fp16", torch.bfloat16): (280038, "0ae689ec7bd36c16"),
    ("fp16", torch.float16): (280038, "d9c2b460f4d739a2"),
    ("bf16", torch.float32): (280038, "af9e74881b6c9443"),
    ("bf16", torch.bfloat16): (280038, "56d86484d1b7d843"),
    ("bf16", torch.float16): (280038, "6a0ddcf0cd43180b"),
    ("grid:0.5", torch.float32): (9388, "b8e3830f43b2c58e"),
    ("grid:0.5", torch.bfloat16): (9348, "e4cc8b20a6e9fe4e"),
    ("grid:0.5", torch.float16): (9388, "bc06b47155950ad7"),
    ("grid:3.0", torch.float32): (53720, "487f2e1698cf9956"),
    ("grid:3.0", torch.bfloat16): (53712, "02fcc7db79212b03"),
    ("grid:3.0", torch.float16): (53720, "652acdad1e97d957"),
    ("delta", torch.float32): (5392, "b928ed977191f974"),
    ("delta", torch.bfloat16): (4964, "d0764f680534f563"),
    ("delta", torch.float16): (4964, "2425fd866927f205"),
}


def golden_side(spec: str, x: torch.Tensor) -> Side:
    """Two segments; for "delta" a reference whose every 37th value is some units in the last place away."""
    if spec != "delta":
        return Side(segments=(100_000, 40_003))
    reference = x.clone()
    bits = reference.view(torch.int32 if x.element_size() == 4 else torch.int16)
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
    assert "expected: 0" in text and "found: 99" in text and "fix:" in text


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
