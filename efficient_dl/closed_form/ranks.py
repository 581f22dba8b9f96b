"""What a fit needs of other ranks: sums of float64 numbers, and small messages. Alone, it needs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from efficient_dl.comm import Transport, gather_json, handshake
from efficient_dl.errors import DataError, EdlError


class Ranks(Protocol):
    """Those who fit together; all of them call the same methods in the same order."""

    rank: int
    world_size: int

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks, of float64 tensors of the same shapes everywhere, bitwise equal on all ranks."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; what JSON can hold, floats exactly."""
        ...

    def first(self, value: Tensor) -> Tensor:
        """Rank 0's float64 tensor, in the shape that all ranks give."""
        ...

    def agree(self, facts: dict[str, Any], failure: Exception | None) -> None:
        """Raises where ranks differ in facts, or one cannot start; that one raises its own failure."""
        ...


class Alone:
    """One process has all rows."""

    rank = 0
    world_size = 1

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def first(self, value: Tensor) -> Tensor:
        return value

    def agree(self, facts: dict[str, Any], failure: Exception | None) -> None:
        if failure is not None:
            raise failure


class Sharded:
    """Rows lie on the ranks of a transport.

    A sum is this project's one-shot all-reduce, at full precision: rank i gets everyone's i-th part, adds them up in
    float64 in rank order, and sends the result to all. Per rank and sum of m numbers 16 m (n − 1)/n bytes leave.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rank, self.world_size = transport.rank, transport.world_size

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        flat = torch.cat([one.reshape(-1) for one in tensors])
        parts = flat.tensor_split(self.world_size)
        received = self._transport.exchange([self._bytes(part) for part in parts]).wait()
        total = torch.zeros_like(parts[self.rank])
        for packet in received:
            total += _numbers(packet)
        whole = torch.cat([_numbers(packet) for packet in self._transport.gather(self._bytes(total)).wait()])
        sizes = [one.numel() for one in tensors]
        return [part.view(one.shape) for part, one in zip(whole.split(sizes), tensors, strict=True)]

    def gather(self, value: Any) -> list[Any]:
        return gather_json(value, self._transport)

    def first(self, value: Tensor) -> Tensor:
        own = value.reshape(-1) if self.rank == 0 else value.new_empty(0)
        return _numbers(self._transport.gather(self._bytes(own)).wait()[0]).view(value.shape)

    def agree(self, facts: dict[str, Any], failure: Exception | None) -> None:
        if failure is not None and not isinstance(failure, EdlError):
            failure = DataError(str(failure), where=f"rank {self.rank}")
        handshake(facts, self._transport, failure)

    def _bytes(self, x: Tensor) -> Tensor:
        return x.contiguous().view(torch.uint8).to(self._transport.device)


def _numbers(packet: Tensor) -> Tensor:
    """A copy, as the transport uses its memory again."""
    return packet.cpu().clone().view(torch.float64)
