"""The identity codec on a GPU: the CPU's bytes and values, and nobody waits for them."""

from __future__ import annotations

import pytest
import torch

from efficient_dl.codec import Codec, Side, make_codec
from efficient_dl.errors import CorruptPacket

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def codecs(device: str) -> tuple[Codec, Codec]:
    codec = make_codec("identity", kernel="triton" if device == "cpu" else "auto", checksum=False)
    assert codec.kernel_for(torch.device(device)) == "triton"
    return codec, make_codec("identity", kernel="reference", checksum=False)


def values(dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(301, generator=torch.Generator().manual_seed(1)) * 30
    x[5], x[6], x[7] = float("inf"), float("nan"), -0.0
    return x.to(dtype)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packets_and_values_are_those_of_the_cpu(device: str, dtype: torch.dtype, accumulate: bool) -> None:
    codec, reference = codecs(device)
    x, side = values(dtype), Side((300, 1))
    packet = codec.encode(x.to(device), side)
    assert torch.equal(packet.cpu(), reference.encode(x, side))
    for out_dtype in {dtype, torch.float32}:
        expected = torch.full((301,), 2.0).to(out_dtype)
        found = expected.clone().to(device)
        reference.decode(packet.cpu(), expected, accumulate, side)
        codec.decode(packet, found, accumulate, side)
        assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_a_damaged_header_is_refused_now_or_told_later(device: str) -> None:
    codec, _ = codecs(device)
    x = values(torch.float32).to(device)
    packet, out = codec.encode(x), torch.zeros_like(x)
    errors = torch.zeros(1, dtype=torch.int64, device=device)
    codec.decode(packet, out, errors=errors)
    assert int(errors) == 0 and torch.equal(out[8:], x[8:])
    packet[9] ^= 1
    with pytest.raises(CorruptPacket):
        codec.decode(packet, torch.empty_like(x))
    codec.decode(packet, out, errors=errors)
    assert int(errors) > 0 and bool(out.isnan().all())
    with pytest.raises(CorruptPacket):
        codec.decode(codec.encode(x)[:-1].clone(), out)
