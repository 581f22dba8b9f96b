"""Does the cost model hold at 2, 4 and 8 hosts, and what do groups of ranks save there?

python -m benchmarks.grouped --out benchmarks/results/grouped.jsonl
Emulates hosts of one rank each behind shaped links (see cluster/); all ranks all-reduce one bucket of gradients
natively, flat at 2 bits, and in groups at 2 bits, in turn. The predictions are made from bandwidths, and processor
seconds and bytes of packets, as measured on two hosts. Ranks share this machine's cores: how much longer codecs take
for that is measured with as many ranks as are predicted, all encoding at once, and the latencies of 1 KiB by torch's
all-reduce and by our exchange in turn with what is predicted from them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.rows import Row, RowFile
from cluster.emulate import EmulatedNetwork
from efficient_dl.codec import make_codec
from efficient_dl.comm import (
    BucketLayout,
    Compressor,
    Levels,
    Plan,
    ProcessGroupTransport,
    Topology,
    all_reduce,
    gather_json,
    grouped_all_reduce,
)
from efficient_dl.comm.layout import BLOCK_NUMEL
from efficient_dl.comm.measurements import CodecSpeed, Line, Measurements, PacketCost, extrapolated
from efficient_dl.comm.meter import Tally
from efficient_dl.comm.planner import PlannerOptions, Shapes, predict
from efficient_dl.comm.probe import exchange_line, native_line
from efficient_dl.comm.topology import group_sizes
from efficient_dl.comm.transport import SIZE_BYTES

BENCH = "grouped"
CODEC = "bits:2.0"
_NAMES = ["weight", "bias"]
_CONTENTION_SECONDS, _CODEC_TRIES = 0.5, 25
_SMALL_BYTES, _IN_A_ROW = 1024, 4
_LATENCIES = {"native": "1 KiB natively", "exchange": "1 KiB by our exchange"}
_TIMEOUT_SECONDS = 120.0


def worker(numels: list[int], repeats: int) -> None:
    """One rank: measures what predictions need, then times every system on every size. Rank 0 prints one JSON line."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=_TIMEOUT_SECONDS))
    group = dist.group.WORLD
    assert group is not None
    control = ProcessGroupTransport(group, timeout=_TIMEOUT_SECONDS)
    contention = [_contention(gradient(1 << 17, control.rank), control)]
    found: dict[str, Any] = {}
    if control.world_size == 2:
        found["measurements"] = _measured(gradient(max(numels), control.rank), control).to_json()
    levels = {
        size: Levels.of(Topology.in_groups(control.world_size, size), control)
        for size in group_sizes(control.world_size)
    }
    found["seconds"] = {
        numel: _timed(gradient(numel, control.rank), control, levels, repeats) for numel in numels
    }
    contention.append(_contention(gradient(1 << 17, control.rank), control))
    found["contention"] = statistics.mean(contention)
    if control.rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def gradient(numel: int, seed: int) -> Tensor:
    """Normal values in blocks of different sizes, as in gradients."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(numel // 256 + 1, generator=generator).exp().repeat_interleave(256)[:numel]
    return torch.randn(numel, generator=generator) * scale


def _contention(x: Tensor, control: ProcessGroupTransport) -> float:
    """Wall-clock seconds a second of processor time, while all ranks encode at once; the mean of the ranks."""
    codec = make_codec(CODEC)
    room = torch.empty(codec.max_bytes(x.numel(), x.dtype), dtype=torch.uint8)
    codec.encode_into(x, room)
    gather_json(0, control)
    wall, processor = time.perf_counter(), time.thread_time()
    while time.perf_counter() - wall < _CONTENTION_SECONDS:
        codec.encode_into(x, room)
    ratio = (time.perf_counter() - wall) / (time.thread_time() - processor)
    return statistics.mean(gather_json(ratio, control))


def _measured(x: Tensor, control: ProcessGroupTransport) -> Measurements:
    packet = _cost(x[:BLOCK_NUMEL].clone())
    whole = _cost(x)
    speed = CodecSpeed(
        CODEC,
        (whole.encode_seconds - packet.encode_seconds) / x.numel(),
        (whole.decode_seconds - packet.decode_seconds) / x.numel(),
        (whole.num_bytes - packet.num_bytes) / (x.numel() - BLOCK_NUMEL),
    )
    values_bytes = BLOCK_NUMEL * speed.bytes_per_value
    packet = replace(packet, num_bytes=packet.num_bytes - values_bytes + SIZE_BYTES)
    return Measurements(
        (1,) * control.world_size,
        native=_faster(lambda: native_line(lambda tensor: dist.all_reduce(tensor), control, x.dtype)),
        exchange=_faster(lambda: exchange_line(control, control)),
        between=None,
        inside=None,
        links=(),
        codecs=(speed,),
        backward_seconds=0.0,
        contended=True,
        packet=packet,
    )


def _faster(measure: Callable[[], Line]) -> Line:
    """The better one of two: other work on the machine only makes a link look slower."""
    return max(measure(), measure(), key=lambda line: line.bytes_per_second)


def _cost(x: Tensor) -> PacketCost:
    """Processor seconds of one packet of these values through a `Compressor`, and its bytes; medians."""
    layout = BucketLayout.of(["values"], [x.numel()], 1)
    compressor, tally, (shard,) = Compressor(Plan.of(2.0), layout.names), Tally(layout), layout.shards
    compressor.meter.stepped(0.0)  # in the first step errors and entropies would be sampled
    room, total = torch.empty(compressor.max_bytes(shard, x.dtype), dtype=torch.uint8), torch.zeros_like(x)
    message = room
    encoding: list[float] = []
    decoding: list[float] = []
    for _ in range(_CODEC_TRIES):
        start = time.thread_time()
        message = compressor.encode(x, room, shard, tally, copies=1)
        middle = time.thread_time()
        compressor.decode(message, total, shard, tally, accumulate=True)
        encoding.append(middle - start)
        decoding.append(time.thread_time() - middle)
    return PacketCost(statistics.median(encoding), statistics.median(decoding), len(message))


def _segments(numel: int) -> list[int]:
    return [numel - numel // 64, numel // 64]


def _timed(
    x: Tensor, control: ProcessGroupTransport, levels: dict[int, Levels], repeats: int
) -> dict[str, list[float]]:
    """Of every system, and of 1 KiB, the seconds of each repetition, on the slowest rank."""
    layout = BucketLayout.of(_NAMES, _segments(x.numel()), control.world_size)
    systems: dict[str, Callable[[], object]] = {"native": lambda: dist.all_reduce(x.clone())}

    def ours(name: str, reduce: Callable[[Compressor], None]) -> None:
        compressor = Compressor(Plan.of(2.0), _NAMES)
        compressor.meter.stepped(0.0)  # in steps of which errors and entropies are not sampled
        systems[name] = lambda: reduce(compressor)

    ours("flat", lambda compressor: all_reduce(x.clone(), layout, compressor, control))
    for size, found in levels.items():
        ours(
            f"groups of {size}",
            lambda compressor, found=found: grouped_all_reduce(x.clone(), layout, compressor, found),
        )
    small = torch.zeros(_SMALL_BYTES // 4)
    message = torch.zeros(_SMALL_BYTES // (control.world_size - 1), dtype=torch.uint8)
    systems[_LATENCIES["native"]] = lambda: dist.all_reduce(small)
    systems[_LATENCIES["exchange"]] = lambda: control.exchange([message] * control.world_size).wait()
    own: dict[str, list[float]] = {name: [] for name in systems}
    for repetition in range(repeats + 1):
        for name, run in systems.items():
            dist.barrier()
            times = _IN_A_ROW if name in _LATENCIES.values() else 1
            start = time.perf_counter()
            for _ in range(times):
                run()
            if repetition:  # the first one opens connections
                own[name].append((time.perf_counter() - start) / times)
    everyone = gather_json(own, control)
    return {
        name: [max(column) for column in zip(*(theirs[name] for theirs in everyone), strict=True)]
        for name in own
    }


def on_paper(
    two: Measurements, hosts: int, contention: float, seconds: dict[str, list[float]]
) -> Measurements:
    """So many hosts, by what was measured on two.

    contention: wall-clock seconds of a processor's second. seconds: of 1 KiB, as measured.
    """
    found = extrapolated(two, hosts, contention)
    latency = {name: statistics.median(seconds[label]) for name, label in _LATENCIES.items()}
    return replace(
        found,
        native=replace(found.native, latency_seconds=latency["native"]),
        exchange=replace(found.exchange, latency_seconds=latency["exchange"]),
    )


def predicted(found: Measurements, hosts: int, numel: int) -> dict[str, float]:
    """Seconds of an exchange by every system."""
    seconds = {one.bits: one.step_seconds for one in predict(found, Shapes((numel,)))}
    result = {"native": seconds["none"], "flat": seconds["2.0"]}
    for size in group_sizes(hosts):
        options = PlannerOptions(native=False, flat=False, groups=True, group_size=size)
        (one,) = predict(found, Shapes((numel,)), options=options)
        result[f"groups of {size}"] = one.step_seconds
    return result


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    hosts: Annotated[str, typer.Option(help="numbers of hosts; the first must be 2")] = "2,4,8",
    rates: Annotated[str, typer.Option(help="link speeds")] = "30mbit,100mbit",
    sizes: Annotated[str, typer.Option(help="values in the bucket")] = "65536,1048576",
    repeats: Annotated[int, typer.Option(help="timed exchanges of each kind", min=1)] = 15,
    quick: Annotated[bool, typer.Option(help="2 and 4 hosts, 100 Mbit/s, 3 repetitions")] = False,
    as_worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Times one bucket's all-reduce natively, flat and in groups, beside what the cost model predicts."""
    numels = [int(size) for size in sizes.split(",")]
    if as_worker:
        return worker(numels, repeats)
    if quick:
        hosts, rates, repeats = "2,4", "100mbit", 3
    rows = RowFile(out)
    for rate in rates.split(","):
        two = None
        for count in map(int, hosts.split(",")):
            measured = _emulated(count, rate, sizes, repeats)
            if two is None:
                two = Measurements.from_json(measured["measurements"])
                _inputs(rows, rate, two)
            case = f"{count} hosts, {rate}"
            rows.add(Row(BENCH, case, "machine", "contention", measured["contention"], "x", False))
            for numel in numels:
                seconds = measured["seconds"][str(numel)]
                found = on_paper(two, count, measured["contention"], seconds)
                _report(rows, f"{case}, {numel} values", seconds, predicted(found, count, numel))


def _emulated(hosts: int, rate: str, sizes: str, repeats: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.grouped",
        "--worker",
        "--sizes",
        sizes,
        "--repeats",
        str(repeats),
    ]
    with EmulatedNetwork(hosts=hosts, rate=rate) as network:
        result = network.run(command, environment={"OMP_NUM_THREADS": "1"}, timeout_seconds=400, quiet=True)
    if result.exit_code != 0:
        print("\n".join(result.output), file=sys.stderr)
        raise typer.Exit(result.exit_code)
    lines = [line for output in result.output for line in output.splitlines()]
    (found,) = [json.loads(line[line.index("{") :]) for line in lines if '"contention": ' in line]
    return found


def _inputs(rows: RowFile, rate: str, two: Measurements) -> None:
    """What predictions were made from."""
    (codec,), case = two.codecs, f"2 hosts, {rate}"
    lines: dict[str, Line] = {"native": two.native, "exchange": two.exchange}
    for name, line in lines.items():
        rows.add(Row(BENCH, case, name, "bandwidth", 8e-6 * line.bytes_per_second, "Mbit/s", True))
    rows.add(Row(BENCH, case, CODEC, "encode", 4e-9 / codec.encode_seconds, "GB/s of fp32", True))
    rows.add(Row(BENCH, case, CODEC, "decode, add", 4e-9 / codec.decode_seconds, "GB/s of fp32", True))
    rows.add(Row(BENCH, case, CODEC, "bits a value", 8 * codec.bytes_per_value, "bits", False))
    rows.add(Row(BENCH, case, CODEC, "encode of a packet", 1e6 * two.packet.encode_seconds, "us", False))
    rows.add(Row(BENCH, case, CODEC, "decode of a packet", 1e6 * two.packet.decode_seconds, "us", False))
    rows.add(Row(BENCH, case, CODEC, "bytes of a packet", two.packet.num_bytes, "B", False))


def _report(rows: RowFile, case: str, seconds: dict[str, list[float]], paper: dict[str, float]) -> None:
    table = Table("all-reduce", "ms", "predicted", "predicted / measured", "least and most ms", title=case)
    for label in _LATENCIES.values():
        rows.add(Row(BENCH, case, label, "latency", 1e3 * statistics.median(seconds[label]), "ms", False))
    for system, guess in paper.items():
        tries = seconds[system]
        name = "gloo, fp32" if system == "native" else f"{system}, 2.0 bits"
        median = statistics.median(tries)
        rows.add(Row(BENCH, case, name, "time of an exchange", 1e3 * median, "ms", False))
        rows.add(Row(BENCH, case, name, "least time of an exchange", 1e3 * min(tries), "ms", False))
        rows.add(Row(BENCH, case, name, "predicted", 1e3 * guess, "ms", False))
        rows.add(Row(BENCH, case, name, "predicted / measured", guess / median, "x", False))
        table.add_row(
            name,
            f"{1e3 * median:.1f}",
            f"{1e3 * guess:.1f}",
            f"{guess / median:.2f}",
            f"{1e3 * min(tries):.1f} {1e3 * max(tries):.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
