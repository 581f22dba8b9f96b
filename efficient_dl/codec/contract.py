"""The contract of every codec: what it takes, what it returns, and what both ends must know."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
import xxhash
from torch import Tensor

from efficient_dl.codec.dtypes import DTYPE_CODES


@dataclass(frozen=True, eq=False)
class Side:
    """What encoder and decoder know already, so that it need not be sent.

    segments: lengths (values) of the parameters inside a flat tensor, in order; their sum is the tensor's numel.
        The block grid restarts at each of them. None: the tensor is one parameter.
    reference: a copy of the tensor that both ends hold, bit for bit: contiguous, of its dtype, numel and device.
        "delta" needs it. A Side belongs to one content of the reference: the fingerprint is computed once, so make
        a new Side after the reference has changed.
    step_size: the step of "grid:RATE", instead of one that is searched for; rounded to float32. A positive normal
        number below 2^100, else ValueError.

    Codecs that do not use a part take it into the fingerprint only. The fingerprint travels in the packet's header;
    decoding with another side raises `SideMismatch`. Sides are equal if their segments and steps are and their
    reference is the same object.
    """

    segments: tuple[int, ...] | None = None
    reference: Tensor | None = None
    step_size: float | None = None

    def __post_init__(self) -> None:
        # The range is that of the rounded step: a number just below 2^100 becomes 2^100.
        if self.step_size is not None and not 2.0**-126 <= _as_float32(self.step_size) < 2.0**100:
            raise ValueError(
                f"Side.step_size must be a positive normal float32 below 2^100, not {self.step_size}"
            )
        if self.reference is not None and (
            self.reference.dtype not in DTYPE_CODES or not self.reference.is_contiguous()
        ):
            raise ValueError(
                f"Side.reference must be a contiguous tensor of a dtype that codecs take, not {self.reference.dtype}, "
                f"strides {self.reference.stride()}"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Side):
            return NotImplemented
        same_numbers = self.segments == other.segments and self.step_size == other.step_size
        return same_numbers and self.reference is other.reference

    def __hash__(self) -> int:
        return hash((self.segments, self.step_size, id(self.reference)))

    @cached_property
    def fingerprint(self) -> int:
        """32 bits that identify the content (0 when there is none); see docs/format.md. Waits for a GPU's reference."""
        content = b""
        if self.segments is not None:
            content += b"segments" + struct.pack(f"<{len(self.segments)}q", *self.segments)
        if self.step_size is not None:
            content += b"step" + struct.pack("<f", self.step_size)
        if self.reference is not None:
            values = self.reference.detach().view(-1).view(torch.uint8).cpu().numpy()
            code, digest = DTYPE_CODES[self.reference.dtype], xxhash.xxh3_64_intdigest(values.data)
            content += b"reference" + struct.pack("<BqQ", code, self.reference.numel(), digest)
        return xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF if content else 0


def _as_float32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


@dataclass
class PacketStats:
    """Where a packet's bits went. Filled by `encode` and `encode_into` when passed to them.

    order0_bits: the empirical order-0 entropy of the coded symbols (places behind the end of a short block count as
        zeros, empty blocks not at all), in bits for the whole tensor: what a memoryless coder with a perfect, free
        table would need. Of "grid:RATE" and "delta": of all integers, those of empty blocks included, without classes.
    model_bits: what the codec's own model costs with an ideal arithmetic coder (its 12-bit tables, its escapes,
        its raw bits), in bits for the whole tensor, without scales and headers.
    scale_bits, header_bits: the blocks' scale codes, classes or reference exponents; the header, parameters, tables
        and directory.
    packet_bytes: the packet's real length.
    largest_escape: of "grid:RATE" (at most 32,767) and "delta", the largest magnitude of an escaped integer; 0 without.
    relative_step: of "bits:RATE", in units of each block's rms. step_size: of "grid:RATE".
    """

    numel: int = 0
    order0_bits: float = 0.0
    model_bits: float = 0.0
    scale_bits: float = 0.0
    header_bits: float = 0.0
    packet_bytes: int = 0
    escapes: int = 0
    largest_escape: int = 0
    empty_blocks: int = 0
    nonfinite_blocks: int = 0
    dropped_blocks: int = 0
    relative_step: float = 0.0
    step_size: float = 0.0
    kernel: str = ""


@runtime_checkable
class Codec(Protocol):
    """A pure, deterministic map from a contiguous tensor to bytes and back. No state, no ranks.

    Tensors are contiguous, of any shape, float32, bfloat16, float16, float8_e4m3fn or float8_e5m2, with numel < 2**31;
    anything else raises `UnsupportedTensor`. Packets are contiguous 1-D uint8 tensors on the tensor's device.
    """

    @property
    def name(self) -> str:
        """The canonical specification, as `make_codec` takes it: "lossless", "bits:2.0", ..."""
        ...

    @property
    def exact(self) -> bool:
        """Whether decoding returns every bit of the encoded tensor, NaN payloads included."""
        ...

    def kernel_for(self, device: torch.device) -> str:
        """What runs on this device's tensors: "native-ISA" (avx512, avx2, portable), "triton", "reference" ..."""
        ...

    def max_bytes(self, numel: int, dtype: torch.dtype, side: Side | None = None) -> int:
        """The largest packet, in bytes, that any tensor of this size, dtype and side can need."""
        ...

    def encode(self, x: Tensor, side: Side | None = None, stats: PacketStats | None = None) -> Tensor:
        """Returns the packet of x with its exact length (on a GPU this waits for the size)."""
        ...

    def fixed_bytes(self, numel: int, side: Side | None = None) -> int:
        """The smallest capacity, in bytes, that `encode_into` takes for such a tensor. Raises ValueError unless the
        codec is "bits:RATE".
        """
        ...

    def encode_into(
        self,
        x: Tensor,
        out: Tensor,
        side: Side | None = None,
        stats: PacketStats | None = None,
        *,
        residual: Tensor | None = None,
        capacity: int | None = None,
    ) -> Tensor:
        """Writes the packet of x to the front of out and returns its byte count, 0-dim int64 on x.device.

        On a GPU with Triton nothing here waits for the device (unless stats are asked for), and after one call with
        the same dtype, numel and side it can be captured in a CUDA graph. Such packets carry no checksum.

        out: uint8 with room for max_bytes(x.numel(), x.dtype, side), or for capacity; less raises ValueError.
            Like residual, it shares no memory with the other tensors (ValueError).
        residual: "bits:RATE" and "grid:RATE" only (ValueError for others): float32, contiguous, x.numel() values on
            x.device. The packet is that of float32(x) + residual, and the residual is replaced by that sum minus
            what decoding gives in float32; by 0 in blocks that decode to NaN. After an error its content is undefined.
        capacity: "bits:RATE" only: the packet has at most this many bytes, its header included: the step is chosen
            for that, and tiles that do not fit all the same decode to zeros. Less than fixed_bytes() raises ValueError.
        """
        ...

    def decode(
        self,
        packet: Tensor,
        out: Tensor,
        accumulate: bool = False,
        side: Side | None = None,
        *,
        errors: Tensor | None = None,
    ) -> None:
        """Decodes a packet of exactly the given length into out, or adds it to out.

        A packet written for a capacity may be followed by unused bytes. On a GPU with Triton the host waits once, at
        the end, to see whether the packet was sound; with errors it does not, and in a CUDA graph it cannot: there the
        output of a corrupt packet is filled with NaN, and the checksum of a packet from a CPU is not verified. So is a
        float32 output of a "lossless" packet of another dtype.

        out: contiguous, as many values as were encoded, of the encoded dtype or float32, not in the packet's memory
        (ValueError). With accumulate, sums are formed in float32 and rounded to out's dtype.
        errors: int64, one value, on out.device: where the host does not wait, a corrupt packet makes it larger instead
        of raising. Kernels that run on the host raise in any case.

        Raises `CorruptPacket` (`SideMismatch` for another side)
        for bytes that are no such packet; out's content is then undefined, memory outside of it untouched.
        """
        ...
