"""The command-line options, shared by all emulations, that say which hosts there are."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.errors import EmulationError
from cluster.topology import Topology, load_topology

_HOSTS, _RATE = 2, "1gbit"


def add_network_options(parser: argparse.ArgumentParser, hosts: str = "hosts") -> None:
    """Adds them; read them with `chosen_topology`. hosts: what the hosts are called here, as in --hosts."""
    parser.add_argument(
        f"--{hosts}", dest="hosts", type=int, metavar="N", help=f"number of {hosts} ({_HOSTS})"
    )
    parser.add_argument("--rate", help=f"of every link, each way: 100mbit, 2.5gbit, none ({_RATE})")
    parser.add_argument("--delay", help="one way between two hosts, like 5ms; needs the kernel's netem")
    parser.add_argument(
        "--topology",
        type=Path,
        metavar="FILE.toml",
        help="instead of these: hosts and sites whose links differ",
    )


def chosen_topology(given: argparse.Namespace) -> Topology:
    """The topology that the options ask for. Raises EmulationError."""
    if given.topology is None:
        return Topology.uniform(
            _HOSTS if given.hosts is None else given.hosts, given.rate or _RATE, given.delay
        )
    for name in ("hosts", "rate", "delay"):
        if getattr(given, name) is not None:
            raise EmulationError(
                f"{given.topology} says all about the hosts and their links; no {name} beside it"
            )
    return load_topology(given.topology)
