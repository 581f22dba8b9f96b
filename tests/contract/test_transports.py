"""One contract for all transports: in memory, over torch.distributed with gloo, and over MPI."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import LoopbackHub, ProcessGroupTransport, Transport
from efficient_dl.errors import ConfigError, TransportError
from tests.distributed.launch import run_failing_ranks, run_ranks
from tests.distributed.meeting import PATIENCE_SECONDS, stay_until
from tests.distributed.mpi_ranks import run_mpi_ranks
from tests.unit.ranks import on_ranks

Script = Callable[..., Any]
Runner = Callable[..., list[Any]]

STARTING = pytest.mark.timeout(300)  # the first test over MPI starts the ranks, on a machine that may be busy
SIZES = [0, 1, 7, 300, 1_000_003]  # a message from a to b has SIZES[(3 a + b) % 5] bytes


def _on_loopback(script: Script, world_size: int, *arguments: Any) -> list[Any]:
    return on_ranks(world_size, lambda transport: script(transport, *arguments))


def _on_gloo(script: Script, world_size: int, *arguments: Any) -> list[Any]:
    return run_ranks(_gloo_rank, world_size, script, *arguments)


def _gloo_rank(rank: int, script: Script, *arguments: Any) -> Any:
    group = dist.group.WORLD
    assert group is not None
    return script(ProcessGroupTransport(group), *arguments)


def _on_openmpi(script: Script, world_size: int, *arguments: Any) -> list[Any]:
    return run_mpi_ranks("openmpi", script, world_size, *arguments)


def _on_mpich(script: Script, world_size: int, *arguments: Any) -> list[Any]:
    return run_mpi_ranks("mpich", script, world_size, *arguments)


@pytest.fixture(
    params=[
        pytest.param(_on_loopback, id="loopback"),
        pytest.param(_on_gloo, id="gloo"),
        pytest.param(_on_openmpi, id="openmpi", marks=[pytest.mark.mpi("openmpi"), STARTING]),
        pytest.param(_on_mpich, id="mpich", marks=[pytest.mark.mpi("mpich"), STARTING]),
    ]
)
def run(request: pytest.FixtureRequest) -> Runner:
    return request.param


def message(source: int, target: int, turn: int = 0) -> Tensor:
    size = SIZES[(3 * source + target) % len(SIZES)]
    return ((torch.arange(size) + 31 * source + 7 * target + turn) % 251).to(torch.uint8)


def exchange(transport: Transport) -> tuple[list[bool], int]:
    work = transport.exchange([message(transport.rank, target) for target in range(transport.world_size)])
    incoming = work.wait()
    expected = [message(source, transport.rank) for source in range(transport.world_size)]
    return [torch.equal(a, b) for a, b in zip(incoming, expected, strict=True)], work.sent_bytes


def gather(transport: Transport) -> tuple[list[bool], int]:
    work = transport.gather(message(transport.rank, 1))
    incoming = work.wait()
    expected = [message(source, 1) for source in range(transport.world_size)]
    return [torch.equal(a, b) for a, b in zip(incoming, expected, strict=True)], work.sent_bytes


def gather_known(transport: Transport) -> tuple[list[bool], int]:
    """All ranks know all sizes."""
    expected = [message(source, 1) for source in range(transport.world_size)]
    work = transport.gather(expected[transport.rank], [one.numel() for one in expected])
    return [torch.equal(a, b) for a, b in zip(work.wait(), expected, strict=True)], work.sent_bytes


def exchange_known(transport: Transport) -> tuple[list[bool], int]:
    """All ranks know what comes from whom; what a rank hands to itself is not asked for."""
    expected = [message(source, transport.rank) for source in range(transport.world_size)]
    sizes = [0 if source == transport.rank else one.numel() for source, one in enumerate(expected)]
    outgoing = [message(transport.rank, target) for target in range(transport.world_size)]
    work = transport.exchange(outgoing, sizes)
    return [torch.equal(a, b) for a, b in zip(work.wait(), expected, strict=True)], work.sent_bytes


def many(transport: Transport) -> bool:
    """Transfers in a row, the faster ranks ahead of the slower ones."""
    ranks = range(transport.world_size)
    for turn in range(20):
        if turn % transport.world_size == transport.rank:
            time.sleep(0.005)
        outgoing = [message(transport.rank, target, turn) for target in ranks]
        incoming = transport.exchange(outgoing).wait() if turn % 3 else transport.gather(outgoing[0]).wait()
        for source in ranks:
            if source != transport.rank:
                target = transport.rank if turn % 3 else 0
                assert torch.equal(incoming[source], message(source, target, turn))
    return True


def sent_and_changed(transport: Transport) -> bool:
    """What was sent may be changed after wait(), while what was received stays until the next transfer."""
    others = [source for source in range(transport.world_size) if source != transport.rank]
    good = True
    for turn in range(5):
        outgoing = [
            torch.full((5000,), transport.rank + turn, dtype=torch.uint8) for _ in range(transport.world_size)
        ]
        received = transport.exchange(outgoing).wait()
        for message in outgoing:
            message.fill_(77)
        time.sleep(0.01)
        good &= all(received[source].eq(source + turn).all() for source in others)
    return good


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_message_to_rank_i_arrives_at_rank_i(run: Runner, world_size: int) -> None:
    for arrived, _ in run(exchange, world_size):
        assert arrived == [True] * world_size


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_gathered_message_arrives_at_all_ranks(run: Runner, world_size: int) -> None:
    for arrived, _ in run(gather, world_size):
        assert arrived == [True] * world_size


@pytest.mark.parametrize("world_size", [1, 3])
def test_where_all_ranks_know_the_sizes_none_are_sent(run: Runner, world_size: int) -> None:
    for rank, (arrived, sent_bytes) in enumerate(run(gather_known, world_size)):
        assert arrived == [True] * world_size
        assert sent_bytes == len(message(rank, 1)) * (world_size - 1)
    for rank, (arrived, sent_bytes) in enumerate(run(exchange_known, world_size)):
        assert arrived == [True] * world_size
        assert sent_bytes == sum(len(message(rank, peer)) for peer in range(world_size) if peer != rank)


@pytest.mark.parametrize("world_size", [1, 3])
def test_sent_bytes_are_the_messages_to_others_and_their_sizes(run: Runner, world_size: int) -> None:
    for rank, (_, sent_bytes) in enumerate(run(exchange, world_size)):
        others = [message(rank, target) for target in range(world_size) if target != rank]
        assert sent_bytes == sum(len(m) for m in others) + 8 * len(others)
    for rank, (_, sent_bytes) in enumerate(run(gather, world_size)):
        assert sent_bytes == (len(message(rank, 1)) + 8) * (world_size - 1)


def test_transfers_in_a_row_stay_in_order(run: Runner) -> None:
    assert run(many, 3) == [True] * 3


def test_received_messages_stay_until_the_next_transfer(run: Runner) -> None:
    assert run(sent_and_changed, 3) == [True] * 3


def wait_in_vain(transport: Transport, given_up: Path) -> tuple[str, float]:
    """Rank 1 sends nothing; the other gives up after half a second, and makes a file for which rank 1 waits."""
    start = time.monotonic()
    if transport.rank == 1:
        stay_until(given_up)
        return "", 0.0
    try:
        transport.exchange([torch.ones(3, dtype=torch.uint8)] * transport.world_size).wait(timeout=0.5)
    except TransportError as error:
        given_up.touch()
        return str(error), time.monotonic() - start
    return "no error", 0.0


def test_a_silent_peer_is_named_after_the_time_out(run: Runner, tmp_path: Path) -> None:
    text, seconds = run(wait_in_vain, 2, tmp_path / "given up")[0]
    assert "rank 0" in text.splitlines()[0]
    assert "rank 1" in text.splitlines()[0]
    assert seconds > 0.4


def test_a_lost_loopback_rank_is_named_at_once() -> None:
    hub = LoopbackHub(2)
    hub.disconnect(1)
    with pytest.raises(TransportError, match="rank 0 lost rank 1"):
        hub.transport(0).gather(torch.ones(3, dtype=torch.uint8)).wait()


def abort(transport: Transport, waiting: int, woken: Path) -> tuple[str, float]:
    """Rank 0 breaks its connections while a rank, itself or the other, waits for a message that never comes.

    The rank that waits makes the file when it is woken; the other stays until then.
    """
    start = time.monotonic()
    if transport.rank == 0:
        threading.Timer(0.5, transport.abort).start()
    if transport.rank != waiting:
        stay_until(woken)
        return "", 0.0
    try:
        transport.exchange([torch.ones(3, dtype=torch.uint8)] * 2).wait(timeout=2 * PATIENCE_SECONDS)
    except TransportError as error:
        woken.touch()
        return str(error), time.monotonic() - start
    return "no error", 0.0


@pytest.mark.parametrize("waiting", [0, 1])
def test_an_abort_wakes_who_waits_here_and_elsewhere(run: Runner, tmp_path: Path, waiting: int) -> None:
    text, seconds = run(abort, 2, waiting, tmp_path / "woken")[waiting]
    assert f"rank {waiting} lost rank {1 - waiting}" in text
    assert seconds > 0.4


def die(rank: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    transport = ProcessGroupTransport(group)
    transport.gather(torch.ones(3, dtype=torch.uint8)).wait()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    transport.gather(torch.ones(3, dtype=torch.uint8)).wait()


def test_a_killed_gloo_rank_is_named_at_once() -> None:
    first, second = run_failing_ranks(die, 2)
    assert isinstance(first.error, TransportError)
    assert "rank 0 lost rank 1" in str(first.error)
    assert second.exit_code == -signal.SIGKILL


def refused(rank: int) -> str:
    group = dist.group.WORLD
    assert group is not None
    try:
        ProcessGroupTransport(group, torch.device("cuda"))
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_a_group_without_a_backend_for_the_device_is_refused() -> None:
    (text,) = run_ranks(refused, 1)
    assert "expected: the backend nccl for cuda" in text


def siblings(transport: Transport) -> list[bool]:
    """A transfer on each of two transports at once; then one of them closes, twice."""
    own = transport.sibling()
    ranks = range(transport.world_size)
    works = [
        each.exchange([message(transport.rank, target) for target in ranks]) for each in (own, transport)
    ]
    good = [
        torch.equal(received, message(source, transport.rank))
        for work in works
        for source, received in enumerate(work.wait())
    ]
    own.close()
    own.close()
    return good + exchange(transport)[0]


def test_a_sibling_has_connections_of_its_own_and_closes_twice(run: Runner) -> None:
    assert run(siblings, 3) == [[True] * 9] * 3


def closed_late(rank: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    late = ProcessGroupTransport(group).sibling()
    dist.destroy_process_group()
    late.close()


def test_a_gloo_sibling_closes_after_torch_was_shut_down() -> None:
    run_ranks(closed_late, 2)
