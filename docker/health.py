#!/usr/bin/env python3
"""The images' health check: can this container compress what it trains?

The compiled codecs load, run on this processor, write the bytes that the reference in torch writes, and restore them.
With --gpu torch also sees a device, which the check asks the driver and uses none of its memory.
"""

from __future__ import annotations

import os
import sys

# torch then asks the driver's management library for devices, and leaves no context on them.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch

from efficient_dl.codec import make_codec
from efficient_dl.errors import EdlError

NUMEL = 10_000  # some whole blocks and a rest


def problems(gpu: bool) -> list[str]:
    """What keeps this container from its work; [] if it is healthy. gpu: whether it needs a device."""
    found = [problem for spec in ("lossless", "bits:2.0") if (problem := _codec_problem(spec))]
    if gpu and not torch.cuda.is_available():
        found.append(
            "torch sees no GPU: start with --gpus all, and see that the host's driver is recent enough"
        )
    return found


def _codec_problem(spec: str) -> str | None:
    values = torch.randn(NUMEL, generator=torch.Generator().manual_seed(1))
    try:
        native, reference = make_codec(spec, kernel="native"), make_codec(spec, kernel="reference")
        packet = native.encode(values)
        expected = reference.encode(values)
        restored, known = torch.empty_like(values), torch.empty_like(values)
        native.decode(packet, restored)
        reference.decode(expected, known)
    except EdlError as error:
        return f"{spec}: {error}"
    if not torch.equal(packet, expected):
        return f"{spec}: the compiled codec writes other bytes than the reference"
    if not torch.equal(restored, known) or (spec == "lossless" and not torch.equal(restored, values)):
        return f"{spec}: the compiled codec restores other values than the reference"
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)  # beside a training, whose cores these are
    found = problems("--gpu" in sys.argv[1:])
    print("\n".join(found) or "healthy")
    sys.exit(bool(found))
