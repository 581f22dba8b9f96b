"""What we read of FSDP2's own state: which parameters travel together, between whom, and which have gradients.

torch gives a custom collective only flat buffers. Everything beyond its public methods that we rely on is in this file;
read in torch 2.11 and 2.13.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from efficient_dl.comm import ChunkLayout
from efficient_dl.errors import ConfigError, EdlError

# In these versions nothing reads a reduced gradient before the end of backward, under the conditions of `may_defer`.
_DEFERRING_TORCH = ((2, 11), (2, 12), (2, 13))
# In these versions torch all-reduces between replicas exactly where `post_backward` finds an HSDP mesh (`_watch`).
_REPLICATING_TORCH = _DEFERRING_TORCH
_DEFAULT_COMMS = ("DefaultAllGather", "DefaultReduceScatter")
_NEEDED_OF_GROUP = ("fsdp_params", "mesh_info", "post_backward", "mp_policy", "_all_reduce_hook", "device")
_NEEDED_OF_REPLICAS = ("all_reduce_grads", "_partial_reduce_output", "_all_reduce_state")
_NEEDED_OF_PARAMETER = (
    "sharded_param",
    "_module_info",
    "_sharded_param_data",
    "_sharded_local_tensor",
    "padded_sharded_param_size",
    "_orig_size",
    "unsharded_accumulated_grad",
    "offload_to_cpu",
)


class Unit:
    """The parameters of one `fully_shard` call, which FSDP gathers and reduces together.

    It watches which of them have gradients in a backward pass, because a reduce-scatter covers only those.
    """

    def __init__(self, module: FSDPModule, group: Any, names: Sequence[str]) -> None:
        self._module = module
        self.names = tuple(names)
        self.group: dist.ProcessGroup = group.mesh_info.shard_process_group
        self.device: torch.device = group.device
        self.world_size = self.group.size()
        replicas = getattr(group.mesh_info, "replicate_process_group", None)
        self._replicas: dist.ProcessGroup | None = replicas if replicas and replicas.size() > 1 else None
        self._group = group
        self._reduced = [p for p in group.fsdp_params if p.sharded_param.requires_grad]
        self._name_of = {id(p): name for p, name in zip(group.fsdp_params, names, strict=True)}
        self._native = (group._all_gather_comm, group._reduce_scatter_comm)
        self._post_backward = group.post_backward
        self._owner: object = None
        self._after_pass: Callable[[], None] = _nothing
        self.replaces_all_reduce = False
        self._is_replacing = False

    def install(self, all_gather: Any, reduce_scatter: Any, owner: object, replaces_all_reduce: bool) -> None:
        """Registers custom collectives, and begins to watch. The model keeps their owner alive from now on.

        replaces_all_reduce: the reduce-scatter also reduces between replicas (HSDP), and torch must not.
        """
        self._owner = owner
        self._after_pass = reduce_scatter.after_pass
        self.replaces_all_reduce = replaces_all_reduce
        self._set_comms(all_gather, reduce_scatter)
        self._group.post_backward = self._watch

    def release(self) -> None:
        """Ends the watching, and gives torch's own collectives back."""
        self._owner = None
        self.replaces_all_reduce = False
        if self._group.__dict__.pop("post_backward", None) is not None:
            self._set_comms(*self._native)

    def _set_comms(self, all_gather: Any, reduce_scatter: Any) -> None:
        self._module.set_custom_all_gather(all_gather)
        self._module.set_custom_reduce_scatter(reduce_scatter)

    @property
    def label(self) -> str:
        """Its first parameter, for messages."""
        return self.names[0]

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The other ranks that hold the same shard, and this one (HSDP); None without such an axis."""
        return self._replicas

    @property
    def reduces_replicas(self) -> bool:
        """Whether gradients are all-reduced between replicas after the current reduce-scatter, by whomever."""
        return self.replicas is not None and self._group.all_reduce_grads

    @property
    def is_replacing(self) -> bool:
        """Whether that all-reduce is left to the current reduce-scatter: torch will make none."""
        return self._is_replacing

    @property
    def partial(self) -> Tensor | None:
        """What passes that were not to be all-reduced have left, to be added before the replicas are reduced."""
        return self._group._partial_reduce_output

    @property
    def divide_factor(self) -> float | None:
        """What the user has set as the divisor of gradients; None is the number of ranks."""
        return self._group.gradient_divide_factor

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of gradients while they are reduced."""
        policy = self._group.mp_policy
        return policy.reduce_dtype or policy.param_dtype or self._group.fsdp_params[0].sharded_param.dtype

    def gather_layout(self) -> ChunkLayout:
        """How all its parameters lie in an all-gather's buffer."""
        return self._layout(self._group.fsdp_params)

    def reduce_layout(self) -> ChunkLayout:
        """How those that have gradients in this backward pass lie in a reduce-scatter's buffer."""
        return self._layout(self._reduced)

    def trained_layout(self) -> ChunkLayout:
        """The same if every parameter that is trained has a gradient."""
        return self._layout([p for p in self._group.fsdp_params if p.sharded_param.requires_grad])

    def shards(self) -> dict[str, Tensor]:
        """The own part of every parameter, without padding, by name."""
        return {self._name_of[id(p)]: p._sharded_local_tensor.detach() for p in self._group.fsdp_params}

    def own_chunk(self) -> Tensor | None:
        """What this rank contributes to an all-gather, a copy; None if an extension or mixed dtypes decide that."""
        parts = []
        for parameter in self._group.fsdp_params:
            if hasattr(parameter._sharded_local_tensor, "fsdp_pre_all_gather"):
                return None
            data = parameter._sharded_param_data.detach()
            parts.append(data.to(self.device, self._group.mp_policy.param_dtype or data.dtype))
        if len({part.dtype for part in parts}) != 1:
            return None
        return torch.cat([part.reshape(-1) for part in parts])

    def may_defer(self, dtype: torch.dtype) -> bool:
        """Whether the result of the current reduce-scatter, of this dtype, is read only after backward.

        On a CPU torch waits for a reduce-scatter inside backward; on a GPU its streams do this better.
        """
        group = self._group
        return (
            self.device.type == "cpu"
            and _version() in _DEFERRING_TORCH
            and (self.replicas is None or self._is_replacing)
            and group._all_reduce_hook is None
            and all(
                p.sharded_param.grad is None
                and p.sharded_param.dtype == dtype
                and not p.offload_to_cpu
                and not getattr(p.sharded_param, "_post_accumulate_grad_hooks", None)
                for p in self._reduced
            )
        )

    def wait_for_reduction(self) -> None:
        """Lets the current stream of a GPU wait for what `post_backward` has started on others."""
        event = getattr(self._group, "_post_reduce_event", None)
        if event is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(event)

    def _watch(self, *arguments: Any) -> Any:
        group = self._group
        self._reduced = [p for p in group.fsdp_params if self._has_gradient(p)]
        if not (self.replaces_all_reduce and self.reduces_replicas):
            result = self._post_backward(*arguments)
            self._after_pass()
            return result
        # torch decides by the class of its mesh whether to all-reduce; without the replicas' role it is plain FSDP,
        # and what a reduce-scatter wrote is final.
        mesh_info = group.mesh_info
        group.mesh_info = _without_replicas(mesh_info)
        self._is_replacing = True
        try:
            result = self._post_backward(*arguments)
        finally:
            group.mesh_info = mesh_info
            self._is_replacing = False
        if group._all_reduce_state is not None:
            raise EdlError(
                "torch has all-reduced gradients between replicas that were reduced already",
                where=f"the module of {self.label!r}, torch {torch.__version__}",
                fix='report this with your torch version; until then axes={"replicate": "none"}',
            )
        return result

    def _has_gradient(self, parameter: Any) -> bool:
        if not hasattr(parameter, "_unsharded_param"):
            return False
        unsharded = parameter.unsharded_param
        includes_unused = getattr(self._group, "reduce_scatter_unused_params", False)
        return (
            parameter.unsharded_accumulated_grad is not None
            or unsharded.grad is not None
            or (includes_unused and unsharded.requires_grad)
        )

    def _layout(self, parameters: Sequence[Any]) -> ChunkLayout:
        return ChunkLayout.of(
            [self._name_of[id(p)] for p in parameters],
            [p._orig_size.numel() for p in parameters],
            [p.padded_sharded_param_size.numel() for p in parameters],
            self.world_size,
        )


def units_of(model: nn.Module) -> list[Unit]:
    """All units of a model, in the order of its modules. Raises ConfigError for what cannot be compressed."""
    prefixes = {id(module): f"{name}." if name else "" for name, module in model.named_modules()}
    found: list[tuple[FSDPModule, Any, list[str]]] = []
    for path, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        group = _group_of(module, path)
        if group is None or any(group is other for _, other, _ in found):
            continue
        _check(group, path)
        infos = [parameter._module_info for parameter in group.fsdp_params]
        found.append((module, group, [prefixes[id(info.module)] + info.param_name for info in infos]))
    if not found:
        raise ConfigError(
            "no module of the model holds parameters that fully_shard has sharded",
            fix="fully_shard(layer) for every layer, then fully_shard(model), then compress(model, optimizer)",
        )
    return [Unit(*one) for one in found]


def check_replacing(unit: Unit) -> None:
    """Raises EdlError unless this torch leaves the all-reduce between replicas to us where we ask it to."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_collectives import foreach_reduce
        from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo, FSDPMeshInfo

        known = (
            _version() in _REPLICATING_TORCH
            and "all_reduce_group" in inspect.signature(foreach_reduce).parameters
            and isinstance(unit._group.mesh_info, FSDPMeshInfo)
            and not isinstance(_without_replicas(unit._group.mesh_info), DDPMeshInfo)
            and all(hasattr(unit._group, name) for name in _NEEDED_OF_REPLICAS)
        )
    except ImportError:
        known = False
    if not known:
        raise EdlError(
            "this torch reduces gradients between replicas (HSDP) in another way than the versions we know",
            expected="torch 2.11 to 2.13",
            found=f"torch {torch.__version__}",
            fix='axes={"replicate": "none"}, which leaves that all-reduce to torch; or install such a torch',
        )


def _without_replicas(mesh_info: Any) -> Any:
    """The same mesh where only its shard axis has a role, as in one-dimensional FSDP."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

    plain = copy.copy(mesh_info)
    plain.__class__ = FSDPMeshInfo
    return plain


def _group_of(module: FSDPModule, path: str) -> Any:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # since torch 2.12
    if groups is None:
        groups = [group for group in (state._fsdp_param_group,) if group is not None]
    if len(groups) > 1:
        raise ConfigError(
            f"module {path or 'root'!r} shards its parameters over several meshes",
            expected="one mesh a module: torch takes no custom collectives otherwise",
            fix="leave ShardPlacementResult with a mesh of its own out of shard_placement_fn",
        )
    return groups[0] if groups else None


def _check(group: Any, path: str) -> None:
    missing = [name for name in _NEEDED_OF_GROUP if not hasattr(group, name)]
    missing += [name for name in _NEEDED_OF_PARAMETER for p in group.fsdp_params[:1] if not hasattr(p, name)]
    if missing:
        raise EdlError(
            "this torch keeps FSDP2's state in another way than the versions we know",
            expected="torch 2.11 to 2.13",
            found=f"torch {torch.__version__}, without {missing[0]!r}",
            fix="install a torch of that range, or train without compress()",
        )
    if not hasattr(group.mesh_info, "shard_process_group"):
        raise ConfigError(
            f"module {path or 'root'!r} is replicated, not sharded", fix="use DistributedDataParallel for it"
        )
    for comm in (group._all_gather_comm, group._reduce_scatter_comm):
        if type(comm).__name__ not in _DEFAULT_COMMS:
            raise ConfigError(
                f"module {path or 'root'!r} has a custom collective already",
                found=type(comm).__name__,
                fix="call compress() once, and set no custom all-gather or reduce-scatter",
            )


def _version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _nothing() -> None:
    """Before `Unit.install`."""
