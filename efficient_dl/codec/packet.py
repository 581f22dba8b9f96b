"""The 32-byte header that every packet starts with: written, read and checked in one place."""

from __future__ import annotations

import struct
from typing import Final

import torch
import xxhash
from torch import Tensor

from efficient_dl.codec.contract import Side
from efficient_dl.codec.dtypes import DTYPE_CODES
from efficient_dl.errors import CorruptPacket, SideMismatch, UnsupportedTensor

FORMAT_VERSION: Final = 2
HEADER_BYTES: Final = 32
MAX_NUMEL: Final = 2**31 - 1

_MAGIC: Final = b"EDLP"
_LAYOUT: Final = struct.Struct("<4sBBBBIIQQ")
CHECKSUM_FLAG: Final = 1
BOUNDED_FLAG: Final = 2
_DROPPED_OFFSET: Final = 56  # of num_dropped in packets of codec 2
BOUNDED_CODEC: Final = 2  # the only one that has bounded packets


def check_tensor(x: Tensor) -> int:
    """Returns x's dtype code, or raises `UnsupportedTensor` for what no codec takes."""
    code = DTYPE_CODES.get(x.dtype)
    if code is None:
        raise UnsupportedTensor(
            f"a codec cannot take a tensor of {x.dtype}",
            expected=", ".join(str(dtype) for dtype in DTYPE_CODES),
            fix="convert the tensor, or leave it to the native collective",
        )
    if not x.is_contiguous() or x.layout is not torch.strided:
        raise UnsupportedTensor(
            "a codec takes contiguous, dense tensors only",
            found=f"shape {tuple(x.shape)}, layout {x.layout}, contiguous: {x.is_contiguous()}",
            fix="pass x.contiguous()",
        )
    if x.is_neg():
        raise UnsupportedTensor(
            "a codec reads memory, and this tensor is the negative of what its memory holds",
            fix="pass x.resolve_neg()",
        )
    if x.numel() > MAX_NUMEL:
        raise UnsupportedTensor(
            "the tensor is too large for one packet",
            expected="fewer than 2**31 values",
            found=f"{x.numel()} values",
            fix="encode it in parts, x.view(-1).split(2**30)",
        )
    return code


def check_side(side: Side | None, numel: int) -> None:
    """Raises ValueError when side describes a tensor of another size."""
    if side is None or side.segments is None:
        return
    if any(n < 0 for n in side.segments) or sum(side.segments) != numel:
        raise ValueError(
            f"Side.segments sums to {sum(side.segments)} values, the tensor has {numel}; "
            "pass the lengths of the parameters that lie in the tensor, in order"
        )


def checked_reference(reference: Tensor | None, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Returns the side's reference as a 1-D tensor, or raises ValueError unless it fits a tensor of dtype and like's
    numel and device."""
    if reference is None:
        raise ValueError('"delta" needs Side(reference=...), the copy of the tensor that both ends hold')
    if (reference.dtype, reference.numel(), reference.device) != (dtype, like.numel(), like.device):
        raise ValueError(
            f"Side.reference has {reference.numel()} values of {reference.dtype} on {reference.device}, the tensor "
            f"{like.numel()} of {dtype} on {like.device}; pass the receiver's copy of the same tensor"
        )
    return reference.detach().view(-1)


def write_header(
    packet: Tensor,
    body_bytes: int,
    codec: int,
    dtype: int,
    numel: int,
    side: Side | None,
    checksum: bool,
    bounded: bool = False,
) -> int:
    """Fills packet[:32] for a body that lies behind it already; returns the packet's bytes."""
    total = HEADER_BYTES + body_bytes
    digest = body_digest(packet[HEADER_BYTES:total]) if checksum else 0
    flags = CHECKSUM_FLAG * checksum | BOUNDED_FLAG * bounded
    fingerprint = side.fingerprint if side is not None else 0
    header = _LAYOUT.pack(_MAGIC, FORMAT_VERSION, codec, dtype, flags, numel, fingerprint, total, digest)
    packet[:HEADER_BYTES].copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
    return total


def check_packet(packet: Tensor, out: Tensor, side: Side | None) -> None:
    """Raises for what is wrong before a byte is read: kinds, devices and sizes of the tensors."""
    check_tensor(out)
    check_side(side, out.numel())
    if packet.device != out.device:
        raise UnsupportedTensor(f"the packet is on {packet.device}, the output on {out.device}")
    if packet.dtype != torch.uint8 or packet.dim() != 1 or not packet.is_contiguous():
        raise UnsupportedTensor(
            "a packet is a contiguous 1-D uint8 tensor",
            found=f"{packet.dtype}, shape {tuple(packet.shape)}",
            fix="pass what encode() returned",
        )
    if packet.numel() < HEADER_BYTES:
        raise CorruptPacket(
            "the packet is shorter than its header",
            expected=f"at least {HEADER_BYTES} bytes",
            found=f"{packet.numel()} bytes",
        )


def read_header(packet: Tensor, codec: int, out: Tensor, side: Side | None) -> tuple[Tensor, int]:
    """Checks packet against what the caller expects; returns its body and the encoded dtype's code.

    Raises `CorruptPacket`, and `SideMismatch` when only the side information differs.
    """
    check_packet(packet, out, side)
    fields = _LAYOUT.unpack(packet[:HEADER_BYTES].cpu().numpy().tobytes())
    magic, version, found_codec, dtype, flags, numel, fingerprint, total, digest = fields
    _require(magic == _MAGIC, "magic", _MAGIC, magic)
    _require(version == FORMAT_VERSION, "format version", FORMAT_VERSION, version)
    _require(found_codec == codec, "codec", codec, found_codec)
    _require(dtype in DTYPE_CODES.values(), "dtype code", "0 to 4", dtype)
    _require(
        out.dtype == torch.float32 or DTYPE_CODES[out.dtype] == dtype,
        "dtype code (for an output of another dtype than float32)",
        DTYPE_CODES[out.dtype],
        dtype,
    )
    known_flags = CHECKSUM_FLAG | (BOUNDED_FLAG if codec == BOUNDED_CODEC else 0)
    _require(flags & ~known_flags == 0, "flags", f"some of {known_flags:#b}", f"{flags:#b}")
    if flags & BOUNDED_FLAG:
        _require(HEADER_BYTES <= total <= packet.numel(), "packet bytes", f"32 to {packet.numel()}", total)
    else:
        _require(total == packet.numel(), "packet bytes", packet.numel(), total)
    _require(numel == out.numel(), "numel", out.numel(), numel)
    _require(numel > 0 or total == HEADER_BYTES, "packet bytes for an empty tensor", HEADER_BYTES, total)
    expected_fingerprint = side.fingerprint if side is not None else 0
    if fingerprint != expected_fingerprint:
        raise SideMismatch(
            "the packet was encoded with other side information",
            expected=f"fingerprint {expected_fingerprint:08x}",
            found=f"{fingerprint:08x}",
            fix="give decode() the Side that encode() was given",
        )
    body = packet[HEADER_BYTES:total]
    if flags & CHECKSUM_FLAG:
        _require(
            body_digest(body) == digest, "checksum", "xxh3-64 of the body", f"{digest:016x} in the header"
        )
    else:
        _require(digest == 0, "checksum of a packet without one", 0, digest)
    return body, dtype


def dropped_blocks(packet: Tensor) -> Tensor:
    """How many blocks a packet of "bits:RATE" had no room for: 0-dim int32 where the packet is; nobody waits for it.

    packet: of at least one value, at a multiple of 4 bytes.
    """
    return packet[_DROPPED_OFFSET : _DROPPED_OFFSET + 4].view(torch.int32)[0]


def byte_view(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor as a 1-D uint8 tensor that shares its memory."""
    return x.view(-1).view(torch.uint8)


def body_digest(body: Tensor) -> int:
    """The checksum of a body (waits for the device)."""
    return xxhash.xxh3_64_intdigest(body.cpu().numpy().data)


def _require(condition: bool, field: str, expected: object, found: object) -> None:
    if not condition:
        raise CorruptPacket(
            f"the packet's {field} is wrong",
            expected=str(expected),
            found=str(found),
            where="packet header",
            fix="check that both ends run the same release and that the bytes arrived whole",
        )
