"""How far does the one-shot exchange carry? The planner's predictions from 2 to 10,000 hosts, on paper.

python -m benchmarks.scaling --out benchmarks/results/scaling.jsonl --plot benchmarks/results/scaling.svg
python -m benchmarks.scaling --plan plan.json           # codecs and backward as `edl probe --json plan.json` found them
Without --plan codecs, packets and backward are measured here, alone on this machine; links are imagined. The model of a
step is docs/planner.md's; what it leaves out is said there.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import matplotlib
import typer
from rich.console import Console
from rich.table import Table

matplotlib.use("svg")
from matplotlib import pyplot as plt

from benchmarks.rows import Row, RowFile
from efficient_dl.comm.measurements import Line, Measurements, assumed_network, merged
from efficient_dl.comm.planner import PlannerOptions, Prediction, Shapes, plan_for
from efficient_dl.comm.probe import codec_speed, codecs_for, packet_cost, sample_gradient
from efficient_dl.config import Config, with_overrides
from efficient_dl.data import load_data
from efficient_dl.models import build_model
from efficient_dl.training.measure import compute_seconds
from efficient_dl.training.task import task_for

BENCH = "scaling"
HOSTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 5000, 10_000)
_SHARDS = 2  # that codecs are timed on; what more of them cost is the packets'


def measured_here(model: str, batch: int) -> tuple[Measurements, Shapes]:
    """Codecs, packets and backward on this machine; a network to be replaced."""
    import torch

    torch.set_num_threads(1)
    settings = ["model.name=gpt", f"model.size={model}", "data.name=stdlib", f"data.batch_size={batch}"]
    config = with_overrides(Config(), settings)
    data = load_data(config.data, context=config.model.context, seed=0)
    network = build_model(config.model, data.spec, seed=0)
    loss = task_for(data.spec.kind).loss
    inputs, targets = data.train_batch(0, 0, 1, batch)
    backward = compute_seconds(
        network, torch.device("cpu"), lambda: loss(network(inputs), targets).backward()
    )
    loss(network(inputs), targets).backward()
    parameters = list(network.parameters())
    sample, segments = sample_gradient(parameters)
    names = codecs_for(2.0)
    packet = packet_cost(names[-1], sample)
    speeds = [codec_speed(name, sample, segments, _SHARDS, packet) for name in names]
    line = Line(0.0, 1.0)
    found = Measurements((1, 1), line, line, None, None, (), merged([speeds]), backward, True, packet)
    return found, Shapes(tuple(p.numel() for p in parameters))


def predictions(
    found: Measurements, model: Shapes, rate: float, latency: float, hosts: int, workers: int
) -> tuple[Prediction, ...]:
    """Native, flat and hierarchical; rate: bytes per second of a host's link, latency: seconds of a message."""
    network = assumed_network(found, rate, hosts, workers, latency)
    flat = plan_for(network, model).predictions
    if network.between is None:
        return flat
    options = PlannerOptions(flat=False, hierarchy=True, native=False)
    return (*flat, *plan_for(network, model, options=options).predictions)


def main(
    plan: Annotated[Path | None, typer.Option(help="what edl probe --json wrote", exists=True)] = None,
    rate: Annotated[float, typer.Option(help="Mbit/s of a host's link")] = 1000.0,
    latency: Annotated[float, typer.Option(help="µs of a message")] = 50.0,
    workers: Annotated[int, typer.Option(help="ranks on each host, which share its link", min=1)] = 8,
    size: Annotated[str, typer.Option(help="of the gpt that is measured without --plan")] = "base",
    batch: Annotated[int, typer.Option(help="sequences of 128 tokens on a rank", min=1)] = 4,
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw it: .svg, .png or .pdf")] = None,
) -> None:
    """Predicts a step's exposed communication for growing clusters."""
    if plan is not None:
        content = json.loads(plan.read_text())
        found = Measurements.from_json(content["measurements"])
        model = Shapes(tuple(content["values"]), content["itemsize"])
    else:
        found, model = measured_here(size, batch)
    found = replace(found, inside=None)  # imagined, too
    case = f"{model.numel / 1e6:.1f} M values, {rate:g} Mbit/s, {latency:g} us, {workers} ranks a host"
    curves = _curves(found, model, rate, latency, workers)
    file = RowFile(out)
    for name, by_hosts in curves.items():
        for hosts, one in by_hosts.items():
            file.add(
                Row(BENCH, f"{case}, {hosts} hosts", name, "exposed_seconds", one.exposed_seconds, "s", False)
            )
    _print(case, found, curves)
    if plot is not None:
        _draw(case, curves, plot)


Curves = dict[str, dict[int, Prediction]]


def _curves(found: Measurements, model: Shapes, rate: float, latency: float, workers: int) -> Curves:
    curves: Curves = {}
    for hosts in HOSTS:
        for one in predictions(found, model, rate * 1e6 / 8, latency * 1e-6, hosts, workers):
            name = (
                "native" if one.bits == "none" else f"{one.bits}{' between hosts' if one.hierarchy else ''}"
            )
            curves.setdefault(name, {})[hosts] = one
    return curves


def _print(case: str, found: Measurements, curves: Curves) -> None:
    cost = found.packet
    table = Table(
        title=f"Exposed milliseconds a step: {case}",
        caption=f"backward {1000 * found.backward_seconds:.0f} ms; a packet costs {1e6 * cost.encode_seconds:.0f} and "
        f"{1e6 * cost.decode_seconds:.0f} µs and {cost.num_bytes:.0f} bytes beside its values",
    )
    table.add_column("hosts", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for hosts in HOSTS:
        cells = [f"{1000 * by_hosts[hosts].exposed_seconds:,.0f}" for by_hosts in curves.values()]
        table.add_row(f"{hosts:,}", *cells)
    Console(width=max(110, Console().width)).print(table)


def _draw(case: str, curves: Curves, out: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, by_hosts in curves.items():
        style = "-" if name == "native" else "--" if "between" in name else ":"
        axis.plot(list(by_hosts), [one.exposed_seconds for one in by_hosts.values()], style, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("hosts")
    axis.set_ylabel("exposed seconds a step, predicted")
    axis.set_title(case, fontsize=9)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
