"""First-in-first-out stages, one thread each: jobs overlap, and every rank takes them in the same order."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch

from efficient_dl.errors import EdlError

J = TypeVar("J")


class Pipeline(Generic[J]):
    """Runs every job through all stages in order; stage s works on one job while stage s − 1 works on the next.

    device: where the jobs' tensors live. On a CUDA device all stages work on one side stream, `stream`; a job may use
        what the submitting stream is still computing, and is complete on `stream` only. (Written after the
        documentation of torch; not yet run on a GPU.)

    A stage that raises ends the pipeline: the job's future gets the exception, and so do those of all jobs behind
    it, because the other ranks' collectives could no longer match ours. The threads are daemons and hold no
    reference to the pipeline or its owner.
    """

    def __init__(self, name: str, stages: Sequence[Callable[[J], None]], device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._closed = False
        failure = _Failure()
        inboxes: list[_Inbox[J]] = [queue.SimpleQueue() for _ in stages]
        self._entry = inboxes[0]
        self._threads = [
            threading.Thread(
                target=_run,
                args=(stage, inbox, outbox, failure, self.stream),
                name=f"{name}-{number}",
                daemon=True,
            )
            for number, (stage, inbox, outbox) in enumerate(
                zip(stages, inboxes, [*inboxes[1:], None], strict=True)
            )
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: J) -> Future[J]:
        """Queues a job and returns at once; the future ends with the job, or with a stage's exception."""
        if self._closed:
            raise EdlError(
                "a collective was started after close()", fix="close the compression after the last step"
            )
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        future: Future[J] = Future()
        self._entry.put((job, future, torch.is_inference_mode_enabled()))
        return future

    def close(self, timeout: float = 10.0) -> bool:
        """Lets the queued jobs finish and ends the threads; False if one of them is still stuck after timeout.

        Called in one of the threads, where Python may collect garbage, too, it does not wait: that thread's job, and
        those behind it, go on after it returns.
        """
        deadline = time.monotonic() + timeout
        if not self._closed:
            self._closed = True
            self._entry.put(None)
        if threading.current_thread() in self._threads:
            return True
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)


_Inbox = queue.SimpleQueue[tuple[J, Future[J], bool] | None]


class _Failure:
    """The first exception of any stage."""

    error: BaseException | None = None


def _run(
    stage: Callable[[J], None],
    inbox: _Inbox[J],
    outbox: _Inbox[J] | None,
    failure: _Failure,
    stream: torch.cuda.Stream | None,
) -> None:
    while (item := inbox.get()) is not None:
        job, future, inference = item
        try:
            if failure.error is not None:
                raise failure.error
            # A tensor that was made in inference mode can be written to there only.
            with (
                torch.cuda.stream(stream) if stream else contextlib.nullcontext(),
                torch.inference_mode(inference),
            ):
                stage(job)
        except BaseException as error:
            failure.error = failure.error or error
            future.set_exception(error)
        else:
            if outbox is not None:
                outbox.put(item)
            else:
                future.set_result(job)
        del item, job, future  # an idle thread keeps no bucket alive
    if outbox is not None:
        outbox.put(None)
