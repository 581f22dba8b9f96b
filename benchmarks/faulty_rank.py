"""`edl` with a fault in one rank, once: python -m benchmarks.faulty_rank --fault hang --rank 1 --step 30 -- train ...

slow: the rank takes a second longer for ten steps. hang: the rank's main thread waits for ever. flip: one bit of a
message that another rank sent is flipped after the kernel has handed it over, where TCP's checksum cannot see it.
version: the rank runs another version of this package.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from efficient_dl.cli import main as edl
from efficient_dl.comm import process_group
from efficient_dl.launching.place import find_place
from efficient_dl.training import end_to_end, worker

_SLOW_STEPS, _SLOW_SECONDS = 10, 1.0


def main() -> None:
    """Install the fault, and run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds that every step takes longer")
    parser.add_argument("--fault", choices=["none", "slow", "hang", "flip", "version"], default="none")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--step", type=int, default=0, help="the last one that is trained without the fault")
    parser.add_argument(
        "--once", type=Path, help="a file that is made when the fault happens, and prevents another"
    )
    parser.add_argument("words", nargs="+", help="of edl, after --")
    options = parser.parse_args()
    fault = Fault(options)
    _wrap_steps(fault, options.pace)
    if options.fault == "flip":
        _wrap_messages(fault)
    if options.fault == "version" and fault.is_due(0):
        worker.versions = lambda: {"efficient_dl": "another", "torch": "2.13.0"}
    sys.argv = ["edl", *options.words]
    edl()


class Fault:
    """Whether the fault is to happen now."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.name: str = options.fault
        self.is_armed = False  # by the step, for what happens inside it
        self.slow_steps = 0  # that are still to come

    def is_due(self, step: int) -> bool:
        """True once: on the rank, from the step on, unless it has happened before."""
        options = self._options
        place = find_place(os.environ)
        rank = 0 if place is None else place.rank
        if rank != options.rank or step < options.step or options.once is None:
            return False
        try:
            options.once.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def _wrap_steps(fault: Fault, pace: float) -> None:
    step = end_to_end.Trainer._train_step

    def wrapped(self: end_to_end.Trainer) -> dict[str, Tensor | float]:
        time.sleep(pace)
        if fault.name in ("slow", "hang", "flip") and fault.is_due(self.step):
            if fault.name == "slow":
                fault.slow_steps = _SLOW_STEPS
            if fault.name == "hang":
                threading.Event().wait()
            fault.is_armed = True
        if fault.slow_steps:
            fault.slow_steps -= 1
            time.sleep(_SLOW_SECONDS)
        return step(self)

    end_to_end.Trainer._train_step = wrapped


def _wrap_messages(fault: Fault) -> None:
    work = process_group._PairwiseWork
    wait = work.wait

    def wrapped(self: Any, timeout: float | None = None) -> list[Tensor]:
        incoming = wait(self, timeout)
        if fault.is_armed:
            fault.is_armed = False
            message = max((one for rank, one in enumerate(incoming) if rank != self._transport.rank), key=len)
            message[len(message) // 2] ^= 1
        return incoming

    work.wait = wrapped


if __name__ == "__main__":
    main()
