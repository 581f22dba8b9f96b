"""Runs a command on emulated hosts: `python -m cluster.emulate --hosts 2 --rate 1gbit -- COMMAND`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from cluster import namespaces
from cluster.errors import EmulationError
from cluster.network import EmulatedNetwork
from cluster.options import add_network_options, chosen_topology
from cluster.processes import RunResult
from cluster.scratch import stale_folders
from cluster.topology import Topology, load_topology

__all__ = ["EmulatedNetwork", "EmulationError", "RunResult", "Topology", "load_topology", "main"]

_OWN_FAILURE = 125  # as env(1) and timeout(1) have it: the tool failed, not the command
_INTERRUPTED = 130

_EPILOG = """\
COMMAND runs on every host with RANK, WORLD_SIZE, LOCAL_RANK, NODE_RANK, MASTER_ADDR, MASTER_PORT and the like set:
scripts written for torchrun and `edl train` join as they are. The exit code is that of the host that failed first
(the others are ended), 130 after Ctrl-C, 125 if the network could not be emulated.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.check:
            return _check(chosen_topology(options).has_delays)
        if options.clean:
            return _clean()
        return _emulate(options)
    except EmulationError as error:
        print(f"cluster.emulate: {error}", file=sys.stderr)
        return _OWN_FAILURE
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.emulate",
        description="Run a command on hosts emulated on this machine, behind links of a given speed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_network_options(parser)
    parser.add_argument(
        "--workers-per-host", type=int, default=1, metavar="N", help="processes on a host (1)"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="then end all hosts, with exit code 124"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the kernel's byte counts of every host"
    )
    parser.add_argument(
        "--check", action="store_true", help="only say what this machine lacks; exit 1 if anything"
    )
    parser.add_argument(
        "--clean", action="store_true", help="only remove what runs killed by SIGKILL have left"
    )
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="after --, with its arguments")
    return parser


def _emulate(options: argparse.Namespace) -> int:
    if not options.command:
        raise EmulationError("no command; write it after --, as in `-- python train.py`")
    if options.workers_per_host < 1:
        raise EmulationError(f"no number of workers per host: {options.workers_per_host}")
    if options.json and not options.json.absolute().parent.is_dir():
        raise EmulationError(f"no folder {options.json.parent} to write {options.json.name} into")
    with EmulatedNetwork(topology=chosen_topology(options)) as network:
        if leftovers := namespaces.stale():
            print(
                f"cluster.emulate: {len(leftovers)} namespaces of killed runs are left; --clean",
                file=sys.stderr,
            )
        before = [network.counters(host) for host in range(network.hosts)]
        result = network.run(
            options.command, workers_per_host=options.workers_per_host, timeout_seconds=options.timeout
        )
        after = [network.counters(host) for host in range(network.hosts)]
        if options.json:
            options.json.write_text(
                json.dumps(_report(options, network, result, before, after), indent=2) + "\n"
            )
    return result.exit_code


def _report(
    options: argparse.Namespace,
    network: EmulatedNetwork,
    result: RunResult,
    before: list[dict[str, int]],
    after: list[dict[str, int]],
) -> dict[str, object]:
    per_host = options.workers_per_host
    return {
        "command": options.command,
        "topology": None if options.topology is None else str(options.topology),
        "rate": _common(one.link.rate for one in network.topology.hosts),
        "delay": _common(one.link.delay for one in network.topology.hosts),
        "workers_per_host": per_host,
        "exit_code": result.exit_code,
        "seconds": result.seconds,
        "hosts": [
            {
                "host": one.name,
                "site": one.site,
                "rate": one.link.rate,
                "delay": one.link.delay,
                "address": network.address(host),
                "exit_codes": list(result.exit_codes[host * per_host : (host + 1) * per_host]),
                "before": before[host],
                "after": after[host],
                **{key: after[host][key] - before[host][key] for key in after[host]},
            }
            for host, one in enumerate(network.topology.hosts)
        ],
    }


def _common(values: Iterable[str | None]) -> str | None:
    """What all have in common; None if they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _check(delay: bool) -> int:
    missing = namespaces.missing_requirements(delay)
    for piece in missing:
        print(f"missing: {piece}")
    if not missing:
        print(f"networks can be emulated here{', with delays' if delay else ''}")
    return 1 if missing else 0


def _clean() -> int:
    names = namespaces.stale()
    namespaces.remove(names)
    folders = stale_folders()
    for folder in folders:
        shutil.rmtree(folder)
    for name in [*names, *folders]:
        print(f"removed {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
