"""Nodes of several ranks over gloo: training with a hierarchy, the ways to name the nodes, and ranks that die."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from efficient_dl.comm import (
    BucketLayout,
    Compressor,
    Levels,
    Plan,
    ProcessGroupTransport,
    Topology,
    all_gather,
    all_reduce_coalesced,
    all_to_all,
    broadcast,
    hierarchical_all_reduce,
)
from efficient_dl.errors import ConfigError, PlanMismatch, TransportError
from tests.distributed.edl_ranks import free_port
from tests.distributed.launch import run_failing_ranks, run_ranks
from tests.distributed.meeting import stay_until

STEPS = 5
SOON = 100.0  # seconds, on a machine that may be busy; the time-out LATE is longer than a test may take
LATE = 250.0
VARIABLES = ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def ddp() -> DistributedDataParallel:
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(48, 300), nn.ReLU(), nn.LayerNorm(300), nn.Linear(300, 10))
    return DistributedDataParallel(net, bucket_cap_mb=0.03)


def hierarchy_of(how: Any) -> Any:
    return init_device_mesh("cpu", how) if isinstance(how, tuple) else how


def launched(rank: int, local_size: int) -> None:
    """Sets what torchrun sets."""
    values = (rank, rank // local_size, rank % local_size, local_size)
    os.environ.update({name: str(value) for name, value in zip(VARIABLES, values, strict=True)})


def train(rank: int, bits: Any, how: Any, local_size: int = 0) -> dict[str, Any]:
    """Parameters, losses and statistics after a few steps; how: for `hierarchy`, a tuple is a mesh of that shape."""
    if local_size:
        launched(rank, local_size)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("efficient_dl")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model = ddp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    compression = edl.compress(model, optimizer, bits, check_every=2, hierarchy=hierarchy_of(how))
    generator = torch.Generator().manual_seed(100 + rank)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(16, 48, generator=generator)
        loss = (model(x) - x[:, :10]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    stats, total = compression.stats(), compression.stats(all_ranks=True)
    compression.close()
    return {
        "parameters": torch.cat([p.detach().reshape(-1) for p in model.parameters()]),
        "losses": losses,
        "stats": stats,
        "total": total,
        "threads": [t.name for t in threading.enumerate() if t.name.startswith("edl")],
        "log": [record.getMessage() for record in records],
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("bits", ["identity", "lossless", 2.0])
def test_every_rank_of_two_nodes_of_two_ends_bitwise_equal(bits: str | float) -> None:
    results = run_ranks(train, 4, bits, 2)
    assert all(same_bits(results[0]["parameters"], other["parameters"]) for other in results[1:])
    assert all(result["stats"]["checks"] == STEPS // 2 for result in results)
    assert all(result["threads"] == [] for result in results)
    assert results[0]["stats"]["hierarchy"]["ranks_per_node"] == [2, 2]
    assert results[0]["losses"][-1] < results[0]["losses"][0]


def test_a_lossless_run_has_the_bits_of_the_identity_run() -> None:
    lossless, identity = run_ranks(train, 4, "lossless", 2)[0], run_ranks(train, 4, "identity", 2)[0]
    assert same_bits(lossless["parameters"], identity["parameters"])
    assert lossless["total"]["ratio"] > 1.0 == identity["total"]["ratio"]


def test_between_two_nodes_of_two_travels_a_third_of_what_four_equal_ranks_send() -> None:
    """Each value crosses once up and once down, not three times each way; inside a node it stays raw."""
    flat, two = (
        run_ranks(train, 4, "identity", None)[0]["total"],
        run_ranks(train, 4, "identity", 2)[0]["total"],
    )
    assert flat["local_bytes"] == 0
    assert flat["values_sent"] == 3 * two["values_sent"]
    numel = sum(p.numel() for p in ddp_parameters())
    assert two["values_sent"] == 2 * numel * STEPS
    assert two["local_bytes"] == 2 * 2 * 4 * numel * STEPS  # all ranks know the sizes


def feeding_back(rank: int, options: dict[str, Any]) -> tuple[Tensor, list[float]]:
    model = ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    if "scale" in options:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    compression = edl.compress(model, optimizer, bits=1.0, hierarchy=2, check_every=1, **options)
    generator = torch.Generator().manual_seed(rank)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        x = torch.randn(16, 48, generator=generator)
        loss = (model(x) - x[:, :10]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    compression.close()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), losses


@pytest.mark.parametrize("options", [{"error_feedback": True}, {"scale": "second_moment"}])
def test_error_feedback_and_the_second_moment_train_in_a_hierarchy(options: dict[str, Any]) -> None:
    results = run_ranks(feeding_back, 4, options)
    assert all(same_bits(results[0][0], parameters) for parameters, _ in results[1:])
    assert results[0][1][-1] < results[0][1][0]


def ddp_parameters() -> list[Tensor]:
    return list(nn.Sequential(nn.Linear(48, 300), nn.LayerNorm(300), nn.Linear(300, 10)).parameters())


@pytest.mark.parametrize(("world_size", "local_size"), [(3, 1), (2, 1)])
def test_with_one_rank_a_node_the_run_is_the_flat_one_and_says_so(world_size: int, local_size: int) -> None:
    flat, one = run_ranks(train, world_size, 2.0, None)[0], run_ranks(train, world_size, 2.0, local_size)[0]
    assert same_bits(flat["parameters"], one["parameters"])
    assert one["stats"]["hierarchy"]["flat_because"] == "every node has one rank"
    assert any("no hierarchy" in line for line in one["log"])


def test_on_one_node_nothing_leaves_and_nothing_is_quantized() -> None:
    lossy, exact = run_ranks(train, 3, 2.0, 3), run_ranks(train, 3, "identity", 3)
    assert all(same_bits(exact[0]["parameters"], other["parameters"]) for other in (*lossy, *exact))
    assert lossy[0]["total"]["wire_bytes"] == 0 < lossy[0]["total"]["local_bytes"]


@pytest.mark.parametrize(
    ("how", "local_size", "source"),
    [((2, 2), 0, "a device mesh"), ("auto", 2, "the variables of torchrun")],
)
def test_a_mesh_and_a_launcher_give_the_run_of_a_given_size(how: Any, local_size: int, source: str) -> None:
    given, found = run_ranks(train, 4, 2.0, 2)[0], run_ranks(train, 4, 2.0, how, local_size)
    assert all(same_bits(given["parameters"], other["parameters"]) for other in found)
    assert found[0]["stats"]["hierarchy"] == {
        "ranks_per_node": [2, 2],
        "source": source,
        "flat_because": None,
    }


def uneven(rank: int) -> dict[str, Any]:
    place = [(0, 0, 2), (0, 1, 2), (1, 0, 1)][rank]
    os.environ.update({name: str(v) for name, v in zip(VARIABLES, (rank, *place), strict=True)})
    return train(rank, 2.0, "auto")


def test_nodes_of_different_sizes_train_flat_with_a_logged_reason() -> None:
    found, flat = run_ranks(uneven, 3), run_ranks(train, 3, 2.0, None)[0]
    assert all(same_bits(flat["parameters"], other["parameters"]) for other in found)
    for result in found:
        (line,) = [text for text in result["log"] if "no hierarchy" in text]
        assert "different numbers of ranks (2, 1)" in line


def wishes(rank: int, each: list[Any]) -> None:
    edl.compress(ddp(), bits=2.0, hierarchy=hierarchy_of(each[rank]))


@pytest.mark.parametrize(
    ("each", "difference"),
    [
        ([None, "auto"], "hierarchy = auto (rank 1), None (rank 0)"),
        ([1, 2], "hierarchy = [[0, 1]] (rank 1), [[0], [1]] (rank 0)"),
    ],
)
def test_ranks_that_wish_for_different_nodes_are_named(each: list[Any], difference: str) -> None:
    for outcome in run_failing_ranks(wishes, 2, each):
        assert isinstance(outcome.error, PlanMismatch)
        assert difference in str(outcome.error)


@pytest.mark.parametrize("how", [3, "nodes", (2,), True])
def test_an_impossible_hierarchy_is_refused(how: Any) -> None:
    for outcome in run_failing_ranks(wishes, 2, [how, how]):
        assert isinstance(outcome.error, ConfigError)


def natively(rank: int, options: dict[str, Any]) -> None:
    edl.compress(ddp(), hierarchy="auto", **options)


@pytest.mark.parametrize("options", [{"bits": "none"}, {"bits": 2.0, "shadow": True}])
def test_a_hierarchy_of_the_native_collective_is_refused(options: dict[str, Any]) -> None:
    (outcome,) = run_failing_ranks(natively, 1, options)
    assert "a hierarchy needs our own reduction" in str(outcome.error)


def leaving(rank: int, how: str, victim: int, timeout: float, folder: Path) -> None:
    """The victim leaves in the fourth step; a silent one stays until the others have made their files in the folder."""
    model = ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    edl.compress(model, optimizer, bits=2.0, timeout=timeout, hierarchy=2)
    for number in range(6):
        if rank == victim and number == 3:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            return stay_until_all_others(rank, folder)
        try:
            optimizer.zero_grad()
            model(torch.randn(8, 48)).square().mean().backward()
            optimizer.step()
        except TransportError:
            (folder / str(rank)).touch()
            raise


def stay_until_all_others(rank: int, folder: Path, what: str = "") -> None:
    for other in range(4):
        if other != rank:
            stay_until(folder / f"{other}{what}")


@pytest.mark.parametrize("victim", [1, 3])
def test_a_killed_rank_is_named_on_every_rank_also_where_none_talks_to_it(
    tmp_path: Path, victim: int
) -> None:
    """The rank on the other node at the other position has no connection to the dead one."""
    outcomes = run_failing_ranks(leaving, 4, "killed", victim, LATE, tmp_path)
    for outcome in outcomes:
        if outcome.rank != victim:
            assert isinstance(outcome.error, TransportError), outcome
            assert f"rank {outcome.rank} lost rank {victim} " in str(outcome.error)
            assert outcome.seconds < SOON


@pytest.mark.slow
def test_a_silent_rank_is_named_after_the_time_out_on_every_rank(tmp_path: Path) -> None:
    outcomes = run_failing_ranks(leaving, 4, "silent", 2, 4.0, tmp_path)
    assert outcomes[2].error is None, outcomes[2].trace
    for outcome in outcomes:
        if outcome.rank != 2:
            assert isinstance(outcome.error, TransportError)
            assert f"rank {outcome.rank} lost rank 2 " in str(outcome.error)
            assert outcome.seconds > 4.0


def collective(transport: ProcessGroupTransport, name: str, levels: Levels) -> None:
    compressor = Compressor(Plan.of("lossless"), ["tensor"])
    x = torch.randn(1000)
    if name == "hierarchical":
        layout = BucketLayout.of(["tensor"], [1000], transport.world_size)
        hierarchical_all_reduce(x, layout, compressor, levels)
    elif name == "coalesced":
        all_reduce_coalesced({"tensor": x}, compressor, transport)
    elif name == "broadcast":
        broadcast({"tensor": x}, compressor, transport, root=1)
    elif name == "all_gather":
        all_gather(x, compressor, transport)
    else:
        all_to_all([x] * transport.world_size, compressor, transport)


def dying(rank: int, name: str, how: str, timeout: float, folder: Path) -> list[str]:
    """Rank 3 leaves between two collectives; the others return what they were told, and which threads are left."""
    group = dist.group.WORLD
    assert group is not None
    transport = ProcessGroupTransport(group, timeout=timeout)
    levels = Levels.of(Topology.of_size(4, 2), transport)
    collective(transport, name, levels)
    (folder / f"{rank} is ready").touch()
    if rank == 3:
        stay_until_all_others(rank, folder, " is ready")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        stay_until_all_others(rank, folder)
        return []
    start = time.monotonic()
    try:
        collective(transport, name, levels)
    except TransportError as error:
        assert how == "silent" or time.monotonic() - start < SOON
        (folder / str(rank)).touch()
        return [str(error).splitlines()[0], *(t.name for t in threading.enumerate() if "edl" in t.name)]
    return ["no error"]


@pytest.mark.parametrize("name", ["hierarchical", "coalesced", "broadcast", "all_gather", "all_to_all"])
def test_every_collective_names_a_killed_rank_on_every_rank(tmp_path: Path, name: str) -> None:
    for outcome in run_failing_ranks(dying, 4, name, "killed", LATE, tmp_path)[:3]:
        assert outcome.error is None, outcome.trace
        (line,) = outcome.value
        assert line.startswith(f"rank {outcome.rank} lost rank 3 "), outcome.value


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hierarchical", "coalesced", "broadcast", "all_gather", "all_to_all"])
def test_every_collective_names_a_silent_rank_after_the_time_out(tmp_path: Path, name: str) -> None:
    *outcomes, silent = run_failing_ranks(dying, 4, name, "silent", 4.0, tmp_path)
    assert silent.error is None, silent.trace
    for outcome in outcomes:
        assert outcome.error is None, outcome.trace
        (line,) = outcome.value
        assert line.startswith(f"rank {outcome.rank} lost rank 3 "), outcome.value


def losing_the_store(rank: int, port: int, folder: Path) -> str:
    """Rank 0 keeps the store in its own memory, as without torchrun, and is killed."""
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, 4, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    group = dist.group.WORLD
    assert group is not None
    transport = ProcessGroupTransport(group, timeout=LATE)
    levels = Levels.of(Topology.of_size(4, 2), transport)
    collective(transport, "hierarchical", levels)
    (folder / f"{rank} is ready").touch()
    if rank == 0:
        stay_until_all_others(rank, folder, " is ready")
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(TransportError) as caught:
        collective(transport, "hierarchical", levels)
    return str(caught.value).splitlines()[0]


@pytest.mark.slow
def test_the_death_of_the_rank_that_keeps_the_store_is_named_as_well(tmp_path: Path) -> None:
    for outcome in run_failing_ranks(losing_the_store, 4, free_port(), tmp_path)[1:]:
        assert outcome.error is None, outcome.trace
        assert outcome.value.startswith(f"rank {outcome.rank} lost rank 0 "), outcome.value
        assert outcome.seconds < SOON


def exchanged(rank: int) -> list[Any]:
    """The exchanges on real ranks, exactly."""
    group = dist.group.WORLD
    assert group is not None
    transport = ProcessGroupTransport(group)
    compressor = Compressor(Plan.of("lossless"), ["tensor"])
    x = {"tensor": torch.full((2, 3), float(rank))}
    all_reduce_coalesced(x, compressor, transport, op="sum")
    sent = {"tensor": torch.full((5,), float(rank)).to(torch.float8_e4m3fn)}
    broadcast(sent, compressor, transport, root=2)
    gathered = all_gather(torch.full((rank,), float(rank), dtype=torch.bfloat16), compressor, transport)
    crossed = all_to_all([torch.full((target,), float(rank)) for target in range(3)], compressor, transport)
    return [
        x["tensor"].tolist(),
        sent["tensor"].float().tolist(),
        *([y.tolist() for y in z] for z in (gathered, crossed)),
    ]


def test_the_exchanges_deliver_over_gloo() -> None:
    for rank, result in enumerate(run_ranks(exchanged, 3)):
        assert result[0] == [[3.0] * 3] * 2
        assert result[1] == [2.0] * 5
        assert result[2] == [[float(source)] * source for source in range(3)]
        assert result[3] == [[float(source)] * rank for source in range(3)]
