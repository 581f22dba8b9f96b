"""A codec made of parts: one header for all, and a kernel for each device that codes the body behind it."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, TypeGuard, cast, runtime_checkable

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats, Side
from efficient_dl.codec.dtypes import DTYPE_CODES
from efficient_dl.codec.packet import (
    BOUNDED_FLAG,
    CHECKSUM_FLAG,
    FORMAT_VERSION,
    HEADER_BYTES,
    check_packet,
    check_side,
    check_tensor,
    read_header,
    write_header,
)
from efficient_dl.errors import CorruptPacket, UnsupportedTensor

if TYPE_CHECKING:
    from typing_extensions import TypeIs

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
class LossyBodyKernel(Protocol):
    """A kernel that can add a residual to the tensor, and fit a packet into a capacity."""

    def fixed_bytes(self, segments: tuple[int, ...]) -> int:
        """The smallest capacity in bytes, the header included (docs/format.md)."""
        ...

    def encode_lossy(
        self,
        x: Tensor,
        segments: tuple[int, ...],
        body: Tensor,
        stats: PacketStats | None,
        residual: Tensor | None,
        capacity: int | None,
    ) -> int | Tensor:
        """As `encode`, with what `Codec.encode_into` says of residual and capacity (the header is in capacity)."""
        ...


@runtime_checkable
class ResidualBodyKernel(Protocol):
    """A kernel that can add a residual to the tensor, but fit no packet into a capacity."""

    def encode_with_residual(
        self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None, residual: Tensor
    ) -> int:
        """As `BodyKernel.encode`, with what `Codec.encode_into` says of residual."""
        ...


@runtime_checkable
class DeviceBodyKernel(Protocol):
    """A kernel on a device that the host does not wait for. Its bodies start at a multiple of 4 bytes.

    reads_any_dtype: whether it can decode to float32 without being told the encoded dtype.
    """

    reads_any_dtype: bool

    @property
    def name(self) -> str:
        """See `BodyKernel.name`."""
        ...

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """See `BodyKernel.max_bytes`."""
        ...

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> Tensor:
        """As `BodyKernel.encode`; the body's bytes are 0-dim int64 on the device."""
        ...

    def decode_on_device(
        self,
        packet: Tensor,
        dtype: torch.dtype,
        segments: tuple[int, ...],
        out: Tensor,
        accumulate: bool,
        status: Tensor,
    ) -> None:
        """Launches the decoding of a packet (header included) and does not wait for it.

        status: int64 (3,): error, the packet's bytes, its flags. Makes the error 4 for a body that is not valid; if it
        is not 0 at the start, a kernel that reads one dtype leaves out alone, because another call may follow. Nothing
        outside of the packet and out is touched.
        """
        ...


@runtime_checkable
class SideBodyKernel(BodyKernel, Protocol):
    """A body kernel that uses more of the side than its segments."""

    def with_side(self, side: Side | None) -> BodyKernel:
        """The same kernel, with what it needs of this side."""
        ...


class PacketCodec:
    """Implements `Codec` over body kernels: one for CPU tensors, and what `device` names for each other device."""

    def __init__(
        self,
        name: str,
        codec_id: int,
        exact: bool,
        cpu: BodyKernel | DeviceBodyKernel,
        device: Callable[[torch.device], BodyKernel | DeviceBodyKernel],
        checksum: bool,
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
        check_side(side, numel)
        if numel == 0:
            return HEADER_BYTES
        return HEADER_BYTES + self._cpu.max_bytes(numel, dtype, len(_segments(side, numel)))

    def fixed_bytes(self, numel: int, side: Side | None = None) -> int:
        """See `Codec.fixed_bytes`."""
        check_side(side, numel)
        if not _is_lossy(self._cpu):
            raise self._refusal("capacity", '"bits:RATE" takes one')
        return self._cpu.fixed_bytes(_segments(side, numel)) if numel else HEADER_BYTES

    def encode(self, x: Tensor, side: Side | None = None, stats: PacketStats | None = None) -> Tensor:
        """See `Codec.encode`."""
        check_tensor(x)
        room = torch.empty(self.max_bytes(x.numel(), x.dtype, side), dtype=torch.uint8, device=x.device)
        return room[: int(self.encode_into(x, room, side, stats))].clone()

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
        """See `Codec.encode_into`. The reference kernel waits for the device, the Triton kernels do not."""
        dtype = check_tensor(x)
        check_side(side, x.numel())
        _check_residual(residual, x)
        needed = self._check_room(x, out, side, capacity)
        _check_apart(x=x, residual=residual, out=out)
        kernel = self._kernel(x.device, side)
        encode = self._encoder(kernel, residual, capacity)
        waits = not _is_on_device(kernel)  # where it does not, the header is the device's, too
        room = out if waits or out.data_ptr() % 4 == 0 else torch.empty_like(out[:needed])
        body_bytes: int | Tensor = 0
        flat, segments, body = x.detach().view(-1), _segments(side, x.numel()), room[HEADER_BYTES:]
        with _current(x.device):
            if x.numel():
                body_bytes = encode(flat, segments, body, stats)
            if waits:
                bounded, codec = capacity is not None, self._codec_id
                total = write_header(
                    out, int(body_bytes), codec, dtype, x.numel(), side, self._checksum, bounded
                )
                count = torch.full((), total, dtype=torch.int64, device=x.device)
            else:
                count = self._write_header_on_device(room, body_bytes, dtype, x.numel(), side, capacity)
        if room is not out:
            out[:needed].copy_(room)
        if stats is not None:
            stats.numel, stats.packet_bytes, stats.kernel = x.numel(), int(count), kernel.name
            stats.header_bits += 8.0 * HEADER_BYTES
        return count

    def decode(
        self,
        packet: Tensor,
        out: Tensor,
        accumulate: bool = False,
        side: Side | None = None,
        *,
        errors: Tensor | None = None,
    ) -> None:
        """See `Codec.decode`."""
        kernel = self._kernel(out.device, side)
        on_device = _is_on_device(kernel)
        body, code = packet, 0
        if on_device:
            check_packet(packet, out, side)
        else:
            body, code = read_header(packet, self._codec_id, out, side)
        _check_apart(packet=packet, out=out)
        flat, segments = out.detach().view(-1), _segments(side, out.numel())
        if on_device:
            with _current(out.device):
                self._decode_on_device(kernel, packet, out.dtype, flat, accumulate, side, errors)
            return
        if out.numel():
            kernel.decode(body, _DTYPES[code], segments, flat, accumulate)

    def _decode_on_device(
        self,
        kernel: DeviceBodyKernel,
        packet: Tensor,
        dtype: torch.dtype,
        out: Tensor,
        accumulate: bool,
        side: Side | None,
        errors: Tensor | None,
    ) -> None:
        from efficient_dl.codec.kernels.triton import header

        aligned = packet if packet.data_ptr() % 4 == 0 else packet.clone()
        fingerprint = 0 if side is None else side.fingerprint
        any_dtype = kernel.reads_any_dtype and out.dtype == torch.float32
        dtypes = tuple(DTYPE_CODES.values()) if any_dtype else (DTYPE_CODES[dtype],)
        status = header.check_header(
            aligned, FORMAT_VERSION, self._codec_id, dtypes, out.numel(), fingerprint
        )
        if out.numel():
            kernel.decode_on_device(aligned, dtype, _segments(side, out.numel()), out, accumulate, status)
        if errors is not None or (out.is_cuda and torch.cuda.is_current_stream_capturing()):
            header.fill_if_corrupt(out, status)
            if errors is not None:
                errors.add_(status[0])
            return
        error, _, flags = cast("list[int]", status.tolist())  # pyright: ignore[reportUnknownMemberType]
        if error or flags & CHECKSUM_FLAG:
            _, code = read_header(packet, self._codec_id, out, side)
            if error == header.OTHER_DTYPE and _DTYPES[code] != dtype:
                self._decode_on_device(kernel, packet, _DTYPES[code], out, accumulate, side, errors)
            elif error:
                raise CorruptPacket(
                    "the packet's body is not valid",
                    where=f"codec {self._name}, {out.numel()} values, found on {out.device}",
                    fix="check that both ends run the same release and that the bytes arrived whole",
                )

    def _write_header_on_device(
        self,
        out: Tensor,
        body_bytes: int | Tensor,
        dtype: int,
        numel: int,
        side: Side | None,
        capacity: int | None,
    ) -> Tensor:
        from efficient_dl.codec.kernels.triton.header import write_header_on_device

        if isinstance(body_bytes, int):
            body_bytes = torch.full((), body_bytes, dtype=torch.int64, device=out.device)
        flags = 0 if capacity is None else BOUNDED_FLAG
        fingerprint = 0 if side is None else side.fingerprint
        return write_header_on_device(
            out, body_bytes, FORMAT_VERSION, self._codec_id, dtype, flags, numel, fingerprint
        )

    def _check_room(self, x: Tensor, out: Tensor, side: Side | None, capacity: int | None) -> int:
        """Returns how many bytes of out may be written."""
        if out.dtype != torch.uint8 or out.dim() != 1 or not out.is_contiguous():
            raise ValueError(
                f"out must be a contiguous 1-D uint8 tensor, not {out.dtype}, {tuple(out.shape)}"
            )
        if out.device != x.device:
            raise UnsupportedTensor(f"the tensor is on {x.device}, the room for its packet on {out.device}")
        needed = self.max_bytes(x.numel(), x.dtype, side)
        if capacity is not None:
            fixed = self.fixed_bytes(x.numel(), side)
            if capacity < fixed:
                raise ValueError(
                    f"a capacity of {capacity} bytes is too small for {x.numel()} values; fixed_bytes() is {fixed}"
                )
            needed = min(needed, capacity)
        if out.numel() < needed:
            raise ValueError(f"out has {out.numel()} bytes, max_bytes() or the capacity asks for {needed}")
        return needed

    def _encoder(
        self, kernel: BodyKernel | DeviceBodyKernel, residual: Tensor | None, capacity: int | None
    ) -> Callable[[Tensor, tuple[int, ...], Tensor, PacketStats | None], int | Tensor]:
        if residual is None and capacity is None:
            return kernel.encode
        flat = None if residual is None else residual.detach().view(-1)
        if _is_lossy(kernel):
            return functools.partial(kernel.encode_lossy, residual=flat, capacity=capacity)
        if capacity is not None:
            raise self._refusal("capacity", '"bits:RATE" takes one')
        if flat is None or not _takes_residual(kernel):
            raise self._refusal("residual", '"bits:RATE" and "grid:RATE" take one')
        return functools.partial(kernel.encode_with_residual, residual=flat)

    def _refusal(self, what: str, others: str) -> ValueError:
        return ValueError(f"codec {self._name!r} takes no {what}; {others}")

    def _kernel(self, device: torch.device, side: Side | None = None) -> BodyKernel | DeviceBodyKernel:
        kernel = self._cpu if device.type == "cpu" else self._device(device)
        return kernel.with_side(side) if _takes_side(kernel) else kernel


# Python compares an object with a protocol attribute by attribute, which takes longer than a small packet.
_KINDS: dict[tuple[type, type], bool] = {}


def _is(kernel: object, protocol: type) -> bool:
    key = (type(kernel), protocol)
    found = _KINDS.get(key)
    if found is None:
        found = _KINDS[key] = isinstance(kernel, protocol)
    return found


def _is_on_device(kernel: BodyKernel | DeviceBodyKernel) -> TypeIs[DeviceBodyKernel]:
    return _is(kernel, DeviceBodyKernel)


def _is_lossy(kernel: BodyKernel | DeviceBodyKernel) -> TypeGuard[LossyBodyKernel]:
    return _is(kernel, LossyBodyKernel)


def _takes_residual(kernel: BodyKernel | DeviceBodyKernel) -> TypeGuard[ResidualBodyKernel]:
    return _is(kernel, ResidualBodyKernel)


def _takes_side(kernel: BodyKernel | DeviceBodyKernel) -> TypeIs[SideBodyKernel]:
    return _is(kernel, SideBodyKernel)


def _check_residual(residual: Tensor | None, x: Tensor) -> None:
    if residual is None:
        return
    if residual.dtype != torch.float32 or residual.numel() != x.numel() or not residual.is_contiguous():
        raise UnsupportedTensor(
            "a residual is a contiguous float32 tensor with as many values as the encoded one",
            expected=f"{x.numel()} values",
            found=f"{residual.dtype}, shape {tuple(residual.shape)}",
        )
    if residual.device != x.device:
        raise UnsupportedTensor(f"the tensor is on {x.device}, its residual on {residual.device}")


def _check_apart(**tensors: Tensor | None) -> None:
    """Raises ValueError if two of the tensors share memory: kernels write one while they read the other."""
    ends = [
        (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), name)
        for name, x in tensors.items()
        if x is not None and x.numel()
    ]
    for (_, end, name), (start, _, other) in itertools.pairwise(sorted(ends)):
        if start < end:
            raise ValueError(f"{name} and {other} share memory; each needs memory of its own")


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device, which need not be the tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def is_triton_installed() -> bool:
    """Whether tensors on CUDA devices are coded by the Triton kernels."""
    return importlib.util.find_spec("triton") is not None


def _segments(side: Side | None, numel: int) -> tuple[int, ...]:
    return (numel,) if side is None or side.segments is None else side.segments
