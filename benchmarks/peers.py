"""Training with torch's own gradient compression in place of ours, so that both run in the same loop."""

from __future__ import annotations

import os
from pathlib import Path

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

    def _compress(self) -> Compression | None:
        if self.system == "fp16 hook":
            self.ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif self.system.startswith("PowerSGD "):
            rank = int(self.system.removeprefix("PowerSGD "))
            state = powerSGD_hook.PowerSGDState(
                None,
                matrix_approximation_rank=rank,
                start_powerSGD_iter=10,
                random_seed=self.config.train.seed,
            )
            self.ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        else:
            return super()._compress()
        return None

    def _train_step(self) -> dict[str, torch.Tensor | float]:
        before = self._sent_bytes()
        row = super()._train_step()
        self.kernel_bytes += self._sent_bytes() - before
        return row

    def _sent_bytes(self) -> int:
        interface = os.environ.get("GLOO_SOCKET_IFNAME", _LOOPBACK)
        if interface == _LOOPBACK and self.rank > 0:
            return 0
        return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())
