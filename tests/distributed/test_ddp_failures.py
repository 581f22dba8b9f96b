"""What goes wrong stops every rank, soon, with an error that names it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from efficient_dl.errors import (
    ConfigError,
    CorruptPacket,
    EdlError,
    PlanMismatch,
    RanksDiverged,
    TransportError,
    UnsupportedTensor,
)
from tests.distributed.launch import run_failing_ranks, run_ranks
from tests.distributed.meeting import stay_until

SOON = 100.0  # seconds, on a machine that may be busy; the time-out LATE is longer than a test may take
LATE = 250.0


def ddp(**options: Any) -> DistributedDataParallel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 5))
    return DistributedDataParallel(net, bucket_cap_mb=0.05, **options)


def step(model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 20)).square().mean().backward()
    optimizer.step()


def with_options(rank: int, options: list[dict[str, Any]]) -> None:
    model = ddp()
    edl.compress(model, torch.optim.SGD(model.parameters(), lr=0.1), **options[rank])


DIFFERENT: dict[str, list[dict[str, Any]]] = {
    "plan.bits = none (rank 2), auto (rank 0)": [{}, {}, {"bits": "none"}],
    "shadow = True (rank 1), False (rank 0)": [{}, {"shadow": True}, {}],
    "check_every = 7 (rank 1), 50 (rank 0)": [{}, {"check_every": 7}, {}],
    "kernel = reference (rank 2), native (rank 0)": [{}, {}, {"kernel": "reference"}],
    "extra.data = b (rank 1), a (rank 0)": [{"extra": {"data": "a"}}, {"extra": {"data": "b"}}, {}],
}


def mismatches(rank: int) -> list[str]:
    texts = []
    for options in DIFFERENT.values():
        with pytest.raises(PlanMismatch) as caught:
            with_options(rank, options)
        texts.append(str(caught.value))
    torch.distributed.barrier()  # a rank that leaves early breaks the other's first connection to it
    return texts


def test_different_options_are_named_on_every_rank() -> None:
    for texts in run_ranks(mismatches, 3):
        assert all(difference in text for difference, text in zip(DIFFERENT, texts, strict=True)), texts


def test_an_impossible_option_on_one_rank_stops_all() -> None:
    outcomes = run_failing_ranks(with_options, 3, [{}, {"bits": 99}, {}])
    assert isinstance(outcomes[1].error, ConfigError)
    for rank in (0, 2):
        assert isinstance(outcomes[rank].error, PlanMismatch)
        assert "rank 1 cannot start: ConfigError" in str(outcomes[rank].error)
    assert all(outcome.seconds < SOON for outcome in outcomes)


def frozen_on_one_rank(rank: int) -> None:
    model = ddp()
    if rank == 1:
        model.module[0].weight.requires_grad_(False)
    edl.compress(model, bits=2.0)


def test_a_parameter_frozen_on_one_rank_is_named() -> None:
    for outcome in run_failing_ranks(frozen_on_one_rank, 2):
        assert isinstance(outcome.error, PlanMismatch)
        assert "parameters.0.weight = torch.float32 [200, 20] on cpu, frozen (rank 1)" in str(outcome.error)


def leaving(
    rank: int, how: str, timeout: float, options: dict[str, Any], given_up: Path | None = None
) -> None:
    """Rank 1 leaves in the fourth step; a silent one stays until rank 0 has made the file given_up."""
    model = ddp(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    edl.compress(model, optimizer, 2.0, timeout=timeout)
    for number in range(6):
        if rank == 1 and number == 3:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if given_up is not None:
                return stay_until(given_up)
            if how == "raises":
                raise ValueError("the user's own")
        try:
            step(model, optimizer)
        except TransportError:
            if given_up is not None:
                given_up.touch()
            raise


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}])
def test_a_killed_rank_is_a_transport_error_on_the_others(options: dict[str, Any]) -> None:
    outcomes = run_failing_ranks(leaving, 3, "killed", LATE, options)
    for rank in (0, 2):
        assert isinstance(outcomes[rank].error, TransportError)
        assert f"rank {rank} lost rank" in str(outcomes[rank].error)
        assert outcomes[rank].seconds < SOON


def test_an_exception_on_one_rank_ends_the_others() -> None:
    outcomes = run_failing_ranks(leaving, 3, "raises", LATE, {})
    assert [type(outcome.error) for outcome in outcomes] == [TransportError, ValueError, TransportError]
    assert all(outcome.seconds < SOON for outcome in outcomes)


@pytest.mark.slow
def test_a_silent_rank_is_given_up_after_the_time_out(tmp_path: Path) -> None:
    outcomes = run_failing_ranks(leaving, 2, "silent", 5.0, {}, tmp_path / "given up")
    assert outcomes[1].error is None, outcomes[1].trace
    assert isinstance(outcomes[0].error, TransportError)
    assert "rank 0 lost rank 1" in str(outcomes[0].error)
    assert outcomes[0].seconds > 5.0


def diverging(rank: int) -> int:
    model = ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    edl.compress(model, optimizer, bits="identity", check_every=3)
    for number in range(6):
        step(model, optimizer)
        if rank == 2 and number == 1:
            with torch.no_grad():
                model.module[2].bias[3] += 1e-6
    return 0


def test_diverged_parameters_are_named_on_every_rank() -> None:
    for outcome in run_failing_ranks(diverging, 3):
        assert isinstance(outcome.error, RanksDiverged)
        assert "after step 3" in str(outcome.error)
        assert "rank 2 from rank 0" in str(outcome.error)
        assert "first in '2.bias'; in 1 of 6 parameters" in str(outcome.error)


def corrupting(rank: int, folder: Path) -> None:
    """Rank 1 damages what it sends. Whoever notices lives until all have stopped: only we can tell the others."""
    model = ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compression = edl.compress(model, optimizer, bits=2.0, timeout=LATE)
    encode = compression._compressor.encode

    def damaged(*arguments: Any, **options: Any) -> Tensor:
        packet = encode(*arguments, **options)
        packet[-1] ^= 1
        return packet

    if rank == 1:
        compression._compressor.encode = damaged  # type: ignore[method-assign]
    try:
        step(model, optimizer)
    except EdlError as error:
        (folder / str(rank)).touch()
        if isinstance(error, CorruptPacket):
            for other in range(3):
                stay_until(folder / str(other))
        raise


@pytest.mark.slow
def test_a_damaged_packet_stops_every_rank_while_the_one_that_noticed_lives_on(tmp_path: Path) -> None:
    outcomes = run_failing_ranks(corrupting, 3, tmp_path)
    kinds = [type(outcome.error) for outcome in outcomes]
    assert CorruptPacket in kinds
    assert set(kinds) <= {CorruptPacket, TransportError}


def refused(rank: int) -> list[str]:
    """The kinds of errors for models that cannot be compressed."""
    hooked = ddp()
    edl.compress(hooked, bits=2.0)
    found = []
    for model, options in [
        (nn.Linear(3, 3), {}),
        (hooked, {}),
        (ddp(), {"check_every": -1}),
        (ddp(), {"bits": "losless"}),
        (ddp(), {"kernel": "cuda"}),
        (ddp(), {"max_relative_error": 0.0}),
        (ddp(), {"on_alarm": "stop"}),
        (ddp(), {"on_alarm": "disable"}),
    ]:
        try:
            edl.compress(model, **{"bits": 2.0, **options})
        except (ConfigError, UnsupportedTensor) as error:
            found.append(f"{type(error).__name__}: {error.problem}")
    return found


def test_what_cannot_be_compressed_is_refused_with_the_reason() -> None:
    assert (
        run_ranks(refused, 2)
        == [
            [
                "ConfigError: compress() cannot take a Linear",
                "ConfigError: the model has a communication hook already",
                "ConfigError: check_every is negative",
                "ConfigError: unknown codec 'losless'",
                "ConfigError: unknown codec kernel",
                "ConfigError: max_relative_error must be positive",
                "ConfigError: unknown on_alarm 'stop'",
                'ConfigError: on_alarm="disable" needs the comparison of parameters',
            ]
        ]
        * 2
    )


def closed(rank: int) -> str:
    model = ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compression = edl.compress(model, optimizer, 2.0)
    step(model, optimizer)
    compression.close()
    compression.close()
    try:
        step(model, optimizer)
    except Exception as error:
        return str(error)
    return "no error"


def test_training_on_after_close_is_an_error() -> None:
    assert all("after close()" in text for text in run_ranks(closed, 2))


SCRIPT = """
    import json, os, sys, threading, time
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    import torch._dynamo  # DDP would import it, in each process
    import efficient_dl as edl
    import efficient_dl.integrations.compress
    from efficient_dl.comm import BucketLayout

    folder = sys.argv[1]
    processes = {}
    for how in ("nothing", "destroyed", "in flight"):
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                break
            processes[pid] = f"{how}, rank {rank}"
        if pid == 0:
            break
    if pid != 0:
        codes = {}
        while processes:
            pid, status = os.wait()
            name = processes.pop(pid)
            codes[name] = os.waitstatus_to_exitcode(status)
            for other in processes:
                if (name, processes[other]) == ("in flight, rank 0", "in flight, rank 1"):
                    os.kill(other, 9)  # it waits for nothing
        print(json.dumps(codes))
        sys.exit()

    # Of each child, what follows is the rest of its main program: it ends as an interpreter ends.
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/{how}", 2), rank=rank, world_size=2)
    model = DistributedDataParallel(nn.Linear(300, 300))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compression = edl.compress(model, optimizer, 2.0)
    for step in range(3):
        if how == "in flight" and step == 2:
            if rank == 0:          # leave while our threads wait for rank 1
                layout = BucketLayout.of(["weight", "bias"], [90000, 300], 2)
                started = compression._backward.engine.start(torch.zeros(90300), layout)
                raise SystemExit(7)
            time.sleep(200)
        model(torch.randn(4, 300)).sum().backward()
        optimizer.step()
    if how == "destroyed":
        dist.destroy_process_group()
    else:
        assert threading.active_count() > 1  # ours are still there when the interpreter ends
"""


@pytest.mark.slow
@pytest.mark.timeout(250)  # a fresh interpreter imports torch
def test_processes_that_never_close_end_by_themselves(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as parent:
        try:
            printed, errors = parent.communicate(timeout=200)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
    assert parent.returncode == 0, errors.decode()
    codes = json.loads(printed)
    assert codes.pop("in flight, rank 0") == 7, errors.decode()
    assert codes.pop("in flight, rank 1") == -signal.SIGKILL
    ended = {f"{how}, rank {rank}": 0 for how in ("nothing", "destroyed") for rank in range(2)}
    assert codes == ended, errors.decode()
