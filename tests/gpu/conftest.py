"""Runs the GPU kernels in Triton's interpreter where there is no GPU; decided before Triton is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
