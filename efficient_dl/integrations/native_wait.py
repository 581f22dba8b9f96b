"""Waiting for torch's own collectives with our time-out and our error."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from efficient_dl.comm import ProcessGroupTransport
from efficient_dl.errors import TransportError


def wait_for_native(start: Callable[[], dist.Work | None], control: ProcessGroupTransport, what: str) -> None:
    """Waits for one of torch's own collectives, with our time-out. Raises TransportError.

    On a GPU the host does not wait: streams are ordered, and the group's own time-out holds. (With a time-out of ours
    NCCL's work would sleep a millisecond at a time, in which whole messages pass.)

    start: begins it on control's group. what: its name.
    """
    try:
        work = start()
        assert work is not None  # this rank is in the group
        if control.device.type == "cuda":
            work.wait()
        else:
            work.wait(timedelta(seconds=control.timeout))
    except RuntimeError as error:
        raise TransportError(
            f"torch's {what} failed",
            found=str(error).strip().splitlines()[0],
            where=f"{control.world_size} ranks, limited to {control.timeout:g} s",
            fix="read the ends of the other ranks' logs: one has stopped, is stuck or cannot be reached",
        ) from error
