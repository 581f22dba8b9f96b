"""Codecs by name: "identity", "lossless", "bits:2.0", and the baselines to compare them with."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from efficient_dl.codec.contract import Codec
from efficient_dl.codec.kernels import baselines
from efficient_dl.codec.kernels.byte_compressors import (
    DEFAULT_ZSTD_LEVEL,
    MAX_ZSTD_LEVEL,
    MIN_ZSTD_LEVEL,
    ByteCompressorBody,
    Lz4Compressor,
    ZstdCompressor,
)
from efficient_dl.codec.kernels.reference.baseline_bodies import (
    ReferenceBlockwise,
    ReferenceCast,
    ReferenceTopk,
)
from efficient_dl.codec.kernels.reference.blockwise import BlockFormat
from efficient_dl.codec.kernels.reference.blockwise_int import Int4Format, Int8Format
from efficient_dl.codec.kernels.reference.bodies import (
    CopyBody,
    ReferenceBlock,
    ReferenceDelta,
    ReferenceGrid,
    ReferenceSplit,
)
from efficient_dl.codec.kernels.reference.sign import SignFormat
from efficient_dl.codec.packet_codec import BodyKernel, DeviceBodyKernel, PacketCodec, is_triton_installed
from efficient_dl.errors import ConfigError

MIN_BITS: Final = 0.1
MIN_GRID_BITS: Final = 0.02
MAX_BITS: Final = 7.0
KERNELS: Final = ("auto", "native", "avx512", "avx2", "portable", "reference", "triton")

AnyBodyKernel = BodyKernel | DeviceBodyKernel

_IDENTITY, _LOSSLESS, _BLOCK, _GRID, _DELTA = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class _Made:
    """A codec's canonical parameter ("" for none), its kernel for CPU tensors and those for other devices."""

    parameter: str
    cpu: AnyBodyKernel
    device: Callable[[torch.device], AnyBodyKernel]


@dataclass(frozen=True)
class _Family:
    """The codecs that share a name and an id: what may follow "name:", and how one is made.

    make: from the parameter's text (None where the spec has none) and the kernel's name.
    usages: how `codec_names` lists them. example: a spec that works, for "did you mean".
    """

    codec_id: int
    exact: bool
    usages: tuple[str, ...]
    example: str
    make: Callable[[str | None, str], _Made]


def codec_names() -> tuple[str, ...]:
    """What `make_codec` takes; a parameter in capitals stands for a number."""
    return tuple(usage for family in _FAMILIES.values() for usage in family.usages)


def make_codec(spec: str, *, checksum: bool = True, kernel: str = "auto") -> Codec:
    """Returns the codec that spec names.

    spec: "identity" (the tensor's bytes), "lossless" (exact, exponents entropy-coded), "bits:RATE" (uniform
        quantizer with local scales, entropy-coded to about RATE bits a value, scales included; 0.1 to 7),
        "grid:RATE" (one step for the whole tensor, entropy-coded with contexts to about RATE bits a value, 0.02 to 7;
        or with `Side.step_size`), or "delta" (exact, the difference to `Side.reference`).
        Baselines: "int8", "int4" and "sign", each with a scale for every 256 values ("int8:64": every 64,
        "int8:tensor": every parameter); "topk:0.01" (the largest 1 % of the magnitudes); "fp16" and "bf16"
        (casts); "zstd", "zstd:LEVEL" and "lz4" (exact, over the raw bytes; optional packages).
    checksum: put an xxh3-64 of the body into every packet; can be off between processes that trust their link.
        Packets that Triton writes have none: the host would have to wait for their bytes.
    kernel: what runs on CPU tensors: "auto" and "native" (C++, the best instruction set of this processor),
        "avx512", "avx2", "portable" (C++ without vector intrinsics), "reference" (torch), or "triton" (for tests: the
        GPU kernels of "identity", "lossless" and "bits:RATE", which run on CPU tensors only with TRITON_INTERPRET=1 in
        the environment). Tensors on CUDA devices use Triton where it is installed and the codec has such a kernel
        (unless kernel is "reference"), all others "reference".

    Raises ConfigError for an unknown or impossible spec and for a kernel that this processor cannot run,
    NativeLibraryMissing if the C++ library is not built, PackageMissing if the spec needs a package that is not
    installed.
    Example: `make_codec("bits:2.0").encode(gradient)`.
    """
    if kernel not in KERNELS:
        raise ConfigError(
            "unknown codec kernel",
            expected=", ".join(KERNELS),
            found=kernel,
            fix='use kernel="auto"',
        )
    name, colon, parameter = spec.partition(":")
    family = _FAMILIES.get(name)
    if family is None:
        raise _unknown(spec)
    made = family.make(parameter if colon else None, kernel)
    canonical = f"{name}:{made.parameter}" if made.parameter else name
    return PacketCodec(canonical, family.codec_id, family.exact, made.cpu, made.device, checksum)


def _unknown(spec: str) -> ConfigError:
    examples = tuple(family.example for family in _FAMILIES.values())
    near = difflib.get_close_matches(spec, examples, n=1, cutoff=0.4)
    return ConfigError(
        f"unknown codec {spec!r}",
        expected=", ".join(codec_names()),
        fix=f"did you mean {near[0]!r}?" if near else 'for example make_codec("bits:2.0")',
    )


def _made(
    parameter: str,
    kernel: str,
    reference: Callable[[], BodyKernel],
    native: Callable[[str], BodyKernel],
    triton: Callable[[], DeviceBodyKernel] | None = None,
) -> _Made:
    """Chooses among a codec's kernels. They import what they need: torch alone is enough for "reference".

    native: for an instruction set. triton: None where a codec has no such kernel.
    """

    def on_device(device: torch.device) -> AnyBodyKernel:
        if triton is not None and kernel != "reference" and device.type == "cuda" and is_triton_installed():
            return triton()
        return reference()

    if kernel == "triton":
        return _Made(parameter, _interpreted(triton), on_device)
    cpu = reference() if kernel == "reference" else native("auto" if kernel == "native" else kernel)
    return _Made(parameter, cpu, on_device)


def _interpreted(triton: Callable[[], DeviceBodyKernel] | None) -> DeviceBodyKernel:
    if triton is None:
        raise ConfigError(
            "this codec has no Triton kernel",
            expected='"identity", "lossless" or "bits:RATE"',
            fix='use kernel="auto"',
        )
    if is_triton_installed():
        from efficient_dl.codec.kernels.triton.header import is_interpreted

        if is_interpreted():
            return triton()
    raise ConfigError(
        'kernel="triton" runs on CPU tensors only in Triton\'s interpreter',
        expected="Triton installed and TRITON_INTERPRET=1 in the environment before it is imported",
        fix='use kernel="auto": tensors on a GPU use Triton by themselves',
    )


def _same_everywhere(parameter: str, body: BodyKernel) -> _Made:
    return _Made(parameter, body, lambda _: body)


@functools.cache
def _triton_copy() -> DeviceBodyKernel:
    from efficient_dl.codec.kernels.triton.copy import TritonCopy

    return TritonCopy()


@functools.cache
def _triton_split() -> DeviceBodyKernel:
    from efficient_dl.codec.kernels.triton.split import TritonSplit

    return TritonSplit()


@functools.cache
def _triton_block(bits: float) -> DeviceBodyKernel:
    from efficient_dl.codec.kernels.triton.block import TritonBlock

    return TritonBlock(bits)


def _require_no_parameter(name: str, parameter: str | None) -> None:
    if parameter is not None:
        raise ConfigError(
            f"the codec {name!r} takes no parameter",
            found=repr(f"{name}:{parameter}"),
            fix=f"use make_codec({name!r})",
        )


def _make_identity(parameter: str | None, kernel: str) -> _Made:
    _require_no_parameter("identity", parameter)
    return _made("", kernel, CopyBody, lambda _: CopyBody(), _triton_copy)


def _make_lossless(parameter: str | None, kernel: str) -> _Made:
    _require_no_parameter("lossless", parameter)

    def native(isa: str) -> BodyKernel:
        from efficient_dl.codec.kernels.native.bodies import NativeSplit

        return NativeSplit(isa)

    return _made("", kernel, ReferenceSplit, native, _triton_split)


def _make_block(parameter: str | None, kernel: str) -> _Made:
    bits = _parse_bits("bits", parameter or "", MIN_BITS)

    def native(isa: str) -> BodyKernel:
        from efficient_dl.codec.kernels.native.bodies import NativeBlock

        return NativeBlock(bits, isa)

    return _made(f"{bits}", kernel, lambda: ReferenceBlock(bits), native, lambda: _triton_block(bits))


def _make_grid(parameter: str | None, kernel: str) -> _Made:
    bits = _parse_bits("grid", parameter or "", MIN_GRID_BITS)

    def native(isa: str) -> BodyKernel:
        from efficient_dl.codec.kernels.native.context_bodies import NativeGrid

        return NativeGrid(bits, isa)

    return _made(f"{bits}", kernel, lambda: ReferenceGrid(bits), native)


def _make_delta(parameter: str | None, kernel: str) -> _Made:
    _require_no_parameter("delta", parameter)

    def native(isa: str) -> BodyKernel:
        from efficient_dl.codec.kernels.native.context_bodies import NativeDelta

        return NativeDelta(isa)

    return _made("", kernel, ReferenceDelta, native)


def _blockwise(name: str, form: Callable[[], BlockFormat]) -> Callable[[str | None, str], _Made]:
    def make(parameter: str | None, kernel: str) -> _Made:
        block_values = _parse_block_values(name, parameter)

        def native(isa: str) -> BodyKernel:
            from efficient_dl.codec.kernels.native.baseline_bodies import NativeBlockwise

            return NativeBlockwise(form().codec_id, block_values, isa)

        def reference() -> BodyKernel:
            return ReferenceBlockwise(form(), block_values)

        labels = {baselines.DEFAULT_BLOCK_VALUES: "", baselines.MAX_BLOCK_VALUES: "tensor"}
        label = labels.get(block_values, str(block_values))
        return _made(label, kernel, reference, native)

    return make


def _make_topk(parameter: str | None, kernel: str) -> _Made:
    fraction = _parse_fraction(parameter or "")

    def native(isa: str) -> BodyKernel:
        from efficient_dl.codec.kernels.native.baseline_bodies import NativeTopk

        return NativeTopk(fraction, isa)

    return _made(f"{fraction}", kernel, lambda: ReferenceTopk(fraction), native)


def _cast(name: str, wire_dtype: torch.dtype) -> Callable[[str | None, str], _Made]:
    def make(parameter: str | None, kernel: str) -> _Made:
        _require_no_parameter(name, parameter)

        def native(isa: str) -> BodyKernel:
            from efficient_dl.codec.kernels.native.baseline_bodies import NativeCast

            return NativeCast(wire_dtype, isa)

        return _made("", kernel, lambda: ReferenceCast(wire_dtype), native)

    return make


def _make_zstd(parameter: str | None, kernel: str) -> _Made:
    level = _parse_level(parameter)
    body = ByteCompressorBody("zstd", ZstdCompressor(level))
    return _same_everywhere("" if level == DEFAULT_ZSTD_LEVEL else str(level), body)


def _make_lz4(parameter: str | None, kernel: str) -> _Made:
    _require_no_parameter("lz4", parameter)
    body = ByteCompressorBody("lz4", Lz4Compressor())
    return _same_everywhere("", body)


def _parse_bits(name: str, text: str, smallest: float) -> float:
    bits = _number(text)
    if not smallest <= bits <= MAX_BITS:
        raise ConfigError(
            "the rate of a lossy codec is out of range",
            expected=f"{smallest} to {MAX_BITS} bits a value",
            found=repr(text),
            where=f"codec {f'{name}:{text}'!r}",
            fix=f'use for example "{name}:2.0", or "lossless" for more',
        )
    return bits


def _parse_block_values(name: str, text: str | None) -> int:
    if text is None:
        return baselines.DEFAULT_BLOCK_VALUES
    if text == "tensor":
        return baselines.MAX_BLOCK_VALUES
    values = int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else 0
    if values % baselines.BLOCK_MULTIPLE or not 0 < values <= baselines.MAX_BLOCK_VALUES:
        raise ConfigError(
            "the block size of a codec is out of range",
            expected=f"a multiple of {baselines.BLOCK_MULTIPLE} up to {baselines.MAX_BLOCK_VALUES}, or tensor",
            found=repr(text),
            where=f"codec {f'{name}:{text}'!r}",
            fix=f'use for example "{name}:256"',
        )
    return values


def _parse_fraction(text: str) -> float:
    fraction = _number(text)
    if not 0 < fraction <= 1:
        raise ConfigError(
            "the fraction of values that top-k keeps is out of range",
            expected="more than 0 and at most 1",
            found=repr(text),
            where=f"codec {f'topk:{text}'!r}",
            fix='use for example "topk:0.01"',
        )
    return fraction


def _parse_level(text: str | None) -> int:
    if text is None:
        return DEFAULT_ZSTD_LEVEL
    level = int(text) if text.isascii() and text.isdecimal() and len(text) < 4 else 0
    if not MIN_ZSTD_LEVEL <= level <= MAX_ZSTD_LEVEL:
        raise ConfigError(
            "the level of zstd is out of range",
            expected=f"{MIN_ZSTD_LEVEL} to {MAX_ZSTD_LEVEL}",
            found=repr(text),
            where=f"codec {f'zstd:{text}'!r}",
            fix='use for example "zstd:3"',
        )
    return level


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


_FAMILIES: Final[dict[str, _Family]] = {
    "identity": _Family(_IDENTITY, True, ("identity",), "identity", _make_identity),
    "lossless": _Family(_LOSSLESS, True, ("lossless",), "lossless", _make_lossless),
    "bits": _Family(_BLOCK, False, ("bits:RATE",), "bits:2.0", _make_block),
    "grid": _Family(_GRID, False, ("grid:RATE",), "grid:0.25", _make_grid),
    "delta": _Family(_DELTA, True, ("delta",), "delta", _make_delta),
    "int8": _Family(baselines.INT8, False, ("int8", "int8:BLOCK"), "int8", _blockwise("int8", Int8Format)),
    "int4": _Family(baselines.INT4, False, ("int4", "int4:BLOCK"), "int4", _blockwise("int4", Int4Format)),
    "sign": _Family(baselines.SIGN, False, ("sign", "sign:BLOCK"), "sign", _blockwise("sign", SignFormat)),
    "topk": _Family(baselines.TOPK, False, ("topk:FRACTION",), "topk:0.01", _make_topk),
    "fp16": _Family(baselines.FLOAT16, False, ("fp16",), "fp16", _cast("fp16", torch.float16)),
    "bf16": _Family(baselines.BFLOAT16, False, ("bf16",), "bf16", _cast("bf16", torch.bfloat16)),
    "zstd": _Family(baselines.ZSTD, True, ("zstd", "zstd:LEVEL"), "zstd", _make_zstd),
    "lz4": _Family(baselines.LZ4, True, ("lz4",), "lz4", _make_lz4),
}
