"""What bits="auto" means for a model: a probe of links and codecs on all ranks, and the planner's decision."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from efficient_dl.comm import ProcessGroupTransport, Topology, Transport
from efficient_dl.comm.measurements import Measurements
from efficient_dl.comm.planner import DEFAULT_FLOOR_BITS, Decision, PlannerOptions, Shapes, plan_for
from efficient_dl.comm.probe import codecs_for, probe, sample_gradient
from efficient_dl.comm.transport import telling_peers
from efficient_dl.errors import ConfigError
from efficient_dl.integrations.native_wait import wait_for_native

_log = logging.getLogger(__name__)
DDP_COPIES = 2  # of each gradient in a step: into its bucket and back
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AutoOptions:
    """What decides how "auto" decides; equal on all ranks.

    floor_bits: the fewest bits a value. backward_seconds: of a step without communication, forward pass included;
        0.0: not known, then all communication is taken to be exposed. ready: by parameter, the share of
        backward_seconds after which its gradient is there; empty: not known, then evenly from a third on.
        family: "bits" or "grid", what rates mean here.
    exact: whether "lossless" may be chosen. feeds_back: whether what lossy packets leave out goes with the next ones,
        which takes time. bucket_copies: how often a step copies each gradient between itself and a bucket: by
        DistributedDataParallel twice, with gradient_as_bucket_view=True once. planner: what else the planner may
        choose.
    """

    floor_bits: float = DEFAULT_FLOOR_BITS
    backward_seconds: float = 0.0
    ready: Mapping[str, float] = field(default_factory=dict)
    family: str = "bits"
    exact: bool = True
    feeds_back: bool = False
    kernel: str = "auto"
    bucket_copies: int = 0
    planner: PlannerOptions = field(default_factory=PlannerOptions)

    def codecs(self) -> tuple[str, ...]:
        """What may be chosen, beside torch's own collective."""
        return tuple(
            one for one in codecs_for(self.floor_bits, self.family) if self.exact or one != "lossless"
        )

    def facts(self) -> dict[str, Any]:
        """What ranks compare before they measure; their own backward times may differ."""
        return {
            "floor_bits": self.floor_bits,
            "family": self.family,
            "exact": self.exact,
            "feeds_back": self.feeds_back,
        }

    def check(self) -> None:
        """Raises ConfigError for a floor or a time that cannot be."""
        if not 0.1 <= self.floor_bits <= 7:
            raise ConfigError(
                "floor_bits is out of range", expected="0.1 to 7 bits a value", found=f"{self.floor_bits}"
            )
        if not 0 <= self.backward_seconds < float("inf"):
            raise ConfigError(
                "backward_seconds is no duration",
                expected="seconds of a step",
                found=f"{self.backward_seconds}",
            )


def decide(
    parameters: Mapping[str, Tensor],
    control: ProcessGroupTransport,
    carrier: Transport,
    topology: Topology | None,
    options: AutoOptions,
    known: Measurements | None = None,
) -> tuple[Measurements, Decision]:
    """Measures and plans all-reduces of gradients; all ranks call it together with equal options, and get the same.

    control: on the process group whose all-reduce is the native one; nothing else may use it meanwhile. carrier: what
    will carry compressed bytes. topology: None: the nodes are looked for. known: what was measured before among as many
    ranks; then nothing is measured. Raises TransportError if a rank is gone.
    """
    trained = list(_trained(parameters).values())
    if not trained:
        raise ConfigError(
            "there is nothing to plan for", found="no trainable parameter that can be compressed"
        )
    if known is not None and known.world_size != control.world_size:
        raise ConfigError(
            "these measurements are of another number of ranks",
            expected=str(control.world_size),
            found=str(known.world_size),
            fix="leave measurements out, and they are taken now",
        )
    if known is not None:
        measurements = _permitted(known, options)
        if known.feeds_back != options.feeds_back and control.rank == 0:
            timed, run = ("without", "with") if options.feeds_back else ("with", "without")
            _log.warning(
                "auto: these measurements timed codecs %s error feedback, and this run is %s it", timed, run
            )
    else:
        with telling_peers(control, carrier):
            measurements = measured(
                sample_gradient(of_one_dtype(parameters)),
                options.codecs(),
                control,
                carrier,
                topology,
                options,
                lambda x: wait_for_native(
                    lambda: dist.all_reduce(x, group=control.group, async_op=True),
                    control,
                    "all-reduce, while links were measured,",
                ),
                [options.ready[name] for name in _trained(parameters)] if options.ready else [],
            )
    decision = plan_for(measurements, shapes_of(parameters), options.floor_bits, options.planner)
    if control.rank == 0:
        _log.info("auto: %s", decision.reason)
    return measurements, decision


def _permitted(known: Measurements, options: AutoOptions) -> Measurements:
    codecs = [one for one in known.codecs if options.exact or one.codec != "lossless"]
    return replace(known, codecs=tuple(codecs))


def shapes_of(parameters: Mapping[str, Tensor]) -> Shapes:
    """What is planned for: the parameters whose gradients a codec takes."""
    trained = list(_trained(parameters).values())
    return Shapes(tuple(p.numel() for p in trained), trained[-1].dtype.itemsize)


def of_one_dtype(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Those of the last one's dtype whose gradients a codec takes: they stand for all where codecs are measured."""
    trained = list(_trained(parameters).values())
    return [p for p in trained if p.dtype == trained[-1].dtype]


def _trained(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p for name, p in parameters.items() if p.requires_grad and p.dtype in _DTYPES and p.numel()}


def measured(
    sample: tuple[Tensor, Sequence[int]],
    codecs: Sequence[str],
    control: ProcessGroupTransport,
    carrier: Transport,
    topology: Topology | None,
    options: AutoOptions,
    native: Callable[[Tensor], object],
    ready: Sequence[float] = (),
) -> Measurements:
    """What `probe` measures for these options; arguments as `probe` and `decide` take them.

    sample: values and the numels of their parameters, as `sample_gradient` returns them.
    """
    values, segments = sample
    return probe(
        carrier,
        native,
        topology or Topology.discover(control, os.environ, socket.gethostname()),
        codecs,
        values,
        segments,
        options.backward_seconds,
        control if options.planner.hierarchy else None,
        options.kernel,
        options.planner.native_one_way,
        ready,
        feeds_back=options.feeds_back,
        bucket_copies=options.bucket_copies,
    )


def planned_bucket_bytes(
    parameters: Mapping[str, Tensor], measurements: Measurements, options: AutoOptions
) -> int:
    """The size of buckets that is best by far for what the planner chooses; 0: DDP's own."""
    decision = plan_for(measurements, shapes_of(parameters), options.floor_bits, options.planner)
    return decision.bucket_bytes


def bucket_copies(model: DistributedDataParallel) -> int:
    """How often a step copies each gradient between itself and its bucket."""
    return 1 if model.gradient_as_bucket_view else DDP_COPIES


def bucket_bytes(model: DistributedDataParallel) -> int:
    """The size of the model's buckets, 0 if it is DDP's own choice."""
    return 0 if model.bucket_bytes_cap_default else int(model.bucket_bytes_cap)


def log_saved_plan(saved: str, chosen: str) -> None:
    """A resumed run keeps the plan it was saved with, where this start's measurement has chosen another one."""
    _log.warning(
        "bits auto: the run goes on with %s, the plan it was saved with; this start alone would have chosen %s",
        saved,
        chosen,
    )


def is_under_floor(bits: str, floor_bits: float) -> bool:
    """Whether a decision ("none", "lossless", "2.0") has fewer bits than may be chosen."""
    return bits not in ("none", "lossless") and float(bits) < floor_bits


def note_ignored(**options: object) -> str:
    """What the native all-reduce makes of the user's other options: rank 0's warning, and words for the reason."""
    ignored = [name for name, value in options.items() if value]
    if not ignored:
        return ""
    if dist.get_rank() == 0:
        _log.warning("auto chose the native all-reduce, which leaves %s without effect", ", ".join(ignored))
    return f"; {', '.join(ignored)} without effect on the native all-reduce"
