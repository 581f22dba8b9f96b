"""The transport over MPI (mpi4py): each message by its own Isend and Irecv, all of them in flight at once.

Why not one of MPI's all-to-alls: the seconds that gloo needs for an exchange, as a multiple of MPI's, between processes
of one machine (two busy cores of an Intel Xeon, messages of 10 MiB, medians of nine, sizes included):

                                             Open MPI 5.0, 2 ranks   4 ranks   MPICH 5.0, 2 ranks   4 ranks
    Isend and Irecv, all at once                               3.6       1.7                  2.5       2.1
    Isend and Irecv, pairwise rounds                           5.2       2.0                  2.8       1.9
    Ialltoallw on the tensors' addresses                       4.8       2.4                  0.2       0.1
    Ialltoallv on one tensor of all messages                   0.5       0.3                  0.1       0.2

MPICH takes derived datatypes apart piece by piece, and a joined tensor is two more copies. Rounds gain little, and all
at once a rank's messages are under way before it can fail: the notice that it has left never overtakes them.

The transport as it is, with smaller messages: benchmarks/exchange_mpi.py, benchmarks/results/exchange_mpi.jsonl.

MPI itself waits for ever. Here every wait polls, with naps that leave the cores to the codecs, and ends at its
deadline or when a peer's notice comes.
"""

from __future__ import annotations

import socket
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm.buffers import ReceiveBuffers
from efficient_dl.comm.handshake import gather_json
from efficient_dl.comm.mpi_link import Leaving, Link, keep_for_ever, mpi_module
from efficient_dl.comm.process_group import DEFAULT_TIMEOUT_SECONDS
from efficient_dl.comm.transport import SIZE_BYTES
from efficient_dl.errors import ConfigError, TransportError

if TYPE_CHECKING:
    from mpi4py import MPI

_MESSAGE_TAG, _SIZE_TAG = 0, 1
CHUNK_BYTES = 2**30  # MPI counts in C ints
_SHORTEST_NAP_SECONDS, _LONGEST_NAP_SECONDS = 50e-6, 1e-3
LAST_MESSAGE_SECONDS = (
    10.0  # for what a peer sent before it closed its end; its large messages have arrived by then
)
_CLOSE_SECONDS = 1.0  # for the peers to close their ends, too
_ITS_SIZE, _ITS_MESSAGE, _OUR_MESSAGE = "its size", "its message", "our message"


class MpiTransport:
    """Implements `Transport` on a communicator of its own; all ranks construct it together.

    comm: whose ranks; a duplicate of it is used. By default MPI.COMM_WORLD.
    timeout: seconds that one transfer may take, and the construction.
    device: the CPU. MPI works on the memory of the tensors; nothing is copied. Messages beyond 1 GiB travel in parts.
    members, names: see `Link`.

    A rank that leaves (`close`, `abort`, a failed transfer, its process's end) tells its peers, and they wait for it no
    longer. If a rank is killed, the launcher ends the others; if it was told not to, they wait until the time-out. A
    process that lost a peer gets 30 s for MPI_Finalize, which would wait for the peer for ever; then SIGALRM ends it,
    and the launcher ends the rest.

    Raises ConfigError (another device; MPI is not initialized with MPI_THREAD_MULTIPLE), PackageMissing (no mpi4py, no
    MPI library), TransportError (not all ranks came).
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        device: torch.device | None = None,
        members: Sequence[int] | None = None,
        names: Sequence[int] | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        if self.device.type != "cpu":
            raise ConfigError(
                f"MpiTransport cannot move tensors on {self.device.type}",
                expected="tensors on the CPU",
                fix="leave transport out: NCCL moves the tensors of CUDA devices",
            )
        self.timeout = timeout
        self.link = Link(comm or mpi_module().COMM_WORLD, timeout, members, names)
        self.receive_buffers = ReceiveBuffers()
        self._goodbye = weakref.finalize(self, self.link.leave, Leaving.CLOSED)

    @property
    def rank(self) -> int:
        """See `Transport.rank`."""
        return self.link.rank

    @property
    def world_size(self) -> int:
        """See `Transport.world_size`."""
        return self.link.world_size

    @property
    def ranks(self) -> Sequence[int]:
        """See `Transport.ranks`; of the first communicator."""
        return self.link.names

    def exchange(self, outgoing: list[Tensor], sizes: Sequence[int] | None = None) -> MpiWork:
        """See `Transport.exchange`."""
        return MpiWork(self, outgoing, sizes)

    def gather(self, packet: Tensor, sizes: Sequence[int] | None = None) -> MpiWork:
        """See `Transport.gather`."""
        return MpiWork(self, [packet] * self.world_size, sizes)

    def sibling(self) -> MpiTransport:
        """See `Transport.sibling`."""
        return MpiTransport(self.link.comm, self.timeout, names=self.link.names)

    def subgroup(self, members: Sequence[int]) -> MpiTransport:
        """See `Divisible.subgroup`."""
        return MpiTransport(self.link.comm, self.timeout, members=members, names=self.link.names)

    def abort(self) -> None:
        """See `Transport.abort`."""
        self.link.leave(Leaving.ABORTED)

    def close(self) -> None:
        """See `Transport.close`. The communicator is freed if all ranks close within a second, else by MPI_Finalize."""
        if self._goodbye.detach():
            self.link.leave(Leaving.CLOSED)
            self.link.free(_CLOSE_SECONDS)


class MpiWork:
    """Messages on their way; implements `Work`. Sends begin at once, receives when the sizes are known."""

    def __init__(
        self, transport: MpiTransport, outgoing: list[Tensor], sizes: Sequence[int] | None = None
    ) -> None:
        link = self._link = transport.link
        self._transport = transport
        self._incoming = list(outgoing)
        self._own_sizes = np.array([message.numel() for message in outgoing], dtype=np.int64)
        self._sizes = np.empty_like(self._own_sizes)
        self._requests: list[MPI.Request] = []
        self._purposes: list[tuple[str, int]] = []  # of each request: what moves, and the peer
        size_bytes = SIZE_BYTES if sizes is None else 0
        self.sent_bytes = sum(outgoing[peer].numel() + size_bytes for peer in link.peers)
        for peer in link.peers:
            if sizes is None:
                self._start(_ITS_SIZE, peer, link.comm.Irecv, self._sizes[peer : peer + 1], _SIZE_TAG)
            else:
                self._receive(peer, sizes[peer])
        for peer in link.peers:
            if sizes is None:
                self._start(_OUR_MESSAGE, peer, link.comm.Isend, self._own_sizes[peer : peer + 1], _SIZE_TAG)
            self._start_parts(_OUR_MESSAGE, peer, link.comm.Isend, outgoing[peer])

    def wait(self, timeout: float | None = None) -> list[Tensor]:
        """See `Work.wait`."""
        limit = self._transport.timeout if timeout is None else timeout
        now = last = time.monotonic()
        deadline = now + limit
        while self._requests:
            if self._advance() or (self._link.read_notices() and self._advance()):
                last = time.monotonic()
                continue
            for what, peer in self._purposes:
                how = self._link.left.get(peer)
                # Of a peer that has closed its end, a message may still be under way.
                is_late = what == _ITS_SIZE or time.monotonic() - last > LAST_MESSAGE_SECONDS
                if how == Leaving.ABORTED or (how == Leaving.CLOSED and is_late):
                    self._fail(what, peer, "it has given up, or has ended")
            now = time.monotonic()
            if now > deadline:
                self._fail(*self._purposes[0], f"nothing came within {limit:g} s")
            if self._link.has_left:
                self._fail(*self._purposes[0], "this rank has given up")
            time.sleep(min(max((now - last) / 20, _SHORTEST_NAP_SECONDS), _LONGEST_NAP_SECONDS))
        return self._incoming

    def _advance(self) -> bool:
        """Lets MPI work; whether anything was completed. A size starts the receive of its message."""
        try:
            completed: list[int] = self._link.mpi.Request.Testsome(self._requests) or []
        except self._link.mpi.Exception as error:
            self._fail(*self._purposes[0], str(error))
        arrived = [self._purposes[position] for position in completed]
        for position in sorted(completed, reverse=True):
            del self._requests[position], self._purposes[position]
        for what, peer in arrived:
            if what == _ITS_SIZE:
                self._receive(peer, int(self._sizes[peer]))
        return bool(completed)

    def _receive(self, peer: int, size_bytes: int) -> None:
        message = self._transport.receive_buffers.take(peer, size_bytes)
        self._incoming[peer] = message
        self._start_parts(_ITS_MESSAGE, peer, self._link.comm.Irecv, message)

    def _start_parts(self, what: str, peer: int, start: Callable[..., MPI.Request], message: Tensor) -> None:
        values = message.numpy()
        for first in range(0, len(values), CHUNK_BYTES):
            self._start(what, peer, start, values[first : first + CHUNK_BYTES], _MESSAGE_TAG)

    def _start(self, what: str, peer: int, start: Callable[..., MPI.Request], values: Any, tag: int) -> None:
        if self._link.has_left:
            self._fail(what, peer, "the transport was closed, aborted, or has failed before")
        try:
            self._requests.append(start(values, peer, tag))
        except self._link.mpi.Exception as error:
            self._fail(what, peer, str(error))
        self._purposes.append((what, peer))

    def _fail(self, what: str, peer: int, found: str) -> NoReturn:
        keep_for_ever(self._requests)
        self._link.leave(Leaving.ABORTED)
        lost = self._link.names[peer]
        raise TransportError(
            f"rank {self._link.names[self._link.rank]} lost rank {lost} while waiting for {what}",
            found=found,
            where=f"a transfer among {self._link.world_size} ranks of MPI, limited to {self._transport.timeout:g} s",
            fix=f"read the end of rank {lost}'s log: it has stopped, is stuck or cannot be reached",
        )


def init_process_group(
    backend: str = "gloo",
    comm: MPI.Intracomm | None = None,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    address: str | None = None,
) -> None:
    """torch's init_process_group for processes that mpirun has started: ranks and world size are those of MPI.

    Rank 0 opens a port, and MPI tells the others which; neither MASTER_ADDR nor any other variable is read.

    backend: as torch takes it. comm: whose ranks, by default MPI.COMM_WORLD's.
    timeout: seconds, for MPI and for torch's collectives.
    address: where the others reach rank 0; by default its host's name, or 127.0.0.1 if all ranks are on one host.

    Raises as `MpiTransport`; ConfigError if torch.distributed is initialized already.
    """
    if dist.is_initialized():
        raise ConfigError("torch.distributed is initialized already", fix="call one init_process_group, once")
    store, rank, world_size = open_store(comm, timeout, address)
    dist.init_process_group(  # pyright: ignore[reportUnknownMemberType]
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )


def open_store(
    comm: MPI.Intracomm | None = None,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    address: str | None = None,
) -> tuple[dist.TCPStore, int, int]:  # pyright: ignore[reportPrivateImportUsage]
    """A store that all ranks of the communicator share, rank, and world size; arguments and errors as above."""
    transport = MpiTransport(comm, timeout)
    rank, world_size, limit = transport.rank, transport.world_size, timedelta(seconds=timeout)
    open_it = partial(
        dist.TCPStore,  # pyright: ignore[reportPrivateImportUsage]
        world_size=world_size,
        timeout=limit,
        wait_for_workers=False,
    )
    store = open_it("127.0.0.1", 0, is_master=True) if rank == 0 else None
    hosts = gather_json([socket.gethostname(), store.port if store else 0], transport)
    transport.close()
    if store is None:
        one_host = len({host for host, _ in hosts}) == 1
        host = address or ("127.0.0.1" if one_host else hosts[0][0])
        store = open_it(host, hosts[0][1], is_master=False)
    return store, rank, world_size
