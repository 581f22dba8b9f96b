"""DistributedDataParallel with entropy-coded gradients: `compress`, and the `Compression` it returns."""

# No `from __future__ import annotations` here: DDP compares the hook's annotations with classes.

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from efficient_dl.codec import FORMAT_VERSION
from efficient_dl.comm import (
    DEFAULT_TIMEOUT_SECONDS,
    Alarm,
    BucketLayout,
    Compressor,
    KillSwitch,
    OnAlarm,
    Plan,
    ProcessGroupTransport,
    Watch,
    check_equal,
    check_options,
    combined,
    gather_json,
    handshake,
    native_tally,
    parameter_scalars,
    since,
    summary,
    total_scalars,
)
from efficient_dl.errors import CheckpointError, ConfigError, EdlError, UnsupportedTensor
from efficient_dl.integrations.ddp_buckets import (
    BucketEngine,
    BucketRecord,
    CompressedEngine,
    HeldStep,
    ShadowEngine,
)
from efficient_dl.integrations.ddp_native import NativeReducer, left_to_torch, log_left_to_torch

_log = logging.getLogger(__name__)
_EXIT_SECONDS = 2.0  # how long a process that ends without close() waits for its own threads


def compress(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    bits: str | float = "auto",
    *,
    shadow: bool = False,
    group: dist.ProcessGroup | None = None,
    check_every: int = 50,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    kernel: str = "auto",
    extra: Mapping[str, Any] | None = None,
    max_relative_error: float | None = None,
    on_alarm: OnAlarm = "warn",
) -> "Compression":
    """Compresses the gradients that a DistributedDataParallel model averages over its ranks.

    Call it once, on every rank, after wrapping the model and before the first backward pass; the ranks compare what
    they are about to do first. The training script stays as it is: gradient accumulation with `no_sync()`, frozen
    and unused parameters, `static_graph`, clipping, GradScaler, bf16 autocast and `torch.compile` work as before.

    model: a DistributedDataParallel, compiled or not, without a hook of its own. Sparse gradients, and those that are
        not float32, bfloat16 or float16, go by torch's own all-reduce, which is logged, and count as native_bytes.
    optimizer: its steps trigger the comparison of parameters between ranks; without one, call `check()` yourself.
    bits: "none" (the native collective, untouched), "identity" (our reduction, uncompressed), "lossless", a number
        of bits a value (2.0), or "auto".
    shadow: apply the native result, bit for bit, and only report what compression would have sent, cost and erred.
    group: the process group to reduce over, by default the model's. Two more groups of its ranks are made.
    check_every: compare all parameters of all ranks, bit by bit, after every so many optimizer steps; 0: never, as
        with bits="none".
    timeout: seconds after which an unfinished transfer, the wait for the slowest rank included, raises TransportError
        and names the rank: longer than anything one rank does alone, such as an evaluation.
    kernel: which kernels code CPU tensors, as in `make_codec`.
    extra: further facts that must agree on all ranks, for example {"data": hash}; compared as text.
    max_relative_error: an alarm is raised where the sampled error of a window of 20 steps, or of one parameter in it,
        is larger; None: 1.0, the error of sending nothing. Other alarms: compression costs more time than it saves,
        unusually many escapes or zeroed blocks, gradients that are never finite. Each kind is raised once. Times are
        judged by all ranks together, when they compare their parameters.
    on_alarm: "warn" logs it, "disable" also turns compression off on all ranks (see `Compression.disable`), but not
        in the shadow; it needs an optimizer and check_every.

    DDP's join() is not supported, nor are optimizers inside of the backward pass. With one rank there is nothing to
    send: nothing is encoded or quantized.

    Raises ConfigError, UnsupportedTensor, PlanMismatch (ranks differ), TransportError.

    Example:
        compression = edl.compress(DistributedDataParallel(model), optimizer, bits=2.0)
        ...                                # train as before
        print(compression.stats()["ratio"])
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile(DistributedDataParallel(...))
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f"compress() cannot take a {type(model).__name__}",
            expected="a torch.nn.parallel.DistributedDataParallel",
            fix="compress(DistributedDataParallel(model), optimizer)",
        )
    parameters = _averaged_parameters(model)
    device = next(iter(parameters.values())).device
    reducing_group = group or model.process_group
    assert reducing_group is not None  # DDP has one
    control = ProcessGroupTransport(reducing_group, device, timeout)
    facts = _facts(parameters, shadow, check_every if optimizer else 0, extra or {})
    facts["alarm"] = {"max_relative_error": max_relative_error, "on_alarm": on_alarm}
    facts["left to torch"] = left_to_torch(model, parameters)
    try:
        _check_supported(model, parameters, check_every)
        check_options(max_relative_error, on_alarm)
        if on_alarm == "disable" and not (optimizer and check_every):
            raise ConfigError(
                'on_alarm="disable" needs the comparison of parameters',
                expected="an optimizer and check_every above 0: the ranks agree on it on the way",
                fix="give compress() the optimizer, and a check_every above 0",
            )
        compressor = Compressor(Plan.of(bits), list(parameters), kernel)
    except EdlError as error:
        handshake(facts, control, failure=error)
        raise
    facts["plan"] = {"bits": compressor.plan.bits, "codec": compressor.plan.codec}
    facts["kernel"] = compressor.codec.kernel_for(device).partition("-")[0]
    handshake(facts, control)
    compression = Compression(model, optimizer, compressor, control, shadow, check_every)
    compression._start_watch(max_relative_error, on_alarm)
    return compression


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
    ) -> None:
        # It keeps no reference to the model, whose C++ reducer keeps the hook and with it this object: a cycle that
        # no garbage collector would see.
        self.plan = compressor.plan
        self.shadow = shadow
        self._compressor = compressor
        self._control = control
        self._check_every = check_every
        self._parameters = _averaged_parameters(model)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._frozen = {name: p for name, p in self._parameters.items() if not p.requires_grad}
        self._joins = _join_check(model)
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
        self._engine = self._make_engine()
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

        Returns bits, codec, kernel, exact, shadow, world_size, checks, and `summary` of the meter: wire_bytes (what
        left, size messages included), raw_bytes (the same with the identity codec), both per step, ratio,
        bits_per_value, entropies, seconds, relative_error and a row for each parameter; the alarms so far; and
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
        return {
            "bits": self.plan.bits,
            "codec": self.plan.codec,
            "reason": self.plan.reason,
            "kernel": kernel,
            "exact": self._compressor.codec.exact,
            "shadow": self.shadow,
            "world_size": self._control.world_size,
            "checks": self._checks,
            "bytes_source": source,
            "disabled": self._switch.off,
            "alarms": self._watch.state_dict() if self._watch else [],
            **summary(state),
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
        """This rank's state: plain numbers and strings, keyed by parameter name. Save one for each rank."""
        return {
            "rank": self._control.rank,
            "world_size": self._control.world_size,
            "optimizer_steps": self._optimizer_steps,
            "shadow": self.shadow,
            "buckets": [list(names) for names in self._record.buckets],
            "buckets_settled": self._record.settled,
            "compressor": self._compressor.state_dict(),
            "switch": self._switch.state_dict(),
            "alarms": self._watch.state_dict() if self._watch else [],
            "marks": dict(self._marks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly from this rank's `state_dict`; every rank must call it, with its own.

        The next steps are reduced in the buckets that the saved run had, until DDP has rebuilt its own; they do not
        overlap backward. A state from before DDP had rebuilt them (the first three steps) cannot tell them: a lossy run
        then goes on with other shards, which is logged. At another world size, or between a shadow run and a real
        one, the counters of bytes, values and seconds start again from zero, which is logged, too. Raises
        PlanMismatch for another plan, CheckpointError for another rank, model or version.
        """
        control = self._control
        if state["world_size"] == control.world_size and state["rank"] != control.rank:
            raise CheckpointError(
                f"rank {control.rank} was given the compression state of rank {state['rank']}",
                fix="save state_dict() on every rank, and load each rank's own",
            )
        fresh = self._compressor.meter.state_dict()
        self._compressor.load_state_dict(state["compressor"])
        self._optimizer_steps = state["optimizer_steps"]
        self._switch.load_state_dict(state.get("switch", {"off": None, "wish": None}))
        self._marks = dict(state.get("marks", {}))
        if state["world_size"] == control.world_size:
            self._continue_in([list(names) for names in state["buckets"]], state["buckets_settled"])
            if not state["buckets_settled"] and not self._compressor.codec.exact:
                _log.warning("saved before DDP had rebuilt its buckets: a lossy run goes on in other shards")
        reasons = []
        if state["world_size"] != control.world_size:
            reasons.append(f"{state['world_size']} ranks, restored on {control.world_size}")
        if state["shadow"] != self.shadow:
            reasons.append(
                "a shadow run, restored in a real one"
                if state["shadow"]
                else "a real run, restored in a shadow"
            )
        if reasons:
            self._compressor.meter.load_state_dict(fresh)
            self._marks = {}
            _log.warning(
                "compression state of %s: the byte counters start again from zero", "; ".join(reasons)
            )
        if self._watch is not None:
            self._watch.load_state_dict(state.get("alarms", []))

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

    def _start_watch(self, max_relative_error: float | None, on_alarm: OnAlarm) -> None:
        exact = self._compressor.codec.exact
        times = not self.shadow and self.plan.codec != "identity"
        if self._engine is not None and self._control.world_size > 1:
            self._watch = Watch(self._compressor.meter, max_relative_error, times=times, exact=exact)
        self._disables_on_alarm = on_alarm == "disable" and not self.shadow

    def _make_engine(self) -> BucketEngine | None:
        if self.plan.codec == "none":
            return None
        if self.shadow:
            return ShadowEngine(self._compressor, self._control)
        return CompressedEngine(self._compressor, self._control)

    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if self._joins():
            raise ConfigError(
                "gradients cannot be compressed inside of DDP's join()",
                fix="give every rank the same number of steps, without join(); or use bits='none'",
            )
        parameters = bucket.parameters()
        names = [self._names[id(parameter)] for parameter in parameters]
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
        result, done = self._engine.start(x, self._layout(names, numels))
        self._pending.append(done)
        return result

    def _layout(self, names: Sequence[str], numels: Sequence[int]) -> BucketLayout:
        return BucketLayout.of(names, numels, self._control.world_size)

    def _finish_backward(self) -> None:
        start = time.perf_counter()
        self._wait()
        self._pending = []
        if self._switch.off is None:
            self._record.end_step()
        self._compressor.meter.stepped(time.perf_counter() - start)
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

    def _wait(self) -> None:
        try:
            for done in self._pending:
                done.result()
        except BaseException:
            assert self._engine is not None
            self._engine.abort()  # the peers learn of it now, not after a time-out
            raise

    def _after_step(self, *_: Any) -> None:
        self._optimizer_steps += 1
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


def _averaged_parameters(model: DistributedDataParallel) -> dict[str, nn.Parameter]:
    """By the names that they have without torch.compile, so that state fits with and without it."""
    return {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in model.module.named_parameters()
        if name not in model.parameters_to_ignore
    }


def _join_check(model: DistributedDataParallel) -> Callable[[], bool]:
    """Whether DDP is inside of its join() now; keeps no reference to the model."""
    reference = weakref.ref(model)

    def joins() -> bool:
        model = reference()
        return model is not None and model._join_config.enable

    return joins


def _facts(
    parameters: Mapping[str, nn.Parameter], shadow: bool, check_every: int, extra: Mapping[str, Any]
) -> dict[str, Any]:
    shapes = {
        name: f"{p.dtype} {list(p.shape)} on {p.device.type}{'' if p.requires_grad else ', frozen'}"
        for name, p in parameters.items()
    }
    return {
        "wire format": FORMAT_VERSION,
        "torch": torch.__version__.partition("+")[0],
        "shadow": shadow,
        "check_every": check_every,
        "parameters": shapes,
        "order of parameters": xxhash.xxh3_64_hexdigest("\n".join(shapes).encode()),
        "extra": {name: str(value) for name, value in extra.items()},
    }


def _check_supported(
    model: DistributedDataParallel, parameters: Mapping[str, nn.Parameter], check_every: int
) -> None:
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in parameters.values()):
        raise ConfigError(
            "the optimizer steps inside of the backward pass",
            found="torch's _apply_optimizer_in_backward, which needs DDP's only communication hook",
            fix="step the optimizer after backward(), or leave compress() out",
        )
    if getattr(model, "_use_python_reducer", False):
        raise ConfigError(
            "DDP was made with torch._dynamo.config.optimize_ddp = 'python_reducer', which has no buckets",
            fix="make it with optimize_ddp = 'ddp_optimizer', torch's default",
        )
    if getattr(model, "_comm_hooks", None):
        raise ConfigError(
            "the model has a communication hook already", fix="call compress() once, and no other hook"
        )
    if check_every < 0:
        raise ConfigError("check_every is negative", expected="optimizer steps, or 0", found=str(check_every))
    devices = sorted({str(parameter.device) for parameter in parameters.values()})
    if len(devices) > 1:
        raise UnsupportedTensor("the model's parameters must be on one device", found=", ".join(devices))
