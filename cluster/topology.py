"""Which hosts an emulated network has, how fast each is connected, and what lies between their sites."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cluster.errors import EmulationError
from cluster.shaping import parse_delay, parse_rate

_MAX_HOSTS = 250  # one /24
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,29}[a-z0-9])?")


@dataclass(frozen=True)
class Link:
    """rate: in each direction, like "100mbit", or "none". delay: like "5ms"; needs the kernel's netem."""

    rate: str = "1gbit"
    delay: str | None = None

    @property
    def rate_bits(self) -> int | None:
        """Bits per second; None: no limit."""
        return parse_rate(self.rate)

    @property
    def delay_seconds(self) -> float:
        """One way."""
        return 0.0 if self.delay is None else parse_delay(self.delay)


@dataclass(frozen=True)
class HostLink:
    """A host and the link that connects it to its site. The delay is that of all that the host sends."""

    name: str
    site: str = "site"
    link: Link = Link()


@dataclass(frozen=True)
class SiteLink:
    """What connects two sites; the delay is that of either direction."""

    between: tuple[str, str]
    link: Link = Link()


@dataclass(frozen=True)
class Topology:
    """Hosts in the order of their ranks, and the links between their sites, which form a tree.

    Raises EmulationError if names are wrong or double, if a site is not connected, or if there are two ways.
    """

    hosts: tuple[HostLink, ...]
    links: tuple[SiteLink, ...] = ()

    @classmethod
    def uniform(cls, hosts: int, rate: str = "1gbit", delay: str | None = None) -> Topology:
        """Hosts h0, h1, ... of one site, all connected alike."""
        _check_count(hosts)
        return cls(tuple(HostLink(f"h{host}", link=Link(rate, delay)) for host in range(hosts)))

    def __post_init__(self) -> None:
        _check_count(len(self.hosts))
        names = [host.name for host in self.hosts]
        for name in (*names, *self.sites):
            if not _NAME.fullmatch(name):
                raise EmulationError(
                    f"no name of a host or site: {name!r}; at most 31 lower-case letters, digits and dashes, "
                    "a letter first and no dash last"
                )
        if double := sorted({name for name in names if names.count(name) > 1}):
            raise EmulationError(f"two hosts are called {', '.join(double)}")
        for one in (*self.hosts, *self.links):
            _ = one.link.rate_bits, one.link.delay_seconds  # raise what is wrong with them
        self._check_tree()

    @property
    def sites(self) -> tuple[str, ...]:
        """In the order in which hosts, and then links, name them."""
        named = [*(host.site for host in self.hosts), *(site for one in self.links for site in one.between)]
        return tuple(dict.fromkeys(named))

    @property
    def has_delays(self) -> bool:
        """Whether it needs the kernel's netem."""
        return any(one.link.delay_seconds > 0 for one in (*self.hosts, *self.links))

    def with_host(self, host: HostLink) -> Topology:
        """The same with one more host, as the last."""
        return replace(self, hosts=(*self.hosts, host))

    def _check_tree(self) -> None:
        group = {site: site for site in self.sites}  # a site's group is named after one of its members
        for one in self.links:
            first, second = (group[site] for site in one.between)
            if first == second:
                raise EmulationError(
                    f"the link between {one.between[0]} and {one.between[1]} is a second way from one to the other; "
                    "links between sites form a tree: leave one out, and let its traffic pass another site"
                )
            group = {site: first if of == second else of for site, of in group.items()}
        if len(set(group.values())) > 1:
            apart = next(site for site in self.sites if group[site] != group[self.sites[0]])
            raise EmulationError(
                f"no link leads from the site {self.sites[0]} to {apart}; add [[links]] with "
                f'between = ["{self.sites[0]}", "{apart}"]'
            )


def load_topology(file: Path) -> Topology:
    """Reads a topology from TOML; see cluster/topologies. Raises EmulationError, which names the file and the place."""
    try:
        read = tomllib.loads(file.read_text())
    except OSError as error:
        raise EmulationError(f"no topology: {error}") from None
    except ValueError as error:  # TOMLDecodeError, and bytes that are no text
        raise EmulationError(f"{file} is not TOML: {error}") from None
    try:
        return _parsed(read)
    except EmulationError as error:
        raise EmulationError(f"{file}: {error}") from None


def _parsed(read: Mapping[str, Any]) -> Topology:
    own = [field.name for field in fields(Link)]
    _check_keys(read, [*own, "hosts", "links"], "at the top")
    default = _link(read, Link(), "at the top")
    hosts, links = read.get("hosts"), read.get("links", [])
    if not isinstance(hosts, dict) or not all(isinstance(table, dict) for table in hosts.values()):
        raise EmulationError("no hosts; write a table for each, as [hosts.h0]")
    if not isinstance(links, list) or not all(isinstance(table, dict) for table in links):
        raise EmulationError("links are an array of tables; write [[links]]")
    found = []
    for name, table in hosts.items():
        where = f"in [hosts.{name}]"
        _check_keys(table, [*own, "site"], where)
        site = _text(table, "site", where) or HostLink.site
        found.append(HostLink(name, site, _link(table, default, where)))
    between = []
    for number, table in enumerate(links, 1):
        where = f"in [[links]] number {number}"
        _check_keys(table, [*own, "between"], where)
        ends = table.get("between")
        if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(end, str) for end in ends):
            raise EmulationError(f'no two sites {where}; write between = ["east", "west"]')
        between.append(SiteLink((ends[0], ends[1]), _link(table, Link(), where)))
    return Topology(tuple(found), tuple(between))


def _link(table: Mapping[str, Any], default: Link, where: str) -> Link:
    rate, delay = _text(table, "rate", where), _text(table, "delay", where)
    return Link(default.rate if rate is None else rate, default.delay if delay is None else delay)


def _text(table: Mapping[str, Any], key: str, where: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise EmulationError(
            f'{key} = {value!r} {where} is not text; write it in quotes, like "100mbit" or "5ms"'
        )
    return value


def _check_keys(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    if unknown := [key for key in table if key not in known]:
        raise EmulationError(f"unknown key {unknown[0]!r} {where}; there are {', '.join(known)}")


def _check_count(hosts: int) -> None:
    if not 1 <= hosts <= _MAX_HOSTS:
        raise EmulationError(f"no number of hosts: {hosts}; it must be between 1 and {_MAX_HOSTS}")
