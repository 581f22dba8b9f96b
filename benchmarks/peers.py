"""Training with torch's own gradient compression in place of ours, so that both run in the same loop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from efficient_dl.config import Config
from efficient_dl.data import Dataset
from efficient_dl.integrations.ddp import Compression
from efficient_dl.training.console import Progress
from efficient_dl.training.loop import Trainer

PEERS = {
    "fp16 hook": "torch's fp16_compress_hook",
    "PowerSGD 4": "torch's PowerSGD, rank 4, error feedback, warm start, from step 10",
    "PowerSGD 16": "the same at rank 16",
}
_LOOPBACK = "lo"
_SENT_BYTES_FIELD = 8  # of a line of /proc/net/dev


class SystemTrainer(Trainer):
    """A `Trainer` for any system: one of ours by its bits, or one of `PEERS`.

    `kernel_bytes`: what this rank's network interface (GLOO_SOCKET_IFNAME) sent during training steps, by the
    kernel's counter, headers of TCP and below included. On the loopback interface, which all workers share, rank 0
    counts for all of them. Other processes' traffic counts too: run nothing beside it.
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
            # Collectives of two buckets race on gloo with the default buckets, and end the process.
            arguments["bucket_cap_mb"] = 100
        return arguments

    def _compress(self) -> Compression:
        compression = super()._compress()  # bits = "none" for a peer: nothing of ours is in its way
        if self.system == "fp16 hook":
            self.ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif self.system.startswith("PowerSGD "):
            state = powerSGD_hook.PowerSGDState(
                None,
                matrix_approximation_rank=int(self.system.removeprefix("PowerSGD ")),
                start_powerSGD_iter=10,
                random_seed=self.config.train.seed,
            )
            self.ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return compression

    def _train_step(self) -> dict[str, torch.Tensor | float]:
        before = self._sent_bytes()
        row = super()._train_step()
        self.kernel_bytes += self._sent_bytes() - before
        return row

    def _sent_bytes(self) -> int:
        return sent_by_kernel(self.rank)


def sent_by_kernel(rank: int) -> int:
    """Bytes that this rank's network interface has sent; 0 for all ranks but the first on the loopback interface."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", _LOOPBACK)
    if interface == _LOOPBACK and rank > 0:
        return 0
    # /proc, not /sys: the latter may show another network namespace's interfaces.
    lines = Path("/proc/net/dev").read_text().splitlines()
    counters = next(line.split(":")[1].split() for line in lines if line.strip().startswith(f"{interface}:"))
    return int(counters[_SENT_BYTES_FIELD])
