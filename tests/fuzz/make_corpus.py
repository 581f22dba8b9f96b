"""Writes the fuzzer's seeds, real packets of every codec: python tests/fuzz/make_corpus.py

decode_fuzzer.cpp says what an input is. Run it again after a change of the format, and commit what it writes; inputs
that once broke a decoder lie in the same folder under names of their own (crash-*) and are never removed.
"""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from efficient_dl.codec import Side, make_codec
from efficient_dl.codec.dtypes import DTYPE_CODES
from efficient_dl.codec.packet import HEADER_BYTES

CORPUS = Path(__file__).resolve().parent / "corpus"
DECODERS = {  # by their places in decode_fuzzer.cpp
    "lossless": 0,
    "bits:0.5": 1,
    "bits:2.0": 1,
    "bits:4.0": 1,
    "grid:0.2": 2,
    "grid:2.0": 2,
    "delta": 3,
    "int8": 4,
    "int4": 5,
    "sign": 6,
    "topk:0.01": 7,
}


def main() -> None:
    """Replaces the seeds."""
    CORPUS.mkdir(exist_ok=True)
    for old in CORPUS.glob("seed-*"):
        old.unlink()
    for spec, decoder in DECODERS.items():
        for dtype, code in DTYPE_CODES.items():
            for kind, (segments, x) in enumerate(_tensors()):
                zeros = torch.zeros_like(x).to(dtype) if spec == "delta" else None
                side = Side(segments=segments, reference=zeros)
                packet = make_codec(spec, checksum=False).encode(x.to(dtype), side)
                prefix = struct.pack("<BBBBI", decoder, code, kind << 2, 0, x.numel() - 1)
                name = f"seed-{spec.replace(':', '-')}-{str(dtype).removeprefix('torch.')}-{kind}"
                (CORPUS / name).write_bytes(prefix + bytes(packet[HEADER_BYTES:].numpy()))
    for dtype in (torch.float32, torch.bfloat16):
        x = _tiles().to(dtype)
        packet = make_codec("lossless", checksum=False).encode(x)
        prefix = struct.pack("<BBBBI", DECODERS["lossless"], DTYPE_CODES[dtype], 0, 0, x.numel() - 1)
        name = f"seed-lossless-{str(dtype).removeprefix('torch.')}-tiles"
        (CORPUS / name).write_bytes(prefix + bytes(packet[HEADER_BYTES:].numpy()))


def _tiles() -> Tensor:
    """Three tiles of few values, whose blocks' codes take 8, 5 and 2 bits."""
    generator = torch.Generator().manual_seed(2)
    blocks = torch.zeros(274, 256)
    blocks[:, ::16] = torch.randn(274, 16, generator=generator)
    blocks[:128] *= torch.ldexp(torch.ones(128), torch.linspace(-120, 120, 128).round())[:, None]
    blocks[128:256] *= torch.ldexp(torch.ones(128), torch.linspace(-10, 10, 128).round())[:, None]
    blocks[10:100] = blocks[140:200] = 0
    return blocks.view(-1)


def _tensors() -> list[tuple[tuple[int, ...], Tensor]]:
    """One tensor for each way of cutting it that decode_fuzzer.cpp knows."""
    generator = torch.Generator().manual_seed(1)

    def noise(numel: int) -> Tensor:
        return torch.randn(numel, generator=generator) * torch.randn(numel, generator=generator)

    mixed = noise(3000)
    mixed[256:1024] = 0
    mixed[1500] = torch.inf
    mixed[2000] = 1e30
    small = noise(20)
    return [
        ((1200,), noise(1200)),
        ((1000, 0, 2000), mixed),
        ((700, 700, 600), noise(2000) * (torch.rand(2000, generator=generator) < 0.05)),
        ((3, 3, 3, 3, 3, 3, 2), small),
    ]


if __name__ == "__main__":
    main()
