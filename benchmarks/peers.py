"""Training with torch's own gradient compression in place of ours, so that both run in the same loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.nic import sent_bytes
from efficient_dl.config import Config
from efficient_dl.data import Dataset
from efficient_dl.integrations.ddp_compression import Compression
from efficient_dl.training.console import Progress
from efficient_dl.training.end_to_end import Trainer

PEERS = {
    "fp16 hook": "torch's fp16_compress_hook",
    "bf16 hook": "torch's bf16_compress_hook",
    "PowerSGD 4": "torch's PowerSGD, rank 4, error feedback, warm start, from step 10",
    "PowerSGD 16": "the same at rank 16",
}


_CASTS: dict[str, Callable[..., Any]] = {
    "fp16 hook": default_hooks.fp16_compress_hook,
    # By its own name DDP refuses it on gloo, which can add bf16.
    "bf16 hook": lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket),
}
POWERSGD_START = 10  # the step from which on PowerSGD compresses

# Collectives of two buckets race on gloo with the default buckets, and end the process.
POWERSGD_BUCKET_MB = 100


def register_peer(
    model: DistributedDataParallel, system: str, seed: int, start_powersgd: int = POWERSGD_START
) -> None:
    """Puts one of `PEERS` into a DistributedDataParallel model."""
    if system in _CASTS:
        model.register_comm_hook(None, _CASTS[system])
        return
    state = powerSGD_hook.PowerSGDState(
        None,
        matrix_approximation_rank=int(system.removeprefix("PowerSGD ")),
        start_powerSGD_iter=start_powersgd,
        random_seed=seed,
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


class SystemTrainer(Trainer):
    """A `Trainer` for any system: one of ours by its bits, or one of `PEERS`.

    `kernel_bytes`: what this rank's network interface sent during training steps (`nic.sent_bytes`).
    """

    def __init__(
        self, config: Config, data: Dataset, device: torch.device, progress: Progress, system: str
    ) -> None:
        super().__init__(config, data, device, progress)
        self.system = system
        self.kernel_bytes = 0

    def _ddp_arguments(self) -> dict[str, Any]:
        arguments = super()._ddp_arguments()
        if self.system.startswith("PowerSGD "):
            arguments["bucket_cap_mb"] = POWERSGD_BUCKET_MB
        return arguments

    def _compress(self) -> Compression:
        compression = super()._compress()  # bits = "none" for a peer: nothing of ours is in its way
        if self.system in PEERS:
            register_peer(self.ddp, self.system, self.config.train.seed)
        return compression

    def _train_step(self) -> dict[str, torch.Tensor | float]:
        before = sent_bytes(self.rank)
        row = super()._train_step()
        self.kernel_bytes += sent_bytes(self.rank) - before
        return row
