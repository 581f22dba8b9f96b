"""Codecs by name: "identity", "lossless", "bits:2.0", "grid:0.15", "delta"."""

from __future__ import annotations

import difflib
from typing import Final

from efficient_dl.codec.contract import Codec
from efficient_dl.codec.kernels.reference.bodies import (
    CopyBody,
    ReferenceBlock,
    ReferenceDelta,
    ReferenceGrid,
    ReferenceSplit,
)
from efficient_dl.codec.packet_codec import BodyKernel, PacketCodec
from efficient_dl.errors import ConfigError

MIN_BITS: Final = 0.1
MAX_BITS: Final = 7.0
MIN_GRID_BITS: Final = 0.02
KERNELS: Final = ("auto", "native", "portable", "reference")

_IDENTITY, _LOSSLESS, _BLOCK, _GRID, _DELTA = 0, 1, 2, 3, 4


def codec_names() -> tuple[str, ...]:
    """What `make_codec` takes; a rate in bits a value follows "bits:" and "grid:"."""
    return ("identity", "lossless", "bits:RATE", "grid:RATE", "delta")


def make_codec(spec: str, *, checksum: bool = True, kernel: str = "auto") -> Codec:
    """Returns the codec that spec names.

    spec: "identity" (the tensor's bytes), "lossless" (exact, exponents entropy-coded), "bits:RATE" (uniform
        quantizer with local scales, entropy-coded to about RATE bits a value, scales included; 0.1 to 7),
        "grid:RATE" (one step for the whole tensor, entropy-coded with contexts to about RATE bits a value; 0.02 to
        7; or with `Side.step_size`), or "delta" (exact, the difference to `Side.reference`).
    checksum: put an xxh3-64 of the body into every packet; can be off between processes that trust their link.
    kernel: what runs on CPU tensors: "auto" and "native" (C++, the best instruction set of this processor),
        "portable" (C++ without vector intrinsics) or "reference" (torch). Tensors on other devices use "reference".

    Raises ConfigError for an unknown or impossible spec, NativeLibraryMissing if the C++ library is not built.
    Example: `make_codec("bits:2.0").encode(gradient)`.
    """
    if kernel not in KERNELS:
        raise ConfigError(
            "unknown codec kernel",
            expected=", ".join(KERNELS),
            found=kernel,
            fix='use kernel="auto"',
        )
    if spec == "identity":
        return PacketCodec(spec, _IDENTITY, True, CopyBody(), CopyBody(), checksum)
    if spec == "lossless":
        return PacketCodec(spec, _LOSSLESS, True, _native_split(kernel), ReferenceSplit(), checksum)
    if spec.startswith("bits:"):
        bits = _parse_bits(spec, MIN_BITS)
        return PacketCodec(
            f"bits:{bits}", _BLOCK, False, _native_block(kernel, bits), ReferenceBlock(bits), checksum
        )
    if spec.startswith("grid:"):
        bits = _parse_bits(spec, MIN_GRID_BITS)
        return PacketCodec(
            f"grid:{bits}", _GRID, False, _native_grid(kernel, bits), ReferenceGrid(bits), checksum
        )
    if spec == "delta":
        return PacketCodec(spec, _DELTA, True, _native_delta(kernel), ReferenceDelta(), checksum)
    near = difflib.get_close_matches(
        spec, ("identity", "lossless", "bits:2.0", "grid:0.2", "delta"), n=1, cutoff=0.4
    )
    raise ConfigError(
        f"unknown codec {spec!r}",
        expected=", ".join(codec_names()),
        fix=f"did you mean {near[0]!r}?" if near else 'for example make_codec("bits:2.0")',
    )


def _native_split(kernel: str) -> BodyKernel:
    if kernel == "reference":
        return ReferenceSplit()
    from efficient_dl.codec.kernels.native.bodies import NativeSplit

    return NativeSplit(portable=kernel == "portable")


def _native_block(kernel: str, bits: float) -> BodyKernel:
    if kernel == "reference":
        return ReferenceBlock(bits)
    from efficient_dl.codec.kernels.native.bodies import NativeBlock

    return NativeBlock(bits, portable=kernel == "portable")


def _native_grid(kernel: str, bits: float) -> BodyKernel:
    if kernel == "reference":
        return ReferenceGrid(bits)
    from efficient_dl.codec.kernels.native.context_bodies import NativeGrid

    return NativeGrid(bits, portable=kernel == "portable")


def _native_delta(kernel: str) -> BodyKernel:
    if kernel == "reference":
        return ReferenceDelta()
    from efficient_dl.codec.kernels.native.context_bodies import NativeDelta

    return NativeDelta(portable=kernel == "portable")


def _parse_bits(spec: str, smallest: float) -> float:
    text = spec.partition(":")[2]
    try:
        bits = float(text)
    except ValueError:
        bits = float("nan")
    if not smallest <= bits <= MAX_BITS:
        raise ConfigError(
            "the rate of a lossy codec is out of range",
            expected=f"{smallest} to {MAX_BITS} bits a value",
            found=repr(text),
            where=f"codec {spec!r}",
            fix='use for example "bits:2.0", or "lossless" for more',
        )
    return bits
