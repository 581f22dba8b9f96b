"""Training with FSDP2: the same bits where they must be, the same options as without us."""

from __future__ import annotations

import copy
import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import efficient_dl as edl
from tests.distributed.launch import run_ranks
from tests.distributed.sharded_model import (
    STEPS,
    Case,
    Transformer,
    full,
    loss_of,
    same_bits,
    sharded,
    step,
    train,
)

CASES = {
    "plain": Case(),
    "no reshard after forward": Case(reshard=False),
    "gradient accumulation": Case(accumulate=3),
    "clipping": Case(clip=0.1),
    "frozen parameters": Case(frozen=True),
    "unused parameters": Case(unused=True),
    "gradients kept": Case(keep_zeros=True),
    "prefetch": Case(prefetch=True),
    "bfloat16 weights": Case(bfloat16=True),
    "bfloat16 gradients": Case(bfloat16=True, reduce_bfloat16=True),
}
QUICK = ["plain", "gradient accumulation", "frozen parameters", "bfloat16 weights"]
# In one launch, because the first training in a process takes as long as three more: torch finds out about DTensors.
TOGETHER = [
    pytest.param(QUICK, id="some cases"),
    pytest.param([name for name in CASES if name not in QUICK], id="the others", marks=pytest.mark.slow),
]
IDENTITY: dict[str, Any] = {"bits": "identity", "weights": "identity"}
NATIVE: dict[str, Any] = {"bits": None}


def trainings(rank: int, case: Case, runs: list[dict[str, Any]]) -> list[Any]:
    """One training after the other, in the same processes."""
    return [train(rank, case=case, **run) for run in runs]


def trainings_of(rank: int, names: list[str], runs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The same for several cases."""
    return {name: trainings(rank, CASES[name], runs) for name in names}


@pytest.mark.parametrize("names", TOGETHER)
def test_a_lossless_run_has_the_bits_of_the_identity_run(names: list[str]) -> None:
    for trained in run_ranks(trainings_of, 3, names, [{"bits": "lossless"}, IDENTITY]):
        for name, (lossless, identity) in trained.items():
            assert same_bits(lossless[0], identity[0]), name
            assert lossless[3] == identity[3], name
            assert lossless[1]["ratio"] > 1.0 == identity[1]["ratio"], name
            assert lossless[1]["steps"] == STEPS, name
            assert lossless[1]["checks"] == STEPS // 2, name


@pytest.mark.parametrize("names", TOGETHER)
def test_a_lossless_run_on_two_ranks_has_the_bits_of_native_fsdp(names: list[str]) -> None:
    # Not bfloat16 gradients: gloo rounds the sum to bfloat16 and then its half once more.
    names = [name for name in names if name != "bfloat16 gradients"]
    for trained in run_ranks(trainings_of, 2, names, [{"bits": "lossless"}, NATIVE]):
        for name, (lossless, native) in trained.items():
            assert same_bits(lossless[0], native[0]), name
            assert lossless[3] == native[3], name


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 4])
def test_lossless_weights_alone_change_no_bit(world_size: int) -> None:
    names = ["plain", "bfloat16 weights"]
    runs = [{"bits": "none", "weights": "lossless"}, {"bits": "none", "weights": "none"}, NATIVE]
    for trained in run_ranks(trainings_of, world_size, names, runs):
        for name, (lossless, counted, native) in trained.items():
            assert same_bits(lossless[0], native[0]), name
            assert same_bits(counted[0], native[0]), name
            assert lossless[1]["bytes_source"] == "counted, analytic", name
            assert counted[1]["bytes_source"] == "analytic", name


def test_every_value_is_counted_and_no_padding() -> None:
    """A gradient goes to its owner from every other rank; weights go out in forward, backward and each check."""
    native, two = run_ranks(trainings, 3, Case(), [{"bits": "none", "weights": "none"}, {"bits": 2.0}])[0]
    for name, parameter in Transformer().named_parameters():
        assert two[2]["gradients"]["parameters"][name]["values_sent"] == 2 * parameter.numel() * STEPS, name
        gathers = two[2]["weights"]["parameters"][name]["values_sent"] / (2 * parameter.numel())
        assert gathers - STEPS // 2 in (STEPS, 2 * STEPS), name
        assert native[2]["parameters"][name]["values_sent"] == 2 * parameter.numel() * (
            STEPS + gathers - STEPS // 2
        )
    assert two[2]["gradients"]["wire_bytes_per_step"] < 0.2 * native[2]["gradients"]["wire_bytes_per_step"]
    assert two[2]["weights"]["ratio"] > 1.1


def test_frozen_and_unused_parameters_send_no_gradients() -> None:
    cases = {"frozen parameters": "layers.0.up.weight", "unused parameters": "layers.1.spare.bias"}
    trained = run_ranks(trainings_of, 2, list(cases), [{"bits": 2.0}])[0]
    for case, name in cases.items():
        _, stats, _, _ = trained[case][0]
        assert stats["gradients"]["parameters"][name]["values_sent"] == 0
        assert stats["weights"]["parameters"][name]["values_sent"] > 0
        assert stats["gradients"]["parameters"]["layers.1.up.weight"]["values_sent"] > 0


@pytest.mark.slow
def test_accumulated_gradients_are_sent_once_a_step() -> None:
    names = ["plain", "gradient accumulation"]
    trained = run_ranks(trainings_of, 2, names, [{"bits": "identity"}])[0]
    once, accumulated = (trained[name][0][1] for name in names)
    assert accumulated["gradients"]["wire_bytes"] == once["gradients"]["wire_bytes"]


@pytest.mark.slow
def test_two_bits_train_nearly_as_well_as_native_fsdp() -> None:
    for two, native in run_ranks(trainings, 2, Case(steps=40), [{"bits": 2.0}, NATIVE]):
        assert two[3][-1] < 0.25 * two[3][0]
        assert two[3][-1] < native[3][-1] + 0.25


@pytest.mark.slow
def test_ranks_compute_with_equal_quantized_weights() -> None:
    """`check` compares what was gathered, the owner's part included, every second step."""
    runs = [{"bits": "lossless", "weights": 6.0}, {"bits": "lossless"}]
    for quantized, exact in run_ranks(trainings, 3, Case(steps=20), runs):
        assert quantized[1]["checks"] == 10
        assert quantized[1]["weights"]["bits_per_value"] < 8.0
        assert not same_bits(quantized[0], exact[0])
        assert quantized[3][-1] < 0.7 * quantized[3][0]


def test_overrides_and_a_budget_hold_for_gradients() -> None:
    runs: list[dict[str, Any]] = [
        {"bits": 2.0, "overrides": {"*.norm.*": "none"}},
        {"bits": "auto", "bytes_per_step": 12_000},
    ]
    for overridden, budgeted in run_ranks(trainings, 2, Case(steps=8), runs):
        assert overridden[1]["overrides"] == {"*.norm.*": "identity"}
        rows = overridden[1]["gradients"]["parameters"]
        assert (
            rows["layers.0.norm.weight"]["bits_per_value"]
            >= 32.0
            > 8.0
            > rows["layers.0.up.weight"]["bits_per_value"]
        )
        assert budgeted[1]["gradients"]["wire_bytes_per_step"] == pytest.approx(12_000, rel=0.1)


def with_hooks(rank: int, bits: str | None) -> dict[str, Tensor]:
    """An optimizer inside backward: every parameter is updated as soon as its gradient is reduced."""
    model = sharded()
    if bits:
        edl.compress(model, bits=bits)
    for parameter in model.parameters():

        def update(p: Tensor) -> None:
            with torch.no_grad():
                p -= 0.1 * p.grad
            p.grad = None

        parameter.register_post_accumulate_grad_hook(update)
    for number in range(3):
        tokens = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(10 * number + rank))
        loss_of(model, tokens).backward()
    return full(model)


def test_hooks_that_read_a_gradient_in_backward_see_it_reduced() -> None:
    assert same_bits(run_ranks(with_hooks, 2, "lossless")[0], run_ranks(with_hooks, 2, None)[0])


def with_factor(rank: int, factor: float) -> dict[str, Tensor]:
    model = sharded()
    for module in (model, *model.layers):
        module.set_gradient_divide_factor(factor)
    edl.compress(model, bits="lossless")
    loss_of(model, torch.arange(68).view(4, 17) % (61 - rank)).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def test_a_divisor_of_ones_own_divides_the_sum() -> None:
    """gloo has no such sum; ours needs none."""
    average, half = run_ranks(with_factor, 2, 2.0)[0], run_ranks(with_factor, 2, 4.0)[0]
    assert all(torch.equal(average[name], 2 * half[name]) for name in average)


def local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def resumed(rank: int, bits: str | float) -> bool:
    """Whether stopping after 3 of 6 steps changes anything, counters included."""

    def start() -> tuple[Any, torch.optim.Optimizer, Any]:
        model = sharded()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, edl.compress(model, optimizer, bits, check_every=2)

    model, optimizer, compression = start()
    for number in range(6):
        if number == 3:
            saved = {name: local(value).clone() for name, value in model.state_dict().items()}
            saved_optimizer = copy.deepcopy(optimizer.state_dict())
            saved_compression = compression.state_dict()
        step(rank, number, model, optimizer)
    wanted, wanted_stats = full(model), compression.stats()
    compression.close()
    model, optimizer, compression = start()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            local(value).copy_(saved[name])
    optimizer.load_state_dict(saved_optimizer)
    compression.load_state_dict(saved_compression)
    for number in range(3, 6):
        step(rank, number, model, optimizer)
    counters = ("wire_bytes", "raw_bytes", "values_sent", "steps", "relative_error")
    stats = compression.stats()
    assert [stats[key] for key in counters] == [wanted_stats[key] for key in counters]
    assert stats["parameters"] == wanted_stats["parameters"]
    return same_bits(full(model), wanted)


def resumed_by_bits(rank: int) -> list[bool]:
    return [resumed(rank, bits) for bits in ("lossless", 2.0)]


def test_a_resumed_run_equals_one_that_never_stopped() -> None:
    """With error feedback in test_rules.py."""
    assert run_ranks(resumed_by_bits, 2) == [[True, True]] * 2


def close_and_train(rank: int) -> bool:
    """Whether training goes on natively after close(), with nothing left running."""
    results: list[dict[str, Tensor]] = []
    for compressed in (True, False):
        model = sharded()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        compression: Any = edl.compress(model, optimizer, "lossless") if compressed else None
        for number in range(4):
            if number == 2 and compression:
                compression.close()
                assert not [t.name for t in threading.enumerate() if t.name.startswith("edl-")]
            step(rank, number, model, optimizer)
        results.append(full(model))
    return same_bits(*results)


def test_a_closed_compression_gives_native_collectives_back() -> None:
    assert all(run_ranks(close_and_train, 2))


def on_mesh(rank: int, kind: str, bits: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Four ranks, two by two."""
    torch.manual_seed(7)
    model: Any = Transformer(inner=102 if kind == "tensor parallel" else 101)  # torch splits only even widths
    options: dict[str, Any] = {}
    if kind == "tensor parallel":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        for layer in model.layers:
            parallelize_module(layer, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        options["mesh"] = mesh["data"]
    else:
        options["reshard_after_forward"] = 2
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compression: Any = None
    if bits:
        compression = edl.compress(model, optimizer, bits, check_every=2)
    number_of_data = rank // 2 if kind == "tensor parallel" else rank
    for number in range(4):
        step(number_of_data, number, model, optimizer)
    return full(model), compression.stats() if compression else {}


@pytest.mark.slow
def test_another_axis_of_the_mesh_is_left_alone() -> None:
    native = run_ranks(on_mesh, 4, "tensor parallel", None)
    for (parameters, stats), (wanted, _) in zip(
        run_ranks(on_mesh, 4, "tensor parallel", "lossless"), native, strict=True
    ):
        assert same_bits(parameters, wanted)
        assert stats["world_size"] == 2
        assert stats["ratio"] > 1.1


@pytest.mark.slow
def test_gathers_within_a_smaller_group_stay_native_and_are_counted() -> None:
    native = run_ranks(on_mesh, 4, "smaller group", None)
    for (parameters, stats), (wanted, _) in zip(
        run_ranks(on_mesh, 4, "smaller group", "none"), native, strict=True
    ):
        assert same_bits(parameters, wanted)
        assert stats["native_gathers"] == 4 * 3
        assert stats["native_gather_bytes"] > 0


def test_a_model_of_one_small_unit_trains_on_more_ranks_than_rows() -> None:

    for parameters, stats in run_ranks(tiny, 4):
        assert stats["steps"] == 3
        assert all(bool(p.isfinite().all()) for p in parameters.values())


def tiny(rank: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    torch.manual_seed(1)
    model = fully_shard(nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compression = edl.compress(model, optimizer, 2.0, check_every=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 6) + rank).square().mean().backward()
        optimizer.step()
    return full(model), compression.stats()


def evaluated(rank: int) -> tuple[float, dict[str, Any]]:
    """Evaluation in inference mode between steps that train; gathers are decoded in threads of their own.

    torch itself fails where the first forward pass of all is one in inference mode.
    """
    torch.manual_seed(1)
    model: Any = nn.Sequential(nn.Linear(60, 30), nn.ReLU(), nn.Linear(30, 2))
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compression: Any = edl.compress(model, optimizer, 2.0, check_every=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(5, 60) + rank).square().mean().backward()
        optimizer.step()
        with torch.inference_mode():
            loss = model(torch.ones(5, 60)).square().mean()
    compression.check()
    stats = compression.stats()
    compression.close()
    return float(loss), stats


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_in_inference_mode_leaves_training_alone(world_size: int) -> None:
    outcomes = run_ranks(evaluated, world_size)
    assert len({loss for loss, _ in outcomes}) == 1
    if world_size > 1:  # else nothing is reduced
        assert all((stats["steps"], stats["checks"]) == (4, 3) for _, stats in outcomes)


class Layers(nn.Module):
    """Of the shape of the tutorial's model: an embedding, layers that are sharded one by one, an output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 36)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(36), nn.Linear(36, 101), nn.GELU(), nn.Linear(101, 36))
            for _ in range(3)
        )
        self.output = nn.Linear(36, 61)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.output(x)


def tutorial(rank: int) -> tuple[bool, int, list[str]]:
    """PyTorch's tutorial "Getting Started with Fully Sharded Data Parallel (FSDP2)", and one line of ours.

    A meta device, mixed precision, explicit prefetching, clipping, Adam, and a full state dict at the end.
    """
    with torch.device("meta"):
        model: Any = Layers()  # sharding changes its class
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for this, following in itertools.pairwise(model.layers):
        this.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([this])
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding):
            module.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    compression = edl.compress(model, optimizer, bits=2.0)
    finite = True
    for step_number in range(3):
        model.unshard()
        seed = torch.Generator().manual_seed(10 * step_number + rank)
        loss = model(torch.randint(61, (4, 8), generator=seed)).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        finite = finite and bool(loss.isfinite())
    compression.check()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved: dict[str, Any] = get_model_state_dict(model, options=options)
    finite = finite and all(bool(one.isfinite().all()) for one in saved.values())
    return finite, compression.stats()["steps"], sorted(saved)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_tutorial_of_fsdp2_runs_with_one_more_line(world_size: int) -> None:
    found = run_ranks(tutorial, world_size)
    assert [(finite, steps) for finite, steps, _ in found] == [(True, 3)] * world_size
    assert found[0][2] == sorted(Layers().state_dict())
