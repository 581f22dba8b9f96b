"""The `Compression` of a DistributedDataParallel model: its hook, its statistics and its state."""

# No `from __future__ import annotations` here: DDP compares the hook's annotations with classes.

import logging
import math
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from efficient_dl.comm import (
    Alarm,
    BucketLayout,
    Compressor,
    KillSwitch,
    OnAlarm,
    ProcessGroupTransport,
    Topology,
    Transport,
    Watch,
    check_equal,
    combined,
    gather_json,
    native_tally,
    parameter_scalars,
    since,
    summary,
    total_scalars,
)
from efficient_dl.errors import CheckpointError, ConfigError, EdlError
from efficient_dl.integrations.ddp_buckets import (
    BucketEngine,
    BucketRecord,
    CompressedEngine,
    HeldStep,
    ShadowEngine,
)
from efficient_dl.integrations.ddp_native import NativeReducer, left_to_torch, log_left_to_torch
from efficient_dl.integrations.ddp_setup import (
    averaged_parameters,
    join_check,
)
from efficient_dl.integrations.ddp_transport import transport_kind
from efficient_dl.integrations.second_moment import SecondMoment

_log = logging.getLogger(__name__)
_EXIT_SECONDS = 2.0  # how long a process that ends without close() waits for its own threads


class Compression:
    """Compressed averaging of one model's gradients, as `compress` set it up."""

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: torch.optim.Optimizer | None,
        compressor: Compressor,
        control: ProcessGroupTransport,
        shadow: bool,
        check_every: int,
        carrier: Transport,
        scaler: torch.amp.GradScaler | None = None,
        second_moment: SecondMoment | None = None,
        topology: Topology | None = None,
    ) -> None:
        # It keeps no reference to the model, whose C++ reducer keeps the hook and with it this object: a cycle that
        # no garbage collector would see.
        self.plan = compressor.plan
        self.shadow = shadow
        self._compressor = compressor
        self._control = control
        self._topology = topology
        self._transport = transport_kind(carrier)
        self._check_every = check_every
        self._scaler = scaler
        self._second_moment = second_moment
        self._commits_itself = optimizer is None
        self._in_backward = False
        self._parameters = averaged_parameters(model)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._frozen = {name: p for name, p in self._parameters.items() if not p.requires_grad}
        self._joins = join_check(model)
        self._left_to_torch = left_to_torch(model, self._parameters)
        self._native = NativeReducer(control, compressor.meter)
        self._switch = KillSwitch()
        self._watch: Watch | None = None
        self._disables_on_alarm = False
        self._marks: dict[str, dict[str, Any]] = {}
        self._optimizer_steps = 0
        self._checks = 0
        self._pending: list[Future[Any]] = []
        self._record = BucketRecord()
        self._held: HeldStep | None = None
        self._engine = self._make_engine(carrier)
        if self._engine is not None:
            log_left_to_torch(self._left_to_torch)
            self._finalizer = weakref.finalize(self, self._engine.stop, _EXIT_SECONDS)
            try:
                model.register_comm_hook(self, _reduce_bucket)
            except RuntimeError as error:  # torch's built-in hooks leave no trace to look for before
                self._finalizer.detach()
                self._engine.close(_EXIT_SECONDS)
                raise ConfigError(
                    "the model's communication hook cannot be registered",
                    found=str(error).splitlines()[0],
                    fix="call compress() once, and no other hook",
                ) from error
        self._step_hook = optimizer.register_step_post_hook(self._after_step) if optimizer else None

    def disable(self, reason: str) -> None:
        """Turns compression off on all ranks: from then on gradients go by torch's own all-reduce.

        One rank is enough. It takes effect on all ranks at once, after the next comparison of their parameters: the
        next optimizer step whose number is a multiple of check_every, or the next `check()`. It costs no message until
        then. It is logged on all ranks, told by `stats()["disabled"]`, and kept by `state_dict`.

        reason: for the logs.
        """
        if self._engine is None:
            _log.warning('there is nothing to disable: bits="none"')
        elif self._switch.off is None:
            self._switch.wish = self._switch.wish or reason
            _log.warning("compression ends with the next comparison of parameters: %s", reason)

    def interval(self, all_ranks: bool = False, name: str = "interval") -> dict[str, Any]:
        """`stats` of the time since the last call with this name, or since the start; the marks are saved, too."""
        now = self._compressor.meter.state_dict()
        state, self._marks[name] = since(now, self._marks.get(name)), now
        return self._stats(state, all_ranks)

    def log_to(self, writer: Any, step: int, all_ranks: bool = False) -> None:
        """Writes the time since its last call to TensorBoard, under compression/ and compression/<parameter>/.

        writer: a torch.utils.tensorboard.SummaryWriter, or None on ranks that write nothing.
        all_ranks: sums of all ranks, instead of this rank's; then every rank must call it.
        """
        stats = self.interval(all_ranks, "log_to")
        if writer is None:
            return
        for key, value in total_scalars(stats).items():
            writer.add_scalar(f"compression/{key}", value, step)
        for name, row in parameter_scalars(stats).items():
            for key, value in row.items():
                writer.add_scalar(f"compression/{name}/{key}", value, step)

    def stats(self, all_ranks: bool = False) -> dict[str, Any]:
        """What was sent, what it cost and how much it erred, since the start or the restored checkpoint.

        all_ranks: sums of all ranks, instead of this rank's; then every rank must call it.

        Returns bits, codec, kernel, exact, shadow, world_size, transport (what carries compressed bytes:
        "process_group", "mpi" or a class), hierarchy (None, or the nodes in use), checks, and `summary` of the meter:
        wire_bytes (what left, size messages included; with a hierarchy: what left the node), raw_bytes (the same with
        the identity codec), local_bytes (what a hierarchy sent inside the node), all three per step, ratio,
        bits_per_value, entropies, seconds, relative_error and a row for each parameter, with order0_bits and model_bits
        of a sample (one step in 20, at most 32 blocks of 256 values), and with error feedback residual_norm, Euclidean;
        the alarms so far; and
        disabled, None or {"step", "reason"} (see `disable`). A step is one synchronized backward pass.

        bytes_source says where the bytes come from: "counted", but for native_bytes, which torch's own collectives
        sent and which are calculated; "shadow" (would have been sent); or "analytic" (bits="none": 2 (n − 1) / n of
        the dense gradients' bytes for each optimizer step).
        """
        return self._stats(self._compressor.meter.state_dict(), all_ranks)

    def _stats(self, state: dict[str, Any], all_ranks: bool) -> dict[str, Any]:
        if all_ranks:
            state = combined(gather_json(state, self._control))
        kernel, source = self._compressor.codec.kernel_for(self._control.device), "counted"
        if self.plan.codec == "none":
            kernel, source = "none", "analytic"
        elif self.shadow:
            source = "shadow"
        figures, residuals = summary(state), self._compressor.residuals
        if residuals is not None:
            norms = {name: residuals.norm(name) for name in figures["parameters"]}
            everyone = gather_json(norms, self._control) if all_ranks else [norms]
            for name, row in figures["parameters"].items():
                row["residual_norm"] = math.hypot(*(theirs[name] for theirs in everyone))
        return {
            "bits": self.plan.bits,
            "codec": self.plan.codec,
            "reason": self.plan.reason,
            "overrides": dict(self.plan.overrides),
            "scale": self.plan.scale,
            "error_feedback": self.plan.error_feedback,
            "kernel": kernel,
            "exact": self._compressor.exact,
            "shadow": self.shadow,
            "world_size": self._control.world_size,
            "transport": self._transport,
            "hierarchy": self._topology.summary() if self._topology else None,
            "checks": self._checks,
            "bytes_source": source,
            "disabled": self._switch.off,
            "alarms": self._watch.state_dict() if self._watch else [],
            **figures,
        }

    def check(self) -> None:
        """Compares all parameters of all ranks, bit by bit; every rank must call it. Raises RanksDiverged."""
        notes = [int(self._switch.wish is not None), *(self._watch.notes() if self._watch else ())]
        everyone = check_equal(self._parameters, self._control, self._optimizer_steps, notes)
        self._checks += 1
        self._switch.agree([bool(theirs[0]) for theirs in everyone], self._control, self._optimizer_steps)
        if self._watch is not None and self._switch.off is None:
            for alarm in self._watch.judge([theirs[1:] for theirs in everyone]):
                self._log_alarm(alarm)
                if self._disables_on_alarm:
                    self._switch.end(alarm.text, self._optimizer_steps)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, keyed by parameter name: plain numbers and strings, and with error feedback a float32
        tensor for each parameter. Save one for each rank."""
        return {
            "rank": self._control.rank,
            "world_size": self._control.world_size,
            "optimizer_steps": self._optimizer_steps,
            "shadow": self.shadow,
            "nodes": self._topology.reduced_by if self._topology else None,
            "buckets": [list(names) for names in self._record.buckets],
            "buckets_settled": self._record.settled,
            "compressor": self._compressor.state_dict(),
            "switch": self._switch.state_dict(),
            "alarms": self._watch.state_dict() if self._watch else [],
            "marks": dict(self._marks),
        }

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Continues exactly from this rank's `state_dict`; every rank must call it, with its own.

        After a change of the world size pass the list of all old ranks' states, by rank: residuals are redistributed
        (every rank gets the mean of all), and rates are taken over; with one state alone, residuals start from zero.

        The next steps are reduced in the buckets that the saved run had, until DDP has rebuilt its own; they do not
        overlap backward. A state from before DDP had rebuilt them (the first three steps) cannot tell them: a lossy run
        then goes on with other shards, which is logged. At another world size, or between a shadow run and a real
        one, the counters of bytes, values and seconds start again from zero, which is logged, too. Raises
        PlanMismatch for another plan, CheckpointError for another rank, model or version.
        """
        control = self._control
        states = [state] if isinstance(state, Mapping) else list(state)
        if not states:
            raise CheckpointError("no compression state was given", fix="pass this rank's state_dict()")
        resized = states[0]["world_size"] != control.world_size
        own = states[0] if resized or len(states) <= control.rank else states[control.rank]
        if not resized and own["rank"] != control.rank:
            raise CheckpointError(
                f"rank {control.rank} was given the compression state of rank {own['rank']}",
                fix="save state_dict() on every rank, and load each rank's own",
            )
        if resized:
            self._load_resized(states)
            self._optimizer_steps = own["optimizer_steps"]
            self._restore_guards({**own, "marks": {}})
            return
        fresh = self._compressor.meter.state_dict()
        self._compressor.load_state_dict(own["compressor"])
        self._optimizer_steps = own["optimizer_steps"]
        self._restore_guards(own)
        self._continue_in([list(names) for names in own["buckets"]], own["buckets_settled"])
        if own.get("nodes") != (self._topology.reduced_by if self._topology else None):
            _log.warning("saved on other nodes: sums are taken in another order, lossy packets cut elsewhere")
        if not own["buckets_settled"] and not self._compressor.exact:
            _log.warning("saved before DDP had rebuilt its buckets: a lossy run goes on in other shards")
        if own["shadow"] != self.shadow:
            self._compressor.start_afresh(fresh)
            self._marks = {}
            _log.warning(
                "compression state of %s: the byte counters and residuals start again from zero",
                "a shadow run, restored in a real one"
                if own["shadow"]
                else "a real run, restored in a shadow",
            )

    def _restore_guards(self, own: Mapping[str, Any]) -> None:
        self._switch.load_state_dict(own["switch"])
        self._marks = dict(own["marks"])
        if self._watch is not None:
            self._watch.load_state_dict(own["alarms"])

    def _load_resized(self, states: Sequence[Mapping[str, Any]]) -> None:
        before = states[0]["world_size"]
        complete = [one["rank"] for one in states] == list(range(before))
        if len(states) > 1 and not complete:
            raise CheckpointError(
                "the compression states are not those of all ranks, in order",
                expected=f"{before} states, of the ranks 0 to {before - 1}",
                found=f"ranks {', '.join(str(one['rank']) for one in states)}",
                fix="pass every old rank's state_dict()",
            )
        self._compressor.load_state_dicts([one["compressor"] for one in states], residuals=complete)
        kept = ""
        if self._compressor.residuals is not None:
            kept = (
                "; residuals are redistributed"
                if complete
                else "; residuals start from zero: not all were given"
            )
        _log.warning(
            "compression state of %d ranks, restored on %d: the byte counters start again from zero%s",
            before,
            self._control.world_size,
            kept,
        )

    def _continue_in(self, buckets: list[list[str]], settled: bool) -> None:
        if not buckets or self.shadow or self._engine is None:
            return
        trained = {name for name, parameter in self._parameters.items() if parameter.requires_grad}
        trained -= set(self._left_to_torch)
        if trained == {name for names in buckets for name in names}:
            self._record.hold(buckets, settled)
        else:
            _log.warning(
                "other parameters are trained than before the restart: a lossy run goes on differently"
            )

    def close(self, timeout: float = 10.0) -> None:
        """Ends the threads and destroys the groups it made; the model cannot train on with this hook.

        timeout: seconds that a peer may keep the threads waiting; then the connections are broken. A process that ends
        without close() ends its threads in the same way.
        """
        if self._step_hook is not None:
            self._step_hook.remove()
        if self._engine is not None and self._finalizer.detach():
            self._engine.close(timeout)

    def abort(self) -> None:
        """Breaks the connections: the peers get a TransportError that names this rank now, not after a time-out."""
        if self._engine is not None:
            self._engine.abort()

    def start_watch(self, max_relative_error: float | None, on_alarm: OnAlarm) -> None:
        """Watches errors and times from now on, as `compress_ddp` says; called once, by it."""
        exact = self._compressor.exact
        times = not self.shadow and self.plan.codec != "identity"
        if self._engine is not None and self._control.world_size > 1:
            self._watch = Watch(
                self._compressor.meter,
                max_relative_error,
                times=times,
                exact=exact,
                escapes_are_usual=self.plan.codec.startswith("grid:"),
            )
        self._disables_on_alarm = on_alarm == "disable" and not self.shadow

    def _make_engine(self, carrier: Transport) -> BucketEngine | None:
        if self.plan.codec == "none":
            return None
        if self.shadow:
            return ShadowEngine(self._compressor, self._control)
        if self._topology is not None and self._topology.flat_reason() is None:
            return CompressedEngine.by_nodes(self._compressor, self._control, self._topology)
        return CompressedEngine.flat(self._compressor, carrier)

    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if self._joins():
            raise ConfigError(
                "gradients cannot be compressed inside of DDP's join()",
                fix="give every rank the same number of steps, without join(); or use bits='none'",
            )
        parameters = bucket.parameters()
        names = [self._names[id(parameter)] for parameter in parameters]
        if not self._in_backward:
            self._in_backward = True
            self._begin_step()
        native = self._switch.off is not None or any(name in self._left_to_torch for name in names)
        if not native:
            self._record.add(names)
        if self._control.world_size == 1:
            result: torch.futures.Future[Tensor] = torch.futures.Future()
            result.set_result(bucket.buffer())
        elif native:
            result, done = self._native.start(bucket.buffer(), dict(zip(names, parameters, strict=True)))
            self._pending.append(done)
        elif self._record.holds:
            self._held = self._held or HeldStep(self._record.buckets)
            result = self._held.hold(bucket.buffer(), self._layout(names, [p.numel() for p in parameters]))
        else:
            result = self._start(bucket.buffer(), names, [p.numel() for p in parameters])
        if bucket.is_last():
            if self._held is not None:
                self._held.start(self._start)
                self._wait()
                self._held.finish()
                self._held = None
            # Runs at the end of backward, before DDP's own: raises what a stage raised, with its own type.
            try:
                torch.autograd.Variable._execution_engine.queue_callback(self._finish_backward)
            except RuntimeError as error:
                raise EdlError(
                    "gradients are reduced outside of a backward pass, as DDP's join() does",
                    fix="give every rank the same number of steps; join() needs bits='none'",
                ) from error
        return result

    def _start(self, x: Tensor, names: Sequence[str], numels: Sequence[int]) -> torch.futures.Future[Tensor]:
        assert self._engine is not None
        moment = self._second_moment
        divisors = None if moment is None else moment.of(names, numels, x)
        result, done = self._engine.start(x, self._layout(names, numels), divisors)
        self._pending.append(done)
        return result

    def _layout(self, names: Sequence[str], numels: Sequence[int]) -> BucketLayout:
        return BucketLayout.of(names, numels, self._control.world_size)

    def _finish_backward(self) -> None:
        start = time.perf_counter()
        self._wait()
        self._pending = []
        self._in_backward = False
        if self._switch.off is None:
            self._record.end_step()
        self._compressor.end_step(time.perf_counter() - start)
        if self._switch.off is None:
            self._compressor.agree(self._control)
        if self._commits_itself:
            self._compressor.commit_step()
        self._check_unfrozen()
        if self._watch is not None and self._switch.off is None:
            for alarm in self._watch.stepped():
                self._log_alarm(alarm)
                if self._disables_on_alarm:
                    self.disable(alarm.text)

    def _log_alarm(self, alarm: Alarm) -> None:
        _log.warning("rank %d, step %d: %s", self._control.rank, alarm.step, alarm.text)

    def _check_unfrozen(self) -> None:
        for name, parameter in self._frozen.items():
            if parameter.requires_grad and parameter.grad is not None and self._control.world_size > 1:
                raise ConfigError(
                    f"parameter {name!r} was frozen when DDP was made, which does not average its gradients now",
                    fix="after unfreezing it, wrap the bare model again, and call compress() again",
                )

    def _begin_step(self) -> None:
        scaler = self._scaler
        follows = self._compressor.residuals is not None and scaler is not None and scaler.is_enabled()
        scale = scaler.get_scale() if follows and scaler is not None else 1.0
        if self._second_moment is None:
            self._compressor.begin_step(scale)
        else:
            self._second_moment.begin_step()
            self._compressor.begin_step(scale, self._second_moment.unscaled)

    def _wait(self) -> None:
        try:
            for done in self._pending:
                done.result()
        except BaseException:
            assert self._engine is not None
            self._engine.abort()  # the peers learn of it now, not after a time-out
            raise

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._optimizer_steps += 1
        # A fused optimizer runs in a step that its GradScaler skips, and skips inside.
        found_inf = getattr(optimizer, "found_inf", None)
        if self._compressor.residuals is not None and not (found_inf is not None and float(found_inf) > 0):
            self._compressor.commit_step()
        if self._engine is None:
            trained = {
                name: p
                for name, p in self._parameters.items()
                if p.requires_grad and not (p.grad is not None and p.grad.is_sparse)
            }
            numels = {name: p.numel() for name, p in trained.items()}
            itemsizes = {name: p.element_size() for name, p in trained.items()}
            self._compressor.meter.add(native_tally(numels, itemsizes, self._control.world_size))
            self._compressor.meter.stepped(exposed_seconds=0.0)
        elif self._check_every and self._optimizer_steps % self._check_every == 0:
            self.check()


def _reduce_bucket(state: Compression, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook that DDP calls, in the autograd thread, when a bucket's gradients are ready."""
    return state._reduce(bucket)
