"""Hosts on one machine: network namespaces around bridges, each behind a link that is shaped both ways."""

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
from cluster.shaping import qdisc_arguments
from cluster.topology import Link, Topology

INTERFACE = "eth0"
_FIRST_PORT = 29500  # torchrun's


def interface_variables() -> dict[str, str]:
    """What tells gloo, NCCL and tensorpipe to use a host's shaped link, where they would have to guess."""
    return {f"{library}_SOCKET_IFNAME": INTERFACE for library in ("GLOO", "NCCL", "TP")}


class EmulatedNetwork:
    """`hosts` network namespaces, each with an `eth0`, joined by a bridge (one for each site) in another namespace.

    rate: of every link in each direction, like "100mbit" or "2.5gbit"; "none" leaves the links unshaped.
    delay: one way between two hosts, like "5ms"; needs the kernel's netem.
    topology: instead of the others, for hosts and sites whose links differ.

    The network exists inside the `with` block. Its names are this process's own and nothing is connected to
    the machine's interfaces, so several networks can exist at a time. Leaving the block, by an exception
    too, kills what still runs on the hosts and removes them; inside it SIGTERM and SIGHUP raise SystemExit where
    they would have ended the process. Raises EmulationError, which lists every missing piece.

    >>> with EmulatedNetwork(hosts=2, rate="1gbit") as network:          # doctest: +SKIP
    ...     result = network.run(["python", "train.py"])
    ...     print(result.exit_code, network.tx_bytes(0))
    """

    def __init__(
        self,
        hosts: int = 2,
        rate: str = "1gbit",
        delay: str | None = None,
        *,
        topology: Topology | None = None,
    ) -> None:
        self.topology = Topology.uniform(hosts, rate, delay) if topology is None else topology
        self.hosts = len(self.topology.hosts)
        self._links = [host.link for host in self.topology.hosts]  # as set_rate leaves them
        self._pid = os.getpid()
        self._prefix = namespaces.unique_prefix()
        # The networks are not connected: equal addresses would do, different ones tell the logs of two apart.
        self._subnet = f"10.{64 + self._pid // 256 % 64}.{self._pid % 256}"
        self._runs = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> EmulatedNetwork:
        missing = namespaces.missing_requirements(delay=self.topology.has_delays)
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

    @property
    def names(self) -> list[str]:
        """Of the hosts, in order."""
        return [host.name for host in self.topology.hosts]

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
    def set_rate(self, rate: str, host: int | None = None) -> None:
        """Shapes the host's link anew, or that of every host. rate: as in the constructor."""
        _ = Link(rate).rate_bits  # raises what is wrong with it, before anything is changed
        for one in range(self.hosts) if host is None else (host,):
            self._links[one] = Link(rate, self._links[one].delay)
            ends = self._ends(one)
            for namespace, device in ends:
                with contextlib.suppress(EmulationError):  # an unshaped link has nothing to delete
                    tc("-n", namespace, "qdisc", "del", "dev", device, "root")
            self._shape(self._links[one], ends[0], ends[1])

    def cut(self, host: int) -> None:
        """Unplugs the host at the switch: its packets vanish without an error, as behind a dead cable."""
        ip("-n", self._switch, "link", "set", f"p{host}", "nomaster")

    def restore(self, host: int) -> None:
        """Plugs in again what `cut` unplugged."""
        ip("-n", self._switch, "link", "set", f"p{host}", "master", self._bridge(host))

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
            [Host(name, self.namespace(host), self.address(host)) for host, name in enumerate(self.names)],
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

    def _bridge(self, host: int) -> str:
        return self._bridge_of(self.topology.hosts[host].site)

    def _bridge_of(self, site: str) -> str:
        return f"br{self.topology.sites.index(site)}"

    def _build(self) -> None:
        ip("netns", "add", self._switch)
        for site in self.topology.sites:
            bridge = self._bridge_of(site)
            ip("-n", self._switch, "link", "add", bridge, "type", "bridge", "mcast_snooping", "0")
            ip("-n", self._switch, "link", "set", bridge, "addrgenmode", "none", "up")
        for number, one in enumerate(self.topology.links):
            self._join(f"s{number}", [self._bridge_of(site) for site in one.between], one.link)
        for host in range(self.hosts):
            self._add_host(host)
            self._shape(self._links[host], *self._ends(host))

    def _join(self, name: str, bridges: list[str], link: Link) -> None:
        ends = (self._switch, f"{name}a"), (self._switch, f"{name}b")
        ip("-n", self._switch, "link", "add", ends[0][1], "type", "veth", "peer", "name", ends[1][1])
        for (_, device), bridge in zip(ends, bridges, strict=True):
            ip("-n", self._switch, "link", "set", device, "addrgenmode", "none", "master", bridge, "up")
        self._shape(link, *ends, both_delay=True)

    def _add_host(self, host: int) -> None:
        (name, eth), (switch, port) = self._ends(host)
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", eth, "netns", name)
        # Without IPv6 addresses an idle link carries nothing, and the counters show the command's bytes alone.
        ip("-n", switch, "link", "set", port, "addrgenmode", "none", "master", self._bridge(host), "up")
        ip("-n", name, "link", "set", eth, "addrgenmode", "none", "up")
        ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", eth)
        # bbr, the default of some machines, paces by itself and measures itself rather than the shaped link.
        network = [f"{self._subnet}.0/24", "dev", eth, "proto", "kernel", "scope", "link"]
        ip("-n", name, "route", "replace", *network, "src", self.address(host), "congctl", "cubic")

    def _shape(
        self, link: Link, near: tuple[str, str], far: tuple[str, str], *, both_delay: bool = False
    ) -> None:
        """near, far: namespace and device of each end, which shape what they send.

        Only the host's own end delays, so that a packet between two hosts waits once; between sites, both_delay.
        """
        for (namespace, device), delays in ((near, True), (far, both_delay)):
            for arguments in qdisc_arguments(link.rate_bits, link.delay_seconds if delays else 0.0):
                tc("-n", namespace, "qdisc", "add", "dev", device, *arguments)

    def _remove(self) -> None:
        if os.getpid() != self._pid:
            return  # a forked child leaves its parent's network alone
        with uninterrupted():
            namespaces.remove([*map(self.namespace, range(self.hosts)), self._switch])
