"""Training jobs as users write them for Slurm, small enough for tests."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# The first node of the allocation holds the rendezvous: asked anew at each start, as a requeued job runs elsewhere.
_SCRIPT = """\
#!/bin/bash
#SBATCH --nodes={nodes} --ntasks-per-node=1 --cpus-per-task=2 --time=5 --requeue --open-mode=append
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${{SLURM_RESTART_COUNT:-0}}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + (SLURM_JOB_ID * 10 + ${{SLURM_RESTART_COUNT:-0}}) % 10000))
cd {repository}
{before}
srun --kill-on-bad-exit=1 {python} -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node={workers} \\
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID" --max-restarts=0 \\
    -m efficient_dl.cli {arguments}
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
    workers_per_node: int = 1,
    before: str = "",
    after: str = "",
) -> Path:
    """Writes an sbatch script that trains by srun and torchrun. before, after: lines around them."""
    file.write_text(
        _SCRIPT.format(
            nodes=nodes,
            repository=shlex.quote(str(REPOSITORY)),
            python=shlex.quote(sys.executable),
            workers=workers_per_node,
            arguments=shlex.join(arguments),
            before=before,
            after=after,
        )
    )
    return file
