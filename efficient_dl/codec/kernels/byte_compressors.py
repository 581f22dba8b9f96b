"""zstd and lz4 over a tensor's raw bytes: the general-purpose baselines, from optional packages, on the CPU."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from typing import Final, Protocol, cast

import numpy
import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.kernels.reference.bodies import CopyBody
from efficient_dl.codec.packet import byte_view
from efficient_dl.errors import CorruptPacket, PackageMissing

MIN_ZSTD_LEVEL: Final = 1
MAX_ZSTD_LEVEL: Final = 22
DEFAULT_ZSTD_LEVEL: Final = 3

_PIECE_BYTES: Final = 2**30  # below what an lz4 block can hold (0x7e000000)
_PIECE_HEADER: Final = struct.Struct("<I")
_STORED: Final = 1 << 31


class ByteCompressor(Protocol):
    """One piece of at most 2^30 bytes at a time."""

    def compress(self, data: memoryview) -> bytes:
        """The compressed bytes, without the size of the data where the format can do without it."""
        ...

    def decompress(self, data: memoryview, num_bytes: int) -> bytes:
        """At most num_bytes bytes, whatever data claims; raises `CorruptPacket`."""
        ...


class ByteCompressorBody:
    """A tensor's bytes in pieces, each compressed, or stored where that is not smaller (docs/format.md, "Baselines").

    Tensors of other devices pass through the CPU's memory: these compressors run nowhere else.
    """

    def __init__(self, name: str, compressor: ByteCompressor) -> None:
        self.name = name
        self._compressor = compressor

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """All pieces stored."""
        num_bytes = numel * dtype.itemsize
        return num_bytes + _PIECE_HEADER.size * -(-num_bytes // _PIECE_BYTES)

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """See `BodyKernel.encode`."""
        data = byte_view(x).cpu()
        position = 0
        pieces = _pieces(data)
        for piece in pieces:
            compressed = self._compressor.compress(piece.numpy().data)
            is_stored = len(compressed) >= piece.numel()
            content = piece if is_stored else _tensor(compressed)
            header = _PIECE_HEADER.pack(content.numel() | _STORED * is_stored)
            for part in (_tensor(header), content):
                body[position : position + part.numel()].copy_(part)
                position += part.numel()
        if stats is not None:
            stats.header_bits = 8.0 * _PIECE_HEADER.size * len(pieces)
            stats.order0_bits = stats.model_bits = 8.0 * position - stats.header_bits
        return position

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """See `BodyKernel.decode`."""
        packed = body.cpu()
        data = torch.empty(out.numel() * dtype.itemsize, dtype=torch.uint8)
        position = 0
        for piece in _pieces(data):
            position = self._decode_piece(packed, position, piece)
        if position != packed.numel():
            raise CorruptPacket(
                "the packet has bytes left over", found=f"{packed.numel() - position}", where=self.name
            )
        CopyBody().decode(data.to(out.device), dtype, segments, out, accumulate)

    def _decode_piece(self, packed: Tensor, position: int, piece: Tensor) -> int:
        start = position + _PIECE_HEADER.size
        if start > packed.numel():
            raise CorruptPacket("the packet is cut short", where=f"byte {position} of the body")
        (field,) = cast("tuple[int]", _PIECE_HEADER.unpack(packed[position:start].numpy().tobytes()))
        content_bytes, is_stored = field & ~_STORED, bool(field & _STORED)
        limit = piece.numel() if is_stored else piece.numel() - 1
        if content_bytes > min(limit, packed.numel() - start) or (is_stored and content_bytes != limit):
            raise CorruptPacket(
                "a compressed piece has the wrong length",
                expected=f"at most {min(limit, packed.numel() - start)} bytes",
                found=f"{content_bytes}",
                where=f"byte {position} of the body",
            )
        content = packed[start : start + content_bytes]
        if not is_stored:
            plain = self._compressor.decompress(content.numpy().data, piece.numel())
            if len(plain) != piece.numel():
                raise CorruptPacket(
                    f"a {self.name} piece is not as long as its tensor",
                    expected=f"{piece.numel()} bytes",
                    found=f"{len(plain)}",
                )
            piece.numpy()[:] = numpy.frombuffer(plain, dtype=numpy.uint8)
        else:
            piece.copy_(content)
        return start + content_bytes


class _ZstdModule(Protocol):
    ZstdError: type[Exception]

    def ZstdCompressor(self, *, level: int, write_content_size: bool) -> _ZstdCompressor: ...
    def ZstdDecompressor(self) -> _ZstdDecompressor: ...
    def get_frame_parameters(self, data: memoryview) -> _ZstdFrame: ...


class _ZstdCompressor(Protocol):
    def compress(self, data: memoryview) -> bytes: ...


class _ZstdDecompressor(Protocol):
    def decompress(self, data: memoryview, *, max_output_size: int, allow_extra_data: bool) -> bytes: ...


class _ZstdFrame(Protocol):
    content_size: int


class ZstdCompressor:
    """zstandard at a level; one frame a piece, with its content's size. Source: RFC 8878."""

    def __init__(self, level: int) -> None:
        self._module = cast("_ZstdModule", _load("zstd", "zstandard", "zstandard"))
        self._level = level

    def compress(self, data: memoryview) -> bytes:
        """See `ByteCompressor.compress`."""
        # An object of its own for each call: they are not safe to share between threads.
        return self._module.ZstdCompressor(level=self._level, write_content_size=True).compress(data)

    def decompress(self, data: memoryview, num_bytes: int) -> bytes:
        """See `ByteCompressor.decompress`."""
        try:
            # The library allocates what a frame claims, so the claim is checked first.
            claimed = self._module.get_frame_parameters(data).content_size
            if claimed != num_bytes:
                raise CorruptPacket(
                    "a zstd frame claims another size than its tensor's",
                    expected=f"{num_bytes} bytes",
                    found=f"{claimed}",
                )
            return self._module.ZstdDecompressor().decompress(
                data, max_output_size=num_bytes, allow_extra_data=False
            )
        except self._module.ZstdError as error:
            raise CorruptPacket("zstd cannot read the packet", found=str(error)) from error


class _Lz4Module(Protocol):
    LZ4BlockError: type[Exception]
    compress: Callable[..., bytes]
    decompress: Callable[..., bytes]


class Lz4Compressor:
    """lz4 in its default, fast mode; one raw block a piece, without a size. Source: the LZ4 block format."""

    def __init__(self) -> None:
        self._module = cast("_Lz4Module", _load("lz4", "lz4", "lz4.block"))

    def compress(self, data: memoryview) -> bytes:
        """See `ByteCompressor.compress`."""
        return self._module.compress(data, store_size=False)

    def decompress(self, data: memoryview, num_bytes: int) -> bytes:
        """See `ByteCompressor.decompress`."""
        try:
            return self._module.decompress(data, uncompressed_size=num_bytes)
        except (self._module.LZ4BlockError, ValueError) as error:
            raise CorruptPacket("lz4 cannot read the packet", found=str(error)) from error


def _load(codec: str, package: str, module: str) -> object:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PackageMissing(
            f"the codec {codec!r} needs the package {package}",
            found=str(error),
            fix=f'run pip install {package}, or install "efficient_dl[bytes]"',
        ) from error


def _pieces(data: Tensor) -> list[Tensor]:
    return [data[first : first + _PIECE_BYTES] for first in range(0, data.numel(), _PIECE_BYTES)]


def _tensor(data: bytes) -> Tensor:
    # A copy, because torch takes no memory that cannot be written to.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
