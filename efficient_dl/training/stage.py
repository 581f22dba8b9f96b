"""One decision of the coordinator carried out on one rank: its partitions, their groups, and the streams between."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from efficient_dl.codec import make_codec
from efficient_dl.comm import ProcessGroupTransport
from efficient_dl.comm.channel import ChannelTotals
from efficient_dl.config import Config
from efficient_dl.coordinator.assignment import Decision
from efficient_dl.errors import CheckpointError, CorruptPacket
from efficient_dl.integrations.ddp_compression import Compression
from efficient_dl.local_learning.blocks import Blocks
from efficient_dl.local_learning.feature_cache import FeatureCache, fingerprint
from efficient_dl.local_learning.held import Frozen, Held, Trained, body_of
from efficient_dl.local_learning.host import Host
from efficient_dl.local_learning.selection import Selection
from efficient_dl.local_learning.streams import StreamOptions, Streams
from efficient_dl.training import measure
from efficient_dl.training.end_to_end import compressed, sync_buffers_argument
from efficient_dl.training.optimizers import Optimizer
from efficient_dl.training.partition_wishes import wishes_of

_log = logging.getLogger(__name__)


@dataclass
class Traffic:
    """What this rank sent and what that cost: gradients inside partitions, activations between them."""

    wire_bytes: float = 0.0
    raw_bytes: float = 0.0
    values_sent: float = 0.0
    codec_seconds: float = 0.0
    activation_bytes: float = 0.0  # the part of wire_bytes that went forward
    waiting_seconds: float = 0.0  # of the computation, for activations

    def plus(self, other: Traffic) -> Traffic:
        mine, theirs = asdict(self), asdict(other)
        return Traffic(**{key: mine[key] + theirs[key] for key in mine})


@dataclass
class Groups:
    """The process groups of partitions, made once for each set of ranks and kept for the run; all ranks take part."""

    timeout_seconds: float
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = field(
        default_factory=dict
    )  # None: of other ranks

    def make(self, sets: Sequence[tuple[int, ...]]) -> None:
        """Those that are not there yet; all ranks of the run call it with the same sets."""
        for ranks in sorted(set(sets)):
            if len(ranks) > 1 and ranks not in self.made:
                group = dist.new_group(list(ranks), timeout=timedelta(seconds=self.timeout_seconds))
                self.made[ranks] = group if isinstance(group, dist.ProcessGroup) else None

    def close(self) -> None:
        """Destroy them all."""
        for group in self.made.values():
            if group is not None:
                dist.destroy_process_group(group)
        self.made.clear()


class Stage:
    """What this rank does until decision.until_step.

    blocks: of a fresh copy of the model, of which this keeps what it holds.
    state: by name, what its partitions start from: a checkpoint's tensors; None: the run's beginning.
    passes: micro-batches of every pass of the stage, steps and evaluations, on all ranks the same.
    features: a folder of this rank's for what a frozen beginning makes of samples, where nothing but this stage's is
    kept; None: it is computed every time.
    """

    def __init__(
        self,
        config: Config,
        decision: Decision,
        blocks: Blocks,
        groups: Groups,
        transport: ProcessGroupTransport,
        state: Mapping[str, Tensor] | None,
        passes: Sequence[int],
        device: torch.device,
        fingerprint: str,
        autocast: Callable[[], Any],
        features: Path | None,
    ) -> None:
        self.decision = decision
        self._config, self._device, self._fingerprint = config, device, fingerprint
        self._transport, self._autocast = transport, autocast
        self._names = {one.index: dict(one.names) for one in blocks.partitions}
        assignment = decision.assignment
        pairs = zip(assignment.ranks, decision.training, strict=True)
        groups.make([ranks for ranks, trains in pairs if trains])  # the others exchange no gradients
        self.compressions: dict[int, Compression] = {}
        self.held: list[Held] = []
        self._streamed = ChannelTotals()  # by streams that have ended
        try:
            for index in assignment.of_rank(dist.get_rank()):
                self.held.append(self._make(index, blocks, groups.made.get(assignment.ranks[index]), state))
        except BaseException:  # nobody else knows what there is to abort
            for compression in self.compressions.values():
                compression.abort()
            raise
        self.features = self._cache(features)
        self._open(passes)
        self._before = {index: compression.stats() for index, compression in self.compressions.items()}

    def renew(self, decision: Decision, passes: Sequence[int]) -> None:
        """Go on for another stage, in which everything stays where it is."""
        assert not self.moves(decision)
        self._streams.finish()
        self._streamed.add(self._streams.totals())
        self.decision = decision
        self._open(passes)

    def moves(self, decision: Decision) -> bool:
        """Whether a partition changes ranks, or begins or ends to train."""
        now = self.decision
        return (decision.assignment, decision.training) != (now.assignment, now.training)

    def traffic(self) -> Traffic:
        """Since the stage's start, or that of the first one that it renewed."""
        totals = self._streams.totals()
        totals.add(self._streamed)
        sums = Traffic(
            wire_bytes=totals.wire_bytes,
            raw_bytes=totals.raw_bytes,
            codec_seconds=totals.codec_seconds,
            activation_bytes=totals.wire_bytes,
            waiting_seconds=totals.waiting_seconds,
        )
        for index, compression in self.compressions.items():
            now, before = compression.stats(), self._before[index]
            keys = ("wire_bytes", "raw_bytes", "values_sent", "codec_seconds")
            sums = sums.plus(Traffic(**{key: now[key] - before[key] for key in keys}))
        return sums

    def leads(self) -> dict[int, tuple[float, int]]:
        """By partition that receives here: how many steps its source was ahead, on average and at most."""
        return self._streams.leads()

    def tensors(self) -> dict[str, Tensor]:
        """The state of the partitions held here, by name, not copied; buffers are those of a partition's first rank."""
        state: dict[str, Tensor] = {}
        for one in self.held:
            names = self._names[one.index]
            state |= {f"model/{names[key]}": value for key, value in body_of(one).state_dict().items()}
            if isinstance(one, Trained):
                head = one.block.head.state_dict()
                state |= {f"head/{one.index}/{key}": value for key, value in head.items()}
                assert isinstance(one.optimizer, Optimizer)
                own = one.optimizer.state_dict()
                state |= {f"optimizer/{one.index}/{key}": value for key, value in own.items()}
        return state

    def restore_compressions(self, states: Mapping[int, dict[str, Any]]) -> None:
        """Their states of a checkpoint from the middle of this stage; bytes are counted from here on."""
        for index, state in states.items():
            self.compressions[index].load_state_dict(state)
        self._before = {index: compression.stats() for index, compression in self.compressions.items()}

    def sync_buffers(self) -> None:
        """Take the running statistics of a partition's first rank on all of them, as its next step would."""
        for one in self.held:
            if isinstance(one, Trained) and isinstance(one.forward, DistributedDataParallel):
                group = one.forward.process_group
                for buffer in _trained_buffers(one.block):
                    dist.broadcast(buffer, src=dist.get_process_group_ranks(group)[0], group=group)

    def finish(self) -> None:
        """End the stage, with nothing left on the way. Raises TransportError."""
        self._streams.finish()
        self._close()

    def abort(self) -> None:
        """Give up at any moment: break this rank's connections, so that no other rank waits for it."""
        self._streams.stop()
        for compression in self.compressions.values():
            compression.abort()
        if self.features is not None:
            self.features.close()

    def _open(self, passes: Sequence[int]) -> None:
        local, rank = self._config.local, dist.get_rank()
        codec = None if local.activations == "identity" else make_codec(_codec_name(local.activations))
        options, assignment = StreamOptions(codec, local.queue), self.decision.assignment
        self._streams = Streams(assignment, self._transport, passes, options, self._device)
        self.host = Host(
            rank,
            assignment,
            self.held,
            self._streams,
            local.window,
            self._autocast,
            selection_of(self._config),
        )
        if self.features is not None:
            self.host.read_frozen(self.features.features)

    def _close(self) -> None:
        for compression in self.compressions.values():
            compression.close()
        if self.features is not None:
            self.features.close()

    def _cache(self, folder: Path | None) -> FeatureCache | None:
        """Of what the frozen partitions make that are before all that train."""
        bodies = [body_of(one) for one in itertools.takewhile(lambda one: isinstance(one, Frozen), self.held)]
        if folder is None or not 0 < len(bodies) < len(self.held):
            return None
        prefix = nn.Sequential(*bodies).eval()
        own = folder / f"{fingerprint(prefix)}-{self._config.train.precision}-{self._device.type}"
        for other in folder.glob("*"):  # of an earlier stage, or a run continued from before this one
            if other != own:
                shutil.rmtree(other, ignore_errors=True)
        limit = self._config.local.cache_bytes
        make = partial(FeatureCache, own, prefix, augmented=self._config.data.augment, max_bytes=limit)
        try:
            return make()
        except CorruptPacket as error:
            _log.warning("%s; its features are computed again", error)
            shutil.rmtree(own)
            return make()

    def _make(
        self,
        index: int,
        blocks: Blocks,
        group: dist.ProcessGroup | None,
        state: Mapping[str, Tensor] | None,
    ) -> Held:
        block = blocks.make(index)
        if state is not None:
            names = self._names[index]
            _fill(block.body, {key: f"model/{names[key]}" for key in block.body.state_dict()}, state)
        if not self.decision.training[index]:
            return Frozen(index, block.body)
        if state is not None and any(key.startswith(f"head/{index}/") for key in state):
            _fill(block.head, {key: f"head/{index}/{key}" for key in block.head.state_dict()}, state)
        optimizer = Optimizer(block, self._config.optimizer, of_part=True)
        parameters = list(block.parameters())
        if state is not None:
            prefix = f"optimizer/{index}/"
            optimizer.load_state_dict(
                {key.removeprefix(prefix): one for key, one in state.items() if key.startswith(prefix)}
            )
        if group is None:
            return Trained(index, block, block, optimizer, parameters, self._config.optimizer.clip)
        ddp = DistributedDataParallel(
            block,
            device_ids=[self._device] if self._device.type == "cuda" else None,
            process_group=group,
            **sync_buffers_argument(bool(_trained_buffers(block))),  # pyright: ignore[reportArgumentType]
        )
        inputs, targets = blocks.example(index)
        with measure.untouched(block, self._device):  # DDP arranges its buckets
            ddp(inputs, targets)[1].backward()
        beside = [
            one for one in self.decision.assignment.of_rank(dist.get_rank()) if self.decision.training[one]
        ]
        sizes = {one: sum(p.numel() for p in blocks.partitions[one].module.parameters()) for one in beside}
        wishes = wishes_of(self._config, block, self._names[index], sizes[index], sum(sizes.values()))
        facts = {"data": self._fingerprint, "partition": index}
        self.compressions[index] = compressed(ddp, optimizer, wishes, extra=facts)
        return Trained(index, block, ddp, optimizer, parameters, self._config.optimizer.clip)


def selection_of(config: Config) -> Selection | None:
    """Which examples partitions hand on; None: all."""
    local = config.local
    if local.keep_examples == 1.0:
        return None
    return Selection(
        local.keep_examples, "loss" if local.keep_by == "loss" else "random", config.train.objective
    )


def wanted_from(decision: Decision, names: Sequence[Mapping[str, str]]) -> Callable[[str], bool]:
    """Which of a checkpoint's tensors this rank needs to carry a decision out: what is frozen has no optimizer."""
    held = decision.assignment.of_rank(dist.get_rank())
    keys = {f"model/{name}" for index in held for name in names[index].values()}
    trained = [index for index in held if decision.training[index]]
    prefixes = tuple(f"{kind}/{index}/" for index in trained for kind in ("head", "optimizer"))
    return lambda key: key in keys or (bool(prefixes) and key.startswith(prefixes))


def _trained_buffers(module: nn.Module) -> list[Tensor]:
    persistent = module.state_dict().keys()
    return [one for name, one in module.named_buffers() if name in persistent]


def _codec_name(activations: float | str) -> str:
    return activations if isinstance(activations, str) else f"bits:{activations}"


def _fill(module: nn.Module, keys: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """Copies a module's state from a checkpoint's; keys: its name there."""
    missing = [key for key in keys.values() if key not in state]
    try:
        if missing:
            raise RuntimeError(f"there is no {missing[0]}")
        module.load_state_dict({name: state[key] for name, key in keys.items()})
    except RuntimeError as error:
        raise CheckpointError(
            "the checkpoint is of another model",
            found=str(error),
            fix="resume with the model of the run's config.toml, or start a new run in another --out",
        ) from None
