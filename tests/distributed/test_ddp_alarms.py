"""The kill switch ends compression on all ranks after the same step; alarms and curves tell what real runs did."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import efficient_dl as edl
from efficient_dl.errors import TransportError
from tests.distributed.launch import run_failing_ranks, run_ranks

Setup = tuple[DistributedDataParallel, torch.optim.Optimizer, edl.Compression]


def compressed(bits: str | float = 2.0, bucket_cap_mb: float = 0.01, **options: Any) -> Setup:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 5))
    model = DistributedDataParallel(net, bucket_cap_mb=bucket_cap_mb)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, edl.compress(model, optimizer, bits, **{"check_every": 3, **options})


def step(rank: int, number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(10 * number + rank)
    model(torch.randn(8, 20, generator=generator)).square().mean().backward()
    optimizer.step()


def messages_into(messages: list[str]) -> None:
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("efficient_dl").addHandler(handler)


def switched_off(rank: int) -> tuple[list[int], dict[str, Any], list[str], bool, list[Tensor]]:
    """Native bytes after each step; rank 1 has enough after the first step."""
    messages: list[str] = []
    messages_into(messages)
    model, optimizer, compression = compressed()
    native_bytes = []
    for number in range(6):
        step(rank, number, model, optimizer)
        native_bytes.append(compression.stats()["native_bytes"])
        if (rank, number) == (1, 0):
            compression.disable("the network is fast")
            compression.disable("a second reason")
    stats = compression.stats()
    kept = compression.state_dict()
    saved = [p.detach().clone() for p in model.parameters()]

    resumed, optimizer2, again = compressed()
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(kept)
    native = DistributedDataParallel(nn.Sequential(*(child for child in resumed.module.children())))
    for training, training_optimizer in ((model, optimizer), (resumed, optimizer2)):
        step(rank, 6, training, training_optimizer)
    # Beyond two ranks torch's sums depend on its buckets, which DDP rebuilds after a model's first step.
    equal = torch.equal if torch.distributed.get_world_size() == 2 else torch.allclose
    same = all(equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    native.load_state_dict(dict(zip(native.state_dict(), saved, strict=True)))
    step(rank, 6, native, torch.optim.SGD(native.parameters(), lr=0.1))
    same &= all(equal(a, b) for a, b in zip(model.parameters(), native.parameters(), strict=True))
    compression.check()
    return native_bytes, stats, messages, same, list(model.parameters())


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_rank_ends_compression_on_all_after_the_same_step(world_size: int) -> None:
    numel = 20 * 100 + 100 + 100 * 100 + 100 + 100 * 5 + 5
    for native_bytes, stats, messages, same, _ in run_ranks(switched_off, world_size):
        a_step = 2 * (world_size - 1) / world_size * 4 * numel
        assert native_bytes[:3] == [0, 0, 0]
        assert native_bytes[3:] == pytest.approx([a_step, 2 * a_step, 3 * a_step], rel=1e-3)
        assert stats["disabled"] == {"step": 3, "reason": "rank 1: the network is fast"}
        assert stats["steps"] == 6
        assert sum("compression is off after step 3" in message for message in messages) == 1
        assert any("stays off, as it was after step 3" in message for message in messages)
        assert same  # afterwards, and after a resume, its bits are those of DDP without us


def by_check(rank: int) -> tuple[Any, Any]:
    model, optimizer, compression = compressed(check_every=0)
    step(rank, 0, model, optimizer)
    if rank == 0:
        compression.disable("by hand")
    before = compression.stats()["disabled"]
    compression.check()
    step(rank, 1, model, optimizer)
    return before, compression.stats()["disabled"]


def test_without_regular_comparisons_check_ends_it() -> None:
    assert run_ranks(by_check, 2) == [(None, {"step": 1, "reason": "rank 0: by hand"})] * 2


def erring(rank: int, on_alarm: str) -> tuple[list[str], Any, bool]:
    """An error limit that 2 bits cannot keep, on rank 1 only as far as its own packets tell."""
    messages: list[str] = []
    messages_into(messages)
    model, optimizer, compression = compressed(max_relative_error=0.05, on_alarm=on_alarm)
    for number in range(45):
        step(rank, number, model, optimizer)
    compression.check()
    stats = compression.stats()
    return messages, stats["disabled"], [alarm["kind"] for alarm in stats["alarms"]] == ["error"]


def test_an_error_over_the_limit_warns_once() -> None:
    for rank, (messages, disabled, known) in enumerate(run_ranks(erring, 2, "warn")):
        assert len(messages) == 1
        assert messages[0].startswith(f"rank {rank}, step 20: the gradients' relative error is 0.")
        assert "over the limit of 0.05. Fix: more bits" in messages[0]
        assert disabled is None
        assert known


def test_an_error_over_the_limit_ends_compression_if_asked_to() -> None:
    for _, disabled, known in run_ranks(erring, 2, "disable"):
        assert disabled["step"] == 21  # the alarm comes with step 20, the next comparison with 21
        assert "rank 0: the gradients' relative error" in disabled["reason"]
        assert known


def slow_codec(rank: int, on_alarm: str) -> tuple[list[tuple[str, str]], Any]:
    """A codec that takes 60 ms longer for a packet than ours."""
    model, optimizer, compression = compressed(7.0, bucket_cap_mb=25, check_every=20, on_alarm=on_alarm)
    encode = compression._compressor.encode

    def slowly(x: Tensor, room: Tensor, shard: Any, tally: Any, *arguments: Any) -> Tensor:
        time.sleep(0.06)
        tally.totals.encode_seconds += 0.06
        return encode(x, room, shard, tally, *arguments)

    compression._compressor.encode = slowly  # type: ignore[method-assign]
    for number in range(42):
        step(rank, number, model, optimizer)
    stats = compression.stats()
    return [(alarm["kind"], alarm["text"]) for alarm in stats["alarms"]], stats["disabled"]


@pytest.mark.slow
@pytest.mark.parametrize("on_alarm", ["warn", "disable"])
def test_a_codec_slower_than_the_line_is_reported_alike_by_all_ranks(on_alarm: str) -> None:
    (alarms, disabled), other = run_ranks(slow_codec, 2, on_alarm)
    ((kind, text),) = alarms
    assert kind == "cost"
    cost = re.match(r"compression costs more time than it saves: the codec takes (\d+) ms a step", text)
    assert cost and int(cost[1]) >= 120, text  # two packets
    assert disabled == ({"step": 40, "reason": text} if on_alarm == "disable" else None)
    assert other == (alarms, disabled)


def leaving(rank: int) -> None:
    model, optimizer, compression = compressed(timeout=250.0, check_every=1)  # more than the test may take
    compression.disable("for the test")
    for number in range(5):
        if (rank, number) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        step(rank, number, model, optimizer)


def test_a_killed_rank_is_a_transport_error_after_the_switch_too() -> None:
    outcome = run_failing_ranks(leaving, 2)[0]
    assert isinstance(outcome.error, TransportError), outcome.trace


class Writer:
    """Takes what a SummaryWriter takes."""

    def __init__(self) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((step, value))


def curves(rank: int) -> tuple[dict[str, list[tuple[int, float]]], dict[str, Any]]:
    """Logged after steps 2 and 5, with a resume between."""
    model, optimizer, compression = compressed()
    writer = Writer()
    for number in range(2):
        step(rank, number, model, optimizer)
    compression.log_to(writer, 2, all_ranks=True)
    step(rank, 2, model, optimizer)
    state = compression.state_dict()
    compression.close()
    model, optimizer, compression = compressed()
    compression.load_state_dict(state)
    for number in range(3, 5):
        step(rank, number, model, optimizer)
    compression.log_to(writer if rank == 0 else None, 5, all_ranks=True)
    assert compression.interval()["steps"] == 5
    assert compression.interval()["steps"] == 0
    return writer.scalars, compression.stats(all_ranks=True)


def test_curves_have_what_each_interval_sent_even_over_a_resume() -> None:
    (scalars, stats), (other, _) = run_ranks(curves, 2)
    (first, second) = scalars["compression/wire_bytes_per_step"]
    assert (first[0], second[0]) == (2, 5)
    assert 2 * first[1] + 3 * second[1] == pytest.approx(stats["wire_bytes"])
    (first, second) = scalars["compression/2.weight/wire_bytes_apportioned"]
    assert first[1] + second[1] == pytest.approx(stats["parameters"]["2.weight"]["wire_bytes_apportioned"])
    for key in ("order0_bits", "model_bits", "bits_per_value", "codec_seconds_per_step", "ratio"):
        assert len(scalars[f"compression/{key}"]) == 2
    assert [step for step, _ in scalars["compression/relative_error"]] == [2]  # only step 1 was measured
    assert [step for step, _ in scalars["compression/2.weight/relative_error"]] == [2]
    assert len(other["compression/ratio"]) == 1
