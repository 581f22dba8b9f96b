"""Topologies: what a file may say, and that links between hosts and sites have the rates that it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.emulate import main
from cluster.errors import EmulationError
from cluster.namespaces import missing_requirements, tc
from cluster.network import EmulatedNetwork
from cluster.slurm import SlurmOptions
from cluster.topology import HostLink, Link, SiteLink, Topology, load_topology
from tests.cluster.jobs import REPOSITORY
from tests.cluster.test_emulate import TRANSFER

EXAMPLES = sorted((REPOSITORY / "cluster/topologies").glob("*.toml"))


def written(folder: Path, text: str) -> Path:
    file = folder / "topology.toml"
    file.write_text(text)
    return file


# -------------------------------------------------------------------- files
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_examples_can_be_read(file: Path) -> None:
    topology = load_topology(file)
    assert len(topology.hosts) == 4
    assert topology.has_delays == (file.stem == "far-sites")


def test_a_host_has_the_rate_at_the_top_unless_it_names_its_own(tmp_path: Path) -> None:
    text = 'rate = "2gbit"\ndelay = "1ms"\n[hosts.a]\n[hosts.b]\nrate = "10mbit"\n[hosts.c]\ndelay = "5ms"\n'
    assert load_topology(written(tmp_path, text)) == Topology(
        (
            HostLink("a", link=Link("2gbit", "1ms")),
            HostLink("b", link=Link("10mbit", "1ms")),
            HostLink("c", link=Link("2gbit", "5ms")),
        )
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rate = ", "is not TOML"),
        ("", "no hosts; write a table for each"),
        ("[hosts]", "no number of hosts: 0"),
        ("hosts = 4", "no hosts; write a table for each"),
        ("[hosts.a]\nspeed = 1", "unknown key 'speed' in [hosts.a]; there are rate, delay, site"),
        ("[hosts.a]\nrate = 100", "rate = 100 in [hosts.a] is not text"),
        ('[hosts.a]\nrate = "fast"', "no rate: 'fast'"),
        ('[hosts.a]\ndelay = "5"', "no delay: '5'"),
        ("[hosts.A]", "no name of a host or site: 'A'"),
        ('[hosts.a]\nsite = "x"\n[hosts.b]\nsite = "y"', "no link leads from the site x to y"),
        ("[hosts.a]\n[links]\nbetween = 1", "write [[links]]"),
        ('[hosts.a]\n[[links]]\nbetween = ["x"]', "no two sites in [[links]] number 1"),
        (
            '[hosts.a]\nsite = "x"\n[[links]]\nbetween = ["x", "x"]',
            "the link between x and x is a second way",
        ),
        (
            '[hosts.a]\nsite = "x"\n' + 2 * '[[links]]\nbetween = ["x", "y"]\n',
            "the link between x and y is a second way from one to the other; links between sites form a tree",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, complaint: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    with pytest.raises(EmulationError) as error:
        load_topology(file)
    assert complaint in str(error.value)
    assert str(file) in str(error.value)


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--topology", "/nowhere/x.toml", "--", "true"]) == 125
    assert "/nowhere/x.toml" in capsys.readouterr().err


def test_a_topology_and_a_rate_are_not_both_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--topology", str(EXAMPLES[0]), "--rate", "1gbit", "--", "true"]) == 125
    assert "no rate beside it" in capsys.readouterr().err


def test_no_node_of_slurm_is_called_head() -> None:
    with pytest.raises(EmulationError, match="no node can be called head"):
        SlurmOptions(topology=Topology((HostLink("head"),)))


# -------------------------------------------------------------------- links
@pytest.mark.netns
def test_only_what_passes_between_sites_is_slowed_by_their_link() -> None:
    topology = Topology(
        (HostLink("a0", "a"), HostLink("a1", "a"), HostLink("b0", "b")),
        (SiteLink(("a", "b"), Link("20mbit")),),
    )
    script = f"""
import os
rank = int(os.environ["RANK"])
for sender in (1, 2):    # to rank 0: from its own site, then from the other
    os.environ["MASTER_PORT"] = str(29000 + sender)
    if rank in (0, sender):
        exec({TRANSFER!r})
"""
    with EmulatedNetwork(topology=topology) as network:
        run = network.run([sys.executable, "-c", script, "1000000"], quiet=True, timeout_seconds=60)
        received = network.rx_bytes(0)
    assert run.exit_code == 0, run.output
    near, far = map(float, run.output[0].split())
    assert far > max(0.35, near)  # 0.4 s of bits, less what is on its way when the receiver's clock starts
    assert received > 2_000_000


@pytest.mark.netns
def test_each_host_is_shaped_at_both_ends_as_its_table_says() -> None:
    topology = load_topology(REPOSITORY / "cluster/topologies/slow-host.toml")
    with EmulatedNetwork(topology=topology) as network:
        assert network.names == ["h0", "h1", "h2", "slow"]
        assert [_rate(network, host) for host in range(4)] == ["1Gbit", "1Gbit", "1Gbit", "100Mbit"]
        network.set_rate("50mbit", host=1)
        assert [_rate(network, host) for host in range(4)] == ["1Gbit", "50Mbit", "1Gbit", "100Mbit"]


def _rate(network: EmulatedNetwork, host: int) -> str:
    """Of the host's link, by the kernel, at both ends."""
    ends = (network.namespace(host), "eth0"), (f"{network.prefix}-switch", f"p{host}")
    rates = {
        tc("-n", name, "qdisc", "show", "dev", device).split("rate ")[1].split()[0] for name, device in ends
    }
    assert len(rates) == 1
    return rates.pop()


@pytest.mark.netns
def test_delays_where_the_kernel_has_none_are_refused_by_name() -> None:
    topology = load_topology(REPOSITORY / "cluster/topologies/far-sites.toml")
    if missing_requirements(delay=True):
        with pytest.raises(EmulationError, match="netem"), EmulatedNetwork(topology=topology):
            pass
    else:
        with EmulatedNetwork(topology=topology) as network:
            assert "delay" in tc("-n", network.namespace(0), "qdisc", "show", "dev", "eth0")
