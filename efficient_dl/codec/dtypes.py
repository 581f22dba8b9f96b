"""The tensors' dtypes and the codes that stand for them in packets and fingerprints."""

from __future__ import annotations

from typing import Final

import torch

DTYPE_CODES: Final[dict[torch.dtype, int]] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}
