"""Runs the GPU kernels in Triton's interpreter where there is no GPU; decided before Triton is imported."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run: on the CPU only in the interpreter, on a GPU only compiled."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param == "cpu" and not interpreted:
        pytest.skip("without TRITON_INTERPRET=1 Triton has no CPU; the same test runs on the GPU")
    if request.param == "cuda" and interpreted:
        pytest.skip("TRITON_INTERPRET=1 is set; the same test runs on the CPU")
    return request.param
