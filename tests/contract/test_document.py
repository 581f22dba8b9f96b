"""docs/format.md against the codecs: what they encode, a decoder written from the document alone reads the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from efficient_dl.codec import Side, make_codec
from efficient_dl.errors import CorruptPacket, SideMismatch
from tests.contract import document_decoder

SPECS = ("identity", "lossless", "bits:0.3", "bits:2.0", "bits:4.0", "grid:0.5", "grid:3.0", "delta")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
TENSORS = ("gaussian", "heavy", "zeros", "sparse", "empty blocks", "one value", "extreme", "any bits")
SIZES = (0, 1, 129, 257, 33_025)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def tensor(kind: str, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator)
    chance = torch.rand(numel, generator=generator)
    wide = torch.randn(numel // 256 + 1, generator=generator).repeat_interleave(256)[:numel]
    if kind == "heavy":
        x = x * torch.exp(2 * wide) * torch.randn(numel, generator=generator) ** 3
    elif kind == "zeros":
        x = torch.where(chance < 0.5, 0, torch.where(chance < 0.6, -0.0, x))
    elif kind == "sparse":
        x = torch.where(chance < 0.999, 0, 1e-3 * x)
    elif kind == "empty blocks":
        x = torch.where(wide < 0.5, 0, x)
    elif kind == "one value":
        x = torch.full_like(x, -0.375)
    elif (
        kind == "extreme"
    ):  # infinities, NaNs, values close to the ends of float32 and below its normal range
        some = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -1e38, 1e-39, -3e-45, 1e-38])
        pick = torch.randint(8, (numel,), generator=generator)
        x = torch.where(chance < 1e-3, some[pick], x * torch.exp(20 * wide))
    elif kind == "any bits":
        size = dtype.itemsize
        x = torch.randint(256, (numel * size,), generator=generator, dtype=torch.uint8)
        return x.view(dtype)
    return x.to(dtype)


def side_for(spec: str, x: Tensor, cut: bool) -> Side | None:
    """Segments, one of them without values and one of a single value, if cut; a reference for deltas."""
    n = x.numel()
    segments = (n // 3, 0, 1, n - n // 3 - 1) if cut and n > 2 else None
    if spec != "delta":
        return Side(segments=segments) if segments else None
    bits = x.view(INTEGERS[x.element_size()])
    change = torch.randn(n, generator=torch.Generator().manual_seed(1)) ** 5
    return Side(segments=segments, reference=(bits + change.to(bits.dtype)).view(x.dtype))


def bytes_of(x: Tensor) -> bytes:
    return x.view(torch.uint8).numpy().tobytes() if x.numel() else b""


def by_document(packet: Tensor, x: Tensor, side: Side | None) -> bytes:
    reference = None if side is None or side.reference is None else bytes_of(side.reference)
    segments, step = (None, None) if side is None else (side.segments, side.step_size)
    return document_decoder.decode(bytes_of(packet), x.numel(), segments, reference, step)


def by_codec(spec: str, packet: Tensor, x: Tensor, side: Side | None) -> bytes:
    out = torch.zeros_like(x)
    make_codec(spec).decode(packet, out, side=side)
    return bytes_of(out)


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("spec", SPECS)
def test_the_document_decodes_what_the_codecs_encode(spec: str, kind: str) -> None:
    for dtype in DTYPES:
        for numel in SIZES:
            x = tensor(kind, numel, dtype)
            side = side_for(spec, x, cut=numel > 129)
            packet = make_codec(spec, checksum=dtype != torch.bfloat16).encode(x, side)
            document = by_document(packet, x, side)
            assert document == by_codec(spec, packet, x, side), (dtype, numel)
            if make_codec(spec).exact:
                assert document == bytes_of(x), (dtype, numel)


@pytest.mark.parametrize("spec", ["bits:0.3", "bits:4.0"])
def test_packets_that_fit_a_capacity(spec: str) -> None:
    x = tensor("heavy", 150_001, torch.float32)
    codec = make_codec(spec)
    smallest, whole = codec.fixed_bytes(x.numel()), codec.encode(x).numel()
    for capacity in (smallest, (smallest + whole) // 2, whole + 1000):
        room = torch.full((capacity,), 7, dtype=torch.uint8)
        codec.encode_into(x, room, capacity=capacity)
        assert by_document(room, x, None) == by_codec(spec, room, x, None), capacity


@pytest.mark.parametrize("step", [0.25, 1e-3])
def test_a_step_that_both_ends_know(step: float) -> None:
    x = tensor("heavy", 5000, torch.float32)
    packet = make_codec("grid:1.0").encode(x, Side(step_size=step))
    assert by_document(packet, x, Side(step_size=step)) == by_codec(
        "grid:1.0", packet, x, Side(step_size=step)
    )
    with pytest.raises(SideMismatch):
        by_document(packet, x, Side(step_size=2 * step))


def outcome(decode: Callable[[], bytes]) -> bytes | None:
    """What decoding gives, None if the packet is refused."""
    try:
        return decode()
    except CorruptPacket:
        return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_the_document_judges_damaged_bodies_as_the_codecs_do(spec: str, dtype: torch.dtype) -> None:
    x = tensor("heavy", 1000, dtype)
    side = side_for(spec, x, cut=False)
    packet = make_codec(spec, checksum=False).encode(x, side)
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        damaged = packet.clone()
        at = int(torch.randint(32, packet.numel(), (), generator=generator))
        damaged[at] ^= int(torch.randint(1, 256, (), generator=generator))
        document = outcome(lambda damaged=damaged: by_document(damaged, x, side))
        codec = outcome(lambda damaged=damaged: by_codec(spec, damaged, x, side))
        assert document == codec, at


@pytest.mark.parametrize("spec", SPECS)
def test_the_document_refuses_damaged_packets(spec: str) -> None:
    x = tensor("heavy", 1000, torch.float32)
    side = side_for(spec, x, cut=False)
    packet = make_codec(spec).encode(x, side)
    for at in (0, 4, 5, 6, 7, 8, 12, 16, 24, 40, packet.numel() - 1):
        damaged = packet.clone()
        damaged[at] ^= 0x55
        with pytest.raises(CorruptPacket):
            by_document(damaged, x, side)
    for length in (0, 31, packet.numel() - 1):
        with pytest.raises(CorruptPacket):
            by_document(packet[:length], x, side)
