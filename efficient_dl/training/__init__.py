"""Training runs: the loop, its checkpoints and folders, and the workers it runs in."""

from efficient_dl.training.launch import WorkersFailed, check_world_size, launch, launched
from efficient_dl.training.run import run, run_worker
from efficient_dl.training.run_folder import Summary
from efficient_dl.training.worker import Stopped, Worker

__all__ = [
    "Stopped",
    "Summary",
    "Worker",
    "WorkersFailed",
    "check_world_size",
    "launch",
    "launched",
    "run",
    "run_worker",
]
