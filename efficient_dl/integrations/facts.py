"""What every integration's ranks compare before they start, whatever engine trains the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from efficient_dl.codec import FORMAT_VERSION


def common_facts(parameters: Mapping[str, Tensor], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, the parameters and a hash of their order, and what the user wants compared, as text."""
    shapes = {
        name: f"{p.dtype} {list(p.shape)} on {p.device.type}{'' if p.requires_grad else ', frozen'}"
        for name, p in parameters.items()
    }
    return {
        "wire format": FORMAT_VERSION,
        "torch": torch.__version__.partition("+")[0],
        "parameters": shapes,
        "order of parameters": xxhash.xxh3_64_hexdigest("\n".join(shapes).encode()),
        "extra": {name: str(value) for name, value in extra.items()},
    }
