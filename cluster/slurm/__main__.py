"""The command line: `python -m cluster.slurm up | run | status | down | once | check`."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import EmulationError
from cluster.options import add_network_options, chosen_topology
from cluster.slurm import claims
from cluster.slurm.cluster import RunningCluster, SlurmCluster, missing_requirements
from cluster.slurm.config import HEAD, SlurmOptions

_OWN_FAILURE = 125  # as cluster.emulate: the tool failed, not the command
_INTERRUPTED = 130
_READY = b"ready"
_UP_SECONDS = 120.0

_EPILOG = """\
examples
  python -m cluster.slurm up --nodes 2 --rate 1gbit       a cluster that stays until `down`
  python -m cluster.slurm run -- sbatch job.sbatch        any command on its head: sbatch, squeue, scancel, bash
  python -m cluster.slurm down
  python -m cluster.slurm once --nodes 2 -- srun -N 2 hostname      up, the command, down
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: the command's own, 125 if the cluster failed, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return options.action(options)
    except EmulationError as error:
        print(f"cluster.slurm: {error}", file=sys.stderr)
        return _OWN_FAILURE
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.slurm",
        description="A Slurm cluster on this machine, each node behind a shaped link.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, action, what in (
        ("up", _up, "bring a cluster up, and return when its nodes are idle"),
        ("once", _once, "bring a cluster up, run a command on its head, take it down"),
        ("keep", _keep, "as up, but stay in the foreground until SIGTERM or Ctrl-C"),
    ):
        one = actions.add_parser(name, help=what, description=what)
        one.set_defaults(action=action)
        _add_options(one)
        if name == "once":
            one.set_defaults(name=f"once-{os.getpid()}")
            one.add_argument("command", nargs="+", metavar="COMMAND", help="after --, with its arguments")
        if name == "keep":
            one.add_argument("--ready-descriptor", type=int, help=argparse.SUPPRESS)
    for name, action, what in (
        ("run", _run, "run a command on the head of the cluster that is up"),
        ("status", _status, "say what its nodes do"),
        ("down", _down, "take it down, or remove what a killed one has left"),
    ):
        one = actions.add_parser(name, help=what, description=what)
        one.set_defaults(action=action)
        one.add_argument("--name", default=SlurmOptions.name, help=f"the cluster's ({SlurmOptions.name})")
        if name == "run":
            one.add_argument("command", nargs="+", metavar="COMMAND", help="after --, with its arguments")
    check = actions.add_parser("check", help="say what this machine lacks; exit 1 if anything")
    check.set_defaults(action=_check)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    default = SlurmOptions()
    parser.add_argument("--name", default=default.name, help=f"several can be up at once ({default.name})")
    add_network_options(parser, "nodes")
    parser.add_argument(
        "--cpus",
        type=int,
        default=default.cpus,
        metavar="N",
        help=f"that a node claims to have ({default.cpus})",
    )


def _options(given: argparse.Namespace) -> SlurmOptions:
    return SlurmOptions(name=given.name, topology=chosen_topology(given), cpus=given.cpus)


def _up(given: argparse.Namespace) -> int:
    """Starts `keep` in the background, and waits until it says that it is ready."""
    _options(given)  # so that a wrong one is refused here
    receiving, sending = os.pipe()
    command = [sys.executable, "-m", "cluster.slurm", "keep", "--ready-descriptor", str(sending)]
    command += [
        word
        for name in ("name", "hosts", "rate", "delay", "topology", "cpus")
        if (value := getattr(given, name)) is not None
        for word in (f"--{'nodes' if name == 'hosts' else name}", str(value))
    ]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as log, os.fdopen(receiving, "rb") as ready:
        keeper = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(sending,),
            start_new_session=True,
        )
        os.close(sending)
        try:
            if ready.read() == _READY:
                print(
                    f"the cluster {given.name!r} is up: python -m cluster.slurm run --name {given.name} -- sinfo"
                )
                return 0
            keeper.wait(_UP_SECONDS)
        finally:  # a Ctrl-C too; a keeper that is ready stays
            if keeper.poll() is None and not _is_ready(given.name):
                keeper.terminate()
                keeper.wait(_UP_SECONDS)
        log.seek(0)
        sys.stderr.write(log.read())
    return _OWN_FAILURE


def _is_ready(name: str) -> bool:
    try:
        RunningCluster.named(name)
    except EmulationError:
        return False
    return True


def _keep(given: argparse.Namespace) -> int:
    with SlurmCluster(_options(given)):
        if given.ready_descriptor is None:
            print(f"the cluster {given.name!r} is up until SIGTERM or Ctrl-C", flush=True)
        else:
            os.write(given.ready_descriptor, _READY)
            os.close(given.ready_descriptor)
        while True:
            time.sleep(3600)


def _once(given: argparse.Namespace) -> int:
    with SlurmCluster(_options(given)) as running:
        process = subprocess.Popen(running.on_host(HEAD, given.command), env=running.environment())
        try:
            return _exit_code(process.wait())
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)


def _run(given: argparse.Namespace) -> int:
    running = RunningCluster.named(given.name)
    command = running.on_host(HEAD, given.command)
    os.execvpe(command[0], command, running.environment())


def _status(given: argparse.Namespace) -> int:
    states = RunningCluster.named(given.name).states()
    for node, state in states.items():
        print(f"{node}  {state}")
    return 0 if states else _OWN_FAILURE


def _down(given: argparse.Namespace) -> int:
    found = claims.take_down(given.name)
    swept = claims.sweep()
    print(f"the cluster {given.name!r} is down" if found else f"there was no cluster {given.name!r}")
    for name in swept:
        print(f"removed what the killed cluster {name!r} had left")
    return 0


def _check(_given: argparse.Namespace) -> int:
    missing = missing_requirements()
    for piece in missing:
        print(f"missing: {piece}")
    if not missing:
        print("a Slurm cluster can run here")
    return 1 if missing else 0


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
