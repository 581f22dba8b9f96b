"""Compiles every GPU kernel as its codec launches it, for a GPU that need not be there: python compile_kernels.py 90

The codecs' own host code runs, on CPU tensors; a launch compiles and does no more. Prints a line for each kernel of
each module: its name and how many variants were compiled.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from efficient_dl.codec.kernels import triton as package
from efficient_dl.codec.kernels.triton.block import TritonBlock
from efficient_dl.codec.kernels.triton.header import check_header, fill_if_corrupt, write_header_on_device
from efficient_dl.codec.kernels.triton.split import TritonSplit

NUMEL = 100_000
SEGMENTS = (70_000, 30_000)
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)


class AbsentGPU:
    """What Triton asks its driver for while it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """The first one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Never used: nothing is launched."""
        return 0


def compile_only(capability: int) -> Counter[str]:
    """From here on launches only compile, and are counted by the kernel's name."""
    driver.set_active(AbsentGPU(capability))
    compiled, run = Counter[str](), JITFunction.run

    def compile_it(self: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, warmup=True, **options)
        assert "cubin" in kernel.asm
        compiled[f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"] += 1
        return kernel

    JITFunction.run = compile_it
    return compiled


def launch_all() -> None:
    """Every kernel, for several dtypes, for either way of coding levels, and with and without adding to the output."""
    status = torch.zeros(3, dtype=torch.int64)
    packet = torch.zeros(8 * NUMEL, dtype=torch.uint8)
    write_header_on_device(packet, torch.tensor(9), 2, 1, 0, 0, NUMEL, 0)
    check_header(packet, 2, 1, (0,), NUMEL, 0)
    fill_if_corrupt(torch.zeros(NUMEL), status)
    for dtype in DTYPES:
        _code(TritonSplit(), dtype, packet, status, accumulate=dtype == torch.bfloat16)
    _code(TritonBlock(4.0), torch.bfloat16, packet, status, accumulate=True)
    levels, x = TritonBlock(2.0), torch.zeros(NUMEL)
    levels.encode_lossy(x, (NUMEL,), packet, None, torch.zeros(NUMEL), 40_000)
    levels.decode_on_device(packet, x.dtype, (NUMEL,), torch.zeros_like(x), False, status)


def _code(
    kernel: TritonSplit | TritonBlock, dtype: torch.dtype, packet: Tensor, status: Tensor, accumulate: bool
) -> None:
    x = torch.zeros(NUMEL).to(dtype)
    kernel.encode(x, SEGMENTS, torch.zeros(kernel.max_bytes(NUMEL, dtype, 2), dtype=torch.uint8), None)
    kernel.decode_on_device(packet, dtype, SEGMENTS, torch.zeros_like(x), accumulate, status)


def all_kernels() -> set[str]:
    """Those that are in the package."""
    found: set[str] = set()
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        names = (name for name, value in vars(loaded).items() if isinstance(value, JITFunction))
        found |= {f"{module.name}.{name}" for name in names if name.endswith("_kernel")}
    return found


if __name__ == "__main__":
    counts = compile_only(int(sys.argv[1]))
    launch_all()
    for name in sorted(all_kernels() | counts.keys()):
        print(name, counts[name])
