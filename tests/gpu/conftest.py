"""Where the GPU kernels run: on the GPU, or in Triton's interpreter, as tests/conftest.py decided."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """See tests/gpu/quick_interpreter.py."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from tests.gpu.quick_interpreter import make_quick

    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield


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
