"""The rules that hold in every integration, each as one check that all ranks run, one after the other in one group.

A check is given a `Rig`, which trains a small model with one integration, and asserts what a rank can see. What ranks
have to compare they gather first, so that all of them come to the same verdict.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from efficient_dl.errors import CorruptPacket, EdlError, PlanMismatch, RanksDiverged, TransportError


class Job(Protocol):
    """One model in training. compressors: of its gradients. all_compressors: of sharded weights, too."""

    compression: Any

    @property
    def compressors(self) -> Sequence[Any]: ...
    @property
    def all_compressors(self) -> Sequence[Any]: ...
    def step(self, number: int, poisoned: bool = False) -> None:
        """One optimizer step on this rank's batch of that number; poisoned: the last rank's loss is infinite."""

    def backward(self, number: int, at_input: Callable[[], None]) -> None:
        """A forward and a backward pass; at_input is called when the gradient has reached the model's input."""

    def parameters(self) -> dict[str, Tensor]: ...
    def gradients(self) -> dict[str, Tensor]: ...
    def loss_scale(self) -> float: ...
    def residuals(self) -> dict[str, Tensor]: ...
    def diverge(self) -> str:
        """Makes the last rank differ; returns what an error has to name."""

    def save(self) -> Any: ...
    def load(self, saved: Any) -> None: ...
    def close(self) -> None: ...


class Rig(Protocol):
    """Starts jobs of one integration. rules: that hold there. seen: see `observed`. all_bounded: options by which no
    message of it is exact."""

    rank: int
    size: int
    all_bounded: Mapping[str, Any]
    rules: Mapping[str, Callable[[Rig], None]]
    seen: dict[Any, Observed]

    def job(self, bits: Any, **options: Any) -> Job:
        """A fresh model with the same weights; bits None leaves the integration alone. half, scaled, fed_back: of the
        model and its gradients; other options are those of `compress`."""

    def local_gradients(self, number: int) -> dict[str, Tensor]:
        """The averages, in float32 and rank order, of what single models have as gradients of that batch."""


def train(job: Job, steps: int = 3, first: int = 0) -> Job:
    for number in range(first, first + steps):
        job.step(number)
    return job


def bits_of(tensors: Mapping[str, Tensor]) -> str:
    """Names every bit."""
    content = [t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values()]
    return xxhash.xxh3_64_hexdigest(b"".join(content))


def everyone(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@dataclass
class Observed:
    """What three steps came to: the weights' bits, encoded messages with the room for each, what torch was given."""

    weights: str
    stats: dict[str, Any]
    encoded: list[tuple[int, int]]
    sent: list[int]


def observed(rig: Rig, bits: Any, then: Callable[[Job], Any] = lambda job: None, **options: Any) -> Observed:
    """Trained once for all rules that ask. then: what else is done with the job, the first time."""
    key = (bits, *options.items())
    if key not in rig.seen:
        job, encoded = rig.job(bits, check_every=0, **options), []
        for compressor in job.all_compressors:
            note_lengths(compressor, encoded)
        with sent_messages() as sent:
            train(job)
            dist.barrier()
        rig.seen[key] = Observed(bits_of(job.parameters()), job.compression.stats(), encoded, sent)
        then(job)
        job.close()
    return rig.seen[key]


def note_lengths(compressor: Any, lengths: list[tuple[int, int]]) -> None:
    encode = compressor.encode

    def noting(x: Tensor, room: Tensor, shard: Any, *rest: Any, **more: Any) -> Tensor:
        message = encode(x, room, shard, *rest, **more)
        lengths.append((len(message), compressor.max_bytes(shard, x.dtype)))
        return message

    compressor.encode = noting


def error_of(action: Callable[[], Any]) -> EdlError | None:
    try:
        action()
    except EdlError as error:
        return error
    return None


@contextmanager
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("efficient_dl").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("efficient_dl").removeHandler(handler)


@contextmanager
def sent_messages() -> Iterator[list[int]]:
    """The bytes of every message that this process hands to torch.distributed from one rank to another."""
    sizes: list[int] = []
    isend = dist.isend

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(tensor.numel() * tensor.element_size())
        return isend(tensor, *arguments, **options)

    dist.isend = counting
    try:
        yield sizes
    finally:
        dist.isend = isend


# ------------------------------------------------------------------------------------------------------- the rules
def ranks_end_equal(rig: Rig) -> None:
    """Rule 1. What differs stops the run on all ranks, and is named."""

    def damage(job: Job) -> None:
        job.compression.check()
        named = job.diverge()
        error = error_of(job.compression.check)
        assert isinstance(error, RanksDiverged), error
        assert named in str(error), error

    found = observed(rig, 2.0, then=damage)
    assert len(set(everyone(found.weights))) == 1


def lossless_is_lossless(rig: Rig) -> None:
    """Rule 2, and 1 for exact codecs. Two ranks sum up as torch does, more in another order."""
    for half in ({}, {"half": True}):
        lossless, identity = (observed(rig, bits, **half) for bits in ("lossless", "identity"))
        assert {lossless.weights, identity.weights} == set(everyone(lossless.weights))
        assert lossless.stats["ratio"] > 1.0 == identity.stats["ratio"]
    if rig.size == 2:
        native = train(rig.job(None))
        assert bits_of(native.parameters()) == observed(rig, "lossless").weights
        native.close()


def reduced_in_one_shot(rig: Rig) -> None:
    """Rule 3. The sums are those of the ranks' own gradients in float32 and in rank order."""
    job = rig.job("identity", check_every=0)
    job.backward(5, lambda: None)
    found, expected = job.gradients(), rig.local_gradients(5)
    job.close()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name].view(-1), values.view(-1)), name


def what_leaves_is_counted(rig: Rig) -> None:
    """Rule 4. Size messages included."""
    for bits in ("lossless", 2.0):
        seen = observed(rig, bits)
        assert seen.stats["wire_bytes"] == sum(seen.sent) > 0
        assert seen.stats["bytes_source"] == "counted"


def overflows_skip_a_step(rig: Rig) -> None:
    """Rule 5. A value that is not finite on one rank reaches all scalers; the step leaves no trace in the residuals."""
    job = train(rig.job(1.0, fed_back=True, scaled=True, check_every=0), 2)
    before, scale, residuals = bits_of(job.parameters()), job.loss_scale(), job.residuals()
    job.step(2, poisoned=True)
    assert job.loss_scale() == scale / 2
    assert bits_of(job.parameters()) == before
    after = job.residuals()
    assert after and bits_of(after) == bits_of(residuals)
    assert all(bool(values.isfinite().all()) for values in after.values())
    train(job, 1, first=3)
    assert bits_of(job.parameters()) != before
    job.close()


def resumes_exactly(rig: Rig) -> None:
    """Rule 6. State is keyed by names, and a resumed run is one that never stopped."""
    job = train(rig.job(1.0, fed_back=True, check_every=2), 5)
    saved, kept = job.save(), job.residuals()
    train(job, 2, first=5)
    whole, counted = bits_of(job.parameters()), job.compression.stats()
    left = bits_of(job.residuals())
    names = set(job.parameters())
    job.close()
    assert kept and set(kept) <= names
    job = rig.job(1.0, fed_back=True, check_every=2)
    job.load(saved)
    assert bits_of(job.residuals()) == bits_of(kept)
    train(job, 2, first=5)
    stats = job.compression.stats()
    assert bits_of(job.parameters()) == whole
    assert bits_of(job.residuals()) == left
    assert [stats[key] for key in ("wire_bytes", "raw_bytes", "values_sent", "steps")] == [
        counted[key] for key in ("wire_bytes", "raw_bytes", "values_sent", "steps")
    ]
    job.close()


def messages_fit_their_rooms(rig: Rig) -> None:
    """Rule 8. Exact messages have the length that was told before, and never more than was made room for; bounded ones
    the length that the plan says, which nobody tells."""
    for bits in ("lossless", 2.0):
        seen = observed(rig, bits)
        assert all(length <= most for length, most in seen.encoded)
        # Beside numbers of 8 bytes, and messages whose size was told for all together, with one byte behind them.
        told = {length for length, _ in seen.encoded}
        assert set(seen.sent) & told
        assert all(size % 8 == 0 or size in told or size - 1 in told for size in seen.sent)
    seen = observed(rig, 2.0, **rig.all_bounded)
    assert seen.encoded and all(length == most for length, most in seen.encoded)
    assert seen.sent and set(seen.sent) <= {length for length, _ in seen.encoded}
    assert seen.stats["messages"] == "bounded" and seen.stats["wire_bytes"] == sum(seen.sent)
    assert len(set(everyone(seen.weights))) == 1


def reduces_beside_backward(rig: Rig) -> None:
    """Rule 9. The backward pass comes to the model's input while the first packet is still being encoded."""
    job = rig.job("identity", check_every=0)
    reached, in_time = threading.Event(), []
    for compressor in job.compressors:

        def waiting(*arguments: Any, _encode: Any = compressor.encode, **options: Any) -> Tensor:
            in_time.append(reached.wait(20))
            return _encode(*arguments, **options)

        compressor.encode = waiting
    job.backward(0, reached.set)
    job.close()
    assert in_time and all(in_time)


def only_the_seed_decides(rig: Rig) -> None:
    """Rule 10. Torch's generator decides nothing, and is not touched."""
    job = rig.job(2.0, check_every=0)
    torch.manual_seed(1000 + rig.rank)
    state = torch.get_rng_state()
    train(job)
    assert torch.equal(torch.get_rng_state(), state)
    assert bits_of(job.parameters()) == observed(rig, 2.0).weights
    job.close()


def slow_ranks_change_no_order(rig: Rig) -> None:
    """Rule 11. Packets that take other ranks longer are sent in the same order, and come to the same sums."""
    job = rig.job(2.0, check_every=1)
    turns = itertools.count(1 + rig.rank, 1 + rig.rank)
    for compressor in job.compressors:

        def late(*arguments: Any, _encode: Any = compressor.encode, **options: Any) -> Tensor:
            time.sleep(0.002 * (next(turns) % 3))
            return _encode(*arguments, **options)

        compressor.encode = late
    train(job)
    assert bits_of(job.parameters()) == observed(rig, 2.0).weights
    job.close()


def differences_stop_the_start(rig: Rig) -> None:
    """Rule 12."""
    error = error_of(lambda: rig.job(1.5 if rig.rank == rig.size - 1 else 2.0))
    assert isinstance(error, PlanMismatch), error
    texts = everyone(str(error))  # on a mesh the difference is seen on one axis, and told on the other
    assert any("plan.bits = 1.5 (rank " in text for text in texts), texts


def damage_is_named(rig: Rig) -> None:
    """Rule 7. A flipped bit in the last rank's packets ends all ranks. The last check: connections are broken."""
    job = rig.job(2.0, check_every=0, timeout=300.0)  # longer than the whole job may take
    train(job, 1)
    if rig.rank == rig.size - 1:
        for compressor in job.compressors:

            def damaged(*arguments: Any, _encode: Any = compressor.encode, **options: Any) -> Tensor:
                message = _encode(*arguments, **options)
                message[-1] ^= 1
                return message

            compressor.encode = damaged
    error = error_of(lambda: train(job, 1, first=1))
    assert isinstance(
        error, CorruptPacket if rig.size == 2 and rig.rank == 0 else (CorruptPacket, TransportError)
    )
    if isinstance(error, CorruptPacket):
        assert f"rank {rig.size - 1}'s packet" in str(error), error


BESIDE_BACKWARD = "9 reductions run beside backward"
RULES: dict[str, Callable[[Rig], None]] = {
    "1 every rank ends bitwise equal": ranks_end_equal,
    "2 lossless is lossless": lossless_is_lossless,
    "3 one-shot reduction in rank order": reduced_in_one_shot,
    "4 the meter counts what leaves": what_leaves_is_counted,
    "5 overflows skip a step without a trace": overflows_skip_a_step,
    "6 a resumed run never stopped": resumes_exactly,
    "8 messages are as long as told, or planned": messages_fit_their_rooms,
    BESIDE_BACKWARD: reduces_beside_backward,
    "10 only the seed decides": only_the_seed_decides,
    "11 one order of collectives": slow_ranks_change_no_order,
    "12 differences stop the start": differences_stop_the_start,
    "7 damaged bytes name their rank": damage_is_named,  # the last, because it breaks the connections
}


def verdicts(rig: Rig) -> dict[str, str]:
    """Each rule's failure on this rank, "" if there is none; what follows on a failure is not run."""
    found: dict[str, str] = {}
    failed = ""
    for name, check in rig.rules.items():
        if failed:
            found[name] = f"not run, because {failed!r} failed before"
            continue
        try:
            check(rig)
            found[name] = ""
        except Exception:
            found[name], failed = traceback.format_exc(), name
    return found
