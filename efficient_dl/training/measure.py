"""Times and memory of training steps, and how each is measured."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

_WARM_UP = 2
_REPEATS = 5


class StepClock:
    """Durations of steps: wall clock on a CPU, CUDA events on a GPU, where reading a clock would stall the queue."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time the body as one step."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            begin_seconds = time.perf_counter()
            yield
            self._seconds.append(time.perf_counter() - begin_seconds)

    def seconds(self) -> list[float]:
        """The seconds of every step so far; on a GPU this waits for the last one."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds.append(begin.elapsed_time(end) / 1000)
        self._events.clear()
        return self._seconds

    def median(self, last: int | None = None) -> float:
        """The median of the last steps (default: of all), 0 if there are none."""
        seconds = self.seconds()
        return statistics.median(seconds[-last:] if last else seconds) if seconds else 0.0


@contextlib.contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo what forward and backward passes in the body leave behind: gradients, buffers, generators."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    model.zero_grad(set_to_none=True)


def compute_seconds(model: nn.Module, device: torch.device, backward: Callable[[], object]) -> float:
    """The median time of a step's forward and backward passes without any communication.

    backward: runs all passes of one step on the bare model (not wrapped by DDP), whose gradients this discards.
    All ranks do this at the same moment, before training, so that they share cores and memory as they will later.
    """
    clock = StepClock(device)
    with untouched(model, device):
        for repeat in range(_WARM_UP + _REPEATS):
            if dist.is_initialized():
                dist.barrier()
            if repeat < _WARM_UP:
                backward()
            else:
                with clock.step():
                    backward()
            model.zero_grad(set_to_none=True)
    return clock.median()


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak of what ran before in this process; on Linux's CPUs by the kernel's own reset, if it may."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as file:
            return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
