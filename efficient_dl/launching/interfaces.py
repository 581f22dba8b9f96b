"""The network interface by which a rank reaches the others, for gloo and NCCL."""

from __future__ import annotations

import array
import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from efficient_dl.errors import LaunchError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
LOOPBACK = "lo"
_GET_ADDRESSES, _GET_FLAGS = 0x8912, 0x8913  # SIOCGIFCONF, SIOCGIFFLAGS of <linux/sockios.h>
_ENTRY_BYTES, _MOST_ADDRESSES = 40, 1024  # of struct ifreq on 64-bit machines
_UP, _IS_LOOPBACK = 0x1, 0x8  # IFF_UP, IFF_LOOPBACK of <linux/if.h>


@dataclass(frozen=True)
class Reach:
    """How one rank reaches rank 0. network: equal where ranks share all interfaces.

    rank_0: rank 0's address as this rank resolves it; source: its own address on the way there. None: no route.
    addresses: of its interfaces that are up, by name; without loopback.
    """

    network: str
    rank_0: str | None
    source: str | None
    addresses: dict[str, tuple[str, ...]]


def reach(host: str, port: int) -> Reach:
    """This process's way to rank 0; nothing is sent."""
    rank_0 = source = None
    with contextlib.suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, socket.SOCK_DGRAM) as end, contextlib.suppress(OSError):
                end.connect(address)  # asks the routing table alone
                rank_0, source = str(address[0]), str(end.getsockname()[0])
                break
    return Reach(_network(), rank_0, source, _addresses())


def choose(everyone: Sequence[Reach], rank: int) -> str:
    """The interface of this rank: loopback if all share one network, else the one that leads to rank 0.

    On rank 0's own host its name may mean the loopback address; then the interface that holds the address by which the
    others reach it counts. Pure: every rank can decide for every other. Raises LaunchError if that leaves a choice.
    """
    if len({one.network for one in everyone}) == 1:
        return LOOPBACK
    own = everyone[rank]
    known = [own.source, *(one.rank_0 for one in everyone)]
    for address in known:
        for name, held in own.addresses.items():
            if address in held:
                return name
    if len(own.addresses) == 1:
        return next(iter(own.addresses))
    names = ", ".join(f"{name} ({', '.join(held)})" for name, held in own.addresses.items())
    raise LaunchError(
        f"rank {rank} cannot tell which network interface leads to the other ranks",
        expected=f"one that holds an address of the way to rank 0 ({own.rank_0 or 'no route'})",
        found=names or "no interface but loopback",
        fix=f"set {GLOO} (and {NCCL}) to its name on the ranks of this host, or MASTER_ADDR to an IP address",
    )


def use(name: str, environment: MutableMapping[str, str]) -> None:
    """Tell gloo, and NCCL unless it is loopback, which it avoids by itself; what the user has set stays."""
    environment.setdefault(GLOO, name)
    if name != LOOPBACK:
        environment.setdefault(NCCL, f"={name}")  # "=": this name, and not all that begin with it


def _network() -> str:
    """Equal for processes that see the same interfaces: the machine's boot and its network namespace."""
    if sys.platform != "linux":
        return socket.gethostname()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"


def _addresses() -> dict[str, tuple[str, ...]]:
    """By interface that is up, the IPv4 addresses before the IPv6 ones; without loopback."""
    if sys.platform != "linux":
        return {}
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        entries = array.array("B", bytes(_ENTRY_BYTES * _MOST_ADDRESSES))
        request = struct.pack("iL", len(entries), entries.buffer_info()[0])
        filled = struct.unpack("iL", fcntl.ioctl(end, _GET_ADDRESSES, request))[0]
        for start in range(0, filled, _ENTRY_BYTES):
            entry = entries[start : start + _ENTRY_BYTES].tobytes()
            name = os.fsdecode(
                entry[:16].split(b"\0")[0].partition(b":")[0]
            )  # "eth0:1" is another address of eth0
            found.setdefault(name, []).append(socket.inet_ntoa(entry[20:24]))
        for name, held in _addresses_6().items():
            found.setdefault(name, []).extend(held)
        return {name: tuple(held) for name, held in found.items() if _leads_out(end, name)}


def _leads_out(end: socket.socket, name: str) -> bool:
    request = struct.pack("256s", name.encode()[:15])
    try:
        flags = struct.unpack_from("H", fcntl.ioctl(end, _GET_FLAGS, request), 16)[0]
    except OSError:
        return False
    return bool(flags & _UP) and not flags & _IS_LOOPBACK


def _addresses_6() -> dict[str, list[str]]:
    """IPv6 addresses by interface, without link-local ones, which gloo cannot use."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, _, _, name = line.split()
            address = ipaddress.IPv6Address(bytes.fromhex(digits))
            if not address.is_link_local:
                found.setdefault(name, []).append(str(address))
    return found
