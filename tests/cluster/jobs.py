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
#SBATCH --nodes={nodes} --ntasks-per-node={tasks} --cpus-per-task=1 --time=5 --requeue --open-mode=append
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${{SLURM_RESTART_COUNT:-0}}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 10 + ${{SLURM_RESTART_COUNT:-0}}) % 10000))
export MASTER_ADDR MASTER_PORT PYTHONPATH={repository}
ARGUMENTS={arguments}
{before}
export ARGUMENTS
srun --kill-on-bad-exit=1 {command}
code=$?
echo "srun ended: $code"
{after}
exit $code
"""
_TORCHRUN = (
    "{python} -m torch.distributed.run --nnodes=$SLURM_NNODES --nproc-per-node=1 --rdzv-backend=c10d "
    "--rdzv-endpoint=$MASTER_ADDR:$MASTER_PORT --rdzv-id=$SLURM_JOB_ID --max-restarts=0 -m efficient_dl.cli $ARGUMENTS"
)
# Half as many processes to start as with torchrun.
_TASKS = (
    "sh -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID "
    "LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec {python} -m efficient_dl.cli $ARGUMENTS'"
)


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
    torchrun: bool = False,
    before: str = "",
    after: str = "",
) -> Path:
    """Writes an sbatch script that trains. torchrun: it starts the workers, else srun does.

    before, after: lines around srun; before may change `$ARGUMENTS`, after knows `$code`. No argument may need quotes.
    """
    python = shlex.quote(sys.executable)
    file.write_text(
        _SCRIPT.format(
            nodes=nodes,
            tasks=tasks_per_node,
            repository=shlex.quote(str(REPOSITORY)),
            command=(_TORCHRUN if torchrun else _TASKS).format(python=python),
            arguments=shlex.quote(" ".join(arguments)),
            before=before,
            after=after,
        )
    )
    return file
