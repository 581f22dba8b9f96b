"""The command line, on every rank: `srun python -m cluster.preflight --folder runs`."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.errors import EmulationError
from cluster.preflight import folder
from cluster.preflight.facts import equal_facts, name_problem, own_problems
from cluster.preflight.meeting import Line, answer_pings, hub, spoke
from cluster.preflight.place import Place, find_place, main_port
from cluster.preflight.verdict import Report, problems_of

_OWN_FAILURE = 125
_CONNECT_SECONDS = 5.0

_EPILOG = """\
examples
  srun --ntasks-per-node=1 python -m cluster.preflight --folder runs
  mpirun -n 4 --hostfile hosts python -m cluster.preflight --head node0
  torchrun --nnodes 2 ... -m cluster.preflight

Compared between all ranks: Python, torch, efficient_dl and its code, Slurm, munge, GPUs and their driver, limits,
clocks, and whether --folder is one folder. Checked on each: interfaces, names, the job's port on rank 0, and that
every host reaches every other. Rank 0 prints what it has found; the exit code of all ranks is 0, or 1 if anything is
wrong. No package but Python itself is needed.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        place = find_place(os.environ, given.head)
        port = given.port or main_port() + 1
        if place.rank == 0:
            return _first(place, port, given)
        with spoke(place.head, port, place.rank, given.timeout) as line:
            return _other(line, place)
    except EmulationError as error:
        print(f"cluster.preflight: {error}", file=sys.stderr)
    except OSError as error:
        print(f"cluster.preflight: rank 0 has gone: {error}; see its own message", file=sys.stderr)
    return _OWN_FAILURE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.preflight",
        description="Before a job: do all of its hosts have what it needs, and the same?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, help="must be one folder, and writable, on all hosts")
    parser.add_argument("--head", metavar="HOST", help="of rank 0, where the launcher does not tell it")
    parser.add_argument("--port", type=int, help="where the ranks meet for this check (MASTER_PORT + 1)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="to wait for ranks (60)"
    )
    parser.add_argument(
        "--max-skew", type=float, default=1.0, metavar="SECONDS", help="between two clocks, at most (1)"
    )
    return parser


def _first(place: Place, port: int, given: argparse.Namespace) -> int:
    """Rank 0: asks all, decides, and tells them."""
    with _listener() as listener, hub(port, place.world_size, given.timeout) as others:
        address = next((line.own_address for line in others.lines.values()), "127.0.0.1")
        offsets = others.clock_offsets()
        about = others.gather(_about(place, address, listener))
        problems = {rank: list(one["problems"]) for rank, one in about.items()}
        if len({one["address"] for one in about.values()}) > 1:
            for rank, one in about.items():
                problems[rank] += [one["name"]] if one["name"] else []
        with contextlib.ExitStack() as stack:
            task = {"folder": None, "token": secrets.token_hex(8), "peers": _peers(about)}
            if given.folder is not None:
                if wrong := stack.enter_context(folder.token(given.folder, task["token"])):
                    problems[0].append(f"{given.folder} {wrong}")
                else:
                    task["folder"] = str(given.folder.absolute())
            others.tell(task)
            answers = others.gather(_work(task, 0))
            for rank, answer in answers.items():
                problems[rank] += answer["problems"]
            if given.folder is not None:
                fine = [rank for rank, answer in answers.items() if answer["folder"]]
                for rank in folder.unseen(given.folder, task["token"], fine):
                    problems[rank].append(f"what it writes into {given.folder} does not show up on rank 0")
        reports = [
            Report(rank, one["host"], one["address"], one["facts"], problems[rank])
            for rank, one in about.items()
            if rank == 0 or rank in others.lines
        ]
        found = problems_of(reports, place.world_size, offsets, given.max_skew)
        others.tell(len(found))
    _print(place, reports, found)
    return 1 if found else 0


def _other(line: Line, place: Place) -> int:
    with _listener() as listener:
        about = _about(place, line.own_address, listener)
        answer_pings(line)
        line.send(about)
        task = line.receive()
        line.send(_work(task, place.rank))
        return 1 if line.receive() else 0


def _about(place: Place, address: str, listener: socket.socket) -> dict[str, Any]:
    # Under torchrun its own store holds the port already.
    port = main_port() if place.rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ else None
    return {
        "host": socket.gethostname(),
        "address": address,
        "port": listener.getsockname()[1],
        "facts": equal_facts(),
        "problems": own_problems(port),
        "name": name_problem(),
    }


def _peers(about: Mapping[int, Mapping[str, Any]]) -> list[tuple[int, str, str, int]]:
    """Rank, host, address and port of one rank of each host, which speaks for all of it."""
    first: dict[str, tuple[int, str, str, int]] = {}
    for rank, one in about.items():
        first.setdefault(one["address"], (rank, one["host"], one["address"], one["port"]))
    return list(first.values())


def _work(task: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """What each rank does at rank 0's word. folder: whether it has written there. problems: what is wrong."""
    problems = []
    wrong = folder.look(Path(task["folder"]), task["token"], rank) if task["folder"] else None
    if wrong:
        problems.append(f"{task['folder']} {wrong}; mount one file system on all hosts")
    if rank in [peer[0] for peer in task["peers"]]:
        with ThreadPoolExecutor(32) as pool:
            problems += filter(None, pool.map(_unreachable, task["peers"]))
    return {"folder": bool(task["folder"]) and not wrong, "problems": problems}


def _unreachable(peer: tuple[int, str, str, int]) -> str | None:
    rank, host, address, port = peer
    try:
        socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return f"it cannot reach rank {rank} on {host} at {address}:{port}: {error}; open all ports between the hosts"
    return None


def _listener() -> socket.socket:
    """What other hosts connect to; the kernel completes the connections without our help."""
    return socket.create_server(("", 0), backlog=1024)


def _print(place: Place, reports: Sequence[Report], problems: Sequence[str]) -> None:
    hosts = len({report.address for report in reports})
    print(
        f"pre-flight: {len(reports)} of {place.world_size} ranks on {hosts} hosts, started by {place.launcher}"
    )
    for problem in problems:
        print(f"  problem: {problem}")
    if not problems:
        for name, value in reports[0].facts.items():
            print(f"  {name}: {value}")
        print("  nothing is wrong")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
