"""What this host's network interface has sent, by the kernel's counter."""

from __future__ import annotations

import os
from pathlib import Path

_LOOPBACK = "lo"
_SENT_BYTES_FIELD = 8  # of a line of /proc/net/dev


def sent_bytes(rank: int) -> int:
    """Bytes that the interface GLOO_SOCKET_IFNAME has sent so far, headers of TCP and below included.

    On the loopback interface, which all workers share, rank 0 counts for all of them. Other processes' traffic
    counts too: run nothing beside it, or run on emulated hosts (python -m cluster.emulate).
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", _LOOPBACK)
    if interface == _LOOPBACK and rank > 0:
        return 0
    # /proc, not /sys: the latter may show another network namespace's interfaces.
    lines = Path("/proc/net/dev").read_text().splitlines()
    counters = next(line.split(":")[1].split() for line in lines if line.strip().startswith(f"{interface}:"))
    return int(counters[_SENT_BYTES_FIELD])
