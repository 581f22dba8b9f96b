"""What a host says of itself before a job, by the standard library alone; nothing here fails for what is missing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
from pathlib import Path

ABSENT = "absent"
_PACKAGES = ("torch", "efficient_dl", "numpy")
_PROGRAMS = {"slurm": "srun", "munge": "munge"}
_CALL_SECONDS = 30.0


def equal_facts() -> dict[str, str]:
    """What must be the same on all hosts, in words."""
    facts = {"python": platform.python_version()}
    facts |= {name: _version(name) for name in _PACKAGES}
    facts["efficient_dl's code"] = _code_hash("efficient_dl")
    if "SLURM_JOB_ID" in os.environ:
        facts |= {name: _program_version(program) for name, program in _PROGRAMS.items()}
    facts["NVIDIA driver"] = _first_line(Path("/proc/driver/nvidia/version"))
    facts["GPUs"] = str(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))
    facts["locked memory"] = _limit(resource.RLIMIT_MEMLOCK)
    facts["open files"] = _limit(resource.RLIMIT_NOFILE)
    return facts


def own_problems(port: int | None) -> list[str]:
    """What is wrong with this host by itself, with the remedy. port: must be free here; None: any may be taken."""
    problems = []
    if port is not None and (complaint := _port_in_use(port)):
        problems.append(f"port {port} cannot be listened at: {complaint}; set another MASTER_PORT")
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for name in filter(None, os.environ.get(variable, "").split(",")):
            if not any(one.startswith(name.lstrip("^=")) for one in interfaces):
                problems.append(f"{variable}={name}, but there is no such interface: {', '.join(interfaces)}")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if list(Path("/sys/class/infiniband").glob("*")) and soft != resource.RLIM_INFINITY:
        problems.append(
            f"locked memory is limited to {_limit(resource.RLIMIT_MEMLOCK)}, and InfiniBand needs it without a limit; "
            "ulimit -l unlimited, or PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
        )
    return problems


def name_problem() -> str | None:
    """What is wrong with the host's own name, if there are other hosts: gloo tells them what it stands for."""
    name = socket.gethostname()
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return None
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        address = f"not to be resolved ({error})"
    else:
        if not address.startswith("127."):
            return None
    return (
        f"the host's own name {name} is {address}, where no other host reaches it; "
        "set GLOO_SOCKET_IFNAME to the network's interface, or mend /etc/hosts"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _code_hash(package: str) -> str:
    """Of the package's Python files: two checkouts may have one version. Imports nothing."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return ABSENT
    digest = hashlib.sha256()
    folder = Path(spec.origin).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _program_version(program: str) -> str:
    if not shutil.which(program):
        return ABSENT
    try:
        shown = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CALL_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"fails: {error}"
    return shown.stdout.splitlines()[0].strip() if shown.stdout else ABSENT


def _first_line(file: Path) -> str:
    try:
        return file.read_text().splitlines()[0]
    except (OSError, IndexError):
        return ABSENT


def _limit(which: int) -> str:
    soft, _ = resource.getrlimit(which)
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def _port_in_use(port: int) -> str | None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        return str(error)
    return None
