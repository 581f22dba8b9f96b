"""Training with DistributedDataParallel: the same bits where they must be, the same options as without us."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from tests.distributed.launch import run_ranks

STEPS = 5


class Net(nn.Module):
    """Parameters in several buckets, from one value to many blocks; `spare` is used on odd ranks only."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(48, 300, dtype=dtype)
        self.norm = nn.LayerNorm(300, dtype=dtype)
        self.spare = nn.Linear(300, 300, dtype=dtype)
        self.last = nn.Linear(300, 10, dtype=dtype)
        self.gain = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x: Tensor, spare: bool = True) -> Tensor:
        x = self.norm(self.first(x).relu())
        return self.gain * self.last(self.spare(x).relu() if spare else x)


def ddp(dtype: torch.dtype = torch.float32, frozen: bool = False, **options: Any) -> DistributedDataParallel:
    torch.manual_seed(7)
    net = Net(dtype)
    net.first.requires_grad_(not frozen)
    return DistributedDataParallel(net, bucket_cap_mb=0.1, **options)


def train(
    rank: int,
    bits: str | float | None,
    case: dict[str, Any] | None = None,
    shadow: bool = False,
    steps: int = STEPS,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Parameters, this rank's stats and all ranks' stats after a few steps; bits None leaves DDP alone."""
    options = dict(case or {})
    accumulate, dtype = options.pop("accumulate", 1), options.pop("dtype", torch.float32)
    unused, clip = options.get("find_unused_parameters", False), options.pop("clip", None)
    model = ddp(dtype, options.pop("frozen", False), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    compression = None
    if bits is not None:
        compression = edl.compress(model, optimizer, bits, shadow=shadow, check_every=2)
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(steps):
        optimizer.zero_grad()
        for turn in range(accumulate):
            x = torch.randn(16, 48, generator=generator).to(dtype)
            with model.no_sync() if turn < accumulate - 1 else contextlib.nullcontext():
                model(x, spare=not unused or rank % 2 == 1).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    parameters = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    if compression is None:
        return parameters, {}, {}
    stats, total = compression.stats(), compression.stats(all_ranks=True)
    compression.close()
    return parameters, stats, total


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(a[name].view(-1).view(torch.uint8), b[name].view(-1).view(torch.uint8)) for name in a
    )


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "frozen parameters": {"frozen": True},
    "gradient accumulation": {"accumulate": 3},
    "clipping": {"clip": 0.1},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_lossless_run_has_the_bits_of_the_identity_run(case: dict[str, Any]) -> None:
    lossless, identity = run_ranks(train, 3, "lossless", case), run_ranks(train, 3, "identity", case)
    assert same_bits(lossless[0][0], identity[0][0])
    assert lossless[0][1]["ratio"] > 1.0 == identity[0][1]["ratio"]


# Not float16: native DDP halves before it adds, which costs denormals their last bit.
@pytest.mark.parametrize("name", [name for name in CASES if name != "float16"])
def test_a_lossless_run_on_two_ranks_has_the_bits_of_native_ddp(name: str) -> None:
    case = CASES[name]
    assert same_bits(run_ranks(train, 2, "lossless", case)[0][0], run_ranks(train, 2, None, case)[0][0])


@pytest.mark.parametrize("case", [CASES["plain"], CASES["unused parameters"], CASES["static graph"]])
def test_every_parameter_is_counted_once_a_step_in_spite_of_rebuilt_buckets(case: dict[str, Any]) -> None:
    """Between them, the ranks send a parameter's values up and down to each of the others once in each step."""
    _, _, total = run_ranks(train, 3, 2.0, case)[0]
    for name, parameter in Net().named_parameters():
        assert total["parameters"][name]["values_sent"] == 2 * 2 * parameter.numel() * STEPS, name


def test_frozen_parameters_are_not_sent() -> None:
    _, stats, _ = run_ranks(train, 2, 2.0, CASES["frozen parameters"])[0]
    assert stats["parameters"]["first.weight"]["values_sent"] == 0
    assert stats["parameters"]["last.weight"]["values_sent"] > 0


def test_accumulated_gradients_are_sent_once_a_step() -> None:
    accumulated = run_ranks(train, 2, "identity", CASES["gradient accumulation"])[0][1]
    assert accumulated["wire_bytes_per_step"] == run_ranks(train, 2, "identity")[0][1]["wire_bytes_per_step"]


@pytest.mark.parametrize("case", [CASES["plain"], CASES["bucket views"], CASES["static graph"]])
def test_a_shadow_run_has_the_bits_of_native_ddp_and_tells_what_would_be_sent(case: dict[str, Any]) -> None:
    native, shadow = run_ranks(train, 3, None, case), run_ranks(train, 3, 2.0, case, True)
    compressed = run_ranks(train, 3, 2.0, case)
    assert same_bits(shadow[0][0], native[0][0])
    told, sent = shadow[0][2], compressed[0][2]
    assert (told["bytes_source"], sent["bytes_source"]) == ("shadow", "counted")
    assert told["raw_bytes"] == sent["raw_bytes"]
    assert told["wire_bytes"] == pytest.approx(sent["wire_bytes"], rel=0.02)
    assert told["relative_error"] == pytest.approx(sent["relative_error"], rel=0.1)
    assert told["codec_seconds_per_step"] > 0


def test_none_leaves_ddp_alone_and_calculates_its_bytes() -> None:
    native, none = run_ranks(train, 3, None), run_ranks(train, 3, "none")
    assert same_bits(none[0][0], native[0][0])
    numel = sum(p.numel() for p in Net().parameters())
    assert none[0][1]["bytes_source"] == "analytic"
    assert none[0][1]["steps"] == STEPS
    assert none[0][1]["wire_bytes_per_step"] == pytest.approx(2 * 2 / 3 * 4 * numel, rel=1e-4)
    assert none[0][1]["bits_per_value"] == pytest.approx(32)


def test_one_rank_trains_as_without_us() -> None:
    ((parameters, stats, _),) = run_ranks(train, 1, 2.0)
    assert same_bits(parameters, run_ranks(train, 1, None)[0][0])
    assert (stats["steps"], stats["wire_bytes"]) == (STEPS, 0)


def test_stats_of_all_ranks_are_the_sums() -> None:
    results = run_ranks(train, 3, 2.0)
    totals = [total for _, _, total in results]
    assert totals[0] == totals[1] == totals[2]
    for key in ("wire_bytes", "raw_bytes", "values_sent"):
        assert totals[0][key] == sum(stats[key] for _, stats, _ in results)
    assert 1.9 < totals[0]["bits_per_value"] < 2.5


def two_models(rank: int) -> list[bool]:
    """A pair of models that one backward pass goes through, each with its own compression."""
    models = [ddp(), ddp()]
    compressions = [
        edl.compress(model, bits=bits) for model, bits in zip(models, ("lossless", 2.0), strict=True)
    ]
    for _ in range(3):
        x = torch.randn(8, 48)
        sum(model(x).square().mean() for model in models).backward()  # type: ignore[union-attr]
    for compression in compressions:
        compression.check()
    return [compression.stats()["steps"] == 3 for compression in compressions]


def test_two_models_do_not_disturb_each_other() -> None:
    assert run_ranks(two_models, 2) == [[True, True]] * 2


def in_a_subgroup(rank: int) -> int:
    group = dist.new_group([0, 2])
    if rank == 1:
        return 0
    steps = 0
    for _ in range(2):  # what one compression closes must not be in the way of the next
        model = ddp(process_group=group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        compression = edl.compress(model, optimizer, bits=2.0, check_every=1)
        model(torch.randn(8, 48)).square().mean().backward()
        optimizer.step()
        stats = compression.stats()
        steps += stats["steps"] * stats["world_size"]
        compression.close()
    return steps


def test_a_subgroup_of_the_ranks_reduces_alone() -> None:
    assert run_ranks(in_a_subgroup, 3) == [4, 0, 4]


def ignoring(rank: int) -> bool:
    torch.manual_seed(7)
    net = Net()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["spare.weight"])
    model = DistributedDataParallel(net)
    with torch.no_grad():
        net.spare.weight += rank
    compression = edl.compress(model, bits=2.0)
    model(torch.randn(8, 48)).square().mean().backward()
    compression.check()
    return "spare.weight" in compression.stats()["parameters"]


def test_parameters_that_ddp_ignores_are_left_alone() -> None:
    assert run_ranks(ignoring, 2) == [False, False]


def dropped(rank: int) -> tuple[bool, bool]:
    """Whether nothing is left of a compression, and of its threads, once its model is gone."""
    model = ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alive = weakref.ref(edl.compress(model, optimizer, bits="identity"))
    model(torch.randn(8, 48)).square().mean().backward()
    optimizer.step()
    dist.barrier()
    del model, optimizer
    gc.collect()
    deadline = time.monotonic() + 30
    while any("edl" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return alive() is None, not any("edl" in thread.name for thread in threading.enumerate())


def test_a_dropped_model_takes_its_compression_along() -> None:
    assert run_ranks(dropped, 2) == [(True, True)] * 2
