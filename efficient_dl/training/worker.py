"""One worker process: finds its peers, agrees with them, and ends with one clear message whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from efficient_dl.comm.topology import machine
from efficient_dl.config import Config, RunConfig
from efficient_dl.errors import EdlError, LaunchError, PlanMismatch, TransportError
from efficient_dl.launching import interfaces
from efficient_dl.launching.caches import own_uid, use_node_caches
from efficient_dl.launching.ends import tell_end
from efficient_dl.launching.meeting import find_meeting, meet
from efficient_dl.launching.place import find_place
from efficient_dl.training import devices
from efficient_dl.training.console import print_error
from efficient_dl.training.session import session
from efficient_dl.training.signals import SIGNALS, Stopped, handled
from efficient_dl.training.versions import check_versions, versions
from efficient_dl.training.watch import verdict

T = TypeVar("T")

_START_TIMEOUT = datetime.timedelta(seconds=120)
_REPORT_SECONDS = 3.0  # how long a failed rank waits for the others' view of what went wrong


class PeerFailed(Exception):
    """Another rank has an error and reports it itself."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


@dataclass(frozen=True)
class Worker:
    """A rank before and after its process group exists; every method is called by all ranks in the same order.

    local_rank: among those on its machine; negative as long as nobody knows. meeting: the store behind `store`.
    """

    rank: int
    size: int
    local_rank: int
    store: dist.Store
    meeting: dist.TCPStore
    calls: Iterator[int] = field(default_factory=itertools.count)  # equal on all ranks; makes keys unique

    def together(self, name: str, step: Callable[[], T], patience: float = 0.0) -> T:
        """Run `step` on every rank; if it raises an EdlError on any of them, no rank goes on.

        The first rank with an error raises it, and so do those with another one; the rest raise PeerFailed.
        name: what is done, the same on all ranks. patience: seconds that ranks may need unequally long.
        """
        try:
            result, error = step(), None
        except EdlError as caught:
            result, error = None, caught
        errors: list[EdlError | None] = self.gather(f"together/{name}", error, patience)
        found = [(rank, one) for rank, one in enumerate(errors) if one is not None]
        if not found:
            return result  # type: ignore[return-value]  # there was no error, so it is step's
        said = [str(one) for rank, one in found if rank < self.rank]
        if error is None or str(error) in said:
            raise PeerFailed(found[0][1].exit_code)
        raise error

    def gather(self, name: str, value: Any, patience: float = 0.0) -> list[Any]:
        """Every rank's value in rank order, without a process group. name: what it is, the same on all ranks.

        patience: seconds to wait for the slowest rank before the store's own time-out begins.
        """
        key = f"{name}/{next(self.calls)}"
        self.store.set(f"{key}/{self.rank}", _bytes(value))
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not self.store.check(keys):
            time.sleep(0.05)  # not in the store's own wait, which no signal interrupts
        return [pickle.loads(self.store.get(one)) for one in keys]

    def start(self, run: RunConfig) -> torch.device:
        """Share out the cores, choose the device, and make the default process group.

        Raises LaunchError if the device is not there, TransportError if the group cannot be made.
        """
        device = self.together("device", lambda: devices.choose_device(run.device, self.local_rank))
        gpus = self.gather("gpus", (machine(), devices.gpu_of(device)))
        self.together("gpus", lambda: devices.check_gpus(gpus))
        bound = run.bind == "cores"
        cores = self.gather("cores", devices.usable_cores(device, bound))
        share = self.together("bind", lambda: devices.share_cores(cores, self.rank, bound))
        torch.set_num_threads(run.threads or share)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("default", self.store),
            rank=self.rank,
            world_size=self.size,
            timeout=datetime.timedelta(seconds=run.timeout_seconds),
        )
        return device

    def agree(self, configs: list[Config]) -> None:
        """End the run with a PlanMismatch, raised on rank 0, unless all ranks were given the same configurations."""
        per_rank: list[list[Config]] = self.gather("configs", configs)
        self.together("agree", lambda: _compare(per_rank))


def _compare(per_rank: list[list[Config]]) -> None:
    ignore = ("run.device", "run.threads", "run.workers")
    for rank, theirs in enumerate(per_rank):
        pairs = list(zip(theirs, per_rank[0], strict=False))
        lines = [line for one, first in pairs for line in one.differences(first, ignore)]
        if lines or len(theirs) != len(per_rank[0]):
            raise PlanMismatch(
                f"rank {rank} was configured otherwise than rank 0",
                differs="; ".join(lines) + f" (rank {rank}, rank 0)",
                fix="start every rank with the same flags and the same configuration file",
            )


def work(main: Callable[..., T], *args: Any, own_launcher: bool = False) -> T:
    """Run main(worker, *args) as one rank, found from the variables of its launcher (launching/place.py).

    Does not return after an error: it is reported once for all ranks, and the process exits with its code.
    own_launcher: the parent process reports signals.
    """
    worker: Worker | None = None
    stops: list[Stopped] = []
    try:
        with handled(stops):
            worker = _with_own_keys(_find_peers())
            per_rank = worker.gather("versions", versions())
            worker.together("versions", lambda: check_versions(per_rank))
            worker = _know_peers(worker)
            result = main(worker, *args)
            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
            return result
    except SystemExit:
        raise
    except BaseException as error:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # reporting is short and bounded; let it finish
        # After a signal every error is its consequence; torch turns one raised inside a hook into a RuntimeError.
        code = _report(stops[0] if stops else error, worker, own_launcher)
        tell_end(code, os.environ)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads stuck in collectives would keep a normal exit waiting


def _find_peers() -> Worker:
    """This rank, by its launcher's variables; its peers, by the store at which all meet."""
    place = find_place(os.environ)
    if place is None:
        raise LaunchError(
            "this process is no rank of a launch",
            expected="RANK and WORLD_SIZE, or the variables of mpirun or srun",
            fix="start it by torchrun, mpirun or srun, or through efficient_dl.training.launch",
        )
    use_node_caches(os.environ, own_uid())
    store = meet(place, find_meeting(place, os.environ), _START_TIMEOUT)
    local_rank = -1 if place.local_rank is None else place.local_rank
    return Worker(place.rank, place.size, local_rank, dist.PrefixStore("edl", store), store)


def _with_own_keys(worker: Worker) -> Worker:
    """The worker with keys that no other has written: an earlier one, or one of another job at the same address."""
    own = session(worker.store, worker.rank, worker.size, _START_TIMEOUT.total_seconds())
    return dataclasses.replace(worker, store=own)


def _know_peers(worker: Worker) -> Worker:
    """The worker with its local rank, if its launcher does not tell it, after choosing the network interface."""
    meeting = worker.meeting
    here = (machine(), interfaces.reach(meeting.host, meeting.port))
    everyone: list[tuple[str, interfaces.Reach]] = worker.gather("peers", here)
    ways = [way for _, way in everyone]
    given = os.environ.get(interfaces.GLOO)
    name = worker.together("interfaces", lambda: given or interfaces.choose(ways, worker.rank))
    interfaces.use(name, os.environ)
    if worker.local_rank >= 0:
        return worker
    return dataclasses.replace(worker, local_rank=sum(one == here[0] for one, _ in everyone[: worker.rank]))


def _rank(worker: Worker | None) -> int:
    """For messages, also of a rank that has not found its peers."""
    if worker is not None:
        return worker.rank
    with contextlib.suppress(LaunchError):
        place = find_place(os.environ)
        return 0 if place is None else place.rank
    return 0


def _report(error: BaseException, worker: Worker | None, own_launcher: bool) -> int:
    """Print the error unless another rank prints the same or its cause; the exit code."""
    rank = _rank(worker)
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        if rank == 0 and not own_launcher:
            print_error(str(error if isinstance(error, Stopped) else Stopped(number)))
        return 128 + number
    if isinstance(error, PeerFailed):
        if worker is not None:
            # Not gone at once: rank 0 may host the store, and the rank with the error may still read from it.
            _others_view_in_time(worker, "", error.exit_code, consequence=True)
        return error.exit_code
    known = error if isinstance(error, EdlError) else _as_transport_error(error)
    if isinstance(known, TransportError):
        found = verdict(known.details.get("found", known.problem), _timed_out(known))
        if found is not None:
            if found.printer == rank:
                print_error(f"{type(found.error()).__name__}: {found.error()}")
            return found.error().exit_code
    text = f"{type(known).__name__}: {known}" if known else "".join(traceback.format_exception(error))
    code = known.exit_code if known else 1
    if worker is not None:
        other = _others_view_in_time(worker, text, code, consequence=isinstance(known, TransportError))
        if other is not None:
            return other
    prefix = f"rank {rank}: " if rank > 0 else ""
    if known:
        print_error(prefix + text)
    else:
        sys.stderr.write(prefix + text)
    return code


def _others_view_in_time(worker: Worker, text: str, code: int, consequence: bool) -> int | None:
    """`_others_view`, given up where a store on a host that is cut off neither answers nor fails."""
    answers: list[int | None] = []
    asking = threading.Thread(
        target=lambda: answers.append(_others_view(worker, text, code, consequence)),
        name="edl-report",
        daemon=True,
    )
    asking.start()
    asking.join(_REPORT_SECONDS + 1.0)
    return answers[0] if answers else None


def _others_view(worker: Worker, text: str, code: int, consequence: bool) -> int | None:
    """Publish this rank's error; the exit code if another rank prints it or its cause, None to print it here.

    A lost connection is usually the consequence of another rank's error, so a rank that has one waits for that.
    """
    others = [rank for rank in range(worker.size) if rank != worker.rank]
    seen: dict[int, tuple[str, int, bool]] = {}
    deadline = time.monotonic() + _REPORT_SECONDS
    hosts_store = worker.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    _publish(worker, (text, code, consequence))
    try:
        while time.monotonic() < deadline and len(seen) < len(others):
            for rank in others:
                if rank not in seen and worker.store.check([f"errors/{rank}"]):
                    seen[rank] = pickle.loads(worker.store.get(f"errors/{rank}"))
            if _settled(worker.rank, seen, consequence) and not hosts_store:
                break
            time.sleep(0.05)
    except (dist.DistError, RuntimeError):
        pass  # the store went with its rank
    causes = [(theirs, their_code) for theirs, their_code, follows in seen.values() if not follows]
    if consequence and causes:
        return causes[0][1]
    lower = [
        theirs for rank, (theirs, _, follows) in seen.items() if rank < worker.rank and follows == consequence
    ]
    return code if text in lower or (consequence and lower) else None


def _publish(worker: Worker, view: tuple[str, int, bool]) -> None:
    """Tell the other ranks how this one ends: its message, its exit code, whether another rank's end caused it."""
    with contextlib.suppress(dist.DistError, RuntimeError):  # the store went with its rank
        worker.store.set(f"errors/{worker.rank}", _bytes(view))


def _settled(rank: int, seen: dict[int, tuple[str, int, bool]], consequence: bool) -> bool:
    if consequence:
        return any(not follows for _, _, follows in seen.values())
    return rank == 0 or 0 in seen


def _as_transport_error(error: BaseException) -> TransportError | None:
    """gloo's and NCCL's errors as ours, None for any other exception."""
    text = str(error)
    words = (
        "gloo",
        "NCCL",
        "Connection closed by peer",
        "Connection reset",
        "Timed out waiting",
        "Broken pipe",
    )
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(one in text for one in words)
    ):
        return TransportError(
            "a collective failed: another rank has ended, hangs or cannot be reached",
            found=_first_line(error),
            fix="look at the other ranks' messages; the last checkpoint is intact: --resume",
        )
    return None


def _timed_out(error: TransportError) -> bool:
    """Whether a peer was waited for in vain; a closed connection is another matter."""
    text = str(error).lower()
    return "timed out" in text or "timeout" in text or "has taken or sent no activations" in text


def _bytes(value: Any) -> Any:
    """Pickled. Any, because torch's stub of Store.set knows only str, and a str may hold no such bytes."""
    return pickle.dumps(value)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
