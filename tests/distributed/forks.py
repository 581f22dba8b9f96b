"""The one server from which tests fork their ranks: what all of them import, it imports once."""

from __future__ import annotations

import functools
import multiprocessing
import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as `edl` sets it; read when torch is imported

# One list: Python keeps a single server, and the last list that it was given before its first fork.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "torch.utils.tensorboard",
        "sklearn.datasets",
        "pytest",
        "hypothesis.strategies",
        "efficient_dl.codec.kernels.native.context_bodies",
        "efficient_dl.codec.kernels.reference.bodies",
        "efficient_dl.integrations.compress",
        "efficient_dl.training",
        "efficient_dl.cli",
    ]
)


@functools.cache
def start_server() -> None:
    """Waits until the server has imported all that, which no test wants on its clock."""
    first = CONTEXT.Process(target=int)
    first.start()
    first.join()
