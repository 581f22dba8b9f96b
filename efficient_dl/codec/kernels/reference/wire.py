"""Little-endian integers to bytes and back, on the tensor's own device."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from efficient_dl.errors import CorruptPacket


def to_bytes(values: Tensor, width: int) -> Tensor:
    """int64 values to `width` bytes each; returns uint8, 1-D."""
    shifts = torch.arange(0, 8 * width, 8, device=values.device)
    return ((values.reshape(-1, 1) >> shifts) & 0xFF).to(torch.uint8).view(-1)


def from_bytes(data: Tensor, width: int, signed: bool = False) -> Tensor:
    """uint8 to int64, `width` bytes a value."""
    shifts = torch.arange(0, 8 * width, 8, device=data.device)
    values = (data.to(torch.int64).view(-1, width) << shifts).sum(1)
    return (
        torch.where(values >> (8 * width - 1) == 1, values - (1 << (8 * width)), values) if signed else values
    )


def pad4(data: Tensor) -> Tensor:
    """data with zero bytes up to a multiple of 4."""
    missing = -data.numel() % 4
    return torch.cat([data, data.new_zeros(missing)]) if missing else data


def integers(values: Tensor) -> list[int]:
    """The values of an integer tensor as Python integers (waits for the device)."""
    return cast("list[int]", values.view(-1).tolist())  # pyright: ignore[reportUnknownMemberType]


class Reader:
    """Takes byte ranges from the front of a body and refuses to read past its end."""

    def __init__(self, data: Tensor) -> None:
        self._data = data
        self._position = 0

    @property
    def remaining(self) -> int:
        """Bytes not taken yet."""
        return self._data.numel() - self._position

    def take(self, num_bytes: int) -> Tensor:
        """The next num_bytes bytes."""
        end = self._position + num_bytes
        if num_bytes < 0 or end > self._data.numel():
            raise CorruptPacket(
                "the packet is cut short",
                expected=f"{end} bytes of body",
                found=f"{self._data.numel()}",
                where=f"byte {self._position} of the body",
            )
        part = self._data[self._position : end]
        self._position = end
        return part

    def peek(self, num_bytes: int) -> Tensor:
        """The next num_bytes bytes, which stay where they are."""
        part = self.take(num_bytes)
        self._position -= num_bytes
        return part

    def integers(self, count: int, width: int, signed: bool = False) -> list[int]:
        """The next `count` integers of `width` bytes."""
        return integers(from_bytes(self.take(count * width), width, signed))

    def align4(self) -> None:
        """Skips padding up to a multiple of 4, which must be zero."""
        if bool(self.take(-self._position % 4).any()):
            raise CorruptPacket("padding is not zero", where=f"byte {self._position} of the body")

    def end(self) -> None:
        """Raises unless all bytes have been taken."""
        if self._position != self._data.numel():
            raise CorruptPacket(
                "the packet has bytes left over", found=f"{self._data.numel() - self._position}"
            )
