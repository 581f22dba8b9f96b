"""The transport contract: byte tensors move between ranks, and nothing looks inside them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor

T_co = TypeVar("T_co", covariant=True)
SIZE_BYTES: Final = 8  # of the number that announces a message's length; every transport counts it


class Work(Protocol[T_co]):
    """A transfer that was started. It progresses, at the latest, inside `wait`."""

    @property
    def sent_bytes(self) -> int:
        """What this rank sends to other ranks for it: the messages, and the sizes that announce them."""
        ...

    def wait(self, timeout: float | None = None) -> T_co:
        """Returns the result; raises `TransportError`, naming the peer, after `timeout` seconds or at a loss.

        timeout: seconds for the whole transfer; None takes the transport's own.
        """
        ...


class Transport(Protocol):
    """Moves bytes between the ranks of one group.

    Messages are contiguous 1-D uint8 tensors on `device`, of any length, zero included, different for each pair of
    ranks, and unknown to the receiver beforehand unless `sizes` are given. All ranks call the same methods in the same
    order, and wait for one transfer before they start the next on the same transport; what was received is valid until
    then, because its memory is used again. After an error a transport is unusable.
    """

    @property
    def rank(self) -> int:
        """This process, 0 … world_size − 1 within the group."""
        ...

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        ...

    @property
    def ranks(self) -> Sequence[int]:
        """Which ranks of the whole job these are, by their number within the group; for messages to users."""
        ...

    @property
    def device(self) -> torch.device:
        """Where messages live."""
        ...

    def exchange(self, outgoing: list[Tensor], sizes: Sequence[int] | None = None) -> Work[list[Tensor]]:
        """Sends the i-th message to rank i; the result's i-th message came from rank i.

        The message to the rank itself is handed through, and counts as no bytes.
        sizes: the bytes of what comes, by rank, where every rank knows what will come: then no sizes are sent.
        """
        ...

    def gather(self, packet: Tensor, sizes: Sequence[int] | None = None) -> Work[list[Tensor]]:
        """Sends one message to all ranks; the result's i-th message came from rank i.

        sizes: the bytes of every rank's message, by rank, where all ranks know them already: then none are sent.
        """
        ...

    def sibling(self) -> Transport:
        """A transport of its own among the same ranks; all of them call it, in the same order.

        Transfers on the two run side by side, in different threads, without an order between them.
        """
        ...

    def abort(self) -> None:
        """Breaks all connections: whoever waits for this rank, here or elsewhere, gets a TransportError now."""
        ...

    def close(self) -> None:
        """Gives up what the transport holds; at any time, also twice."""
        ...


class Divisible(Transport, Protocol):
    """A transport that can make others among a part of its ranks."""

    def subgroup(self, members: Sequence[int]) -> Transport:
        """A transport among some of these ranks, ascending. All ranks call it, each for the part that it is in."""
        ...


@contextmanager
def telling_peers(*transports: Transport) -> Generator[None]:
    """Breaks these connections if the body raises: peers get a TransportError that names this rank, not a time-out."""
    try:
        yield
    except BaseException:
        for transport in transports:
            transport.abort()
        raise
