"""Distributed training with entropy-coded gradients: `compress` a model, make a codec, `partition` a network."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efficient_dl import closed_form, depth, entropy, objectives
    from efficient_dl.codec import make_codec
    from efficient_dl.integrations.compress import compress
    from efficient_dl.integrations.ddp_compression import Compression
    from efficient_dl.integrations.fsdp import FsdpCompression
    from efficient_dl.local_learning.learner import LocalLearner
    from efficient_dl.local_learning.partition import Partition, Partitions, partition

__all__ = [
    "Compression",
    "FsdpCompression",
    "LocalLearner",
    "Partition",
    "Partitions",
    "closed_form",
    "compress",
    "depth",
    "entropy",
    "make_codec",
    "objectives",
    "partition",
]

_MODULES = ("closed_form", "depth", "entropy", "objectives")
_HOMES = {
    "Compression": "efficient_dl.integrations.ddp_compression",
    "compress": "efficient_dl.integrations.compress",
    "FsdpCompression": "efficient_dl.integrations.fsdp",
    "make_codec": "efficient_dl.codec",
    "LocalLearner": "efficient_dl.local_learning.learner",
    "Partition": "efficient_dl.local_learning.partition",
    "Partitions": "efficient_dl.local_learning.partition",
    "partition": "efficient_dl.local_learning.partition",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `import efficient_dl` alone does not load torch."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
