"""Gradients that DDP's buckets leave to torch's own all-reduce: what no codec takes, and all after a kill switch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from efficient_dl.comm import Meter, ProcessGroupTransport, native_tally, sparse_tally
from efficient_dl.errors import TransportError

TorchFuture = torch.futures.Future

_log = logging.getLogger(__name__)
CODED = (torch.float32, torch.bfloat16, torch.float16)


class NativeReducer:
    """Averages buckets by torch's all-reduce on the model's group, as DDP without a hook does, and counts the bytes.

    The bytes are calculated: 2 (n − 1) / n of a dense bucket's, as a ring sends; n − 1 times this rank's indices and
    values of a sparse one, as an all-gather does.
    """

    def __init__(self, control: ProcessGroupTransport, meter: Meter) -> None:
        self._control = control
        self._meter = meter

    def start(self, x: Tensor, parameters: Mapping[str, Tensor]) -> tuple[TorchFuture[Tensor], Future[Any]]:
        """Starts on one bucket; returns what DDP waits for, and what ends when the all-reduce is complete.

        x: the bucket's gradients, dense or sparse, replaced by their average. parameters: those in it, by name.
        """
        world_size = self._control.world_size
        if x.is_sparse:
            (name,) = parameters
            indices, values = x._indices(), x._values()
            num_bytes = indices.numel() * indices.element_size() + values.numel() * values.element_size()
            self._meter.add(sparse_tally(name, x.numel(), values.numel(), num_bytes, world_size))
            x.div_(world_size)
        else:
            itemsize = x.element_size()
            parts = (
                2 if next(iter(parameters.values())).is_complex() else 1
            )  # DDP sends complex values as two real
            numels = {name: parts * p.numel() for name, p in parameters.items()}
            self._meter.add(native_tally(numels, dict.fromkeys(numels, itemsize), world_size))
            x.mul_(1.0 / world_size)
        work = dist.all_reduce(x, group=self._control.group, async_op=True)
        assert work is not None
        done: Future[Any] = Future()
        return work.get_future().then(lambda future: _end(future, done)), done


def _end(future: TorchFuture[Any], done: Future[Any]) -> Tensor:
    try:
        value = future.value()[0]
    except RuntimeError as error:
        failure = TransportError(
            "torch's own all-reduce failed: a peer is dead, stuck or unreachable",
            found=str(error).splitlines()[0],
            fix="read the ends of the other ranks' logs",
        )
        done.set_exception(failure)
        raise failure from error
    done.set_result(None)
    return value


def left_to_torch(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The trained parameters whose gradients no codec takes, each with the reason."""
    sparse = {
        id(child.weight)
        for child in module.modules()
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.sparse
    }
    reasons: dict[str, str] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad and id(parameter) in sparse:
            reasons[name] = "its gradients are sparse"
        elif parameter.requires_grad and parameter.dtype not in CODED:
            reasons[name] = f"its gradients are {str(parameter.dtype).removeprefix('torch.')}"
    return reasons


def log_left_to_torch(reasons: Mapping[str, str]) -> None:
    """Says once which parameters are not compressed, and why."""
    if reasons:
        lines = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
        _log.warning("reduced by torch's own all-reduce, uncompressed: %s", lines)
