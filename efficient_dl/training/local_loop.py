"""Layer-wise and partition-wise training: partitions with losses of their own, where the coordinator places them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

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
from efficient_dl.errors import ConfigError
from efficient_dl.local_learning.blocks import Blocks
from efficient_dl.local_learning.partition import Balance, Partitions, partition
from efficient_dl.models import build_model
from efficient_dl.training import measure, resume
from efficient_dl.training.checkpoint import Checkpoint
from efficient_dl.training.console import Progress
from efficient_dl.training.run_loop import RunLoop
from efficient_dl.training.schedule import learning_rate
from efficient_dl.training.stage import Groups, Stage, Traffic, wanted_from
from efficient_dl.training.task import evaluate_batch, predictions

_AUTO_HEADS = {"tokens": "causal:1", "samples": "auglocal"}
_KINDS: dict[str, Kind] = {"simultaneous": "simultaneous", "sequential": "sequential"}
_BALANCE: dict[str, Balance] = {"time": "time", "memory": "memory", "parameters": "parameters"}
_OPTIMIZER_BYTES = {"adamw": 2.0, "sgd": 1.0, "muon": 1.0}  # for each of a parameter
_STAGES = 10  # of a run, unless local.stage_steps says otherwise
_RUNS = itertools.count()  # in these processes, all of which make them in the same order


class LocalTrainer(RunLoop):
    """Each rank holds the partitions that the coordinator gives it, and does its share of their micro-batches.

    A step takes `accumulate` micro-batches for each rank, the same samples as end-to-end training. Metrics of a step
    are gathered when a stage ends or an evaluation comes, so that no rank waits for another in between.
    """

    def __init__(self, config: Config, data: Dataset, device: torch.device, progress: Progress) -> None:
        super().__init__(config, data, device, progress)
        local = config.local
        self.label = f"{local.mode}, {local.partitions} partitions"
        self.micro_batches = self.world_size * config.train.accumulate
        self.heads = _AUTO_HEADS[self.task.unit] if local.heads == "auto" else local.heads
        self.options = ScheduleOptions(
            kind="pipelined" if local.mode == "partitionwise" else _KINDS[local.schedule],
            micro_batches=self.micro_batches,
            stage_steps=local.stage_steps or max(1, config.train.steps // _STAGES),
            total_steps=config.train.steps,
            plateau=PlateauRule(local.freeze_below) if local.freeze_below > 0 else None,
            optimizer_bytes_per_parameter_byte=_OPTIMIZER_BYTES[config.optimizer.name],
            queue_micro_batches=local.queue,
        )
        self.stage: Stage | None = None
        self.losses: dict[int, list[float]] = {}  # of this stage's steps, on this rank
        self.rows: list[dict[str, Any]] = []  # not gathered yet
        self.traffic_before = Traffic()  # of ended stages
        self.waited, self.waited_until = 0.0, 0  # seconds for activations in this stage, and until which step

    def _prepare(self) -> None:
        """Cut the model as rank 0 measures it; nothing is placed before the first decision."""
        self._check()
        timeout = self.config.run.timeout_seconds
        self.groups = Groups(timeout)
        self.transport = ProcessGroupTransport(_gloo_group(), timeout=timeout)
        self.coordinator = Coordinator(
            self.rank,
            self.world_size,
            self.options,
            timeout=timeout,
            name=f"coordinator/{next(_RUNS)}",  # a store knows a name once
            facts={"data": self.data.fingerprint, "heads": self.heads, "settings": self.config.fingerprint()},
        )
        self.compute_seconds = 0.0
        cut: list[Any] = [self._measured_cut() if self.rank == 0 else None]
        dist.broadcast_object_list(cut, src=0)
        self.cuts, self.names, self.costs = cut[0]
        self.state_names = [dict(one.names) for one in self._fresh()]
        measure.reset_peak_memory(self.device)
        torch.manual_seed(
            self.config.train.seed + 1_000_003 * (self.rank + 1)
        )  # dropout differs between ranks

    def _check(self) -> None:
        config = self.config
        if config.local.window == 2 and self.options.kind != "simultaneous":
            raise ConfigError(
                "window 2 needs all partitions on the same ranks",
                expected="local.mode=layerwise, local.schedule=simultaneous",
                found=f"local.mode={config.local.mode}, local.schedule={config.local.schedule}",
                fix="--window 1, or --mode layerwise",
            )
        if config.compression.shadow and config.local.activations != "identity":
            raise ConfigError(
                "compression.shadow applies uncompressed results, local.activations would be compressed",
                fix="local.activations=identity, or compression.shadow=false",
            )

    def _measured_cut(self) -> tuple[tuple[str, ...], tuple[str, ...], list[PartitionCosts]]:
        model = build_model(self.config.model, self.data.spec, self.config.train.seed).to(self.device)
        inputs, _ = self._micro_batch(0)
        cut = partition(
            model, self.config.local.partitions, inputs, balance=_BALANCE[self.config.local.balance]
        )
        for line in str(cut).splitlines():
            self.progress.note(line)
        costs = self._blocks(cut).costs(*self._micro_batch(0))
        return cut.cuts, tuple(one.name for one in cut), costs

    def _blocks(self, partitions: Partitions) -> Blocks:
        return Blocks(
            partitions,
            *self._micro_batch(0),
            self.heads,
            self.data.spec.classes,
            self.task.unit,
            penalty=self.config.local.penalty,
            seed=self.config.train.seed,
        )

    def _fresh(self) -> Partitions:
        """The model's partitions with the values of the run's start; who holds none of them keeps no memory for it."""
        model = build_model(self.config.model, self.data.spec, self.config.train.seed).to(self.device)
        return partition(model, self.cuts)

    def _train_step(self) -> dict[str, Tensor | float]:
        if self.stage is None:
            self._next_stage()
        assert self.stage is not None
        step = self.step
        with self.clock.step():
            losses = self.stage.host.train_step(step, self.micro_batches, self._micro_batch, self._lr)
        for index, loss in losses.items():
            self.losses.setdefault(index, []).append(loss.item())
        self.step += 1
        if self.step == self.stage.decision.until_step and self.step < self.last_step:
            self._next_stage()
        return {f"loss_partition_{index}": loss for index, loss in losses.items()}

    def _lr(self, index: int) -> float:
        last = self.coordinator.history[-1]
        before = self.coordinator.states[index].steps
        done = before + (self.step - last.step if last.decision.training[index] else 0)
        return learning_rate(self.config.optimizer, done, self.options.budget(index, len(self.names)))

    def _micro_batch(self, number: int) -> tuple[Tensor, Tensor]:
        """The samples that rank number // accumulate would take end to end as its part number % accumulate."""
        config, accumulate = self.config, self.config.train.accumulate
        inputs, targets = self.data.train_batch(
            self.step,
            number // accumulate,
            self.world_size,
            config.data.batch_size,
            accumulate,
            number % accumulate,
        )
        return self._on_device(inputs), self._on_device(targets)

    def _next_stage(self) -> None:
        """At a stage's end: ask the coordinator; where something moves, checkpoint, move, and go on.

        An evaluation of this step comes afterwards, in the new stage.
        """
        losses = {index: smoothed(values) for index, values in self.losses.items()}
        decision = self._decide(losses)
        self.losses = {}
        state: Mapping[str, Tensor] | None = None
        if self.stage is not None:
            self._flush()
            if not any(decision.training):
                self.last_step = self.step
                self.stage.renew(self.stage.decision, [len(self._eval_batches())])
                return
            if not self.stage.moves(decision):
                self.stage.renew(decision, self._passes(decision.until_step, evaluates_now=True))
                return
            self._save()
            self._end_stage()
            state = self.checkpoints.load(self.step, wanted_from(decision, self.state_names)).tensors
        self._begin(decision, state, evaluates_now=state is not None)

    def _decide(self, losses: Mapping[int, float]) -> Decision:
        first = self.rank == 0 and not len(self.coordinator.history)
        report = Report(
            self.names,
            dict(enumerate(self.costs)) if first else {},
            losses,
            self.config.local.memory_bytes or None,
        )
        num_decisions = len(self.coordinator.history)
        decision = self.coordinator.decide(self.step, report)
        for entry in list(self.coordinator.history)[num_decisions:]:
            if self.stage is None or self.stage.moves(entry.decision):
                self.progress.note(f"step {entry.step}: {entry.decision.reason}")
            self.folder.log_decision(entry.to_row())
        return decision

    def _begin(self, decision: Decision, state: Mapping[str, Tensor] | None, *, evaluates_now: bool) -> None:
        self.stage = Stage(
            self.config,
            decision,
            self._blocks(self._fresh()),
            self.groups,
            self.transport,
            state,
            self._passes(decision.until_step, evaluates_now),
            self.device,
            self.data.fingerprint,
            self._autocast,
        )
        self.compute_seconds = sum(
            self.coordinator.costs[index].seconds(decision.training[index])
            * self.micro_batches
            / len(decision.assignment.ranks[index])
            for index in decision.assignment.of_rank(self.rank)
        )

    def _passes(self, until_step: int, evaluates_now: bool) -> list[int]:
        """The micro-batches of every pass of a stage: steps, and evaluations after them; but the last step's evaluation
        is in the next stage, if there is one, where this tells whether it evaluates_now.
        """
        steps, evaluation = [self.micro_batches], [len(self._eval_batches())]
        passes = [*evaluation] if evaluates_now and self._evaluates(self.step) else []
        for step in range(self.step + 1, until_step + 1):
            passes += steps
            if self._evaluates(step) and (step < until_step or step == self.config.train.steps):
                passes += evaluation
        return passes

    def _evaluates(self, step: int) -> bool:
        every = self.config.train.eval_every
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def _eval_batches(self) -> list[tuple[Tensor, Tensor]]:
        config = self.config
        return list(self.data.eval_batches(config.train.eval_batches, config.data.batch_size))

    def _end_stage(self) -> None:
        assert self.stage is not None
        self._flush()
        self.traffic_before = self.traffic_before.plus(self.stage.traffic())
        self.stage.finish()
        self.stage = None
        self.waited = 0.0

    def _trained_here(self) -> list[int]:
        assert self.stage is not None
        training = self.stage.decision.training
        return [one.index for one in self.stage.held if training[one.index]]

    def _log(self, row: dict[str, Tensor | float]) -> None:
        shown = {"step": self.step, **{key: float(value) for key, value in row.items()}}
        for index in self._trained_here():
            shown[f"lr_partition_{index}"] = self._lr(index)
        shown["step_seconds"] = self.clock.median(last=self.config.train.log_every)
        self.rows.append(shown)

    def _flush(self) -> None:
        """Gather the rows that have not been, and write them, means over the ranks that know a number."""
        assert self.stage is not None
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
            losses = [merged[key] for key in sorted(merged) if key.startswith("loss_partition_")]
            row = {"step": int(merged.pop("step")), "loss": losses[-1] if losses else float("nan"), **merged}
            self.folder.log(row)
            self.progress.row(row)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Pass validation data through all partitions; before the last one has begun, the last head so far answers."""
        if self.stage is None:
            self._begin(self._for_evaluation(), self._latest_state(), evaluates_now=True)
        assert self.stage is not None
        self._flush()
        self.stage.sync_buffers()
        batches = self._eval_batches()
        sums: dict[str, float] = {}

        def batch(number: int) -> tuple[Tensor, Tensor]:
            inputs, targets = batches[number]
            return self._on_device(inputs), self._on_device(targets)

        for _, outputs, targets in self.stage.host.evaluate(self.step, len(batches), batch):
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

    def _for_evaluation(self) -> Decision:
        """All partitions as they lay last, none trained."""
        everyone = (tuple(range(self.world_size)),) * len(self.names)
        return Decision(Assignment(everyone), (False,) * len(self.names), self.step, "to evaluate")

    def _latest_state(self) -> Mapping[str, Tensor] | None:
        latest = self.checkpoints.latest()
        return None if latest is None else self.checkpoints.load(latest).tensors

    def _save(self) -> None:
        assert self.stage is not None
        self._flush()
        self.stage.sync_buffers()
        tensors = self.stage.tensors()
        held = {index for index, ranks in enumerate(self.stage.decision.assignment.ranks) if ranks}
        if self.rank == 0 and len(held) < len(self.names):  # so that the checkpoint holds the whole model
            waiting = [one for one in self._fresh() if one.index not in held]
            tensors |= {
                f"model/{one.names[key]}": value
                for one in waiting
                for key, value in one.module.state_dict().items()
            }
        state = {
            **resume.generator_state(self.device),
            "compression": {k: one.state_dict() for k, one in self.stage.compressions.items()},
            "losses": self.losses,
            "traffic": asdict(self.traffic_before.plus(self.stage.traffic())),
        }
        local = {
            "cuts": list(self.cuts),
            "names": list(self.names),
            "coordinator": self.coordinator.state_dict(),
        }
        self.checkpoints.save(self.step, tensors, state, self._about() | {"local": local})

    def _restore(self, checkpoint: Checkpoint) -> None:
        local = checkpoint.about["local"]
        self.step = checkpoint.step
        self.cuts, self.names = tuple(local["cuts"]), tuple(local["names"])
        self.state_names = [dict(one.names) for one in self._fresh()]
        self.coordinator.load_state_dict(local["coordinator"])
        same_ranks = checkpoint.about["ranks"] == self.world_size
        if same_ranks:
            state = checkpoint.rank_states[0]
            resume.restore_generators(state, self.device)
            self.losses = state["losses"]
            self.traffic_before = Traffic(**state["traffic"])
        if self.step >= self.config.train.steps:
            return
        num_decisions = len(self.coordinator.history)
        decision = self._decide({})
        if not any(decision.training):
            self.last_step = self.step
            return
        self._begin(decision, checkpoint.tensors, evaluates_now=False)
        assert self.stage is not None
        if same_ranks and num_decisions == len(self.coordinator.history) and self._same_plan(checkpoint):
            self.stage.restore_compressions(checkpoint.rank_states[0]["compression"])

    def _traffic(self) -> dict[str, Any]:
        own = self.traffic_before if self.stage is None else self.traffic_before.plus(self.stage.traffic())
        total = Traffic()
        for one in self._over_ranks(asdict(own)):
            total = total.plus(Traffic(**one))
        steps = max(self.step, 1)
        source = "analytic" if self.config.compression.bits == "none" else "counted"
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
            self.traffic_before = self.traffic_before.plus(self.stage.traffic())
            self.stage.finish()
            self.stage = None
        self.coordinator.close()
        self._draw()

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


def _gloo_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group
