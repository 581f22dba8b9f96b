"""The tensor's own bytes on a GPU: torch's copies, with the header's kernels, so that the host waits for nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_dl.codec.contract import PacketStats
from efficient_dl.codec.dtypes import DTYPE_CODES
from efficient_dl.codec.kernels.reference.bodies import CopyBody
from efficient_dl.codec.kernels.reference.outputs import apply_values
from efficient_dl.codec.packet import HEADER_BYTES, byte_view

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_WRONG_BODY = 4  # header.WRONG_BODY, which is a constant of another language


class TritonCopy:
    """See `CopyBody`; decoding takes a copy more, because whether the header was sound is known on the device alone."""

    name = "triton"
    reads_any_dtype = True

    def __init__(self) -> None:
        self._copy = CopyBody()

    def max_bytes(self, numel: int, dtype: torch.dtype, num_segments: int) -> int:
        """Exactly numel * itemsize."""
        return self._copy.max_bytes(numel, dtype, num_segments)

    def encode(self, x: Tensor, segments: tuple[int, ...], body: Tensor, stats: PacketStats | None) -> Tensor:
        """See `DeviceBodyKernel.encode`."""
        num_bytes = self._copy.encode(x, segments, body, stats)
        return torch.full((), num_bytes, dtype=torch.int64, device=x.device)

    def decode_on_device(
        self,
        packet: Tensor,
        dtype: torch.dtype,
        segments: tuple[int, ...],
        out: Tensor,
        accumulate: bool,
        status: Tensor,
    ) -> None:
        """See `DeviceBodyKernel.decode_on_device`."""
        body = packet[HEADER_BYTES:]
        candidates = [dtype] if out.dtype != torch.float32 else list(DTYPE_CODES)
        candidates = [one for one in candidates if out.numel() * one.itemsize == body.numel()]
        code = (packet[4:8].view(torch.int32)[0] >> 16) & 255  # docs/format.md: the dtype
        is_sound, integers = status[0] == 0, _INTEGERS[out.element_size()]
        is_known = torch.zeros_like(is_sound)
        result = out.view(integers)
        for candidate in candidates:
            decoded = out.clone()
            if candidate == out.dtype and not accumulate:
                byte_view(decoded).copy_(body)
            else:
                # A packet may start anywhere in a receive buffer: clone, so that a typed view is aligned.
                apply_values(body.clone().view(candidate), decoded, accumulate)
            is_it = is_sound & (code == DTYPE_CODES[candidate])
            is_known |= is_it
            result = torch.where(is_it, decoded.view(integers), result)
        out.view(integers).copy_(result)
        status[0] = torch.where(is_sound & ~is_known, _WRONG_BODY, status[0])
