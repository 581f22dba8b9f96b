"""Times and memory of training steps, and how each is measured."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

_WARM_UP = 2
_REPEATS = 5


@dataclass(frozen=True)
class Compute:
    """A step's forward and backward passes without communication.

    seconds: the median. ready: the share of them after which each parameter's gradient is there, by name, a median.
    """

    seconds: float
    ready: Mapping[str, float]


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


def compute(model: nn.Module, device: torch.device, backward: Callable[[], object]) -> Compute:
    """Times a step's forward and backward passes without any communication.

    backward: runs all passes of one step on the bare model (not wrapped by DDP), whose gradients this discards.
    All ranks do this at the same moment, before training, so that they share cores and memory as they will later.
    """
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    marks: dict[str, _Mark] = {}
    hooks = [
        one.register_post_accumulate_grad_hook(lambda _, name=name: marks.__setitem__(name, _Mark(device)))
        for name, one in trained.items()
    ]
    seconds: list[float] = []
    shares: list[dict[str, float]] = []
    with contextlib.ExitStack() as removing, untouched(model, device):
        for hook in hooks:
            removing.callback(hook.remove)
        for repeat in range(_WARM_UP + _REPEATS):
            if dist.is_initialized():
                dist.barrier()
            marks.clear()
            begin = _Mark(device)
            backward()
            took = _Mark(device).since(begin)
            model.zero_grad(set_to_none=True)
            if repeat >= _WARM_UP:
                seconds.append(took)
                shares.append({name: min(mark.since(begin) / took, 1.0) for name, mark in marks.items()})
    ready = {name: statistics.median(one.get(name, 1.0) for one in shares) for name in trained}
    return Compute(statistics.median(seconds), ready)


class _Mark:
    """A moment, as the device that computes comes to it."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()
        self._time = time.perf_counter()

    def since(self, earlier: _Mark) -> float:
        """Seconds; on a GPU this waits for it."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


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
