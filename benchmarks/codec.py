"""How small and how fast is the codec core, beside what users have today?

python -m benchmarks.codec --out benchmarks/results/codec.jsonl
Tensors come from short training runs (benchmarks/codec_tensors.py). Each peer codes the same tensor in the same run,
in turns with ours; everything runs on one core, except for the case gpu.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.codec_delta import delta
from benchmarks.codec_gpu import gpu
from benchmarks.codec_loss import loss
from benchmarks.codec_lossless import lossless
from benchmarks.codec_lossy import lossy
from benchmarks.codec_run import MIB, Run
from benchmarks.codec_sparse import sparse
from benchmarks.codec_tensors import MOMENTS, Recipe, trained_tensors
from benchmarks.codec_timing import use_one_core
from benchmarks.rows import RowFile

CASES: dict[str, Callable[[Run], None]] = {
    "lossless": lossless,
    "lossy": lossy,
    "sparse": sparse,
    "loss": loss,
    "delta": delta,
    "gpu": gpu,
}
QUIET = 0.95  # share of a core below which timings say little
QUICK = Recipe(gpt_size="micro", gpt_steps=20, cnn_steps=20)


def main(
    out: Annotated[Path | None, typer.Option(help="append rows to this JSON Lines file")] = None,
    case: Annotated[str, typer.Option(help=f"some of {','.join(CASES)}; empty: all that can run")] = "",
    rounds: Annotated[
        int,
        typer.Option(
            help="timed repetitions; slow systems have 3 or more",
            min=3,
        ),
    ] = 15,
    size_mib: Annotated[float, typer.Option(help="tensors are timed at this size", min=0.25)] = 25,
    big: Annotated[bool, typer.Option(help="lossless: also Gaussian weights of 256 MiB")] = False,
    cache: Annotated[Path, typer.Option(help="keeps the trained tensors")] = Path("runs/codec_tensors.pt"),
    quick: Annotated[bool, typer.Option(help="tiny models, few repetitions: less than a minute")] = False,
) -> None:
    """Ratios, speeds and coding loss of the codecs on real gradients, weights and weight updates.

    Example: python -m benchmarks.codec --case lossless,lossy --out benchmarks/results/codec.jsonl
    """
    chosen = case.split(",") if case else list(CASES)
    unknown = [name for name in chosen if name not in CASES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(CASES)}", param_hint="--case")
    if "gpu" in chosen and not torch.cuda.is_available():
        if case:
            raise typer.BadParameter("torch finds no GPU on this machine", param_hint="--case gpu")
        chosen.remove("gpu")
        print("case gpu is left out: torch finds no GPU on this machine")
    use_one_core()
    recipe, kept = (QUICK, cache.with_suffix(".quick.pt")) if quick else (Recipe(), cache)
    run = Run(
        trained=trained_tensors(recipe, kept),
        file=RowFile(out),
        rounds=3 if quick else rounds,
        timing_bytes=MIB if quick else int(size_mib * MIB),
        moments=MOMENTS[-1:] if quick else MOMENTS,
        big=big,
        quick=quick,
    )
    for name in chosen:
        wall, cpu = time.perf_counter(), time.process_time()
        CASES[name](run)
        share = (time.process_time() - cpu) / (time.perf_counter() - wall)
        run.row(name, "this run", "cpu_share", share, "of the wall time", True)
        if share < QUIET and name != "gpu":
            run.say(
                f"case {name} had its core for {100 * share:.0f} % of the time: repeat it on a quiet machine"
            )


if __name__ == "__main__":
    typer.run(main)
