"""Which transport carries a model's compressed bytes, beside the process group that carries all else."""

from __future__ import annotations

import os
import socket
from typing import cast

from efficient_dl.comm import Divisible, ProcessGroupTransport, Transport, gather_json
from efficient_dl.comm.mpi import MpiTransport
from efficient_dl.comm.mpi_link import mpi_module
from efficient_dl.errors import ConfigError

PROCESS_GROUP, MPI = "process_group", "mpi"


def transport_name(wish: Transport | str | None) -> str:
    """What the ranks compare in their handshake."""
    if isinstance(wish, str):
        return wish
    return PROCESS_GROUP if wish is None else f"{type(wish).__name__} object"


def transport_kind(transport: Transport) -> str:
    """What `stats` call a transport in use: "process_group", "mpi", or its class."""
    kinds = {ProcessGroupTransport: PROCESS_GROUP, MpiTransport: MPI}
    return kinds.get(type(transport), type(transport).__name__)


def divisible(transport: Transport) -> Divisible:
    """The transport itself; raises ConfigError if it cannot make others among a part of its ranks."""
    if not hasattr(transport, "subgroup"):
        raise ConfigError(
            f"groups cannot be made with the transport {transport_kind(transport)!r}",
            expected="a transport with a method subgroup(members), as the process group's and MPI's have",
            fix="leave one of transport and hierarchy out",
        )
    return cast(Divisible, transport)


def check_transport(wish: Transport | str | None, control: ProcessGroupTransport, native: bool) -> None:
    """Raises ConfigError, or PackageMissing, if this rank can see that the wish is impossible.

    native: nothing is sent but by the process group's own collectives.
    """
    if wish is None:
        return
    if native:
        raise ConfigError(
            f"transport {transport_name(wish)!r} would carry nothing",
            where="bits='none' and shadow=True leave the reduction to the process group",
            fix="leave transport out",
        )
    if isinstance(wish, str):
        if wish != MPI:
            raise ConfigError(
                f"unknown transport {wish!r}", expected="'mpi', a Transport, or None for the process group"
            )
        found = mpi_module().COMM_WORLD
        rank, world_size, device = found.Get_rank(), found.Get_size(), "cpu"
    else:
        rank, world_size, device = wish.rank, wish.world_size, wish.device.type
    if (rank, world_size) != (control.rank, control.world_size):
        raise ConfigError(
            f"transport {transport_name(wish)!r} and the process group have different ranks",
            expected=f"rank {control.rank} of {control.world_size}, as in the process group",
            found=f"rank {rank} of {world_size}",
            fix="start the processes by mpirun, and torch by efficient_dl.comm.mpi.init_process_group(); for a part of "
            "the ranks pass MpiTransport(communicator)",
        )
    if device != control.device.type:
        raise ConfigError(
            f"transport {transport_name(wish)!r} carries tensors on {device}, the model is on {control.device.type}",
            fix="leave transport out, or train on the transport's device",
        )


def make_transport(wish: Transport | str | None, control: ProcessGroupTransport) -> Transport:
    """The transport, after `check_transport` and the handshake; all ranks call it.

    Raises ConfigError on every rank if it joins other processes than the process group, or in another order.
    """
    if wish is None:
        return control
    transport = MpiTransport(timeout=control.timeout) if isinstance(wish, str) else wish
    process = f"{socket.gethostname()}:{os.getpid()}"
    expected, found = gather_json(process, control), gather_json(process, transport)
    if found != expected:
        rank = next(rank for rank, name in enumerate(expected) if found[rank] != name)
        raise ConfigError(
            f"transport {transport_name(wish)!r} and the process group join different processes",
            expected=f"process {expected[rank]} as rank {rank}, as in the process group",
            found=f"process {found[rank]}",
            fix="make both from the same ranks, in the same order",
        )
    return transport
