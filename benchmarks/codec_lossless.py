"""Case lossless: ratio and speed of the exact codec beside ZipNN, Blosc2, zstd and LZ4."""

from __future__ import annotations

import torch
import typer

from benchmarks.codec_peers import lossless_peers
from benchmarks.codec_run import MIB, OURS, Run, speed_table
from benchmarks.codec_tensors import NamedTensor, gaussian_weights
from benchmarks.codec_timing import Ours, System, check_exact, measure
from efficient_dl.codec import make_codec

WITH_CHECKSUM = f"{OURS}, checksum"


def lossless(run: Run) -> None:
    """Every tensor in bfloat16 and float32."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        tensors = [
            tensor.to(dtype)
            for take in (run.trained.gradient, run.trained.weight)
            for model in ("gpt", "cnn")
            for tensor in (take(model, moment) for moment in run.moments)
        ]
        if dtype == torch.bfloat16:
            tensors.append(gaussian_weights(run.timing_bytes))
            if run.big:
                tensors.append(gaussian_weights(256 * MIB))
        table = speed_table(f"lossless {name}, one core", "ratio", "ours / its")
        with typer.progressbar(tensors, label=f"lossless {name}") as bar:
            for tensor in bar:
                for row in _measure(run, tensor):
                    table.add_row(*row)
                table.add_section()
        run.console.print(table)


def _measure(run: Run, tensor: NamedTensor) -> list[list[str]]:
    case = f"lossless, {tensor.name}"
    ratios = dict[str, float]()
    for system in _systems(run, tensor):
        check_exact(system, tensor.values)
        ratio = tensor.values.numel() * tensor.values.element_size() / system.packet_bytes()
        ratios[system.name] = ratio
        run.row(case, system.name, "ratio", ratio, "bytes in / bytes out", True)
    num_bytes = max(run.timing_bytes, tensor.values.nbytes if tensor.name.startswith("gaussian") else 0)
    timed = tensor.tiled(num_bytes)
    systems = _systems(run, timed)
    cells = run.speeds(case, num_bytes, measure(systems, run.rounds), systems)
    rows = list[list[str]]()
    for system in systems:
        relative = ratios[OURS] / ratios[system.name]
        if system.name not in (OURS, WITH_CHECKSUM):
            run.row(case, OURS, f"ratio over {system.name}", relative, "×", True)
        first = tensor.name if system.name == OURS else ""
        rows.append(
            [first, system.name, f"{ratios[system.name]:.3f}", f"{relative:.3f}", *cells[system.name]]
        )
    return rows


def _systems(run: Run, tensor: NamedTensor) -> list[System]:
    peers, missing = lossless_peers(tensor.values)
    for sentence in missing:
        run.say(f"missing peer: {sentence}")
    ours = Ours(OURS, make_codec("lossless", checksum=False), tensor.values, tensor.side)
    checked = Ours(WITH_CHECKSUM, make_codec("lossless"), tensor.values, tensor.side)
    return [ours, checked, *peers]
