"""HSDP: gradients between replicas are reduced by us, compressed, and torch's own all-reduce is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import efficient_dl as edl
from efficient_dl.errors import ConfigError, EdlError
from efficient_dl.integrations import fsdp_units
from tests.distributed.launch import run_failing_ranks, run_ranks
from tests.distributed.sharded_model import Transformer, batch, full, loss_of, same_bits

STEPS = 3
BITS: dict[str, Any] = {"bits": 2.0, "axes": {"shard": "none"}}


def mesh_of(replicas: int, shards: int) -> Any:
    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicas", "shards"))


def replicated(mesh: Any, dtype: torch.dtype | None = None) -> Transformer:
    """Two replicas of two shards."""
    torch.manual_seed(7)
    model = Transformer()
    policy = MixedPrecisionPolicy(reduce_dtype=dtype)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def train(
    rank: int, mesh: Any, options: dict[str, Any] | None, partial: bool = False, **model_options: Any
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """partial: every step adds up two passes, of which only the second is all-reduced."""
    model: Any = replicated(mesh, **model_options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    compression: Any = None
    if options is not None:
        compression = edl.compress(model, optimizer, check_every=1, **options)
    for number in range(STEPS):
        optimizer.zero_grad()
        for turn in range(1 + partial):
            model.set_requires_all_reduce(turn == partial)
            loss_of(model, batch(rank, 2 * number + turn)).backward()
        optimizer.step()
    parameters = full(model)
    if compression is None:
        return parameters, {}, {}
    found = parameters, compression.stats(), compression.stats(all_ranks=True)
    compression.close()
    return found


def trainings(rank: int, runs: list[tuple[Any, ...]], **options: Any) -> list[Any]:
    return [train(rank, mesh_of(2, 2), *run, **options) for run in runs]


def test_lossless_replicas_have_the_bits_of_native_hsdp_however_the_shards_are_reduced() -> None:
    wishes: list[Any] = [
        {"bits": "lossless"},
        {"bits": "identity"},
        {"bits": "lossless", "axes": {"shard": "none"}},
        {"bits": "lossless", "axes": {"replicate": "none"}},
        None,
    ]
    for both, identity, replicas, shards, native in run_ranks(trainings, 4, [(one,) for one in wishes]):
        for found in (both, identity, replicas, shards):
            assert same_bits(found[0], native[0])
            assert found[1]["checks"] == STEPS
        assert both[1]["replicas"]["ratio"] > 1.05 > 1.0 == identity[1]["replicas"]["ratio"]
        assert both[1]["replica_wire_bytes"] == replicas[1]["replica_wire_bytes"] == 0
        assert replicas[1]["gradients"]["native_bytes"] == replicas[1]["gradients"]["wire_bytes"] > 0
        assert shards[1]["replica_wire_bytes"] > shards[1]["replicas"]["wire_bytes"] == 0


def test_two_bits_between_replicas_leave_them_equal_and_send_an_eighth() -> None:
    """`check` compares the replicas' shards, bit by bit, after every step."""
    for rank, (two, partial, native) in enumerate(
        run_ranks(trainings, 4, [(BITS,), (BITS, True), ({"bits": "none", "weights": "none"},)])
    ):
        for found in (two, partial):
            replicas = found[1]["replicas"]
            assert found[1]["checks"] == STEPS
            assert replicas["ratio"] > 8.0
            assert 0 < replicas["wire_bytes"] < 0.13 * native[1]["replica_wire_bytes"], rank
            assert 0.0 < replicas["relative_error"] < 0.6
            assert not same_bits(found[0], native[0])
        sent = {name: row["values_sent"] for name, row in two[2]["replicas"]["parameters"].items()}
        numels = {name: p.numel() for name, p in Transformer().named_parameters()}
        assert sent == {name: 2 * numel * STEPS for name, numel in numels.items()}  # up and down, once each


def test_passes_that_are_not_all_reduced_are_added_first() -> None:
    lossless, native = run_ranks(trainings, 4, [({"bits": "lossless"}, True), (None, True)])[3]
    assert same_bits(lossless[0], native[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lossless_replicas_in_half_precision_have_the_bits_of_identity(dtype: torch.dtype) -> None:
    runs: list[Any] = [({"bits": "lossless"},), ({"bits": "identity"},), (None,)]
    for lossless, identity, native in run_ranks(trainings_in, 4, runs, dtype):
        assert same_bits(lossless[0], identity[0])
        for name, values in native[
            0
        ].items():  # the same mean, but for roundings, which Adam's first steps enlarge
            assert float((values - lossless[0][name]).norm()) < 0.1 * float(values.norm()), name


def trainings_in(rank: int, runs: list[tuple[Any, ...]], dtype: torch.dtype) -> list[Any]:
    return trainings(rank, runs, dtype=dtype)


def with_factor(rank: int, factor: float | None, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The gradients of one pass, by us and by torch alone where gloo can."""
    mesh = mesh_of(2, 2)
    found: list[dict[str, Tensor]] = []
    for options in ({"bits": "identity"}, None):
        model: Any = replicated(mesh, dtype)
        if options is None and factor is not None:
            break  # gloo has no such sum
        for module in (model, *model.layers):
            if factor is not None:
                module.set_gradient_divide_factor(factor)
        if options is not None:
            edl.compress(model, **options)
        loss_of(model, batch(rank, 0)).backward()
        found.append({name: p.grad.full_tensor() for name, p in model.named_parameters()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_divisor_of_ones_own_divides_the_sum_over_all_ranks(dtype: torch.dtype) -> None:
    """By default it is the number of all ranks, 4, though torch sees only the 2 of the shard axis."""
    mean, native = run_ranks(with_factor, 4, None, dtype)[0]
    (eighth,) = run_ranks(with_factor, 4, 8.0, dtype)[0]
    for name, values in native.items():
        torch.testing.assert_close(mean[name], values, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mean[name], 2 * eighth[name], rtol=1e-3, atol=1e-5)


def on_another_torch(rank: int) -> list[str]:
    mesh = mesh_of(1, 2)
    edl.compress(replicated(mesh), bits=2.0).close()  # one replica: nothing to take over
    mesh = mesh_of(2, 1)
    errors: list[str] = []
    for version, options, kind in (
        (fsdp_units._version, {}, ConfigError),
        (lambda: (2, 99), {}, EdlError),
        (lambda: (2, 99), {"axes": {"shards": 2.0}}, ConfigError),
    ):
        fsdp_units._version = version
        with pytest.raises(kind) as caught:
            edl.compress(replicated(mesh), bits=2.0, **options)
        errors.append(str(caught.value))
    edl.compress(replicated(mesh), bits=2.0, axes={"replicate": "none"}).close()
    return errors


def test_a_torch_that_we_do_not_know_is_refused_where_replicas_are_ours() -> None:
    unsharded, unknown, axis = run_ranks(on_another_torch, 2)[1]
    assert "replicas of unsharded parameters" in unsharded
    assert "reduces gradients between replicas (HSDP) in another way" in unknown
    assert 'axes={"replicate": "none"}' in unknown
    assert "no axis 'shards'" in axis


def reduced_twice(rank: int) -> None:
    """A torch that would not look at the mesh's class."""
    model = nn.Linear(16, 16)
    fully_shard(model, mesh=mesh_of(2, 2))
    edl.compress(model, bits="lossless")
    fsdp_units._without_replicas = lambda mesh: mesh
    model(torch.randn(2, 16)).sum().backward()


def test_gradients_that_torch_has_reduced_as_well_are_an_error() -> None:
    for outcome in run_failing_ranks(reduced_twice, 4):
        assert isinstance(outcome.error, EdlError)
        assert "reduced already" in str(outcome.error)
