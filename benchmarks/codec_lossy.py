"""Case lossy: float32 to about two bits a value, beside the usual quantizers and memcpy."""

from __future__ import annotations

import torch
import typer
from torch import Tensor

from benchmarks.codec_loss import Loss
from benchmarks.codec_run import OURS, Run, our_codec, speed_table
from benchmarks.codec_tensors import GAUSSIAN_STD, NamedTensor
from benchmarks.codec_timing import Copy, Ours, System, measure
from efficient_dl.codec.kernels.native.library import available_isas

RATE = "bits:2.0"
BASELINES = ("int8", "int4", "topk:0.01", "sign", "fp16")
BLOCK = 256


class TorchInt8:
    """Eager torch: blocks of 256 values by their largest magnitude to int8, decoded and added, in kept buffers."""

    name = "torch eager int8"

    def __init__(self, x: Tensor) -> None:
        self._x = x[: x.numel() // BLOCK * BLOCK].view(-1, BLOCK)
        self._room = torch.zeros_like(self._x)
        self._codes = torch.zeros(self._x.shape, dtype=torch.int8)
        self._scales = torch.zeros(self._x.shape[0], 1)
        self._out = torch.zeros_like(self._x)

    def prepare(self) -> None:
        """Nothing."""

    def encode(self) -> None:
        """See System."""
        torch.linalg.vector_norm(self._x, torch.inf, dim=1, keepdim=True, out=self._scales)
        self._scales.div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
        torch.div(self._x, self._scales, out=self._room)
        self._codes.copy_(self._room.round_())

    def decode(self) -> None:
        """See System."""
        torch.mul(self._codes, self._scales, out=self._room)
        self._out.add_(self._room)

    def packet_bytes(self) -> int:
        """See System."""
        return self._codes.numel() + 4 * self._scales.numel()

    def decoded(self) -> Tensor:
        """See System."""
        return (self._codes * self._scales).flatten()


def lossy(run: Run) -> None:
    """The codecs that lose something, on gradients and on Gaussian values; decoding adds to its output."""
    numel = run.timing_bytes // 4
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(numel, generator=generator).mul_(GAUSSIAN_STD)
    tensors = [run.trained.gradient(model, moment) for model in ("gpt", "cnn") for moment in run.moments]
    tensors.append(NamedTensor("gaussian", normal, (numel,)))
    table = speed_table(
        "fp32 to about 2 bits, decoded and added, one core",
        "bits/value",
        "error",
        "over model",
        "over order 0",
    )
    with typer.progressbar(tensors, label="lossy") as bar:
        for tensor in bar:
            for row in _measure(run, tensor):
                table.add_row(*row)
            table.add_section()
    run.console.print(table)
    run.console.print(
        "error: squared error over the tensor's energy; over model, over order 0: packet bits beyond the codec's model "
        "and beyond the order-0 entropy of its symbols, each with scales. memcpy: GB/s of bytes copied."
    )


def _systems(tensor: NamedTensor) -> list[System]:
    """Ours for each instruction set of this processor, the best first; then the others."""
    x, side = tensor.values, tensor.side
    named = [(f"{OURS} native-{isa}", our_codec(RATE, isa)) for isa in available_isas()]
    named += [(f"baseline {spec}", our_codec(spec)) for spec in BASELINES]
    return [
        *(Ours(name, codec, x, side, accumulate=True) for name, codec in named),
        TorchInt8(x),
        Copy(x),
    ]


def _measure(run: Run, tensor: NamedTensor) -> list[list[str]]:
    case = f"{RATE}, {tensor.name}"
    sizes: dict[str, list[str]] = {}
    for system in _systems(tensor):
        system.encode()
        system.decode()
        sizes[system.name] = _sizes(run, case, system, tensor.values)
    timed = tensor.tiled(run.timing_bytes)
    systems = _systems(timed)
    cells = run.speeds(case, timed.values.nbytes, measure(systems, run.rounds), systems, ours=systems[0].name)
    return [
        [tensor.name if i == 0 else "", one.name, *sizes[one.name], *cells[one.name]]
        for i, one in enumerate(systems)
    ]


def _sizes(run: Run, case: str, system: System, x: Tensor) -> list[str]:
    out = system.decoded()
    bits = 8 * system.packet_bytes() / out.numel()
    x = x[: out.numel()].double()
    error = float((out.double() - x).square().sum() / x.square().sum())
    run.row(case, system.name, "bits_per_value", bits, "bits", False)
    run.row(case, system.name, "squared_error", error, "of the tensor's energy", False)
    cells = [f"{bits:.3f}", f"{error:.4f}", "", ""]
    if isinstance(system, Ours) and system.name.startswith(OURS):
        found = Loss.of(system.stats())
        unit = "fraction of the ideal bits, scales included"
        run.row(case, system.name, "loss_over_model", found.over_model, unit, False)
        run.row(case, system.name, "loss_over_order0", found.over_order0, unit, False)
        cells[2:] = [f"{100 * found.over_model:.2f} %", f"{100 * found.over_order0:.2f} %"]
    return cells
