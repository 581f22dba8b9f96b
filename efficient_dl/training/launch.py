"""Starts local workers through torch's elastic launcher, or joins the launcher that started this process."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from efficient_dl.errors import LaunchError
from efficient_dl.launching.place import find_place
from efficient_dl.training.signals import SIGNALS, Stopped
from efficient_dl.training.worker import work

T = TypeVar("T")

_SHUTDOWN_SECONDS = (
    10  # beyond their grace, between the signal that asks workers to end and the one that ends them
)


class WorkersFailed(Exception):
    """A worker has reported an error and ended with this exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a worker ended with exit code {exit_code}")
        self.exit_code = exit_code


def launched() -> bool:
    """Whether a launcher (torchrun, mpirun, srun, cluster.emulate, a script) started this process as one of its ranks.

    Raises LaunchError if its variables contradict each other.
    """
    return find_place(os.environ) is not None


def check_world_size(workers: int) -> None:
    """Raise LaunchError if a launcher started another number of ranks than the user asked for."""
    place = find_place(os.environ)
    if place is not None and place.size != workers:
        raise LaunchError(
            "the launcher started another number of workers than the run asks for",
            expected=f"{workers} (run.workers)",
            found=f"{place.size} ({place.launcher.size})",
            fix=f"leave --workers out under a launcher, or give --workers {place.size}",
        )


def launch(workers: int, main: Callable[..., T], *args: Any, grace_seconds: float = 0.0) -> T:
    """Run main(worker, *args) in every rank and return rank 0's result; main must be importable (module level).

    Started alone, this process starts `workers` local ones and waits; nothing of them is left afterwards.
    Under a launcher it is itself one rank and returns its own result; `workers` is then ignored.
    grace_seconds: what workers may take to end after a signal before ten more seconds and SIGKILL.
    Raises WorkersFailed (already reported), LaunchError if a worker was killed, Stopped on a signal.
    """
    if launched():
        return work(main, *args)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name may resolve to anything
    handled = (*SIGNALS, signal.SIGQUIT)  # but for those that a parent (nohup) has chosen to ignore
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a free port
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(),
        shutdown_timeout=_SHUTDOWN_SECONDS + math.ceil(grace_seconds),
        signals_to_handle=",".join(n.name for n in handled if signal.getsignal(n) != signal.SIG_IGN),
    )
    _silence_elastic()
    try:
        with _signals_reach_only_us():
            return elastic_launch(config, _started)(main, args)[0]
    except ChildFailedError as failed:
        raise _explained(failed) from None
    except SignalException as stopped:
        raise Stopped(stopped.sigval) from None
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT) from None


def _started(main: Callable[..., T], args: tuple[Any, ...]) -> T:
    return work(main, *args, own_launcher=True)


def _explained(failed: ChildFailedError) -> BaseException:
    rank, failure = failed.get_first_failure()
    code = failure.exitcode
    if code >= 128:
        return Stopped(code - 128)
    if code >= 0:
        return WorkersFailed(code)
    name = signal.Signals(-code).name
    likely = "often the system ran out of memory: try a smaller --batch-size" if name == "SIGKILL" else None
    return LaunchError(f"worker {rank} was ended by {name}", found=f"process {failure.pid}", fix=likely)


@contextlib.contextmanager
def _signals_reach_only_us() -> Iterator[None]:
    """Keep signals from workers that are still importing, where they would end in a traceback.

    Blocked signals are inherited: a worker sees them once it can handle them (worker.work unblocks). This process
    receives them on another thread; Python then runs the handler on the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGQUIT)}
    done = threading.Event()
    threading.Thread(target=done.wait, name="edl-signals", daemon=True).start()
    resource_tracker.ensure_running()  # its start unblocks signals in the calling thread
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        done.set()


def _silence_elastic() -> None:
    """Workers report their own errors; the agent's log would repeat them as tracebacks."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
