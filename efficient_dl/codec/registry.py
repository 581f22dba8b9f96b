"""Codecs by name: "identity", "lossless", "bits:2.0"."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Final

import torch

from efficient_dl.codec.contract import Codec
from efficient_dl.codec.kernels.reference.bodies import CopyBody, ReferenceBlock, ReferenceSplit
from efficient_dl.codec.packet_codec import BodyKernel, DeviceBodyKernel, PacketCodec, is_triton_installed
from efficient_dl.errors import ConfigError

MIN_BITS: Final = 0.1
MAX_BITS: Final = 7.0
KERNELS: Final = ("auto", "native", "portable", "reference", "triton")

_IDENTITY, _LOSSLESS, _BLOCK = 0, 1, 2


def codec_names() -> tuple[str, ...]:
    """What `make_codec` takes; a rate in bits a value follows "bits:"."""
    return ("identity", "lossless", "bits:RATE")


def make_codec(spec: str, *, checksum: bool = True, kernel: str = "auto") -> Codec:
    """Returns the codec that spec names.

    spec: "identity" (the tensor's bytes), "lossless" (exact, exponents entropy-coded), or "bits:RATE" (uniform
        quantizer with local scales, entropy-coded to about RATE bits a value, scales included; 0.1 to 7).
    checksum: put an xxh3-64 of the body into every packet; can be off between processes that trust their link.
        Packets that Triton writes have none: the host would have to wait for their bytes.
    kernel: what runs on CPU tensors: "auto" and "native" (C++, the best instruction set of this processor),
        "portable" (C++ without vector intrinsics), "reference" (torch), or "triton" (for tests: the GPU kernels, which
        run on CPU tensors only with TRITON_INTERPRET=1 in the environment). Tensors on CUDA devices always use
        "triton" if it is installed (unless kernel is "reference"), those on other devices "reference".

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
        return PacketCodec(spec, _IDENTITY, True, CopyBody(), lambda _: CopyBody(), checksum)
    if spec == "lossless":
        return PacketCodec(spec, _LOSSLESS, True, _native_split(kernel), _device_split(kernel), checksum)
    if spec.startswith("bits:"):
        bits = _parse_bits(spec)
        return PacketCodec(
            f"bits:{bits}", _BLOCK, False, _native_block(kernel, bits), _device_block(kernel, bits), checksum
        )
    near = difflib.get_close_matches(spec, ("identity", "lossless", "bits:2.0"), n=1, cutoff=0.4)
    raise ConfigError(
        f"unknown codec {spec!r}",
        expected=", ".join(codec_names()),
        fix=f"did you mean {near[0]!r}?" if near else 'for example make_codec("bits:2.0")',
    )


def _native_split(kernel: str) -> BodyKernel | DeviceBodyKernel:
    if kernel == "reference":
        return ReferenceSplit()
    if kernel == "triton":
        _require_interpreter()
        return _triton_split()
    from efficient_dl.codec.kernels.native.bodies import NativeSplit

    return NativeSplit(portable=kernel == "portable")


def _device_split(kernel: str) -> Callable[[torch.device], BodyKernel | DeviceBodyKernel]:
    def choose(device: torch.device) -> BodyKernel | DeviceBodyKernel:
        if kernel != "reference" and device.type == "cuda" and is_triton_installed():
            return _triton_split()
        return ReferenceSplit()

    return choose


@functools.cache
def _triton_split() -> DeviceBodyKernel:
    from efficient_dl.codec.kernels.triton.split import TritonSplit

    return TritonSplit()


def _native_block(kernel: str, bits: float) -> BodyKernel | DeviceBodyKernel:
    if kernel == "reference":
        return ReferenceBlock(bits)
    if kernel == "triton":
        _require_interpreter()
        return _triton_block(bits)
    from efficient_dl.codec.kernels.native.bodies import NativeBlock

    return NativeBlock(bits, portable=kernel == "portable")


def _device_block(kernel: str, bits: float) -> Callable[[torch.device], BodyKernel | DeviceBodyKernel]:
    def choose(device: torch.device) -> BodyKernel | DeviceBodyKernel:
        if kernel != "reference" and device.type == "cuda" and is_triton_installed():
            return _triton_block(bits)
        return ReferenceBlock(bits)

    return choose


@functools.cache
def _triton_block(bits: float) -> DeviceBodyKernel:
    from efficient_dl.codec.kernels.triton.block import TritonBlock

    return TritonBlock(bits)


def _require_interpreter() -> None:
    if is_triton_installed():
        from efficient_dl.codec.kernels.triton.header import is_interpreted

        if is_interpreted():
            return
    raise ConfigError(
        'kernel="triton" runs on CPU tensors only in Triton\'s interpreter',
        expected="Triton installed and TRITON_INTERPRET=1 in the environment before it is imported",
        fix='use kernel="auto": tensors on a GPU use Triton by themselves',
    )


def _parse_bits(spec: str) -> float:
    text = spec.removeprefix("bits:")
    try:
        bits = float(text)
    except ValueError:
        bits = float("nan")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ConfigError(
            "the rate of a lossy codec is out of range",
            expected=f"{MIN_BITS} to {MAX_BITS} bits a value",
            found=repr(text),
            where=f"codec {spec!r}",
            fix='use for example "bits:2.0", or "lossless" for more',
        )
    return bits
