"""`edl demo`: one small GPT trained three times in the same workers, and what each way of sending cost."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from efficient_dl.config import Config, with_overrides
from efficient_dl.errors import ConfigError, LaunchError
from efficient_dl.training.console import byte_text
from efficient_dl.training.launch import launch, launched
from efficient_dl.training.run import run_worker
from efficient_dl.training.run_folder import RunFolder, Summary

BITS = ("none", "lossless", "2.0")
LABELS = {"none": "uncompressed", "lossless": "lossless", "2.0": "2 bits"}
STEPS = 200  # three times this, evaluations and start included, takes 50 to 110 s on two cores
QUICK_STEPS = 40
OUT = Path("runs/demo")
MARKER = ".edl-demo"  # in each run's folder: the next demo may replace it


def demo_configs(steps: int, workers: int, out: Path) -> list[Config]:
    """The three configurations: equal but for compression.bits and the folder."""
    return [
        with_overrides(
            Config(),
            [
                "model.name=gpt",
                "model.size=nano",
                "data.name=stdlib",
                "data.batch_size=8",
                "optimizer.name=adamw",
                "optimizer.lr=0.003",
                f"optimizer.warmup_steps={max(1, steps // 10)}",
                f"train.steps={steps}",
                f"train.eval_every={max(1, steps // 4)}",
                "train.eval_batches=16",
                f"train.log_every={max(1, steps // 20)}",
                "train.checkpoint_every=0",
                f"compression.bits={bits}",
                f"run.workers={workers}",
                f"run.out={out / bits}",
            ],
        )
        for bits in BITS
    ]


def run_demo(
    steps: int | None = None, quick: bool = False, workers: int = 2, out: Path | None = None
) -> None:
    """Train, then print the table and the plot's path. An earlier demo in the same folder is replaced.

    Raises LaunchError under a launcher, ConfigError for settings out of range or a folder that is not a demo's.
    """
    if launched():
        raise LaunchError(
            "the demo starts its own workers",
            found="RANK or WORLD_SIZE: a launcher started this process",
            fix="run edl demo without torchrun; under a launcher use edl train",
        )
    out = out or OUT
    if steps is None:
        steps = QUICK_STEPS if quick else STEPS
    configs = demo_configs(steps, workers, out)
    _make_room([Path(config.run.out) for config in configs])
    console = Console(soft_wrap=True)
    console.print(
        f"A byte-level GPT learns Python's standard library on {workers} workers, {configs[0].train.steps} steps, "
        "three times from the same start on the same data.",
        highlight=False,
        markup=False,
    )
    summaries = launch(workers, run_worker, configs)
    console.print(comparison_table(summaries))
    path = save_plot([RunFolder(Path(config.run.out), writes=False) for config in configs], summaries, out)
    console.print(f"plot: {path}", highlight=False, markup=False)
    console.print(f"curves: tensorboard --logdir {out}", highlight=False, markup=False)


def comparison_table(summaries: Sequence[Summary]) -> Table:
    """One row a run."""
    table = Table(caption="bytes: of all workers; computed for the uncompressed run, counted for the others")
    table.add_column("gradients", no_wrap=True)
    for heading in ("val loss", "sent/step", "bits/value", "ratio", "step", "codec"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in summaries:
        table.add_row(
            LABELS[str(one.bits)],
            f"{one.val_loss:.4f}",
            byte_text(one.wire_bytes_per_step),
            f"{one.bits_per_value:.2f}",
            f"{one.ratio:.2f}",
            f"{one.step_seconds_median * 1000:.0f} ms",
            f"{one.codec_seconds_per_step * 1000:.1f} ms",
        )
    return table


def save_plot(folders: Sequence[RunFolder], summaries: Sequence[Summary], out: Path) -> Path:
    """Draw loss against steps, loss against bytes sent, and bytes a step, into out/comparison.svg."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (by_step, by_bytes, totals) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    labels = [LABELS[str(one.bits)] for one in summaries]
    for folder, summary, label in zip(folders, summaries, labels, strict=True):
        rows = [row for row in folder.rows() if "loss" in row]
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        width = 4 if summary.bits == "none" else 1  # lossless lies exactly on it
        (line,) = by_step.plot(steps, losses, label=label, linewidth=width, alpha=0.4 if width > 1 else 1)
        by_bytes.plot(
            [step * summary.wire_bytes_per_step / 1e6 for step in steps], losses, color=line.get_color()
        )
        checks = [row for row in folder.rows() if "val_loss" in row]
        by_step.plot(
            [row["step"] for row in checks], [row["val_loss"] for row in checks], "o", color=line.get_color()
        )
    by_step.set(xlabel="steps", ylabel="loss (nats a byte; dots: validation)", title="loss by steps")
    by_step.legend()
    by_bytes.set(xlabel="MB sent by all workers", xscale="log", title="loss by bytes")
    bars = totals.bar(labels, [one.wire_bytes_per_step / 1e6 for one in summaries], color=["C0", "C1", "C2"])
    totals.bar_label(bars, [byte_text(one.wire_bytes_per_step) for one in summaries])
    totals.set(ylabel="MB a step, all workers", title="bytes sent a step")
    path = out / "comparison.svg"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _make_room(folders: Sequence[Path]) -> None:
    """Replace a former demo's runs by empty, marked folders. Raises ConfigError if one is not a demo's."""
    for folder in folders:
        if (folder.exists() or folder.is_symlink()) and not (folder / MARKER).is_file():
            raise ConfigError(
                "this folder is not a demo's",
                expected=f"nothing there, or a folder with a file {MARKER}",
                found=str(folder),
                fix="choose another --out for the demo, or move this folder away",
            )
    try:
        for folder in folders:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            (folder / MARKER).touch()
    except OSError as error:
        raise ConfigError(
            "the demo's folder cannot be written", found=str(error), fix="choose another --out for the demo"
        ) from None
