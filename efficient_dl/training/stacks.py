"""Where a process is: the stacks of all its threads, and the collective that one of them waits in."""

from __future__ import annotations

import sys
import threading
import traceback
from types import FrameType

_PACKAGE = "/efficient_dl/"
_COMM = "/efficient_dl/comm/"
_WATCHERS = ("edl-watch", "edl-signals")  # which look, and wait for nothing else
_DISTRIBUTED = "/torch/distributed/distributed_c10d.py"


def all_stacks() -> str:
    """Every thread's name but the watch's own, the collective it is in, and its stack, the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda one: one[0] != main)
    parts: list[str] = []
    for ident, frame in frames:
        if names.get(ident, "") in _WATCHERS:
            continue
        parts.append(f"thread {names.get(ident, ident)}: {waiting_in(frame) or 'in no collective of Python'}")
        parts += [line.rstrip("\n") for line in traceback.format_stack(frame)]
    return "\n".join(parts)


def main_thread() -> str:
    """The collective that the main thread is in, or the innermost line of this package that it is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or -1)
    if frame is None:
        return "nowhere"
    return waiting_in(frame) or _place(frame)


def waiting_in(frame: FrameType) -> str | None:
    """The collective or transfer that the stack is inside of, and from where; None if it is in none.

    DDP's own all-reduce waits in C++, inside of backward, and shows no such frame.
    """
    found: str | None = None
    one: FrameType | None = frame
    while one is not None:
        path = one.f_code.co_filename
        if path.endswith(_DISTRIBUTED) and not one.f_code.co_name.startswith(("_", "wrapper")):
            found = f"torch.distributed.{one.f_code.co_name}"
        elif found is None and _COMM in path:
            found = one.f_code.co_qualname
        if found is not None and _PACKAGE in path and path.endswith(".py") and not _is_in(path, found):
            return f"in {found}, called at {_line(one)}"
        one = one.f_back
    return None if found is None else f"in {found}"


def _is_in(path: str, found: str) -> bool:
    return _COMM in path and not found.startswith("torch.")


def _place(frame: FrameType) -> str:
    one: FrameType | None = frame
    while one is not None:
        if _PACKAGE in one.f_code.co_filename:
            return f"at {_line(one)}, in {one.f_code.co_name}"
        one = one.f_back
    return f"at {_line(frame)}"


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename.rpartition(_PACKAGE)[2]}:{frame.f_lineno}"
