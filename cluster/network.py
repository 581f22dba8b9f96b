"""Hosts on one machine: network namespaces around a bridge, each behind a link that is shaped both ways."""

from __future__ import annotations

import contextlib
import json
import os
from types import TracebackType

from cluster import namespaces
from cluster.errors import EmulationError
from cluster.interruption import exit_on_signals, uninterrupted
from cluster.namespaces import ip, tc
from cluster.processes import Host, RunResult, run_on_hosts
from cluster.shaping import parse_delay, parse_rate, qdisc_arguments

INTERFACE = "eth0"
_MAX_HOSTS = 250  # one /24
_FIRST_PORT = 29500  # torchrun's


def interface_variables() -> dict[str, str]:
    """What tells gloo, NCCL and tensorpipe to use a host's shaped link, where they would have to guess."""
    return {f"{library}_SOCKET_IFNAME": INTERFACE for library in ("GLOO", "NCCL", "TP")}


class EmulatedNetwork:
    """`hosts` network namespaces, each with an `eth0`, joined by a bridge in a namespace of its own.

    rate: of every link in each direction, like "100mbit" or "2.5gbit"; "none" leaves the links unshaped.
    delay: one way between two hosts, like "5ms"; needs the kernel's netem.

    The network exists inside the `with` block. Its names are this process's own and nothing is connected to
    the machine's interfaces, so several networks can exist at a time. Leaving the block, by an exception
    too, kills what still runs on the hosts and removes them; inside it SIGTERM and SIGHUP raise SystemExit where
    they would have ended the process. Raises EmulationError, which lists every missing piece.

    >>> with EmulatedNetwork(hosts=2, rate="1gbit") as network:          # doctest: +SKIP
    ...     result = network.run(["python", "train.py"])
    ...     print(result.exit_code, network.tx_bytes(0))
    """

    def __init__(self, hosts: int = 2, rate: str = "1gbit", delay: str | None = None) -> None:
        if not 1 <= hosts <= _MAX_HOSTS:
            raise EmulationError(f"no number of hosts: {hosts}; it must be between 1 and {_MAX_HOSTS}")
        self.hosts = hosts
        self._rate_bits = parse_rate(rate)
        self._delay_seconds = 0.0 if delay is None else parse_delay(delay)
        self._pid = os.getpid()
        self._prefix = namespaces.unique_prefix()
        # The networks are not connected: equal addresses would do, different ones tell the logs of two apart.
        self._subnet = f"10.{64 + self._pid // 256 % 64}.{self._pid % 256}"
        self._runs = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> EmulatedNetwork:
        missing = namespaces.missing_requirements(delay=self._delay_seconds > 0)
        if missing:
            raise EmulationError(
                "this machine cannot emulate a network; it lacks\n  - " + "\n  - ".join(missing)
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(exit_on_signals())
            stack.callback(self._remove)
            self._build()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    @property
    def prefix(self) -> str:
        """How the names of all its namespaces begin."""
        return self._prefix

    # ---------------------------------------------------------------- hosts
    def namespace(self, host: int) -> str:
        """The name by which `ip netns` knows the host."""
        return f"{self._prefix}-h{host}"

    def address(self, host: int) -> str:
        """The IPv4 address of the host's eth0."""
        return f"{self._subnet}.{host + 1}"

    def tx_bytes(self, host: int) -> int:
        """Bytes that have left through the host's eth0 by the kernel's count, packet headers included."""
        return self.counters(host)["tx_bytes"]

    def rx_bytes(self, host: int) -> int:
        """Bytes that have arrived at the host's eth0 by the kernel's count, packet headers included."""
        return self.counters(host)["rx_bytes"]

    def counters(self, host: int) -> dict[str, int]:
        """The kernel's counters of the host's eth0: {"tx_bytes": ..., "rx_bytes": ...}."""
        shown = ip("-n", self.namespace(host), "-json", "-statistics", "link", "show", "dev", INTERFACE)
        statistics = json.loads(shown)[0]["stats64"]
        return {f"{way}_bytes": statistics[way]["bytes"] for way in ("tx", "rx")}

    # ---------------------------------------------------------------- links
    def set_rate(self, rate: str) -> None:
        """Shapes every link anew. rate: as in the constructor."""
        self._rate_bits = parse_rate(rate)
        for host in range(self.hosts):
            for namespace, device in self._ends(host):
                with contextlib.suppress(EmulationError):  # an unshaped link has nothing to delete
                    tc("-n", namespace, "qdisc", "del", "dev", device, "root")
            self._shape(host)

    def cut(self, host: int) -> None:
        """Unplugs the host at the switch: its packets vanish without an error, as behind a dead cable."""
        ip("-n", self._switch, "link", "set", f"p{host}", "nomaster")

    def restore(self, host: int) -> None:
        """Plugs in again what `cut` unplugged."""
        ip("-n", self._switch, "link", "set", f"p{host}", "master", "br0")

    # ---------------------------------------------------------------- commands
    def kill_all(self) -> None:
        """Kills whatever runs on the hosts."""
        for host in range(self.hosts):
            namespaces.kill_processes(self.namespace(host))

    def run(
        self,
        command: list[str],
        *,
        workers_per_host: int = 1,
        environment: dict[str, str] | None = None,
        timeout_seconds: float | None = None,
        quiet: bool = False,
        grace_seconds: float = 10.0,
    ) -> RunResult:
        """Runs the command on every host at once, with torchrun's variables set, and waits for all of them.

        environment: added to this process's own. timeout_seconds: then all are ended and the exit code is 124.
        quiet: the output, which is in the result, is not printed too. grace_seconds: between SIGTERM and SIGKILL
        for the others once a worker has failed. Afterwards nothing is left running on the hosts.
        """
        self._runs += 1
        return run_on_hosts(
            [Host(f"h{host}", self.namespace(host), self.address(host)) for host in range(self.hosts)],
            command,
            port=_FIRST_PORT + self._runs,  # the last run's may still be in TIME_WAIT
            workers_per_host=workers_per_host,
            environment={**interface_variables(), **(environment or {})},
            timeout_seconds=timeout_seconds,
            quiet=quiet,
            grace_seconds=grace_seconds,
        )

    # ---------------------------------------------------------------- set-up
    @property
    def _switch(self) -> str:
        return f"{self._prefix}-switch"

    def _ends(self, host: int) -> tuple[tuple[str, str], tuple[str, str]]:
        return (self.namespace(host), INTERFACE), (self._switch, f"p{host}")

    def _build(self) -> None:
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        ip("-n", self._switch, "link", "set", "br0", "addrgenmode", "none", "up")
        for host in range(self.hosts):
            self._add_host(host)
            self._shape(host)

    def _add_host(self, host: int) -> None:
        (name, eth), (switch, port) = self._ends(host)
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", eth, "netns", name)
        # Without IPv6 addresses an idle link carries nothing, and the counters show the command's bytes alone.
        ip("-n", switch, "link", "set", port, "addrgenmode", "none", "master", "br0", "up")
        ip("-n", name, "link", "set", eth, "addrgenmode", "none", "up")
        ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", eth)
        # bbr, the default of some machines, paces by itself and measures itself rather than the shaped link.
        network = [f"{self._subnet}.0/24", "dev", eth, "proto", "kernel", "scope", "link"]
        ip("-n", name, "route", "replace", *network, "src", self.address(host), "congctl", "cubic")

    def _shape(self, host: int) -> None:
        for namespace, device in self._ends(host):
            # Only the sending end delays, so that a packet between two hosts waits once.
            delay_seconds = self._delay_seconds if device == INTERFACE else 0.0
            for arguments in qdisc_arguments(self._rate_bits, delay_seconds):
                tc("-n", namespace, "qdisc", "add", "dev", device, *arguments)

    def _remove(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked child leaves its parent's network alone
        with uninterrupted():
            namespaces.remove([*map(self.namespace, range(self.hosts)), self._switch])
