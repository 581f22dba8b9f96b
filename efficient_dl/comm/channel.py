"""Tensors from one rank to another, one after the other, ahead of their use: a bounded queue at each end.

The sender's thread encodes and sends, the receiver's thread receives and decodes, both beside the computation. A sender
gets at most `depth` messages ahead of its thread, and a receiver's thread at most `depth` ahead of its rank; then `put`
waits. The n-th `get` returns what the n-th `put` was given, so results depend on no clock. Nothing is sent back.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.codec import Codec
from efficient_dl.comm.process_group import ProcessGroupTransport
from efficient_dl.errors import CorruptPacket, TransportError

_POLL_SECONDS = 0.05
_AHEAD_SECONDS = 7 * 86_400.0
_MAX_DIMS = 7
_HEADER_NUMEL = 5 + _MAX_DIMS  # sequence number, mark, bytes, dtype, number of dims, dims
_HEADER_BYTES = 8 * _HEADER_NUMEL
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


@dataclass
class ChannelTotals:
    """Sums over one end of a channel, or over several. Bytes are counted where they are sent.

    raw_bytes: what the messages would have been uncompressed. waiting_seconds: of the computation, for the queue.
    lead: how many marks the sender was ahead of the message in use, as far as the receiver knew; summed, and the most.
    """

    messages: int = 0
    wire_bytes: int = 0
    raw_bytes: int = 0
    codec_seconds: float = 0.0
    waiting_seconds: float = 0.0
    lead_sum: int = 0
    lead_most: int = 0

    def add(self, other: ChannelTotals) -> None:
        """Adds another end's sums to these."""
        most = max(self.lead_most, other.lead_most)
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
        self.lead_most = most


class _End(ABC):
    """What both ends have: a thread, a queue, and the error that ended the thread."""

    def __init__(
        self, transport: ProcessGroupTransport, peer: int, tag: int, codec: Codec | None, depth: int
    ) -> None:
        if depth < 1:
            raise ValueError(f"a channel's queue holds at least one message, not {depth}")
        self.totals = ChannelTotals()
        self._transport = transport
        self._peer = peer
        self._tag = tag
        self._codec = codec
        self._queue: queue.Queue[tuple[Tensor, int] | None] = queue.Queue(depth)
        self._error: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._guarded, name=f"edl-channel-{tag}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread without waiting for messages; the transport's `abort` ends one that is in a transfer."""
        self._stopped.set()

    def join(self, timeout: float) -> None:
        """Waits until the thread has ended. Raises TransportError, or what ended the thread."""
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise self._late(timeout)

    def _guarded(self) -> None:
        try:
            self._run()
        except Exception as error:
            self._error = error

    @abstractmethod
    def _run(self) -> None:
        """What the thread does until it has ended."""

    def _late(self, timeout: float) -> TransportError:
        return TransportError(
            f"rank {self._peer} has taken or sent no activations for {timeout:g} s",
            where=f"channel {self._tag}",
            fix=f"read the end of rank {self._peer}'s log: it has stopped, is stuck or cannot be reached; or raise the "
            "time-out, if it only computes for longer",
        )

    def _wait_for_room(self, item: tuple[Tensor, int] | None) -> bool:
        """Puts an item into the queue from the thread's or the rank's side; False once the channel was stopped."""
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                if self._error is not None:
                    raise self._error from None
        return False

    def _finish(self, work: dist.Work | None, seconds: float | None = None) -> None:
        if work is not None:
            work.wait(timedelta(seconds=self._transport.timeout if seconds is None else seconds))


class TensorSender(_End):
    """The sending end.

    transport: of a gloo group; its ranks number `peer`. tag: tells this channel from others between the same two ranks;
    1 to 30,000. codec: encodes floating-point tensors; None sends them as they are. depth: messages in the queue.
    """

    def put(self, tensor: Tensor, mark: int = 0) -> None:
        """Sends a tensor of up to 7 dimensions; waits while the queue is full. It must not be changed afterwards.

        mark: any number that grows, such as the step; the receiver measures the lead by it. Raises TransportError.
        """
        if tensor.ndim > _MAX_DIMS or tensor.dtype not in _DTYPES:
            raise ValueError(f"no channel takes a tensor of {tensor.ndim} dimensions and {tensor.dtype}")
        begin = time.perf_counter()
        deadline = time.monotonic() + self._transport.timeout
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put((tensor.detach(), mark), timeout=_POLL_SECONDS)
                break
            except queue.Full:
                if time.monotonic() > deadline:
                    raise self._late(self._transport.timeout) from None
        self.totals.waiting_seconds += time.perf_counter() - begin

    def finish(self) -> None:
        """Waits until all that was put has been sent. Raises TransportError."""
        self._wait_for_room(None)
        self.join(self._transport.timeout)

    def _run(self) -> None:
        sequence = 0
        while not self._stopped.is_set():
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if item is None:
                return
            self._send(*item, sequence)
            sequence += 1

    def _send(self, tensor: Tensor, mark: int, sequence: int) -> None:
        begin = time.perf_counter()
        payload = self._payload(tensor)
        self.totals.codec_seconds += time.perf_counter() - begin
        dims = [*tensor.shape, *[0] * (_MAX_DIMS - tensor.ndim)]
        header = torch.tensor(
            [sequence, mark, payload.numel(), _DTYPES.index(tensor.dtype), tensor.ndim, *dims]
        )
        group = self._transport.group
        with self._transport.naming(self._peer, "sending activations to"):
            self._finish(dist.isend(header, group=group, group_dst=self._peer, tag=self._tag))
            if payload.numel():
                self._finish(dist.isend(payload, group=group, group_dst=self._peer, tag=self._tag))
        self.totals.messages += 1
        self.totals.wire_bytes += _HEADER_BYTES + payload.numel()
        self.totals.raw_bytes += _HEADER_BYTES + tensor.numel() * tensor.element_size()

    def _payload(self, tensor: Tensor) -> Tensor:
        with _current(tensor.device):
            values = tensor.contiguous()
            if _is_encoded(self._codec, tensor.dtype):
                assert self._codec is not None
                return self._codec.encode(values).cpu()
            return values.cpu().reshape(-1).view(torch.uint8)


class TensorReceiver(_End):
    """The receiving end.

    count: how many messages will come; after those its thread ends. codec: the sender's. device: of the tensors.
    """

    def __init__(
        self,
        transport: ProcessGroupTransport,
        peer: int,
        tag: int,
        codec: Codec | None,
        depth: int,
        count: int,
        device: torch.device | None = None,
    ) -> None:
        self._count = count
        self._device = device or torch.device("cpu")
        self._latest_mark = 0
        super().__init__(transport, peer, tag, codec, depth)

    def get(self) -> Tensor:
        """The next tensor. Raises TransportError, CorruptPacket."""
        begin = time.perf_counter()
        deadline = time.monotonic() + self._transport.timeout
        while True:
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                ended = not self._thread.is_alive()  # before the error, which it may set at its end
                if self._error is not None:
                    raise self._error from None
                if ended and self._queue.empty():
                    raise RuntimeError(f"channel {self._tag} was opened for {self._count} messages") from None
                if time.monotonic() > deadline:
                    raise self._late(self._transport.timeout) from None
        assert item is not None
        tensor, mark = item
        self.totals.waiting_seconds += time.perf_counter() - begin
        self.totals.lead_sum += self._latest_mark - mark
        self.totals.lead_most = max(self.totals.lead_most, self._latest_mark - mark)
        self.totals.messages += 1
        return tensor

    def _run(self) -> None:
        for sequence in range(self._count):
            if self._stopped.is_set():
                return
            tensor, mark = self._receive(sequence)
            self._latest_mark = mark
            if not self._wait_for_room((tensor, mark)):
                return

    def _receive(self, expected: int) -> tuple[Tensor, int]:
        header = torch.empty(_HEADER_NUMEL, dtype=torch.int64)
        # Received ahead of need, while the peer may wait for this very rank: only `get` says when it is late.
        self._fill(header, _AHEAD_SECONDS)
        sequence, mark, num_bytes, dtype_index, ndim, *dims = (int(number) for number in header)
        if (
            sequence != expected
            or not 0 <= dtype_index < len(_DTYPES)
            or not 0 <= ndim <= _MAX_DIMS
            or min(num_bytes, *dims) < 0
        ):
            raise CorruptPacket(
                "a message of activations is not the one that was expected",
                expected=f"number {expected} from rank {self._peer}",
                found=f"number {sequence}, dtype {dtype_index}, {ndim} dimensions, {num_bytes} bytes",
                where=f"channel {self._tag}",
                fix="start all ranks with one version and one configuration",
            )
        dtype, shape = _DTYPES[dtype_index], dims[:ndim]
        self._check_size(num_bytes, shape, dtype)  # before room is made for it
        payload = torch.empty(num_bytes, dtype=torch.uint8)
        if num_bytes:
            self._fill(payload)
        begin = time.perf_counter()
        with _current(self._device):
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
            if _is_encoded(self._codec, dtype):
                assert self._codec is not None
                self._codec.decode(payload.to(self._device), tensor)
            else:
                tensor.copy_(payload.view(dtype).reshape(shape))
        self.totals.codec_seconds += time.perf_counter() - begin
        return tensor, mark

    def _check_size(self, num_bytes: int, shape: list[int], dtype: torch.dtype) -> None:
        numel = math.prod(shape)
        if _is_encoded(self._codec, dtype):
            assert self._codec is not None
            most, least = self._codec.max_bytes(numel, dtype), 0
        else:
            most = least = numel * dtype.itemsize
        if not least <= num_bytes <= most:
            raise CorruptPacket(
                "a message of activations has another size than its header says",
                expected=f"{'' if least else 'at most '}{most} bytes for {shape} of {dtype}",
                found=f"{num_bytes} bytes",
                where=f"channel {self._tag} from rank {self._peer}",
                fix="start all ranks with one version and one configuration",
            )

    def _fill(self, room: Tensor, seconds: float | None = None) -> None:
        with self._transport.naming(self._peer, "receiving activations from"):
            work = dist.irecv(room, group=self._transport.group, group_src=self._peer, tag=self._tag)
            self._finish(work, seconds)


def _is_encoded(codec: Codec | None, dtype: torch.dtype) -> bool:
    return codec is not None and dtype.is_floating_point and dtype != torch.float64


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the thread's current one, where kernels are launched; a new thread begins on the first."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
