"""What a rank computes on: its device, its cores, its threads; agreed on with the ranks of the same machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from efficient_dl.comm.topology import machine, own_cores
from efficient_dl.errors import LaunchError
from efficient_dl.launching import binding


def choose_device(setting: str, local_rank: int) -> torch.device:
    """The CPU, or the GPU with the local rank's number: of those that CUDA_VISIBLE_DEVICES leaves.

    Launchers also show each rank one GPU alone; then it is that. `check_gpus` finds ranks that got the same one.
    Raises LaunchError if there is no GPU for this rank.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "cpu" or (setting == "auto" and count == 0):
        return torch.device("cpu")
    if count != 1 and local_rank >= count:
        raise LaunchError(
            "there is no GPU for every worker",
            expected=f"at least {local_rank + 1} on this machine",
            found=str(count),
            fix="fewer --workers, or --set run.device=cpu",
        )
    return torch.device("cuda", 0 if count == 1 else local_rank)


def gpu_of(device: torch.device) -> str:
    """What identifies the GPU on its machine; empty for the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def check_gpus(everyone: Sequence[tuple[str, str]]) -> None:
    """Raises LaunchError if two ranks have the same GPU. everyone: (machine, GPU) by rank."""
    first: dict[tuple[str, str], int] = {}
    for rank, one in enumerate(everyone):
        if one[1] and first.setdefault(one, rank) != rank:
            raise LaunchError(
                f"there is no GPU for every worker: ranks {first[one]} and {rank} have the same one",
                found=f"GPU {one[1]}",
                where="CUDA_VISIBLE_DEVICES, or --gpus-per-task and the like",
                fix="fewer workers on the machine, or more GPUs for each, or --set run.device=cpu",
            )


def usable_cores(device: torch.device, bound: bool) -> tuple[str, tuple[int, ...]]:
    """This machine, and the cores that this process may use; bound: of those, the GPU's neighbours."""
    cores = own_cores()
    if bound and device.type == "cuda":
        cores = binding.near_gpu(cores, _pci(torch.cuda.get_device_properties(device)))
    return machine(), tuple(cores)


def share_cores(everyone: Sequence[tuple[str, tuple[int, ...]]], rank: int, bound: bool) -> int:
    """How many threads this rank has: its cores, divided by the ranks that were given the very same ones.

    everyone: every rank's `usable_cores`. bound: keep this process on its share; raises LaunchError if it is empty.
    """
    own = everyone[rank]
    sharing = [other for other, cores in enumerate(everyone) if cores == own]
    if bound:
        share = binding.share_of(own[1], sharing.index(rank), len(sharing), binding.core_places(own[1]))
        binding.bind(share)
        return len(share)
    return max(1, len(own[1]) // len(sharing))


def _pci(properties: Any) -> str:
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
