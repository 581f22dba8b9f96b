"""Which ranks share a node, from what launchers and hosts tell; and who is gone, from what ranks report."""

from __future__ import annotations

import pytest

from efficient_dl.comm import Topology
from efficient_dl.comm.losses import follow
from efficient_dl.comm.topology import clues
from efficient_dl.errors import ConfigError


def torchrun(rank: int, node: int, local_rank: int, local_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "GROUP_RANK": str(node),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
    }


def open_mpi(rank: int, local_rank: int, local_size: int) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
    }


def slurm(rank: int, node: int, local_rank: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local_rank)}


def decide(environments: list[dict[str, str]], hosts: str) -> Topology:
    return Topology.decide([clues(e, host) for e, host in zip(environments, hosts, strict=True)])


def test_torchrun_tells_the_nodes_whatever_the_hosts_are_called() -> None:
    found = decide([torchrun(rank, rank // 2, rank % 2, 2) for rank in range(4)], "aaaa")
    assert found.nodes == ((0, 1), (2, 3))
    assert found.source == "the variables of torchrun"
    assert (found.node_of(2), found.peers_of(2)) == ((2, 3), (0, 2))


def test_open_mpi_and_mpich_tell_the_nodes_of_consecutive_ranks() -> None:
    assert decide([open_mpi(rank, rank % 3, 3) for rank in range(6)], "a" * 6).nodes == ((0, 1, 2), (3, 4, 5))
    mpich = [
        {"PMI_RANK": str(rank), "MPI_LOCALRANKID": str(rank % 2), "MPI_LOCALNRANKS": "2"} for rank in range(4)
    ]
    assert decide(mpich, "aaaa").nodes == ((0, 1), (2, 3))


def test_a_scattered_mapping_of_open_mpi_is_found_by_host_names() -> None:
    found = decide([open_mpi(rank, rank // 2, 2) for rank in range(4)], "abab")
    assert found.nodes == ((0, 2), (1, 3))
    assert found.source == "host names (the variables of Open MPI do not add up)"
    assert (found.node_of(3), found.peers_of(3)) == ((1, 3), (2, 3))


def test_slurm_tells_the_nodes_of_a_cyclic_distribution() -> None:
    found = decide([slurm(rank, rank % 2, rank // 2) for rank in range(4)], "aaaa")
    assert found.nodes == ((0, 2), (1, 3))


def test_variables_that_a_shell_left_over_are_not_believed() -> None:
    """Ranks started by hand inside `srun --pty bash` all carry the shell's own place."""
    found = decide([slurm(0, 0, 0)] * 4, "aabb")
    assert found.nodes == ((0, 1), (2, 3))
    assert found.source.startswith("host names (the variables of Slurm")


def test_variables_on_some_ranks_only_are_not_believed() -> None:
    environments = [torchrun(rank, rank, 0, 1) for rank in range(3)]
    assert decide([*environments, {}], "aabb").nodes == ((0, 1), (2, 3))


def test_nodes_of_different_sizes_reduce_flat_and_say_why() -> None:
    found = decide([{}] * 3, "aab")
    assert not found.even
    assert found.flat_reason() == "the nodes have different numbers of ranks (2, 1)"
    assert found.summary()["ranks_per_node"] == [2, 1]
    assert found.reduced_by is None


def test_one_rank_a_node_reduces_flat() -> None:
    assert decide([{}] * 3, "abc").flat_reason() == "every node has one rank"


def test_nodes_of_a_given_size_hold_consecutive_ranks() -> None:
    assert Topology.of_size(6, 3).nodes == ((0, 1, 2), (3, 4, 5))
    for size in (0, -2, 4, 12):
        with pytest.raises(ConfigError, match="cannot be divided"):
            Topology.of_size(6, size)


@pytest.mark.parametrize(
    ("reports", "gone"),
    [
        ({0: 3, 1: 3, 2: 3}, 3),
        ({0: 1, 1: 3, 2: 3}, 3),  # rank 0 waited for rank 1, which waited for rank 3
        ({0: 2, 2: 1, 1: 3}, 3),
        ({0: 1}, 1),
    ],
)
def test_the_rank_that_reports_nothing_is_gone(reports: dict[int, int], gone: int) -> None:
    assert follow(reports, 0) == gone


def test_ranks_that_lost_each_other_do_not_lead_anywhere() -> None:
    reports = {0: 1, 1: 2, 2: 1}
    assert follow(reports, 0) in reports
