"""Training and failing over MPI, on ranks that mpirun started."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from efficient_dl.comm import mpi as mpi_module
from efficient_dl.comm import mpi_link
from efficient_dl.comm.mpi import MpiTransport, init_process_group
from efficient_dl.errors import ConfigError, PackageMissing, PlanMismatch, TransportError
from tests.distributed.launch import run_ranks
from tests.distributed.mpi_ranks import Ended, launch, run_mpi_ranks

BOTH = [
    pytest.param("openmpi", marks=pytest.mark.mpi("openmpi")),
    pytest.param("mpich", marks=pytest.mark.mpi("mpich")),
]
SOON = 100.0  # seconds, on a machine that may be busy; a transfer itself may take 250
pytestmark = pytest.mark.timeout(300)  # most of it to start ranks on such a machine


@pytest.fixture(params=BOTH)
def mpi(request: pytest.FixtureRequest) -> str:
    return request.param


def train(
    transport: Any, rank: int, bits: str | float, steps: int = 4, hierarchy: Any = None
) -> tuple[dict[str, Tensor], float]:
    """Parameters after a few steps, and the ratio."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(48, 300), nn.LayerNorm(300), nn.ReLU(), nn.Linear(300, 10))
    model = DistributedDataParallel(net, bucket_cap_mb=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    compression = edl.compress(
        model, optimizer, bits, check_every=2, timeout=20, transport=transport, hierarchy=hierarchy
    )
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 48, generator=generator)).square().mean().backward()
        optimizer.step()
    ratio = compression.stats()["ratio"]
    compression.close()
    return {name: p.detach().clone() for name, p in net.named_parameters()}, ratio


def train_thrice(transport: MpiTransport) -> list[tuple[dict[str, Tensor], float]]:
    """Lossless by MPI, uncompressed by MPI, and by gloo; the ranks' order in the group is that of MPI."""
    init_process_group(comm=transport.link.comm, timeout=20)
    try:
        assert (dist.get_rank(), dist.get_world_size()) == (transport.rank, transport.world_size)
        runs = ((transport, "lossless"), (transport, "identity"), (None, "identity"), (transport, 2.0))
        return [train(carrier, transport.rank, bits) for carrier, bits in runs]
    finally:
        dist.destroy_process_group()


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_lossless_run_over_mpi_has_the_bits_of_uncompressed_runs_over_mpi_and_gloo(
    mpi: str, world_size: int
) -> None:
    ranks = run_mpi_ranks(mpi, train_thrice, world_size)
    for lossless, identity, gloo, lossy in ranks:
        assert same_bits(lossless[0], identity[0])
        assert same_bits(lossless[0], gloo[0])
        assert same_bits(lossy[0], ranks[0][3][0])
        assert lossless[1] > 1.0 == identity[1]
        assert lossy[1] > 8.0
    assert all(same_bits(ranks[0][0][0], other[0][0]) for other in ranks[1:])


def in_groups(transport: MpiTransport) -> list[tuple[dict[str, Tensor], float]]:
    init_process_group(comm=transport.link.comm, timeout=20)
    try:
        runs = ((transport, "lossless"), (None, "identity"), (transport, 2.0))
        return [train(carrier, transport.rank, bits, 3, "groups:2") for carrier, bits in runs]
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_groups_over_mpi_come_to_the_bits_of_groups_over_gloo(mpi: str) -> None:
    ranks = run_mpi_ranks(mpi, in_groups, 4)
    for lossless, gloo, lossy in ranks:
        assert same_bits(lossless[0], gloo[0])
        assert same_bits(lossy[0], ranks[0][2][0])
        assert lossy[1] > 8.0


def in_parts(transport: MpiTransport) -> bool:
    mpi_module.CHUNK_BYTES = 1000
    try:
        outgoing = [torch.arange(10_001).add(7 * target).to(torch.uint8) for target in range(2)]
        incoming = transport.exchange(outgoing).wait()
        return torch.equal(incoming[1 - transport.rank], outgoing[transport.rank])
    finally:
        mpi_module.CHUNK_BYTES = 2**30


def test_a_long_message_travels_in_parts(mpi: str) -> None:
    assert run_mpi_ranks(mpi, in_parts, 2) == [True, True]


def close_one_end(transport: MpiTransport, knows_size: bool) -> tuple[str, float]:
    """Rank 0 sends a last message and leaves; rank 1 gets the message, and then waits for nothing."""
    own = transport.sibling()
    outgoing = [torch.full((3_000_000,), own.rank, dtype=torch.uint8)] * 2
    work = own.exchange(outgoing)
    if own.rank == 0:
        work.wait()
        own.close()
        return "", 0.0
    time.sleep(0.3)
    assert work.wait()[0].eq(0).all()
    start = time.monotonic()
    mpi_module.LAST_MESSAGE_SECONDS = 0.5
    try:
        own.exchange(outgoing, [3_000_000, 0] if knows_size else None).wait(timeout=200)
    except TransportError as error:
        return str(error), time.monotonic() - start
    finally:
        mpi_module.LAST_MESSAGE_SECONDS = 10.0
    return "no error", 0.0


@pytest.mark.parametrize(("knows_size", "what"), [(False, "its size"), (True, "its message")])
def test_a_rank_that_closed_its_end_is_waited_for_no_longer(mpi: str, knows_size: bool, what: str) -> None:
    text, seconds = run_mpi_ranks(mpi, close_one_end, 2, knows_size)[1]
    assert f"rank 1 lost rank 0 while waiting for {what}" in text
    assert seconds < SOON


def use_after_abort(transport: MpiTransport) -> bool:
    own = transport.sibling()
    own.abort()
    with pytest.raises(TransportError, match="closed, aborted, or has failed before"):
        own.gather(torch.ones(3, dtype=torch.uint8))
    own.close()
    return True


def test_an_aborted_transport_is_refused_and_closes(mpi: str) -> None:
    assert run_mpi_ranks(mpi, use_after_abort, 2) == [True, True]


def absent(transport: MpiTransport) -> tuple[str, float]:
    if transport.rank == 1:
        return "", 0.0
    start = time.monotonic()
    transport.timeout = 0.3
    try:
        transport.sibling()
    except TransportError as error:
        return str(error), time.monotonic() - start
    return "no error", 0.0


def test_a_rank_that_does_not_come_to_the_construction_is_noticed(mpi: str) -> None:
    text, seconds = run_mpi_ranks(mpi, absent, 2)[0]
    assert "rank 0 waited in vain for other ranks" in text
    assert seconds > 0.2


def with_another_order(transport: MpiTransport) -> list[str]:
    """A communicator with reversed ranks; another transport on one rank; a transport with nothing to carry."""
    comm = transport.link.comm
    init_process_group(comm=comm, timeout=20)
    try:
        model = DistributedDataParallel(nn.Linear(3, 3))
        backwards = MpiTransport(comm.Split(0, -transport.rank), timeout=20)
        texts = []
        for options in (
            {"transport": backwards},
            {"transport": transport if transport.rank else None},
            {"transport": transport, "shadow": True},
            {"transport": "pigeons"},
        ):
            try:
                edl.compress(model, bits=2.0, timeout=20, **options)
            except (ConfigError, PlanMismatch) as error:
                texts.append(str(error))
        return texts
    finally:
        dist.destroy_process_group()


def test_transports_that_do_not_fit_are_refused_on_every_rank(mpi: str) -> None:
    for rank, texts in enumerate(run_mpi_ranks(mpi, with_another_order, 2)):
        order, different, nothing, unknown = texts
        assert f"expected: rank {rank} of 2, as in the process group\n  found: rank {1 - rank} of 2" in order
        assert "transport = MpiTransport object (rank 1), process_group (rank 0)" in different
        assert "would carry nothing" in nothing
        assert "unknown transport 'pigeons'" in unknown


def test_cuda_tensors_are_refused() -> None:
    with pytest.raises(ConfigError, match="MpiTransport cannot move tensors on cuda"):
        MpiTransport(device=torch.device("cuda"))


def test_without_mpi4py_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(PackageMissing, match="pip install mpi4py"):
        MpiTransport()


def unusable(rank: int, how: str) -> str:
    import mpi4py

    if how == "few threads":
        mpi4py.rc.thread_level = "serialized"
    elif how == "no library":
        os.environ["MPI4PY_LIBMPI"] = "/nowhere/libmpi.so"
    else:
        mpi4py.rc.initialize = False
    try:
        MpiTransport()
    except (ConfigError, PackageMissing) as error:
        return str(error)
    return "accepted"


@pytest.mark.mpi("openmpi")
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("few threads", "expected: MPI_THREAD_MULTIPLE"),
        ("no library", "mpi4py finds no MPI library"),
        ("not initialized", "MPI is not initialized"),
    ],
)
def test_an_mpi_that_cannot_serve_is_explained(how: str, expected: str) -> None:
    assert expected in run_ranks(unusable, 1, how)[0]


def leaving(how: str) -> None:
    """Rank 1 leaves in the third step."""
    mpi_link.EXIT_SECONDS = 3
    init_process_group(timeout=20)
    rank = dist.get_rank()
    model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 200), nn.Linear(200, 5)), bucket_cap_mb=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    edl.compress(model, optimizer, 2.0, timeout=3.0 if how == "silent" else 250.0, transport="mpi")
    for number in range(5):
        if rank == 1 and number == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "silent":
                threading.Event().wait()
            if how == "raises":
                raise ValueError("the user's own")
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()


# Every rank imports torch, for seconds: what does not depend on the MPI is shown with one of them.
RANKS = {"openmpi": 3, "mpich": 2}


def left(mpi: str, how: str) -> Ended:
    ended = launch(mpi, RANKS[mpi], leaving, how)
    assert ended.code != 0
    assert ended.leaked == []
    return ended


@pytest.mark.slow
def test_an_exception_on_one_rank_ends_the_others(mpi: str) -> None:
    ended = left(mpi, "raises")
    assert isinstance(ended.reports[1], ValueError)
    for rank in (0, 2)[: RANKS[mpi] - 1]:
        assert isinstance(ended.reports[rank], TransportError)
        assert f"rank {rank} lost rank" in str(ended.reports[rank])
    assert ended.seconds < SOON


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(mpi: str) -> None:
    ended = left(mpi, "killed")
    assert ended.seconds < SOON


@pytest.mark.slow
def test_a_silent_rank_is_named_after_the_time_out_and_the_job_ends(mpi: str) -> None:
    ended = left(mpi, "silent")
    errors = [ended.reports[rank] for rank in (0, 2)[: RANKS[mpi] - 1]]
    assert all(isinstance(error, TransportError) for error in errors)
    assert "lost rank" in str(errors[0])
    assert ended.seconds < SOON


def by_name() -> tuple[dict[str, Tensor], float]:
    init_process_group(timeout=20)
    result = train("mpi", dist.get_rank(), 2.0)
    dist.destroy_process_group()
    return result


@pytest.mark.slow
def test_compress_takes_mpi_by_its_name_under_mpirun(mpi: str) -> None:
    world_size = RANKS[mpi]
    ended = launch(mpi, world_size, by_name)
    assert ended.code == 0, ended.output
    parameters = [ended.reports[rank][0] for rank in range(world_size)]
    assert all(same_bits(parameters[0], other) for other in parameters[1:])
    assert ended.leaked == []
