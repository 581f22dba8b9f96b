"""Interfaces, cores and GPUs of ranks, decided from facts."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_dl.errors import LaunchError
from efficient_dl.launching.binding import core_places, cores_in, numa_nodes, share_of
from efficient_dl.launching.interfaces import Reach, choose, reach, use
from efficient_dl.training.devices import check_gpus, share_cores

A = Reach("a", "10.0.0.1", "10.0.0.1", {"eth0": ("10.0.0.1",), "ib0": ("10.1.0.1",)})
B = Reach("b", "10.0.0.1", "10.0.0.2", {"eth0": ("10.0.0.2",), "ib0": ("10.1.0.2",)})


def test_ranks_of_one_host_use_loopback_and_of_several_the_way_to_rank_0() -> None:
    assert choose([A, A], 0) == choose([A, A], 1) == "lo"
    assert [choose([A, B], rank) for rank in range(2)] == ["eth0", "eth0"]
    by_ib = Reach("b", "10.1.0.1", "10.1.0.2", B.addresses)
    assert [choose([Reach("a", "10.1.0.1", "10.1.0.1", A.addresses), by_ib], rank) for rank in (0, 1)] == [
        "ib0"
    ] * 2


def test_rank_0_whose_name_is_loopback_at_home_uses_the_address_that_others_reach() -> None:
    at_home = Reach("a", "127.0.1.1", "127.0.0.1", A.addresses)
    assert choose([at_home, B], 0) == "eth0"


def test_a_single_interface_needs_no_way_and_several_are_an_error_that_lists_them() -> None:
    lost = Reach("a", None, None, {"eth0": ("10.9.0.1",)})
    assert choose([lost, B], 0) == "eth0"
    with pytest.raises(LaunchError) as caught:
        choose([Reach("a", "127.0.1.1", "127.0.0.1", {"e0": ("1.2.3.4",), "e1": ("1.2.3.5",)}), B], 0)
    assert all(text in str(caught.value) for text in ("e0 (1.2.3.4)", "e1 (1.2.3.5)", "GLOO_SOCKET_IFNAME"))
    with pytest.raises(LaunchError, match="no interface but loopback"):
        choose([Reach("a", None, None, {}), B], 0)


def test_what_the_user_named_stays_and_nccl_is_told_the_exact_name() -> None:
    environment = {"GLOO_SOCKET_IFNAME": "mine"}
    use("eth0", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "mine", "NCCL_SOCKET_IFNAME": "=eth0"}
    environment = {}
    use("lo", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "lo"}


def test_this_host_reaches_itself_by_loopback() -> None:
    own = reach("127.0.0.1", 1)
    assert own.source == own.rank_0 == "127.0.0.1"
    assert "lo" not in own.addresses
    assert set(own.addresses) <= {name for _, name in socket.if_nameindex()}
    assert choose([own, own], 1) == "lo"


@given(st.sets(st.integers(0, 63), min_size=1), st.data())
def test_shares_of_cores_are_disjoint_complete_and_equal(cores: set[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(cores)))
    places = {core: (core % 2, 0, core // 2) for core in cores}
    shares = [share_of(sorted(cores), position, count, places) for position in range(count)]
    assert sorted(core for share in shares for core in share) == sorted(cores)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_keep_numa_nodes_and_hyperthreads_together() -> None:
    places = {
        core: (core % 4 // 2, core % 4 // 2, core % 2) for core in range(8)
    }  # core and core + 4 share one
    assert [share_of(range(8), position, 4, places) for position in range(4)] == [
        [0, 4],
        [1, 5],
        [2, 6],
        [3, 7],
    ]
    with pytest.raises(LaunchError, match=r"run\.bind=none"):
        share_of([0], 0, 2, {})


def test_numa_nodes_and_cores_are_read_from_linux(tmp_path: Path) -> None:
    for node, cores in enumerate(["0-1,4", "2-3"]):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(cores + "\n")
    topology = tmp_path / "cpu/cpu3/topology"
    topology.mkdir(parents=True)
    (topology / "core_id").write_text("7\n")
    assert numa_nodes(tmp_path) == {0: {0, 1, 4}, 1: {2, 3}}
    assert core_places([3, 4], tmp_path) == {3: (1, 0, 7), 4: (0, 0, 0)}
    assert cores_in("") == []


def test_threads_are_the_cores_divided_by_those_who_were_given_the_very_same() -> None:
    everyone = [("m", (0, 1, 2, 3))] * 2 + [("m", (0, 1)), ("other", (0, 1, 2, 3))]
    assert [share_cores(everyone, rank, bound=False) for rank in range(4)] == [2, 2, 2, 4]


def test_a_bound_rank_stays_on_its_share() -> None:
    cores = tuple(sorted(os.sched_getaffinity(0)))
    if len(cores) < 2:
        pytest.skip("one core cannot be shared out")
    try:
        assert share_cores([("m", cores)] * 2, 1, bound=True) == len(cores) - len(cores) // 2
        assert len(os.sched_getaffinity(0)) == len(cores) - len(cores) // 2
    finally:
        os.sched_setaffinity(0, cores)


def test_two_ranks_with_the_same_gpu_are_an_error_and_one_each_is_not() -> None:
    check_gpus([("m", "GPU-1"), ("m", "GPU-2"), ("other", "GPU-1"), ("m", ""), ("m", "")])
    with pytest.raises(LaunchError, match="ranks 0 and 2 have the same one"):
        check_gpus([("m", "GPU-1"), ("m", "GPU-2"), ("m", "GPU-1")])
