"""Network namespaces through iproute2: what they need, whose they are, and how they go away."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.errors import EmulationError
from cluster.shaping import qdisc_arguments

_NAME = re.compile(r"edl-(?P<pid>\d+)-(?P<started>\d+)-\d+-\w+")
_CAPABILITIES = {12: "CAP_NET_ADMIN", 21: "CAP_SYS_ADMIN"}  # linux/capability.h
_KILL_SECONDS = 10.0
_numbers = itertools.count()


def ip(*arguments: str) -> str:
    """Runs `ip` and returns what it prints. Raises EmulationError with its complaint."""
    return _call(["ip", *arguments])


def tc(*arguments: str) -> str:
    """Runs `tc` and returns what it prints. Raises EmulationError with its complaint."""
    return _call(["tc", *arguments])


def unique_prefix() -> str:
    """The start of a namespace's name: this process, when it started, and a number that counts up.

    Process numbers come back, a process number with its start time does not.
    """
    pid = os.getpid()
    return f"edl-{pid}-{_start_time(pid)}-{next(_numbers)}"


def remove(names: list[str]) -> None:
    """Kills what runs in these namespaces and removes those that exist."""
    existing = set(_existing())
    for name in existing.intersection(names):
        kill_processes(name)
        ip("netns", "del", name)


def beginning_with(prefix: str) -> list[str]:
    """The namespaces of one network, by the `unique_prefix` that their names begin with."""
    return [name for name in _existing() if name.startswith(f"{prefix}-")]


def kill_processes(name: str) -> None:
    """Sends SIGKILL to every process in the namespace, those that left their process group or session too."""
    deadline = time.monotonic() + _KILL_SECONDS
    while pids := [
        int(pid) for pid in ip("netns", "pids", name).split()
    ]:  # one may fork while it is looked for
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise EmulationError(f"processes {pids} in {name} survive SIGKILL")
        time.sleep(0.005)


def stale() -> list[str]:
    """Namespaces of processes that are gone: they were killed with SIGKILL, or the machine was short of memory."""
    return [name for name in _existing() if is_stale(name)]


def is_stale(name: str) -> bool:
    """Whether a name begins with the `unique_prefix` of a process that is gone."""
    parts = _NAME.fullmatch(name)
    return parts is not None and _start_time(int(parts["pid"])) != int(parts["started"])


def missing_requirements(delay: bool = False) -> list[str]:
    """What this machine lacks, a line each with its remedy; nothing if networks can be emulated.

    delay: a delay is wanted too.
    """
    if sys.platform != "linux":
        return [f"Linux: network namespaces do not exist on {sys.platform}"]
    missing = [
        f"the program {program}: apt-get install iproute2"
        for program in ("ip", "tc")
        if not shutil.which(program)
    ]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    effective = int(status["CapEff"], 16)
    missing += [
        f"{name}: run as root, or in a container with --cap-add {name}, or as an ordinary user under "
        "unshare -Urnm sh -c 'mount -t tmpfs none /run && exec COMMAND'"
        for bit, name in _CAPABILITIES.items()
        if not effective >> bit & 1
    ]
    return missing or _missing_in_kernel(delay)


def _missing_in_kernel(delay: bool) -> list[str]:
    name = f"{unique_prefix()}-probe"
    try:
        ip("netns", "add", name)
    except EmulationError as error:
        return [f"permission to add a network namespace: {error}"]
    steps = {
        "virtual Ethernet pairs (modprobe veth)": "ip link add v0 type veth peer name v1",
        "bridges (modprobe bridge)": "ip link add b0 type bridge",
        "the token bucket filter (modprobe sch_tbf)": f"tc qdisc add dev v0 {' '.join(qdisc_arguments(10**9)[0])}",
        "TCP cubic (modprobe tcp_cubic)": "ip route add 10.0.0.0/24 dev v0 congctl cubic",
    }
    if delay:
        netem = " ".join(qdisc_arguments(None, 0.001)[0])
        steps["delays, netem (modprobe sch_netem)"] = f"tc qdisc add dev v1 {netem}"
    missing: list[str] = []
    try:
        for piece, command in steps.items():
            program, *arguments = command.split()
            try:
                _call([program, "-n", name, *arguments])
                if piece.startswith("virtual"):
                    ip("-n", name, "link", "set", "v0", "up")
            except EmulationError as error:
                missing.append(f"{piece}: the kernel has none, or refuses: {error}")
    finally:
        remove([name])
    return missing


def _existing() -> list[str]:
    return [line.split()[0] for line in ip("netns", "list").splitlines() if line]


def _start_time(pid: int) -> int:
    """When the process started, in ticks since boot; -1 if there is none."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return -1
    return int(after_name.split()[19])  # field 22, proc(5)


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise EmulationError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout
