"""`edl doctor`: what this machine has, and what it lacks for which purpose."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from efficient_dl.codec import FORMAT_VERSION, make_codec
from efficient_dl.config import DataConfig
from efficient_dl.data import load_data
from efficient_dl.errors import EdlError

_PACKAGES = (
    *("efficient_dl", "torch", "numpy", "typer", "rich", "tensorboard", "matplotlib", "scikit-learn"),
    *("triton", "zstandard", "lz4"),
)

_CAPABILITIES = {12: "CAP_NET_ADMIN", 21: "CAP_SYS_ADMIN"}


def print_report() -> None:
    """Print one line a fact."""
    for name, text in facts():
        print(f"{name:<20}{text}")


def facts() -> Iterator[tuple[str, str]]:
    """(name, value) of everything worth knowing in a bug report."""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    yield "packet format", f"version {FORMAT_VERSION}"
    yield "codec kernels", _kernels()
    yield "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} may be used"
    yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    yield "GPUs", _gpus()
    yield "network namespaces", _namespaces()
    for name in ("stdlib", "digits", "fashion-mnist"):
        yield f"data {name}", _data(name)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _kernels() -> str:
    try:
        cpu = make_codec("bits:2.0").kernel_for(torch.device("cpu"))
    except EdlError as error:
        cpu = str(error).replace("\n ", ";")
    if not torch.cuda.is_available():
        return cpu
    return f"{cpu}; on the GPU {make_codec('bits:2.0').kernel_for(torch.device('cuda'))}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names)


def _namespaces() -> str:
    """What emulated hosts need (`python -m cluster.emulate --check` in the repository says more)."""
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"not usable: no {' and no '.join(missing)} (Debian: apt install iproute2)"
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        effective = int(status["CapEff"], 16)
    except (OSError, KeyError):
        return "not usable: this system has none"
    lacking = [name for bit, name in _CAPABILITIES.items() if not effective >> bit & 1]
    if lacking:
        return f"not usable: no {' and no '.join(lacking)} (run as root, or under unshare -Urnm)"
    return "usable"


def _data(name: str) -> str:
    try:
        data = load_data(DataConfig(name=name, download=False))
    except EdlError as error:
        return f"not here: {error.problem}" + (f"; {fix}" if (fix := error.details.get("fix")) else "")
    return f"{data.num_train:,} + {data.num_validation:,} {data.spec.kind}, {data.fingerprint}"
