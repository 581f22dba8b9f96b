"""Case sparse: one global step, few non-zeros; our coder beside zstd on the same integers in int8."""

from __future__ import annotations

import warnings

import torch
import typer
from torch import Tensor

from benchmarks.codec_peers import INSTALL, load
from benchmarks.codec_run import OURS, Run, our_codec, speed_table
from benchmarks.codec_timing import Ours, System, measure
from efficient_dl.codec import Codec

SHARES = (0.1, 0.03, 0.01)
RATES = (0.02, 4.0)  # bits a value between which the rate is looked for
RATE_SEARCH_STEPS = 12
ROUNDING = 0.375  # the grid quantizer's: a value below 0.625 steps becomes 0 (docs/format.md, codec 3)


class Zstd8:
    """zstd, level 1, on int8 codes. quantize: making the codes, and decoding them to float32, is timed too."""

    def __init__(self, x: Tensor, step: float, quantize: bool) -> None:
        zstandard = load("zstandard")
        self.name = "int8 + zstd -1" if quantize else "zstd -1 alone"
        self._x, self._step, self._quantize = x, step, quantize
        self._room = torch.zeros_like(x)
        self._codes = torch.zeros(x.shape, dtype=torch.int8)
        self._out = torch.zeros_like(x)
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()
        self._packet = b""
        self._make_codes()

    def prepare(self) -> None:
        """Nothing."""

    def encode(self) -> None:
        """See System."""
        if self._quantize:
            self._make_codes()
        self._packet = self._compressor.compress(self._codes.numpy())

    def decode(self) -> None:
        """See System."""
        codes = self._decompressor.decompress(self._packet)
        if self._quantize:
            with warnings.catch_warnings():  # torch warns that bytes are read-only; they are only read here
                warnings.simplefilter("ignore", UserWarning)
                torch.mul(torch.frombuffer(codes, dtype=torch.int8), self._step, out=self._out)

    def packet_bytes(self) -> int:
        """See System; the step's 4 bytes are counted."""
        return len(self._packet) + 4

    def decoded(self) -> Tensor:
        """See System."""
        return self._codes * self._step

    def _make_codes(self) -> None:
        torch.abs(self._x, out=self._room)
        self._room.mul_(1 / self._step).add_(ROUNDING).floor_().clamp_(max=127)
        self._codes.copy_(self._room.copysign_(self._x))


def sparse(run: Run) -> None:
    """Gradients quantized so that a given share of the values is not zero."""
    table = speed_table("fp32, one global step, one core", "non-zero", "bits/value", "error", "its / ours")
    tensors = [run.trained.gradient(model, moment) for model in ("gpt", "cnn") for moment in run.moments]
    work = [(tensor, share) for tensor in tensors for share in SHARES]
    with typer.progressbar(work, label="sparse") as bar:
        for tensor, share in bar:
            x = tensor.values
            codec, step = codec_at(x, share)
            systems, timed = _systems(run, x, codec, step), tensor.tiled(run.timing_bytes).values
            sizes = dict[str, int]()
            for system in systems:
                system.encode()
                sizes[system.name] = system.packet_bytes()
            case = f"sparse, {tensor.name}, {100 * share:g} % non-zero"
            timed_systems = _systems(run, timed, codec, step)
            cells = run.speeds(case, timed.nbytes, measure(timed_systems, run.rounds), timed_systems)
            for i, system in enumerate(systems):
                decoded = system.decoded()
                error = float((decoded - x).square().sum() / x.square().sum())
                filled = float((decoded != 0).float().mean())
                bits = 8 * sizes[system.name] / x.numel()
                relative = sizes[system.name] / sizes[OURS]
                run.row(case, system.name, "nonzero", filled, "share of the values", False)
                run.row(case, system.name, "bits_per_value", bits, "bits", False)
                run.row(case, system.name, "squared_error", error, "of the tensor's energy", False)
                if system.name != OURS:
                    run.row(case, OURS, f"bytes of {system.name} over ours", relative, "×", True)
                columns = (f"{100 * filled:.2f} %", f"{bits:.4f}", f"{error:.4f}", f"{relative:.3f}")
                name = tensor.name if i == 0 else ""
                table.add_row(name, system.name, *columns, *cells[system.name])
            table.add_section()
    run.console.print(table)
    run.console.print(
        "Only `int8 + zstd` does the whole work; `zstd alone` starts from and ends at int8 codes. int8 saturates at "
        "127 steps, which shows in the error."
    )


def _systems(run: Run, x: Tensor, codec: Codec, step: float) -> list[System]:
    systems: list[System] = [Ours(OURS, codec, x)]
    try:
        systems += [Zstd8(x, step, quantize=True), Zstd8(x, step, quantize=False)]
    except ImportError as error:
        run.say(f"missing peer: zstd: {error}; {INSTALL}")
    return systems


def codec_at(x: Tensor, share: float) -> tuple[Codec, float]:
    """Our codec at the rate that leaves about this share of x not zero, and its step, read off the decoded values."""
    low, high = RATES
    out = torch.empty_like(x)
    found: list[tuple[float, Codec, float]] = []
    for _ in range(RATE_SEARCH_STEPS):
        middle = (low * high) ** 0.5
        codec = our_codec(f"grid:{middle:.4f}")
        codec.decode(codec.encode(x), out)
        filled = float((out != 0).float().mean())
        if filled:
            found.append((abs(filled - share), codec, float(out[out != 0].abs().min())))
        low, high = (middle, high) if filled < share else (low, middle)
    _, best, step = min(found, key=lambda one: one[0])
    return best, step
