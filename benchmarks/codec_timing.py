"""Times an encoder and a decoder beside its peers: the same tensor, one core, taking turns, in reused memory."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from efficient_dl.codec import Codec, PacketStats, Side
from efficient_dl.codec.kernels.native.library import set_num_threads

MIN_TURNS = 3
TIME_SHARE_SECONDS = 1.0  # of a system, for one tensor and direction, before it is left out of further rounds
NEAR_BEST = 0.03
WARM_UP_BELOW_SECONDS = 0.03  # what takes longer does not notice what the caches held at its start

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class System(Protocol):
    """A codec with one tensor to code again and again."""

    name: str

    def prepare(self) -> None:
        """What must happen before each encode, not timed."""
        ...

    def encode(self) -> None:
        """Codes the tensor; keeps the packet."""
        ...

    def decode(self) -> None:
        """Decodes the kept packet into memory that is kept too."""
        ...

    def packet_bytes(self) -> int:
        """Bytes of the kept packet."""
        ...

    def decoded(self) -> Tensor:
        """What the packet decodes to; not timed."""
        ...


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over all repetitions."""

    best: float
    median: float

    def speed(self, num_bytes: int) -> float:
        """GB/s at the best."""
        return num_bytes / self.best / 1e9

    def median_speed(self, num_bytes: int) -> float:
        """GB/s at the median."""
        return num_bytes / self.median / 1e9


class Ours:
    """One of our codecs. accumulate: decoding adds to the output, which then holds no tensor."""

    def __init__(
        self, name: str, codec: Codec, x: Tensor, side: Side | None = None, accumulate: bool = False
    ) -> None:
        self.name = name
        self._codec, self._x, self._side, self._accumulate = codec, x, side, accumulate
        self._room = torch.zeros(codec.max_bytes(x.numel(), x.dtype, side), dtype=torch.uint8)
        self._out = torch.zeros_like(x)
        self._packet = self._room[:0]

    def prepare(self) -> None:
        """Nothing."""

    def encode(self) -> None:
        """See System."""
        self._packet = self._room[: int(self._codec.encode_into(self._x, self._room, self._side))]

    def decode(self) -> None:
        """See System."""
        self._codec.decode(self._packet, self._out, self._accumulate, self._side)

    def packet_bytes(self) -> int:
        """See System."""
        return self._packet.numel()

    def decoded(self) -> Tensor:
        """See System."""
        out = torch.empty_like(self._x)
        self._codec.decode(self._packet, out, side=self._side)
        return out

    def stats(self) -> PacketStats:
        """Where the packet's bits went; not timed."""
        stats = PacketStats()
        self._codec.encode_into(self._x, self._room, self._side, stats)
        return stats


class Copy:
    """memcpy, the yardstick: both directions copy the tensor."""

    name = "memcpy"

    def __init__(self, x: Tensor) -> None:
        self._x, self._out = x, torch.zeros_like(x)

    def prepare(self) -> None:
        """Nothing."""

    def encode(self) -> None:
        """See System."""
        self._out.copy_(self._x)

    def decode(self) -> None:
        """See System."""
        self._out.copy_(self._x)

    def packet_bytes(self) -> int:
        """See System."""
        return self._x.numel() * self._x.element_size()

    def decoded(self) -> Tensor:
        """See System."""
        return self._out


def use_one_core() -> None:
    """One thread for torch and for our kernels; freed memory stays in the process.

    Fresh pages cost more than most codecs here. Our codecs write into given memory, most peers cannot: with
    mallopt (glibc) the memory that they free is what they get the next time, so they do not pay for pages either.
    """
    torch.set_num_threads(1)
    set_num_threads(1)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def measure(systems: Sequence[System], rounds: int) -> dict[str, tuple[Timing, Timing]]:
    """Encode and decode times by the systems' names; in each round every system has one turn, the first one last next.

    A turn is an untimed call and a timed one, so that each system finds in the caches what its own call left there, and
    not its neighbour's. A system that has used up its share of time has its turns in the first rounds only. On a busy
    machine there are up to three times as many rounds, until every system has reached its best several times: one lucky
    turn, or none, would make a ratio of two bests worthless.
    """
    encodes: dict[str, list[float]] = {system.name: [] for system in systems}
    decodes: dict[str, list[float]] = {system.name: [] for system in systems}
    for system in systems:  # memory and tables are touched, and there is a packet to decode
        system.prepare()
        system.encode()
        system.decode()
    for i in range(3 * rounds):
        if i >= rounds and all(map(_settled, (*encodes.values(), *decodes.values()))):
            break
        turns = [*systems[i % len(systems) :], *systems[: i % len(systems)]]
        for system in turns:
            _turn(encodes[system.name], system.encode, system.prepare)
        for system in turns:
            _turn(decodes[system.name], system.decode, _nothing)
    return {system.name: (_timing(encodes[system.name]), _timing(decodes[system.name])) for system in systems}


def check_exact(system: System, x: Tensor) -> None:
    """Raises RuntimeError unless the system gives back every bit of x."""
    system.prepare()
    system.encode()
    if not torch.equal(system.decoded().view(torch.uint8), x.view(torch.uint8)):
        raise RuntimeError(f"{system.name} does not give back the {x.dtype} tensor that it encoded")


def _turn(seconds: list[float], call: Callable[[], None], prepare: Callable[[], None]) -> None:
    if _spent(seconds):
        return
    if not seconds or seconds[-1] < WARM_UP_BELOW_SECONDS:
        prepare()
        call()
    prepare()
    start = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - start)


def _spent(seconds: list[float]) -> bool:
    return len(seconds) >= MIN_TURNS and sum(seconds) > TIME_SHARE_SECONDS


def _settled(seconds: list[float]) -> bool:
    near = sum(one <= min(seconds) * (1 + NEAR_BEST) for one in seconds)
    return near >= MIN_TURNS or _spent(seconds)


def _nothing() -> None:
    pass


def _timing(seconds: list[float]) -> Timing:
    return Timing(min(seconds), statistics.median(seconds))
