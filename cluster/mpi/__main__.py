"""The command line: `python -m cluster.mpi --hosts 2 --rate 100mbit -n 4 -- COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cluster.errors import EmulationError
from cluster.mpi.hosts import mpi_hosts
from cluster.mpi.programs import find_mpirun
from cluster.options import add_network_options, chosen_topology

_OWN_FAILURE = 125
_INTERRUPTED = 130

_EPILOG = """\
mpirun is Open MPI's or MPICH's. COMMAND finds MASTER_ADDR and MASTER_PORT in its environment, beside the variables of
mpirun. The exit code is mpirun's, 124 after --timeout, 130 after Ctrl-C, 125 if the hosts could not be emulated.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        mpirun = find_mpirun(given.mpirun)
        topology = chosen_topology(given)
        num_ranks = len(topology.hosts) if given.n is None else given.n
        with mpi_hosts(topology) as hosts:
            return hosts.run(mpirun, num_ranks, given.command, timeout_seconds=given.timeout).returncode
    except EmulationError as error:
        print(f"cluster.mpi: {error}", file=sys.stderr)
        return _OWN_FAILURE
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.mpi",
        description="Run an MPI job on hosts emulated on this machine, behind links of a given speed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_network_options(parser)
    parser.add_argument("-n", type=int, metavar="RANKS", help="ranks, spread over the hosts (one a host)")
    parser.add_argument(
        "--mpirun", metavar="PATH", help="instead of the one beside the interpreter or on the PATH"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="then end the job, with exit code 124"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --, with its arguments")
    return parser


if __name__ == "__main__":
    sys.exit(main())
