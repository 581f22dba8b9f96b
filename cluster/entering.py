"""Starts commands on emulated hosts that also have a name and an /etc/hosts of their own, as Slurm and MPI need."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

# `ip netns exec` will not do: it mounts a fresh /sys, in which slurmd misses the control groups and ends.
_ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
_PACKAGES = {"nsenter": "util-linux", "unshare": "util-linux", "mount": "mount", "hostname": "hostname"}


def missing_programs() -> list[str]:
    """What this machine lacks to enter hosts, a line each with its remedy."""
    return [
        f"the program {program}: apt-get install {package}"
        for program, package in _PACKAGES.items()
        if not shutil.which(program)
    ]


def hosts_text(addresses: Mapping[str, str]) -> str:
    """An /etc/hosts. addresses: of every host by its name."""
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    return "\n".join(lines) + "\n"


def on_host(namespace: str, name: str, hosts_file: Path, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` on a host; its process becomes the command's own.

    namespace: the host's name for `ip netns`. name: what `hostname` says there. hosts_file: its /etc/hosts.
    The names and mounts belong to the process and its children, and vanish with the last of them.
    """
    return [
        *("nsenter", f"--net=/run/netns/{namespace}"),
        # slave: when a network is removed outside, it does not live on in here.
        *("unshare", "--uts", "--mount", "--propagation", "slave"),
        *("sh", "-c", _ENTER, "sh", name, str(hosts_file), *command),
    ]
