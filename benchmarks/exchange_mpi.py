"""Is an exchange over MPI faster than over gloo, between processes of one machine?

mpirun -n 2 python -m benchmarks.exchange_mpi --out benchmarks/results/exchange_mpi.jsonl
Every rank sends a message of the given size to every other one, in turns over MPI and over gloo; both transports send
the sizes, too.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.rows import Row, RowFile
from efficient_dl.comm import ProcessGroupTransport, Transport, gather_json
from efficient_dl.comm.mpi import MpiTransport, init_process_group

BENCH = "exchange_mpi"
KIB = 1024


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    sizes: Annotated[str, typer.Option(help="message sizes in KiB")] = "64,1024,10240",
    repeats: Annotated[int, typer.Option(help="timed exchanges of each kind", min=1)] = 15,
    quick: Annotated[bool, typer.Option(help="1 MiB only")] = False,
) -> None:
    """Prints, on rank 0, the slowest rank's median seconds of each transport."""
    torch.set_num_threads(1)
    init_process_group()
    group = dist.group.WORLD
    assert group is not None
    mpi, gloo = MpiTransport(), ProcessGroupTransport(group)
    rows = RowFile(out if mpi.rank == 0 else None)
    table = Table(
        "message", "MPI, ms", "gloo, ms", "gloo / MPI", title=f"{mpi.world_size} ranks, {_library()}"
    )
    for kib in [1024] if quick else map(int, sizes.split(",")):
        generator = torch.Generator().manual_seed(mpi.rank)
        outgoing = [
            torch.randint(0, 256, (kib * KIB,), dtype=torch.uint8, generator=generator)
            for _ in range(mpi.world_size)
        ]
        seconds: dict[str, list[float]] = {"MPI": [], "gloo": []}
        for turn in range(repeats + 1):
            for name, transport in (("MPI", mpi), ("gloo", gloo)):
                dist.barrier()
                start = time.perf_counter()
                transport.exchange(outgoing).wait()
                if turn > 0:
                    seconds[name].append(time.perf_counter() - start)
        slowest = {name: _slowest(statistics.median(values), gloo) for name, values in seconds.items()}
        case = f"{mpi.world_size} ranks on one machine, {kib} KiB, {_library()}"
        for name, value in slowest.items():
            rows.add(Row(BENCH, case, f"efficient_dl over {name}", "exchange", value, "s", False))
        cells = [f"{1000 * value:.2f}" for value in slowest.values()]
        table.add_row(f"{kib} KiB", *cells, f"{slowest['gloo'] / slowest['MPI']:.2f}")
    if mpi.rank == 0:
        Console().print(table)
    mpi.close()
    dist.destroy_process_group()


def _slowest(seconds: float, transport: Transport) -> float:
    return max(gather_json(seconds, transport))


def _library() -> str:
    from mpi4py import MPI

    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


if __name__ == "__main__":
    typer.run(main)
