"""Case gpu: the codecs on a GPU beside nvCOMP's ANS and a device copy, in CUDA events' time."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from benchmarks.codec_run import MIB, OURS, Run, our_codec
from benchmarks.codec_tensors import NamedTensor, gaussian_weights
from benchmarks.codec_timing import Timing

SIZES_MIB = (25, 256)
NVCOMP_INSTALL = "pip install nvidia-nvcomp-cu13"
NVCOMP_MODES = {"nvCOMP ANS, float16": torch.float16, "nvCOMP ANS, bytes": torch.uint8}
COLUMNS = (
    "tensor",
    "system",
    "ratio",
    "encode GB/s",
    "% of copy",
    "decode GB/s",
    "% of copy",
    "encode ×",
    "decode ×",
)


@dataclass(frozen=True)
class Result:
    """One system on one tensor. extra_bytes: what decoding reads besides the packet (the output, if it adds)."""

    system: str
    packet_bytes: int
    encode: Timing
    decode: Timing
    extra_bytes: int = 0


def gpu(run: Run) -> None:
    """Lossless bfloat16 at 25 and 256 MiB, and two bits from float32; speeds count the uncompressed tensor."""
    device = torch.device("cuda")
    sizes = SIZES_MIB[:1] if run.quick else SIZES_MIB
    gradient = run.trained.gradient("gpt", "stream")
    weight = run.trained.weight("gpt", "end")
    work: list[tuple[str, NamedTensor, bool]] = []
    for mib in sizes:
        # Repeats are for speed alone; these coders have no memory of earlier values, so ratios do not profit.
        tensors = [
            gaussian_weights(mib * MIB),
            *(t.to(torch.bfloat16).tiled(mib * MIB) for t in (weight, gradient)),
        ]
        work += [
            ("lossless", NamedTensor(f"{t.name}, {mib} MiB", t.values, t.segments), False) for t in tensors
        ]
        tiled = gradient.tiled(mib * MIB)
        work.append(
            ("bits:2.0", NamedTensor(f"{gradient.name}, fp32, {mib} MiB", tiled.values, tiled.segments), True)
        )
    table = Table(title=f"codecs on {torch.cuda.get_device_name()}")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i < 2 else "right")
    with typer.progressbar(work, label="gpu") as bar:
        for spec, tensor, accumulate in bar:
            x = tensor.values.to(device)
            copied = torch.empty_like(x)
            ceiling = gpu_timing(lambda a=x, b=copied: b.copy_(a), run.rounds)
            results = _ours(run, spec, tensor, x, accumulate)
            if spec == "lossless":
                results += _nvcomp(run, x)
            _report(run, f"gpu, {spec}, {tensor.name}", x.nbytes, ceiling, results, table)
            table.add_section()
    run.console.print(table)
    run.console.print(
        "% of copy: bytes that must move (tensor and packet, and the output where it is added to) a second, over those "
        "of a device copy of the tensor in the same run (read and written). 25 MiB may stay in the GPU's L2 cache, for "
        "the copy as for the codecs."
    )


def gpu_timing(call: Callable[[], object], rounds: int) -> Timing:
    """Seconds between two events around the call, after two calls that are not timed."""
    for _ in range(2):
        call()
    seconds = list[float]()
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return Timing(min(seconds), statistics.median(seconds))


def _ours(run: Run, spec: str, tensor: NamedTensor, x: Tensor, accumulate: bool) -> list[Result]:
    codec = our_codec(spec)
    kernel = codec.kernel_for(x.device)
    if kernel == "reference" and x.nbytes > SIZES_MIB[0] * MIB:
        run.say(f"{spec} has no fused kernel for this GPU, the reference is timed at {SIZES_MIB[0]} MiB only")
        return []
    room = torch.empty(codec.max_bytes(x.numel(), x.dtype, tensor.side), dtype=torch.uint8, device=x.device)
    out = torch.zeros_like(x)
    packet = room[: int(codec.encode_into(x, room, tensor.side))]
    encode = gpu_timing(lambda: codec.encode_into(x, room, tensor.side), run.rounds)
    codec.decode(packet, out, side=tensor.side)
    if codec.exact and not torch.equal(out.view(torch.uint8), x.view(torch.uint8)):
        raise RuntimeError(f"{spec} on the GPU does not give back the tensor {tensor.name}")
    decode = gpu_timing(lambda: codec.decode(packet, out, accumulate, tensor.side), run.rounds)
    name = OURS if kernel != "reference" else f"{OURS} {kernel}"
    return [Result(name, packet.numel(), encode, decode, x.nbytes if accumulate else 0)]


def _nvcomp(run: Run, x: Tensor) -> list[Result]:
    try:
        nvcomp: Any = importlib.import_module("nvidia.nvcomp")
    except ImportError as error:
        run.say(f"missing peer: nvCOMP: {error}; {NVCOMP_INSTALL}")
        return []
    results = list[Result]()
    for name, dtype in NVCOMP_MODES.items():
        try:
            results.append(_nvcomp_mode(nvcomp, name, x.view(dtype), run.rounds))
        except Exception as error:  # a peer that fails must not cost our own rows; the reason is printed
            run.say(f"{name} failed: {error!r}")
    return results


def _nvcomp_mode(nvcomp: Any, name: str, x: Tensor, rounds: int) -> Result:
    """nvCOMP allocates its outputs from its own pool; it has no bfloat16, float16 is its mode for 16-bit floats."""
    data_type = {torch.float16: "<f2", torch.uint8: "<u1"}[x.dtype]
    stream = torch.cuda.current_stream().cuda_stream
    codec = nvcomp.Codec(algorithm="ANS", data_type=data_type, cuda_stream=stream)
    array = nvcomp.as_array(x)
    packet = codec.encode(array)
    decoded = torch.from_dlpack(codec.decode(packet)).view(-1).view(torch.uint8)
    if not torch.equal(decoded, x.view(-1).view(torch.uint8)):
        raise RuntimeError("it does not give back the tensor")
    encode = gpu_timing(lambda: codec.encode(array), rounds)
    decode = gpu_timing(lambda: codec.decode(packet), rounds)
    return Result(name, packet.buffer_size, encode, decode)


def _report(
    run: Run, case: str, num_bytes: int, ceiling: Timing, results: list[Result], table: Table
) -> None:
    copy_speed = 2 * num_bytes / ceiling.best / 1e9
    run.row(case, "device copy", "moved_gb_per_s", copy_speed, "GB/s read and written", True)
    table.add_row(
        case, "device copy", "", f"{copy_speed / 2:.0f}", "100", f"{copy_speed / 2:.0f}", "100", "", ""
    )
    ours = next((one for one in results if one.system.startswith(OURS)), None)
    for one in results:
        ratio = num_bytes / one.packet_bytes
        run.row(case, one.system, "ratio", ratio, "bytes in / bytes out", True)
        cells, factors = [f"{ratio:.3f}"], list[str]()
        for direction, timing, extra in (("encode", one.encode, 0), ("decode", one.decode, one.extra_bytes)):
            share = (num_bytes + one.packet_bytes + extra) / timing.best / 1e9 / copy_speed
            speed = timing.speed(num_bytes)
            run.row(case, one.system, f"{direction}_gb_per_s", speed, "GB/s, best", True)
            run.row(
                case,
                one.system,
                f"{direction}_gb_per_s_median",
                timing.median_speed(num_bytes),
                "GB/s, median",
                True,
            )
            run.row(
                case, one.system, f"{direction}_share_of_copy", share, "of the copy's bytes a second", True
            )
            cells += [f"{speed:.1f}", f"{100 * share:.1f}"]
            if ours is None or one is ours:
                factors.append("")
                continue
            factor = timing.best / getattr(ours, direction).best
            run.row(case, ours.system, f"{direction}_speed over {one.system}", factor, "×", True)
            factors.append(f"{factor:.2f}")
        table.add_row("", one.system, *cells, *factors)
