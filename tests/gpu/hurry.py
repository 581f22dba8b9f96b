"""Spares Triton's interpreter work without effect: more than half of what the kernels cost there."""

from __future__ import annotations

import dataclasses
import functools
import types


@functools.cache
def hurry() -> None:
    """Changes Triton's interpreter in this process; what is computed stays the same.

    A sum of integers is checked for overflow, and nothing asks for the outcome: assertions on a device need
    TRITON_DEBUG. A device function replaces the language's functions by the interpreter's, and finds that the kernel
    which calls it has done so.
    Source: triton 3.9, runtime/interpreter.py (_patch_lang) and language/semantic.py (device_assert).
    """
    import triton.language as tl
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)

    replace, nothing = interpreter._patch_lang, types.SimpleNamespace(restore=lambda: None)

    def replace_once(function: types.FunctionType) -> object:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.add) for language in languages):
            return nothing
        return replace(function)

    interpreter._patch_lang = replace_once
