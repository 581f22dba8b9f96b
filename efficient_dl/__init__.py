"""Distributed training with entropy-coded gradients: `compress` a model, or make a codec of your own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efficient_dl.codec import make_codec
    from efficient_dl.integrations.compress import compress
    from efficient_dl.integrations.ddp_compression import Compression
    from efficient_dl.integrations.fsdp import FsdpCompression

__all__ = ["Compression", "FsdpCompression", "compress", "make_codec"]

_HOMES = {
    "Compression": "efficient_dl.integrations.ddp_compression",
    "compress": "efficient_dl.integrations.compress",
    "FsdpCompression": "efficient_dl.integrations.fsdp",
    "make_codec": "efficient_dl.codec",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `import efficient_dl` alone does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
