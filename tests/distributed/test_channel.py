"""A channel hands tensors on in order, whole, as fast as both ends allow, and says who is gone."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.codec import make_codec
from efficient_dl.comm import ProcessGroupTransport
from efficient_dl.comm.channel import ChannelTotals, TensorReceiver, TensorSender
from efficient_dl.errors import CorruptPacket, TransportError
from tests.distributed.launch import run_failing_ranks, run_ranks

TENSORS = [
    torch.arange(24, dtype=torch.int64).reshape(2, 3, 4),
    torch.randn(3, 5, generator=torch.Generator().manual_seed(1)),
    torch.tensor([float("nan"), -0.0, float("inf")]),
    torch.empty(0, 7),
    torch.tensor(2.5, dtype=torch.float64),
    torch.tensor([True, False, True]),
    torch.randn(40, 30, generator=torch.Generator().manual_seed(2)).bfloat16(),
]


def transport_of(timeout: float = 20.0) -> ProcessGroupTransport:
    return ProcessGroupTransport(dist.new_group(), timeout=timeout)


def handed_on(rank: int, codec_name: str | None) -> tuple[list[Tensor], ChannelTotals]:
    """Rank 0 to rank 1, and at the same time rank 1 to rank 0, with the same tag."""
    codec = make_codec(codec_name) if codec_name else None
    transport = transport_of()
    sender = TensorSender(transport, 1 - rank, 16, codec, 2)
    receiver = TensorReceiver(transport, 1 - rank, 16, codec, 2, len(TENSORS))
    putting = threading.Thread(target=lambda: [sender.put(one) for one in TENSORS])
    putting.start()
    received = [receiver.get() for _ in TENSORS]
    putting.join()
    sender.finish()
    receiver.join(10.0)
    with pytest.raises(RuntimeError, match="opened for 7 messages"):
        receiver.get()
    return received, sender.totals


@pytest.mark.parametrize("codec_name", [None, "lossless"])
def test_tensors_arrive_bit_for_bit_in_order(codec_name: str | None) -> None:
    for received, totals in run_ranks(handed_on, 2, codec_name):
        for before, after in zip(TENSORS, received, strict=True):
            assert after.dtype == before.dtype
            assert after.shape == before.shape
            assert torch.equal(_bits(after), _bits(before))
        header = 8 * 12
        assert totals.raw_bytes == sum(header + one.numel() * one.element_size() for one in TENSORS)
        assert totals.messages == len(TENSORS)
        if codec_name is None:
            assert totals.wire_bytes == totals.raw_bytes


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def squeezed(rank: int) -> tuple[float, int, int]:
    codec = make_codec("bits:4.0")
    transport = transport_of()
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3))
    if rank == 0:
        sender = TensorSender(transport, 1, 16, codec, 1)
        sender.put(x)
        sender.finish()
        return 0.0, sender.totals.wire_bytes, sender.totals.raw_bytes
    receiver = TensorReceiver(transport, 0, 16, codec, 1, 1)
    return float((receiver.get() - x).norm() / x.norm()), 0, 0


def test_a_lossy_channel_sends_about_its_bits() -> None:
    (_, wire_bytes, raw_bytes), (error, _, _) = run_ranks(squeezed, 2)
    assert 0.11 < wire_bytes / raw_bytes < 0.14
    assert 0.01 < error < 0.15


def ahead(rank: int) -> tuple[int, int]:
    """The sender puts as fast as it can, the receiver takes its time: how far it got ahead."""
    transport = transport_of()
    if rank == 0:
        sender = TensorSender(transport, 1, 16, None, 2)
        for step in range(30):
            sender.put(torch.full((10,), float(step)), mark=step)
        sender.finish()
        return 0, 0
    receiver = TensorReceiver(transport, 0, 16, None, 2, 30)
    while not receiver._queue.full():  # however slow the sender's machine is
        time.sleep(0.01)
    values = []
    for _ in range(30):
        time.sleep(0.01)
        values.append(int(receiver.get()[0]))
    assert values == list(range(30))
    return receiver.totals.lead_most, receiver.totals.messages


def test_the_lead_is_bounded_by_the_queues() -> None:
    _, (most, messages) = run_ranks(ahead, 2)
    assert 1 <= most <= 4  # two in the queue, one in the thread's hands, one that is being taken
    assert messages == 30


def many(rank: int) -> int:
    """Four channels between each two of three ranks, all at once, over one group."""
    transport = transport_of()
    peers = [peer for peer in range(3) if peer != rank]
    ends = [(peer, tag) for peer in peers for tag in range(16, 20)]
    senders = {end: TensorSender(transport, *end, None, 3) for end in ends}
    receivers = {end: TensorReceiver(transport, *end, None, 3, 50) for end in ends}

    def put_all(end: tuple[int, int]) -> None:
        for number in range(50):
            senders[end].put(torch.full((257 * (number % 5),), float(100 * end[1] + number)))

    putting = [threading.Thread(target=put_all, args=(end,)) for end in ends]
    for one in putting:
        one.start()
    wrong = 0
    for number in range(50):
        for end, receiver in receivers.items():
            tensor = receiver.get()
            wrong += tensor.numel() != 257 * (number % 5)
            wrong += bool((tensor != 100 * end[1] + number).any())
    for one in putting:
        one.join()
    for sender in senders.values():
        sender.finish()
    return wrong


def test_channels_side_by_side_do_not_mix() -> None:
    assert run_ranks(many, 3) == [0, 0, 0]


def killed(rank: int) -> None:
    transport = transport_of(timeout=250.0)  # longer than the test may take
    if rank == 0:
        sender = TensorSender(transport, 1, 16, None, 1)
        for _ in range(1000):
            sender.put(torch.zeros(10_000))
    receiver = TensorReceiver(transport, 0, 16, None, 1, 1000)
    receiver.get()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_receiver_is_named_to_the_sender() -> None:
    outcome = run_failing_ranks(killed, 2)[0]
    assert isinstance(outcome.error, TransportError), outcome.trace
    assert "rank 1" in str(outcome.error)


def silent(rank: int) -> None:
    transport = transport_of(timeout=1.0)
    if rank == 0:
        TensorReceiver(transport, 1, 16, None, 1, 1).get()
    time.sleep(3.0)


def test_a_silent_sender_is_a_time_out() -> None:
    outcome = run_failing_ranks(silent, 2)[0]
    assert isinstance(outcome.error, TransportError), outcome.trace
    assert "rank 1" in str(outcome.error)


def early(rank: int) -> float:
    """The receiver's thread waits for longer than the time-out; the receiver itself does not."""
    transport = transport_of(timeout=2.0)
    if rank == 0:
        time.sleep(5.0)
        sender = TensorSender(transport, 1, 16, None, 1)
        sender.put(torch.full((3,), 7.0))
        sender.finish()
        received = 7.0
    else:
        receiver = TensorReceiver(transport, 0, 16, None, 1, 1)
        time.sleep(5.0)
        received = float(receiver.get().mean())
    dist.barrier()
    return received


def test_what_is_received_ahead_of_need_is_not_late() -> None:
    assert run_ranks(early, 2) == [7.0, 7.0]


GARBLED = {
    "something else": [-5] * 12,
    "more bytes than the shape has": [0, 0, 2**50, 0, 1, 3, *[0] * 6],
}


def garbled(rank: int, header_values: list[int]) -> None:
    transport = transport_of(timeout=100.0)
    if rank == 0:
        header = torch.tensor(header_values)
        dist.send(header, group=transport.group, group_dst=1, tag=16)
        time.sleep(1.0)
    else:
        TensorReceiver(transport, 0, 16, None, 1, 1).get()


@pytest.mark.parametrize("case", GARBLED)
def test_a_garbled_header_is_corrupt(case: str) -> None:
    outcome = run_failing_ranks(garbled, 2, GARBLED[case])[1]
    assert isinstance(outcome.error, CorruptPacket), outcome.trace
