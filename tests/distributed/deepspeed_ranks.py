"""What the ranks of test_deepspeed.py do: each number of ranks runs all its cases in one process group.

Importing DeepSpeed, and its first steps, take a process seconds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from efficient_dl.errors import EdlError
from efficient_dl.integrations.compress import compress
from efficient_dl.integrations.deepspeed import compress_engine
from tests.distributed.measured_links import measuring, network

STEPS = 3
SLOW, FAST = network((1, 1), 0.5), network((1, 1), 1e6)
FP16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
BF16 = {"enabled": True}
MIXED = {"bf16": BF16, "data_types": {"grad_accum_dtype": "fp32"}}
ACCUMULATED = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.01}

# What differs from `CONFIG`; "zero" is the section zero_optimization, "groups" splits the optimizer's parameters.
CASES: dict[str, dict[str, Any]] = {
    "stage 0": {"zero": {"stage": 0}},
    "stage 0, prescaled": {"zero": {"stage": 0}, "prescale_gradients": True},
    "stage 0, predivided": {"zero": {"stage": 0}, "gradient_predivide_factor": 4.0},
    "stage 0, sums": {"zero": {"stage": 0}, "gradient_allreduce_op": "sum"},
    "stage 0, accumulated": {"zero": {"stage": 0}, **ACCUMULATED},
    "stage 0, fp16": {"zero": {"stage": 0}, "fp16": FP16},
    "stage 0, bf16": {"zero": {"stage": 0}, "bf16": BF16},
    "stage 1": {"zero": {"stage": 1}},
    "stage 1, all-reduced": {"zero": {"stage": 1, "reduce_scatter": False}},
    "stage 1, accumulated": {"zero": {"stage": 1}, **ACCUMULATED},
    "stage 1, bf16 and float32": {"zero": {"stage": 1}, **MIXED},
    "stage 2": {"zero": {"stage": 2}},
    "stage 2, all-reduced": {"zero": {"stage": 2, "reduce_scatter": False}},
    "stage 2, all-reduced and predivided": {
        "zero": {"stage": 2, "reduce_scatter": False},
        "gradient_predivide_factor": 4.0,
    },
    "stage 2, one reduce a rank": {"zero": {"stage": 2, "use_multi_rank_bucket_allreduce": False}},
    "stage 2, not contiguous": {"zero": {"stage": 2, "contiguous_gradients": False}},
    "stage 2, not contiguous, mixed": {"zero": {"stage": 2, "contiguous_gradients": False}, **MIXED},
    "stage 2, overlapped": {"zero": {"stage": 2, "overlap_comm": True}},
    "stage 2, round robin": {"zero": {"stage": 2, "round_robin_gradients": True}},
    "stage 2, two groups": {"zero": {"stage": 2}, "groups": True},
    "stage 2, accumulated": {"zero": {"stage": 2}, **ACCUMULATED},
    "stage 2, fp16": {"zero": {"stage": 2}, "fp16": FP16},
    "stage 2, bf16": {"zero": {"stage": 2}, "bf16": BF16},
    "stage 2, bf16 and float32": {"zero": {"stage": 2}, **MIXED},
    "stage 2, sent as bf16": {"zero": {"stage": 2}, "communication_data_type": "bf16"},
}
# Trained with the identity codec as well; in the others the lossless run alone is compared with DeepSpeed's.
WITH_IDENTITY = [
    "stage 0",
    "stage 0, fp16",
    "stage 1",
    "stage 2",
    "stage 2, all-reduced",
    "stage 2, bf16 and float32",
]
# Those that the rules do not run with three and four ranks.
FEW = ["stage 2, all-reduced", "stage 2, not contiguous"]
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 1,
    "steps_per_print": 10**9,
    "zero_allow_untested_optimizer": True,
}


class Net(nn.Module):
    """Parameters from one value to more than a bucket, some of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 300)
        self.norm = nn.LayerNorm(300)
        self.frozen = nn.Linear(300, 100)
        self.last = nn.Linear(100, 170)
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.last(self.frozen(self.norm(self.first(x).relu())).relu())


def start_deepspeed(rank: int) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A shared-memory shortcut for inference, which DeepSpeed would compile now, for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed asks for the processor's own float16 arithmetic; torch has a slower one on every processor.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo", verbose=False)


def engine_of(case: dict[str, Any], section: Any = None) -> Any:
    import deepspeed

    torch.manual_seed(7)
    net, case = Net(), dict(case)
    parameters: Any = [p for p in net.parameters() if p.requires_grad]
    if case.pop("groups", False):
        parameters = [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.002}]
    optimizer: Any = torch.optim.Adam(parameters, lr=0.005)
    if case.pop("sgd", False):
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    zero = {"reduce_bucket_size": 16000, **case.pop("zero")}
    config = {**CONFIG, **case, "zero_optimization": zero}
    if section is not None:
        config["efficient_dl"] = section
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]


def train(engine: Any, rank: int, steps: int = STEPS, poisoned: int | None = None) -> list[float]:
    """Returns this rank's losses; in the poisoned step rank 1's gradients are infinite."""
    dtype, losses = next(engine.module.parameters()).dtype, []
    for step in range(engine.global_steps, engine.global_steps + steps):
        for turn in range(engine.gradient_accumulation_steps()):
            generator = torch.Generator().manual_seed(1000 * step + 10 * turn + rank)
            x = torch.randn(16, 48, generator=generator).to(dtype)
            target = x.float().repeat(1, 4)[:, :170]
            loss = (engine(x).float() - target).square().mean()
            losses.append(loss.item())
            engine.backward(loss * float("inf") if step == poisoned and rank == 1 else loss)
            engine.step()
    return losses


def digest(engine: Any) -> str:
    """Names every bit of the parameters."""
    content = [p.detach().view(-1).view(torch.uint8).numpy().tobytes() for p in engine.module.parameters()]
    return xxhash.xxh3_64_hexdigest(b"".join(content))


def run(case: dict[str, Any], bits: Any, rank: int, steps: int = STEPS) -> dict[str, Any]:
    """Trains by the case's configuration; bits None leaves DeepSpeed alone."""
    engine = engine_of(case)
    compression = None if bits is None else compress_engine(engine, bits, check_every=1)
    result: dict[str, Any] = {"losses": train(engine, rank, steps), "digest": digest(engine)}
    if compression is not None:
        result["stats"] = compression.stats()
        result["total"] = compression.stats(all_ranks=True)
        compression.close()
    result["weights"] = torch.cat([p.detach().float().view(-1) for p in engine.module.parameters()])
    engine.destroy()
    return result


def error_of(action: Callable[[], Any]) -> BaseException | None:
    try:
        action()
    except EdlError as error:
        return error
    return None


@contextlib.contextmanager
def warnings_in(messages: list[str]) -> Iterator[None]:
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("efficient_dl")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {
        name: {bits: run(case, bits, rank) for bits in (None, "lossless", 2.0)}
        for name, case in CASES.items()
    }
    for name in WITH_IDENTITY:
        results[name]["identity"] = run(CASES[name], "identity", rank)
    for by_bits in results.values():
        for result in by_bits.values():
            del result["weights"]
    results["long"] = {bits: run(CASES["stage 2"], bits, rank, 40)["losses"] for bits in (None, 2.0)}
    results["none"] = run(CASES["stage 2"], "none", rank)
    results["section"] = sections(rank)
    results["auto"] = automatic(rank)
    results["refused"] = refusals(rank)
    results["closed"] = closed(rank)
    results["overflow"] = {bits: overflow(rank, bits) for bits in (None, "lossless", 2.0)}
    results["resume"] = {
        name: resume(rank, CASES[name], folder / name) for name in ("stage 0", "stage 2, fp16")
    }
    results["lacking"] = lacking(rank, folder / "stage 2, fp16")
    results["saved plan"] = {stage: saved_plan(rank, stage, folder / f"auto {stage}") for stage in (0, 2)}
    return results


def sections(rank: int) -> dict[str, Any]:
    engine = engine_of(CASES["stage 2"], {"bits": "lossless", "check_every": 1})
    compression = compress_engine(engine)
    train(engine, rank)
    result = {
        "digest": digest(engine),
        "bits": compression.plan.bits,
        "checks": compression.stats()["checks"],
    }
    compression.close()
    for name, section in {
        "unknown": {"bitz": 2.0},
        "no object": 2.0,
        "no number": {"check_every": "often"},
        "no rate": {"bits": True},
    }.items():
        engine = engine_of(CASES["stage 0"], section)
        result[name] = error_of(lambda engine=engine: compress_engine(engine))
    engine = engine_of(CASES["stage 0"], {"bits": 2.0})
    result["twice"] = error_of(lambda: compress_engine(engine, bits=3.0))
    return result


def automatic(rank: int) -> dict[str, Any]:
    """Measured, under a floor of 3 bits; an all-reduce in stage 0, sums at their owners in stage 2."""
    results: dict[str, Any] = {}
    for name in ("stage 0", "stage 2"):
        engine = engine_of(CASES[name], {"floor_bits": 3.0})
        compression = compress_engine(engine, check_every=1)
        train(engine, rank)
        results[name] = compression.plan.bits, compression.stats()["reason"], compression.stats()["steps"]
        compression.close()
    return results


def saved_plan(rank: int, stage: int, folder: Path) -> dict[str, Any]:
    """A run that measured a slow link, saved after three of six steps; and what goes on where the link is fast."""
    case = {"zero": {"stage": stage}, "sgd": True}
    seen: dict[str, Any] = {}
    for name in ("whole", "parted"):
        with measuring(SLOW):
            engine = engine_of(case)
            compression = compress_engine(engine, "auto", check_every=2)
        train(engine, rank, 3)
        seen["planned"] = compression.plan.bits
        if name == "parted":
            engine.save_checkpoint(str(folder))
            compression.close()
            with measuring(FAST):
                engine = engine_of(case)
                compression = compress_engine(engine, "auto", check_every=2)
            seen["planned again"] = compression.plan.bits
            messages: list[str] = []
            with warnings_in(messages):
                engine.load_checkpoint(str(folder))
            seen["messages"] = messages
            seen["plugged"] = compression.plan.bits, compression.stats()["codec"]
        train(engine, rank, 3)
        stats = compression.stats()
        seen[name] = digest(engine), stats["steps"], stats["wire_bytes"], stats["parameters"], stats["reason"]
        compression.close()
    for name, options in {"fixed": {"bits": 3.0}, "floor": {"floor_bits": 5.0}}.items():
        engine = engine_of(case)
        with measuring(SLOW):
            compression = compress_engine(engine, **options)
        seen[name] = error_of(lambda engine=engine: engine.load_checkpoint(str(folder)))
        compression.close()
    return seen


def refusals(rank: int) -> dict[str, Any]:
    engine = engine_of(CASES["stage 2"])
    differ = error_of(lambda: compress_engine(engine, bits=2.0 + rank))
    compression = compress_engine(engine, 2.0)
    twice = error_of(lambda: compress_engine(engine))
    compression.close()
    with torch.device("cpu"):
        stage3 = engine_of({"zero": {"stage": 3}})
    return {
        "plans differ": differ,
        "twice": twice,
        "stage 3": error_of(lambda: compress_engine(stage3)),
        "no engine": error_of(lambda: compress_engine(nn.Linear(2, 2))),
        "other optimizer": error_of(lambda: compress(stage3, torch.optim.SGD(stage3.module.parameters()))),
    }


def closed(rank: int) -> dict[str, Any]:
    engine = engine_of(CASES["stage 2"])
    before = set(vars(engine)), set(vars(engine.optimizer))
    compression = compress(engine, engine.optimizer, "identity")
    replaced = set(vars(engine)) - before[0], set(vars(engine.optimizer)) - before[1]
    compression.close()
    compression.check()
    after = set(vars(engine)), set(vars(engine.optimizer))
    train(engine, rank)
    return {"replaced": replaced, "restored": before == after, "digest": digest(engine)}


def overflow(rank: int, bits: Any) -> dict[str, Any]:
    engine = engine_of(CASES["stage 2, fp16"])
    compression = None if bits is None else compress_engine(engine, bits)
    train(engine, rank, 2)
    before, scale = digest(engine), engine.optimizer.loss_scale
    train(engine, rank, 1, poisoned=2)
    skipped = {"unchanged": digest(engine) == before, "halved": engine.optimizer.loss_scale / scale}
    train(engine, rank, 2)
    result = {**skipped, "skipped": engine.skipped_steps, "digest": digest(engine), "trained": before}
    if compression is not None:
        compression.close()
    return result


def resume(rank: int, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run of six steps, and one of three that is saved and goes on in another engine."""
    results = {}
    for name in ("whole", "parted"):
        engine = engine_of(case)
        compression = compress_engine(engine, 2.0)
        train(engine, rank)
        if name == "parted":
            engine.save_checkpoint(str(folder))
            saved = compression.state_dict()
            compression.close()
            engine = engine_of(case)
            compression = compress_engine(engine, 2.0)
            engine.load_checkpoint(str(folder))
            results["same state"] = compression.state_dict() == saved
        train(engine, rank)
        stats = compression.stats()
        results[name] = digest(engine), stats["steps"], stats["wire_bytes"], stats["parameters"]
        compression.close()
    return results


def lacking(rank: int, folder: Path) -> dict[str, Any]:
    """Loading with one rank's file gone, with another plan, without the optimizer, and with no file at all."""
    results: dict[str, Any] = {}
    tag = folder / "global_step3"
    engine = engine_of(CASES["stage 2, fp16"])
    compression = compress_engine(engine, 3.0)
    results["other plan"] = error_of(lambda: engine.load_checkpoint(str(folder)))
    compression.close()
    compression = compress_engine(engine, 2.0)
    # After each load another rank's file goes.
    for name, next_gone in (("module only", 1), ("one gone", 0), ("all gone", None)):
        load = functools.partial(engine.load_checkpoint, str(folder), load_module_only=name == "module only")
        messages: list[str] = []
        with warnings_in(messages):
            error = error_of(load)
        results[name] = error, messages, compression.stats()["steps"]
        dist.barrier()
        if rank == next_gone:
            (tag / f"efficient_dl_rank{rank}.pt").unlink()
        dist.barrier()
    compression.close()
    return results


def more_ranks(rank: int, folder: Path, dies: bool) -> dict[str, Any]:
    results: dict[str, Any] = {
        name: {bits: run(CASES[name], bits, rank) for bits in (None, "identity", "lossless", 2.0)}
        for name in FEW
    }
    for by_bits in results.values():
        native = by_bits[None]["weights"]
        for result in by_bits.values():
            result["distance"] = float((result.pop("weights") - native).abs().max())
    engine = engine_of(CASES["stage 0"])
    compression = compress_engine(engine, 2.0)
    messages: list[str] = []
    with warnings_in(messages):
        engine.load_checkpoint(str(folder / "stage 0"))
    results["other world size"] = messages, compression.stats()["steps"]
    compression.close()
    if dies:
        engine = engine_of(CASES["stage 2"])
        compress_engine(engine, 2.0, timeout=250.0)
        train(engine, rank, 1)
        if rank == 2:
            os._exit(7)
        start = time.monotonic()
        results["dead"] = error_of(lambda: train(engine, rank, 1)), time.monotonic() - start
    return results
