"""`edl probe`: one rank of it, the network that --what-if imagines, and the tables."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from efficient_dl.comm.measurements import Line, Measurements, assumed_network
from efficient_dl.comm.planner import Prediction, wording
from efficient_dl.config import Config
from efficient_dl.data import load_data
from efficient_dl.errors import ConfigError
from efficient_dl.models import check_model
from efficient_dl.training.console import progress_for
from efficient_dl.training.disk import writable
from efficient_dl.training.planning import Planned, measured_plan
from efficient_dl.training.worker import Worker

_FETCH_SECONDS = 1800.0
_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg])bit", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)", re.IGNORECASE)
_BITS = {"k": 1e3, "m": 1e6, "g": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_EXAMPLE = "--what-if rate=400mbit,hosts=16"


@dataclass(frozen=True)
class WhatIf:
    """A network as somebody imagines it: of every host's link, and of one message."""

    bytes_per_second: float
    hosts: int
    workers_per_host: int = 1
    latency_seconds: float = 2e-4

    @staticmethod
    def of(text: str) -> WhatIf:
        """Reads "rate=400mbit,hosts=16", optionally with workers-per-host=8 and latency=5ms. Raises ConfigError."""
        words: dict[str, str] = {}
        for one in text.split(","):
            key, _, value = one.strip().partition("=")
            words[key] = value
        unknown = set(words) - {"rate", "hosts", "workers-per-host", "latency"}
        rate = _RATE.fullmatch(words.get("rate", ""))
        latency = _DURATION.fullmatch(words.get("latency", "200us"))
        counts = [words.get("hosts", ""), words.get("workers-per-host", "1")]
        if unknown or not rate or not latency or not all(one.isdecimal() and int(one) for one in counts):
            raise ConfigError(
                "--what-if cannot be read",
                expected="rate=400mbit,hosts=16 and if you like workers-per-host=8 and latency=5ms",
                found=text,
                fix=f"edl probe {_EXAMPLE}",
            )
        bytes_per_second = float(rate[1]) * _BITS[rate[2].lower()] / 8
        if bytes_per_second <= 0 or int(counts[0]) * int(counts[1]) < 2:
            raise ConfigError(
                "--what-if describes no network",
                expected="a rate above 0, and at least two workers in all",
                found=text,
                fix=f"edl probe {_EXAMPLE}",
            )
        seconds = float(latency[1]) * _SECONDS[latency[2].lower()]
        return WhatIf(bytes_per_second, int(counts[0]), int(counts[1]), seconds)

    def network(self, measured: Measurements) -> Measurements:
        """It, with what was measured of codecs and backward."""
        return assumed_network(
            measured, self.bytes_per_second, self.hosts, self.workers_per_host, self.latency_seconds
        )


def run_probe(worker: Worker, config: Config, out: Path | None, what_if: WhatIf | None) -> Planned:
    """One rank of `edl probe`; rank 0 prints the tables and writes the JSON."""
    device = worker.start(config.run)
    worker.agree([config])
    load = partial(load_data, config.data, context=config.model.context, seed=config.train.seed)
    worker.together("fetch", load if worker.local_rank == 0 else lambda: None, _FETCH_SECONDS)
    data = worker.together("data", load)
    worker.together("model", lambda: check_model(config.model, data.spec, config.data.batch_size))
    planned = measured_plan(config, data, device, progress_for(worker.rank), hierarchy="auto")
    if what_if is not None:
        planned = planned.what_if(what_if.network(planned.measurements), config.compression.floor_bits)
    worker.together("write", lambda: _report(planned, out) if worker.rank == 0 else None)
    return planned


def _report(planned: Planned, out: Path | None) -> None:
    print_plan(planned, Console())
    if out is not None:
        with writable(out.parent, "choose another --json"):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(planned.to_json(), indent=1) + "\n")


def print_plan(planned: Planned, console: Console) -> None:
    """Tables of what was measured and what is predicted, and the decision in one sentence."""
    found = planned.measurements
    console.print(_network_table(found))
    console.print(_codec_table(planned))
    console.print(_step_table(planned))
    console.print(planned.decision.reason)
    if planned.decision.bucket_bytes:
        console.print(
            f"Buckets of {planned.decision.bucket_bytes >> 20} MiB would make a step shorter still: "
            f"DistributedDataParallel(model, bucket_cap_mb={planned.decision.bucket_bytes >> 20})"
        )
    if planned.decision.group_size:
        size = planned.decision.group_size
        console.print(f'"in groups of {size}" is compress(model, optimizer, bits, hierarchy="groups:{size}")')
    if planned.decision.hierarchy:
        console.print('"between nodes" is compress(model, optimizer, bits, hierarchy="auto")')


def _network_table(found: Measurements) -> Table:
    nodes = len(found.ranks_per_node)
    title = f"Network: {found.world_size} ranks on {nodes} node{'s' * (nodes > 1)}"
    table = _table(f"{title} (assumed)" if found.assumed else title, "", "latency", "bandwidth")
    lines: list[tuple[str, Line | None]] = [
        ("native all-reduce", found.native),
        ("exchange among all", found.exchange),
        ("exchange between nodes", found.between),
        ("exchange inside nodes", found.inside),
    ]
    if found.world_size > 1:
        for name, line in lines:
            if line is not None:
                table.add_row(name, _ms(line.latency_seconds), mbits(line.bytes_per_second))
    for link in sorted(found.links, key=lambda link: link.bytes_per_second)[:12]:
        name = f"node {link.source} to node {link.target}"
        table.add_row(name, _ms(link.latency_seconds), mbits(link.bytes_per_second))
    return table


def _codec_table(planned: Planned) -> Table:
    fed = ", errors fed back" if planned.measurements.feeds_back else ""
    table = _table(
        f"Codecs, on a gradient of this model{fed}", "", "encode", "decode, add", "bits a value", "pays below"
    )
    break_even = {one.bits: one.break_even for one in planned.decision.predictions}
    for one in planned.measurements.codecs:
        bits = one.codec.partition(":")[2] or one.codec
        size = planned.model.itemsize
        table.add_row(
            one.codec,
            f"{size / one.encode_seconds / 1e9:.2f} GB/s",
            f"{size / one.decode_seconds / 1e9:.2f} GB/s",
            f"{8 * one.bytes_per_value:.2f}",
            _pays(break_even[bits]) if bits in break_even else "",
        )
    return table


def _step_table(planned: Planned) -> Table:
    backward = planned.measurements.backward_seconds
    title = f"Predicted steps; backward takes {_ms(backward)}"
    table = _table(title, "", "step", "exposed", "codec", "transfer", "sent a rank")
    for one in planned.decision.predictions:
        table.add_row(
            wording(one),
            _ms(one.step_seconds),
            _ms(one.exposed_seconds),
            _ms(one.codec_seconds),
            _ms(one.transfer_seconds),
            f"{one.sent_bytes / 1e6:.2f} MB",
            style=_style(one, planned),
        )
    return table


def _style(one: Prediction, planned: Planned) -> str | None:
    return "bold" if one is planned.decision.chosen else None


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _pays(break_even: float) -> str:
    if break_even == 0:
        return "never"
    return "always" if math.isinf(break_even) else mbits(break_even)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.2f} ms"


def mbits(bytes_per_second: float) -> str:
    """A speed as network people write it."""
    return f"{8 * bytes_per_second / 1e6:,.0f} Mbit/s"
