"""Training with DeepSpeed's engine, ZeRO stages 0, 1 and 2: the same bits where they must be, the same options.

Importing DeepSpeed takes a process seconds: each number of ranks is started once, and runs all its cases.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from efficient_dl.comm import gather_json
from efficient_dl.errors import CheckpointError, ConfigError, EdlError, PlanMismatch, TransportError
from efficient_dl.integrations.deepspeed import EngineCompression, compress_engine, is_engine
from efficient_dl.integrations.deepspeed_plugs import check_signatures, check_version
from tests.distributed.launch import Outcome, run_failing_ranks, run_ranks

REQUIRED = os.environ.get("REQUIRE_DEEPSPEED") == "1"
if importlib.util.find_spec("deepspeed") is None:
    if REQUIRED:
        pytest.fail("REQUIRE_DEEPSPEED=1, but deepspeed is not installed", pytrace=False)
    pytest.skip("this machine lacks deepspeed: pip install -e '.[deepspeed]'", allow_module_level=True)

STEPS = 3
FP16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}
BF16 = {"enabled": True}

# What differs from `CONFIG`; "zero" is the section zero_optimization, "groups" splits the optimizer's parameters.
CASES: dict[str, dict[str, Any]] = {
    "stage 0": {"zero": {"stage": 0}},
    "stage 0, prescaled": {"zero": {"stage": 0}, "prescale_gradients": True},
    "stage 0, predivided": {"zero": {"stage": 0}, "gradient_predivide_factor": 4.0},
    "stage 0, sums": {"zero": {"stage": 0}, "gradient_allreduce_op": "sum"},
    "stage 0, fp16": {"zero": {"stage": 0}, "fp16": FP16},
    "stage 0, bf16": {"zero": {"stage": 0}, "bf16": BF16},
    "stage 1": {"zero": {"stage": 1}},
    "stage 1, all-reduced": {"zero": {"stage": 1, "reduce_scatter": False}},
    "stage 1, accumulated": {"zero": {"stage": 1}, "gradient_accumulation_steps": 2, "gradient_clipping": 0.01},
    "stage 1, bf16 and float32": {
        "zero": {"stage": 1}, "bf16": BF16, "data_types": {"grad_accum_dtype": "fp32"},
    },
    "stage 2": {"zero": {"stage": 2}},
    "stage 2, all-reduced": {"zero": {"stage": 2, "reduce_scatter": False}},
    "stage 2, all-reduced and predivided": {
        "zero": {"stage": 2, "reduce_scatter": False}, "gradient_predivide_factor": 4.0,
    },
    "stage 2, one reduce a rank": {"zero": {"stage": 2, "use_multi_rank_bucket_allreduce": False}},
    "stage 2, not contiguous": {"zero": {"stage": 2, "contiguous_gradients": False}},
    "stage 2, overlapped": {"zero": {"stage": 2, "overlap_comm": True}},
    "stage 2, round robin": {"zero": {"stage": 2, "round_robin_gradients": True}},
    "stage 2, two groups": {"zero": {"stage": 2}, "groups": True},
    "stage 2, accumulated": {"zero": {"stage": 2}, "gradient_accumulation_steps": 2, "gradient_clipping": 0.01},
    "stage 2, fp16": {"zero": {"stage": 2}, "fp16": FP16},
    "stage 2, bf16": {"zero": {"stage": 2}, "bf16": BF16},
    "stage 2, bf16 and float32": {
        "zero": {"stage": 2}, "bf16": BF16, "data_types": {"grad_accum_dtype": "fp32"},
    },
    "stage 2, sent as bf16": {"zero": {"stage": 2}, "communication_data_type": "bf16"},
}
FEW = ["stage 0", "stage 1", "stage 2", "stage 2, all-reduced", "stage 2, not contiguous", "stage 2, bf16"]
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 1,
    "steps_per_print": 10**9,
    "zero_allow_untested_optimizer": True,
}


class Net(nn.Module):
    """Parameters from one value to more than a bucket, one of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 300)
        self.norm = nn.LayerNorm(300)
        self.frozen = nn.Linear(300, 300)
        self.last = nn.Linear(300, 70)
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.last(self.frozen(self.norm(self.first(x).relu())).relu())


def engine_of(case: dict[str, Any], section: dict[str, Any] | None = None, lr: float = 0.05) -> Any:
    import deepspeed

    torch.manual_seed(7)
    net = Net()
    case = dict(case)
    parameters: Any = [p for p in net.parameters() if p.requires_grad]
    if case.pop("groups", False):
        parameters = [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.02}]
    zero = {"reduce_bucket_size": 16000, **case.pop("zero")}
    config = {**CONFIG, **case, "zero_optimization": zero} | ({"efficient_dl": section} if section else {})
    optimizer = torch.optim.Adam(parameters, lr=lr / 10)
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]


def train(engine: Any, rank: int, steps: int = STEPS, first: int = 0, poison: int | None = None) -> None:
    dtype = next(engine.module.parameters()).dtype
    for step in range(first, first + steps):
        for turn in range(engine.gradient_accumulation_steps()):
            generator = torch.Generator().manual_seed(1000 * step + 10 * turn + rank)
            x = torch.randn(16, 48, generator=generator).to(dtype)
            loss = engine(x).float().square().mean()
            if step == poison and rank == 1:
                loss = loss * float("inf")
            engine.backward(loss)
            engine.step()


def bits_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n].view(-1).view(torch.uint8), b[n].view(-1).view(torch.uint8)) for n in a)


def run(case: dict[str, Any], bits: Any, rank: int, steps: int = STEPS) -> dict[str, Any]:
    engine = engine_of(case)
    compression = None if bits is None else compress_engine(engine, bits, check_every=1)
    train(engine, rank, steps)
    result: dict[str, Any] = {"parameters": bits_of(engine.module), "steps": engine.global_steps}
    if compression is not None:
        result["stats"] = compression.stats()
        compression.close()
    engine.destroy()
    return result


def start_deepspeed(rank: int) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A shared-memory shortcut for inference, which DeepSpeed would compile now, for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed asks for fast float16 arithmetic of the processor; torch has correct one on every processor.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo", verbose=False)


def main(rank: int) -> Any:
    t=time.time()
    start_deepspeed(rank)
    out = {}
    print("import", time.time()-t, flush=True)
    for name, case in CASES.items():
        t=time.time()
        try:
            r = {b: run(case, b, rank) for b in (None, "identity", "lossless", 2.0)}
        except Exception as e:
            import traceback; traceback.print_exc()
            if rank == 0: print(name, "FAILED", repr(e)[:300], flush=True)
            continue
        if rank == 0:
            print(f"{name:30s}", "native==identity", same(r[None]["parameters"], r["identity"]["parameters"]), "lossless==identity", same(r["lossless"]["parameters"], r["identity"]["parameters"]), "ratio", r["lossless"]["stats"]["ratio"], r[2.0]["stats"]["ratio"], r[2.0]["stats"]["bits_per_value"], time.time()-t, flush=True)
    return out


if __name__ == "__main__":
    import sys
    run_ranks(main, int(sys.argv[1]), timeout=200)
