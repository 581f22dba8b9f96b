"""Training jobs as users write them for Slurm, small enough for tests."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

_SCRIPT = """\
#!/bin/bash
#SBATCH --nodes={nodes} --ntasks-per-node={tasks} --cpus-per-task=1 --time=5 --requeue --open-mode=append
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${{SLURM_RESTART_COUNT:-0}}"
export PYTHONPATH={repository}
ARGUMENTS={arguments}
{before}
export ARGUMENTS
srun --kill-on-bad-exit=1 {python} -m efficient_dl.cli $ARGUMENTS
code=$?
echo "srun ended: $code"
{after}
exit $code
"""


def train_arguments(out: Path, steps: int, *more: str) -> list[str]:
    """`edl train` of a small network at 2 bits a value."""
    return [
        *("train", "--model", "mlp-nano", "--data", "digits", "--bits", "2.0", "--batch-size", "16"),
        *("--steps", str(steps), "--out", str(out), *more),
    ]


def write_script(
    file: Path,
    arguments: Sequence[str],
    *,
    nodes: int = 2,
    tasks_per_node: int = 1,
    before: str = "",
    after: str = "",
) -> Path:
    """Writes an sbatch script that trains, with srun alone: half as many processes to start as with torchrun.

    before, after: lines around srun; before may change `$ARGUMENTS`, after knows `$code`. No argument may need quotes.
    """
    file.write_text(
        _SCRIPT.format(
            nodes=nodes,
            tasks=tasks_per_node,
            repository=shlex.quote(str(REPOSITORY)),
            python=shlex.quote(sys.executable),
            arguments=shlex.quote(" ".join(arguments)),
            before=before,
            after=after,
        )
    )
    return file
