"""Takes away two thirds of the time of Triton's interpreter, and changes no result.

What takes it is neither the kernels' arithmetic nor the memory, but that every operation on a tensor describes its type
anew, that every sum is computed twice, and that the language is patched at every call of a function.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Replaces functions of Triton until the patch is undone."""
    _patch_the_language_once_a_kernel(patch)
    _leave_out_checks_that_nobody_reads(patch)
    _remember_types(patch)


def _patch_the_language_once_a_kernel(patch: pytest.MonkeyPatch) -> None:
    """The interpreter replaces triton.language's functions by its own when a kernel starts, undoes that when the kernel
    ends, and in between replaces them anew at every call of a device function: here once a kernel and module.
    """
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

    one_at_a_time = threading.RLock()  # what it replaces is every thread's
    rewrite = interpreter.InterpretedFunction.rewrite

    def run_one_grid(self: Any, *arguments: Any, **options: Any) -> Any:
        with one_at_a_time:
            replaced.clear()
            return run_grid(self, *arguments, **options)

    def rewrite_one(self: Any) -> Any:
        with one_at_a_time:  # two threads that parse at once can raise SystemError in Python 3.11
            return rewrite(self)

    patch.setattr(interpreter, "_patch_lang", replace_once)
    patch.setattr(interpreter.GridExecutor, "__call__", run_one_grid)
    patch.setattr(interpreter.InterpretedFunction, "rewrite", rewrite_one)


def _leave_out_checks_that_nobody_reads(patch: pytest.MonkeyPatch) -> None:
    """Every integer sum is formed in 64 bits as well and compared, and without `debug` the outcome is thrown away."""
    check = TritonSemantic.binary_op_sanitize_overflow_impl

    def check_if_debugging(self: Any, *arguments: Any) -> None:
        if self.builder.options.debug:
            check(self, *arguments)

    patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", check_if_debugging)


def _remember_types(patch: pytest.MonkeyPatch) -> None:
    """What depends on a tensor's shape alone is made once a shape, and numpy's dtypes are looked up once a dtype."""
    describe_block, describe_tensor = core.block_type.__init__, core.tensor.__init__
    find_dtype = interpreter._get_np_dtype
    blocks: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}
    dtypes: dict[str, Any] = {}

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        if sizes not in blocks:
            describe_block(self, element_ty, shape)
            blocks[sizes] = self.shape, self.numel, self.name.removesuffix(f"{element_ty}>")
        self.element_ty = element_ty
        self.shape, self.numel, name = blocks[sizes]
        self.name = f"{name}{element_ty}>"

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in tensors:
            describe_tensor(self, handle, type)
            tensors[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[sizes]

    def np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return find_dtype(scalar)
        if scalar.name not in dtypes:
            dtypes[scalar.name] = find_dtype(scalar)
        return dtypes[scalar.name]

    patch.setattr(core.block_type, "__init__", block_init)
    patch.setattr(core.tensor, "__init__", tensor_init)
    patch.setattr(interpreter, "_get_np_dtype", np_dtype)
