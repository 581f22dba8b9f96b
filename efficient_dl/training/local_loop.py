"""Layer-wise and partition-wise training: partitions with losses of their own, where the coordinator places them."""

from __future__ import annotations

import functools
import itertools
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from efficient_dl.comm import ProcessGroupTransport
from efficient_dl.config import Config
from efficient_dl.coordinator.assignment import Assignment, Decision
from efficient_dl.coordinator.coordinator import Coordinator
from efficient_dl.coordinator.costs import PartitionCosts
from efficient_dl.coordinator.facts import Kind, ScheduleOptions
from efficient_dl.coordinator.plateau import PlateauRule, smoothed
from efficient_dl.coordinator.report import Report
from efficient_dl.coordinator.timeline import STATISTICS, draw_timeline
from efficient_dl.data import Dataset
from efficient_dl.training import measure, resume
from efficient_dl.training.checkpoint import Checkpoint
from efficient_dl.training.console import Progress
from efficient_dl.training.cutting import Cutter
from efficient_dl.training.from_rank_0 import from_rank_0
from efficient_dl.training.in_order import InOrder
from efficient_dl.training.pace import Pace
from efficient_dl.training.run_loop import RunLoop
from efficient_dl.training.schedule import learning_rate
from efficient_dl.training.stage import Groups, Stage, Traffic, wanted_from
from efficient_dl.training.survey import Survey
from efficient_dl.training.task import evaluate_batch, predictions

_KINDS: dict[str, Kind] = {"simultaneous": "simultaneous", "sequential": "sequential"}
_OPTIMIZER_BYTES = {"adamw": 2.0, "sgd": 1.0, "muon": 1.0}  # for each of a parameter
_SENT_SHARES = {"lossless": 0.85}  # of fp32 bytes, as gradients of small GPTs measured
_runs: WeakKeyDictionary[dist.ProcessGroup, itertools.count[int]] = WeakKeyDictionary()
_MEASURING_PATIENCE = 10  # time-outs that ranks wait for rank 0 to measure the model
_PATIENCE_SECONDS, _PATIENCE_STEPS = 5.0, 5
_THRIFT = "train.activation_checkpointing"
_STAGES = 10  # of a run, unless local.stage_steps says otherwise


class LocalTrainer(RunLoop):
    """Each rank holds the partitions that the coordinator gives it, and does its share of their micro-batches.

    A step takes `accumulate` micro-batches for each rank, the same samples as end-to-end training. Metrics of a step
    are gathered when a stage ends or an evaluation comes, so that no rank waits for another in between.
    """

    def __init__(self, config: Config, data: Dataset, device: torch.device, progress: Progress) -> None:
        super().__init__(config, data, device, progress)
        local = config.local
        self.label = f"{local.mode}, {local.count} partitions"
        self.micro_batches = self.world_size * config.train.accumulate
        self.cutter = Cutter(config, data.spec, self.task.unit, device)
        self.options = ScheduleOptions(
            kind="pipelined" if local.mode == "partitionwise" else _KINDS[local.schedule],
            micro_batches=self.micro_batches,
            stage_steps=local.stage_steps or max(1, config.train.steps // _STAGES),
            total_steps=config.train.steps,
            plateau=PlateauRule(local.freeze_below) if local.freeze_below > 0 else None,
            optimizer_bytes_per_parameter_byte=_OPTIMIZER_BYTES[config.optimizer.name],
            queue_micro_batches=local.queue,
            activation_share=_sent_share(local.activations),
            gradient_share=_sent_share(config.compression.bits),
            window=local.window,
            heads_wait=local.penalty > 0,
        )
        self.stage: Stage | None = None
        self.losses: dict[int, list[float]] = {}  # of this stage's steps, on this rank
        self.rows: list[dict[str, Any]] = []  # not gathered yet
        self.traffic_before = Traffic()  # of ended stages
        self.counted_from = 0  # the step since which bytes are counted
        self.waited, self.waited_until = 0.0, 0  # seconds for activations in this stage, and until which step

    def _prepare(self) -> None:
        timeout, number = self.config.run.timeout_seconds, _number_of_run()
        store = dist.distributed_c10d._get_default_store()
        self.groups = Groups(timeout)
        self.transport = ProcessGroupTransport(_gloo_group(), timeout=timeout)
        self.survey = Survey(
            self.cutter,
            lambda: self._micro_batch(0),
            self._autocast,
            self.transport,
            partial(from_rank_0, self.rank, store, f"cut-{number}", _MEASURING_PATIENCE * timeout),
        )
        self.coordinator = Coordinator(
            self.rank,
            self.world_size,
            self.options,
            timeout=timeout,
            facts={
                "data": self.data.fingerprint,
                "heads": self.cutter.heads,
                "settings": self.config.fingerprint(),
            },
            store=store,
            name=f"coordinator-{number}",
        )
        self.pace = Pace(
            store,
            self.rank,
            self.world_size,
            f"pace-{number}",
            timeout,
            self._patience,
            lambda: self.watch.at("waiting for slower ranks", self.step),
        )
        self.compute_seconds = 0.0
        self.costs: list[PartitionCosts] = []  # as rank 0 has measured them for the next decision
        self.hosts = self._over_ranks(socket.gethostname())
        measure.reset_peak_memory(self.device)
        torch.manual_seed(
            self.config.train.seed + 1_000_003 * (self.rank + 1)
        )  # dropout differs between ranks

    def _start(self) -> None:
        """Cut the model as rank 0 measures it; nothing is placed before the first decision."""
        self.cuts, self.names, self.costs = self.survey.cut(self.progress.note)
        self.pace.tell(0)
        self.state_names = [dict(one.names) for one in self.cutter.fresh(self.cuts)]
        measure.reset_peak_memory(self.device)

    def _patience(self) -> float:
        """Seconds without a step of another rank after which it may have ended: a few steps and a little more."""
        return _PATIENCE_SECONDS + _PATIENCE_STEPS * self.clock.median()

    def _train_step(self) -> dict[str, Tensor | float]:
        if self.stage is None:
            self._begin(self._decide({}), None)
        assert self.stage is not None
        rates = {f"lr_partition_{index}": self._lr(index) for index in self._trained_here()}
        self.watch.at("partitions", self.step + 1)
        if not self.stage.held:
            self.pace.follow(self.step + 1)  # not ahead of all that work
        with self.clock.step():
            losses = self.stage.host.train_step(self.step, self.micro_batches, self._micro_batch, self._lr)
        for index, loss in losses.items():
            self.losses.setdefault(index, []).append(loss.item())
        self.step += 1
        if self.options.kind == "pipelined":
            self.pace.tell(self.step)
        return {f"loss_partition_{index}": loss for index, loss in losses.items()} | rates

    def _lr(self, index: int) -> float:
        last = self.coordinator.history[-1]
        before = self.coordinator.states[index].steps
        done = before + (self.step - last.step if last.decision.training[index] else 0)
        return learning_rate(self.config.optimizer, done, self.options.budget(index, len(self.names)))

    def _micro_batch(self, number: int) -> tuple[Tensor, Tensor]:
        """The samples that rank number // accumulate would take end to end as its part number % accumulate."""
        config, accumulate = self.config, self.config.train.accumulate
        self.watch.at(f"partitions, batch {number}", self.step + 1)
        inputs, targets = self.data.train_batch(
            self.step,
            number // accumulate,
            self.world_size,
            config.data.batch_size,
            accumulate,
            number % accumulate,
        )
        return self._on_device(inputs), self._on_device(targets)

    def _between_steps(self) -> None:
        """At a stage's end: ask the coordinator; where something moves, checkpoint, move, and go on."""
        assert self.stage is not None
        if self.step < self.stage.decision.until_step or self.step >= self.config.train.steps:
            return
        self._flush()
        decision = self._decide({index: smoothed(values) for index, values in self.losses.items()})
        self.losses = {}
        if decision.ended:
            self.last_step = self.step
            passes = [] if self._evaluates(self.step) else [self.num_eval_batches]
            self.stage.renew(self.stage.decision, passes)
        elif not self.stage.moves(decision):
            self.stage.renew(decision, self._passes(decision.until_step))
        else:
            self._save()
            compressed = self._compressed()
            self._finish_stage()
            self.waited = 0.0
            wanted = wanted_from(decision, self.state_names)
            self._begin(decision, self.checkpoints.load(self.step, wanted).tensors)
            self._carry_over(compressed)

    def _decide(self, losses: Mapping[int, float], replan: bool = False) -> Decision:
        work = link = None
        if self.options.kind == "pipelined" and self.world_size > 1:
            work, link = self.survey.here(not self.coordinator.knows_speeds, not self.coordinator.knows_links)
        report = Report(
            self.names,
            dict(enumerate(self.costs)) if self.rank == 0 else {},
            losses,
            self.config.local.memory_bytes or None,
            bytes_per_second=link,
            work_seconds=work,
        )
        num_decisions = len(self.coordinator.history)
        decision = self.coordinator.decide(self.step, report, replan=replan)
        self.costs = []
        for entry in list(self.coordinator.history)[num_decisions:]:
            if self.stage is None or self.stage.moves(entry.decision):
                self.progress.note(f"step {entry.step}: {entry.decision.reason}")
            self.folder.log_decision(entry.to_row())
        return decision

    def _begin(self, decision: Decision, state: Mapping[str, Tensor] | None) -> None:
        self.stage = Stage(
            self.config,
            decision,
            self.cutter.blocks(self.cutter.fresh(self.cuts), self._micro_batch(0)),
            self.groups,
            self.transport,
            state,
            self._passes(decision.until_step),
            self.device,
            self.data.fingerprint,
            self._autocast,
            self._features / f"rank_{self.rank}" if self.config.local.cache_bytes else None,
        )
        self.compute_seconds = sum(
            self.coordinator.costs[index].seconds(decision.training[index])
            * self.micro_batches
            / len(decision.assignment.ranks[index])
            / self.coordinator.speed_of(self.rank)
            for index in decision.assignment.of_rank(self.rank)
        )

    @property
    def _features(self) -> Path:
        """Of what frozen partitions make of samples; it stays where a run is stopped, for the resume."""
        return self.folder.path / "features"

    def _finish_stage(self) -> None:
        """Nothing is left on its way."""
        assert self.stage is not None
        self.traffic_before = self.traffic_before.plus(self.stage.traffic())
        self.stage.finish()
        if self.stage.features is not None:
            kept = self.stage.features.stats
            self.progress.note(
                f"features of what is frozen: {kept.hits} batches read, {kept.misses} computed; "
                f"{kept.feature_bytes / 1e6:.1f} MB kept in {kept.packet_bytes / 1e6:.1f} MB"
            )
        self.stage = None

    def _passes(self, until_step: int) -> list[int]:
        """The micro-batches of every pass from here to a stage's end: steps, and evaluations after them."""
        passes: list[int] = []
        for step in range(self.step + 1, until_step + 1):
            passes += (
                [self.micro_batches, self.num_eval_batches] if self._evaluates(step) else [self.micro_batches]
            )
        return passes

    def _evaluates(self, step: int) -> bool:
        every = self.config.train.eval_every
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def _eval_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.eval_batches(self.config.train.eval_batches, self.config.data.batch_size)

    def _watched_eval_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, (inputs, targets) in enumerate(self._eval_batches()):
            self.watch.at(f"evaluation, batch {index}", self.step)
            yield self._on_device(inputs), self._on_device(targets)

    @functools.cached_property
    def num_eval_batches(self) -> int:
        return sum(1 for _ in self._eval_batches())

    def _trained_here(self) -> list[int]:
        assert self.stage is not None
        training = self.stage.decision.training
        return [one.index for one in self.stage.held if training[one.index]]

    def _log(self, row: dict[str, Tensor | float]) -> None:
        shown = {"step": self.step, **{key: float(value) for key, value in row.items()}}
        shown["step_seconds"] = self.clock.median(last=self.config.train.log_every)
        self.rows.append(shown)

    def _flush(self) -> None:
        """Gather the rows that have not been, and write them, means over the ranks that know a number."""
        assert self.stage is not None
        if self.options.kind == "pipelined":
            self.pace.meet(self.step)
        leads = {f"lead_partition_{index}": mean for index, (mean, _) in self.stage.leads().items()}
        if self.rows:
            waited = self.stage.traffic().waiting_seconds
            waiting = (waited - self.waited) / max(1, self.step - self.waited_until)
            self.waited, self.waited_until = waited, self.step
            self.rows[-1] |= leads | {
                f"waiting_seconds_partition_{index}": waiting for index in self._trained_here()
            }
        per_rank: list[list[dict[str, float]]] = self._over_ranks(self.rows)
        self.rows = []
        for same_step in zip(*per_rank, strict=True):
            merged = _mean_row(same_step)
            keys = [f"loss_partition_{index}" for index in range(len(self.names))]
            losses = [merged[key] for key in keys if key in merged]
            row = {"step": int(merged.pop("step")), "loss": losses[-1] if losses else float("nan"), **merged}
            self.folder.log(row)
            self.progress.row(row)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Pass validation data through all partitions; before the last one has begun, the last head so far answers."""
        if self.stage is None:
            self._begin_evaluation()
        assert self.stage is not None
        self._flush()
        self.stage.sync_buffers()
        batches = InOrder(self._watched_eval_batches())
        sums: dict[str, float] = {}
        for _, outputs, targets in self.stage.host.evaluate(self.step, self.num_eval_batches, batches):
            count = predictions(targets)
            means = evaluate_batch(self.task, outputs, targets)
            for name, value in {"count": count, **{k: v.item() * count for k, v in means.items()}}.items():
                sums[name] = sums.get(name, 0.0) + value
        per_rank = [one for one in self._over_ranks(sums) if one]
        total = {name: sum(one[name] for one in per_rank) for name in per_rank[0]}
        count = total.pop("count")
        row = {"step": self.step, **{f"val_{name}": value / count for name, value in total.items()}}
        self.val_loss = row["val_loss"]
        self.folder.log(row)
        self.progress.row(row)

    def _begin_evaluation(self) -> None:
        """All partitions on every rank as the latest checkpoint has them, none trained."""
        everyone = (tuple(range(self.world_size)),) * len(self.names)
        decision = Decision(Assignment(everyone), (False,) * len(self.names), self.step, "to evaluate")
        latest = self.checkpoints.latest()
        wanted = wanted_from(decision, self.state_names)
        self._begin(decision, None if latest is None else self.checkpoints.load(latest, wanted).tensors)

    def _save(self) -> None:
        assert self.stage is not None
        self._flush()
        self.stage.sync_buffers()
        tensors = self.stage.tensors()
        held = {index for index, ranks in enumerate(self.stage.decision.assignment.ranks) if ranks}
        if self.rank == 0 and len(held) < len(self.names):  # so that the checkpoint holds the whole model
            waiting = [one for one in self.cutter.fresh(self.cuts) if one.index not in held]
            tensors |= {
                f"model/{one.names[key]}": value
                for one in waiting
                for key, value in one.module.state_dict().items()
            }
        state = {
            **resume.generator_state(self.device),
            "compression": self._compressed(),
            "losses": self.losses,
            "traffic": asdict(self.traffic_before.plus(self.stage.traffic())),
            "counted_from": self.counted_from,
        }
        local = {
            "cuts": list(self.cuts),
            "names": list(self.names),
            "hosts": self.hosts,
            "coordinator": self.coordinator.state_dict(),
        }
        self.checkpoints.save(self.step, tensors, state, self._about() | {"local": local})
        self.saved_step = self.step

    def _compressed(self) -> dict[int, tuple[tuple[int, ...], dict[str, Any]]]:
        """By partition that reduces gradients here: its ranks, and the state of its compression on this one."""
        assert self.stage is not None
        ranks = self.stage.decision.assignment.ranks
        return {index: (ranks[index], one.state_dict()) for index, one in self.stage.compressions.items()}

    def _carry_over(self, compressed: Mapping[int, tuple[tuple[int, ...], dict[str, Any]]]) -> None:
        """Partitions that train on the ranks on which they did go on with their residuals; others begin with none."""
        assert self.stage is not None
        ranks = self.stage.decision.assignment.ranks
        self.stage.restore_compressions(
            {
                index: state
                for index, (before, state) in compressed.items()
                if index in self.stage.compressions and tuple(before) == ranks[index]
            }
        )

    def _read(self, step: int) -> Checkpoint:
        return self.checkpoints.load(step, lambda name: False)  # which tensors, the decision tells

    def _restore(self, checkpoint: Checkpoint) -> None:
        local = checkpoint.about["local"]
        self.pace.tell(self.step)
        self.cuts, self.names = tuple(local["cuts"]), tuple(local["names"])
        self.state_names = [dict(one.names) for one in self.cutter.fresh(self.cuts)]
        self.coordinator.load_state_dict(local["coordinator"])
        if local.get("hosts") != self.hosts:
            self.coordinator.forget_speeds()
        thrifty = checkpoint.about["settings"].get(_THRIFT, False)
        costs_other = thrifty != self.config.train.activation_checkpointing
        if costs_other:
            self.costs = self.survey.costs(self.cuts)
        state = checkpoint.rank_states[0]
        same_ranks = checkpoint.about["ranks"] == self.world_size
        counts_on = same_ranks and self._same_plan(checkpoint)
        self.counted_from = self.waited_until = self.step
        if same_ranks:
            resume.restore_generators(state, self.device)
            self.losses = state["losses"]
        if counts_on:
            self.traffic_before, self.counted_from = Traffic(**state["traffic"]), state["counted_from"]
        if self.step >= self.config.train.steps:
            return
        before = self.coordinator.history[-1]
        decision = self._decide({}, replan=costs_other)
        goes_on = self.coordinator.history[-1] is before
        if decision.ended:
            self.last_step = self.step
            return
        if not goes_on:
            self.losses = {}  # of a stage that was cut short
        wanted = wanted_from(decision, self.state_names)
        self._begin(decision, self.checkpoints.load(self.step, wanted).tensors)
        assert self.stage is not None
        if counts_on:
            self._carry_over(state["compression"])

    def _traffic(self) -> dict[str, Any]:
        own = self.traffic_before if self.stage is None else self.traffic_before.plus(self.stage.traffic())
        total = Traffic()
        for one in self._over_ranks(asdict(own)):
            total = total.plus(Traffic(**one))
        steps = max(self.step - self.counted_from, 1)
        settings = self.config.compression
        source = "analytic" if settings.bits == "none" else "shadow" if settings.shadow else "counted"
        return {
            "bits_per_value": 8 * (total.wire_bytes - total.activation_bytes) / max(total.values_sent, 1),
            "raw_bytes_per_step": total.raw_bytes / steps,
            "wire_bytes_per_step": total.wire_bytes / steps,
            "ratio": total.raw_bytes / total.wire_bytes if total.wire_bytes else 1.0,
            "codec_seconds_per_step": total.codec_seconds / steps / self.world_size,
            "bytes_source": source,
        }

    def _close(self) -> None:
        if self.stage is not None:
            self._finish_stage()
        if self.rank == 0:
            shutil.rmtree(self._features, ignore_errors=True)
        self.coordinator.close()
        self.groups.close()
        self.transport.close()
        self._draw()

    def _abort(self) -> None:
        if self.stage is not None:
            self.stage.abort()
        self.pace.give_up()

    def _draw(self) -> None:
        """Which partition trained where and when, for people: a picture in the folder, a table in the log."""
        if self.rank == 0:
            statistics = [
                {"step": row["step"], "partition": index, key: row[f"{key}_partition_{index}"]}
                for row in self.folder.rows()
                for index in range(len(self.names))
                for key in STATISTICS
                if row.get(f"{key}_partition_{index}") is not None
            ]
            draw_timeline(self.coordinator.history, self.folder.timeline, statistics)
            self.progress.note(f"which partition trained where: {self.folder.timeline}")


def _mean_row(rows: tuple[dict[str, float], ...]) -> dict[str, float]:
    keys = dict.fromkeys(key for row in rows for key in row)
    known = {key: [row[key] for row in rows if key in row] for key in keys}
    return {key: sum(values) / len(values) for key, values in known.items()}


def _sent_share(bits: float | str) -> float:
    """Of fp32 bytes, what is sent at so many bits a value."""
    return _SENT_SHARES.get(bits, 1.0) if isinstance(bits, str) else bits / 32


def _number_of_run() -> int:
    """How many runs the default process group has seen; equal on all its ranks."""
    assert dist.group.WORLD is not None
    return next(_runs.setdefault(dist.group.WORLD, itertools.count()))


def _gloo_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group
