"""Where the GPU kernels run: on the GPU, or in Triton's interpreter, as tests/conftest.py decided."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="package", autouse=True)
def language_patched_once_a_kernel() -> Iterator[None]:
    """Saves a quarter of the interpreter's time and changes no result.

    It replaces the functions of triton.language by its own when a kernel starts, undoes that when the kernel ends, and
    in between replaces them anew at every call of a device function. Here it does so once a kernel and module.
    """
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    replace: Callable[[Any], Any] = interpreter._patch_lang
    run_grid = interpreter.GridExecutor.__call__
    replaced: set[str] = set()

    def replace_once(function: Any) -> Any:
        modules = {
            value.__name__
            for value in function.__globals__.values()
            if isinstance(value, ModuleType) and (value is tl or value is tl.core)
        }
        if modules <= replaced:
            return None  # of a device function: nobody undoes it before the kernel ends
        replaced.update(modules)
        return replace(function)

    one_at_a_time = threading.Lock()  # what it replaces is every thread's

    def run_one_grid(self: Any, *arguments: Any, **options: Any) -> Any:
        with one_at_a_time:
            replaced.clear()
            return run_grid(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter.GridExecutor, "__call__", run_one_grid)
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
