"""A codec made of parts: one header for all, and a kernel for each device that codes the body behind it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats, Side
from efficient_dl.codec.dtypes import DTYPE_CODES
from efficient_dl.codec.packet import (
    HEADER_BYTES,
    check_side,
    check_tensor,
    read_header,
    write_header,
)
from efficient_dl.errors import UnsupportedTensor

_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


class BodyKernel(Protocol):
    """Codes the part of a packet behind its header. Tensors are 1-D, contiguous and not empty.

    Segments are the parameters' lengths; there is always at least one.
    """

    @property
    def name(self) -> str:
        """What `Codec.kernel_for` reports."""
        ...

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """The largest body in bytes."""
        ...

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> int:
        """Writes the body to the front of `body`, returns its bytes, and fills stats (without its header)."""
        ...

    def decode(
        self, body: Tensor, dtype: torch.dtype, segments: tuple[int, ...], out: Tensor, accumulate: bool
    ) -> None:
        """Decodes into out (dtype or float32), or adds to it; raises `CorruptPacket`."""
        ...


@runtime_checkable
class SideBodyKernel(BodyKernel, Protocol):
    """A body kernel that uses more of the side than its segments."""

    def with_side(self, side: Side | None) -> BodyKernel:
        """The same kernel, with what it needs of this side."""
        ...


class PacketCodec:
    """Implements `Codec` over body kernels: one for CPU tensors, one for everything else."""

    def __init__(
        self, name: str, codec_id: int, exact: bool, cpu: BodyKernel, device: BodyKernel, checksum: bool
    ) -> None:
        self._name = name
        self._codec_id = codec_id
        self._exact = exact
        self._cpu = cpu
        self._device = device
        self._checksum = checksum

    def __repr__(self) -> str:
        return f"make_codec({self._name!r})"

    @property
    def name(self) -> str:
        """See `Codec.name`."""
        return self._name

    @property
    def exact(self) -> bool:
        """See `Codec.exact`."""
        return self._exact

    def kernel_for(self, device: torch.device) -> str:
        """See `Codec.kernel_for`."""
        return self._kernel(device).name

    def max_bytes(self, numel: int, dtype: torch.dtype, side: Side | None = None) -> int:
        """See `Codec.max_bytes`."""
        if dtype not in DTYPE_CODES:
            raise UnsupportedTensor(f"a codec cannot take a tensor of {dtype}")
        if numel == 0:
            return HEADER_BYTES
        return HEADER_BYTES + self._cpu.max_bytes(numel, dtype, len(_segments(side, numel)))

    def encode(self, x: Tensor, side: Side | None = None, stats: PacketStats | None = None) -> Tensor:
        """See `Codec.encode`."""
        check_tensor(x)
        room = torch.empty(self.max_bytes(x.numel(), x.dtype, side), dtype=torch.uint8, device=x.device)
        return room[: int(self.encode_into(x, room, side, stats))].clone()

    def encode_into(
        self, x: Tensor, out: Tensor, side: Side | None = None, stats: PacketStats | None = None
    ) -> Tensor:
        """See `Codec.encode_into`. The reference kernel waits for the device; a fused kernel will not."""
        dtype = check_tensor(x)
        check_side(side, x.numel())
        if out.dtype != torch.uint8 or out.dim() != 1 or not out.is_contiguous():
            raise ValueError(
                f"out must be a contiguous 1-D uint8 tensor, not {out.dtype}, {tuple(out.shape)}"
            )
        if out.device != x.device:
            raise UnsupportedTensor(f"the tensor is on {x.device}, the room for its packet on {out.device}")
        needed = self.max_bytes(x.numel(), x.dtype, side)
        if out.numel() < needed:
            raise ValueError(f"out has {out.numel()} bytes, max_bytes() asks for {needed}")
        kernel = self._kernel(x.device, side)
        body_bytes = 0
        if x.numel():
            segments = _segments(side, x.numel())
            body_bytes = kernel.encode(x.detach().view(-1), segments, out[HEADER_BYTES:], stats)
        total = write_header(out, body_bytes, self._codec_id, dtype, x.numel(), side, self._checksum)
        if stats is not None:
            stats.numel, stats.packet_bytes, stats.kernel = x.numel(), total, kernel.name
            stats.header_bits += 8.0 * HEADER_BYTES
        return torch.tensor(total, dtype=torch.int64, device=x.device)

    def decode(self, packet: Tensor, out: Tensor, accumulate: bool = False, side: Side | None = None) -> None:
        """See `Codec.decode`."""
        body, code = read_header(packet, self._codec_id, out, side)
        if out.numel():
            segments = _segments(side, out.numel())
            kernel = self._kernel(out.device, side)
            kernel.decode(body, _DTYPES[code], segments, out.detach().view(-1), accumulate)

    def _kernel(self, device: torch.device, side: Side | None = None) -> BodyKernel:
        kernel = self._cpu if device.type == "cpu" else self._device
        return kernel.with_side(side) if isinstance(kernel, SideBodyKernel) else kernel


def _segments(side: Side | None, numel: int) -> tuple[int, ...]:
    return (numel,) if side is None or side.segments is None else side.segments
