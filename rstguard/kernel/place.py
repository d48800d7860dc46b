"""Where this machine stands in its network: interfaces, addresses, ways, translations, services.

Everything is read, nothing changed, by the tools that Linux has for it (`ip`, `ss`, iptables-save,
`nft`) and a `Kernel`.  What cannot be read is empty, and named in `Place.unknown`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from rstguard.engine.address import Prefix, address_text, is_v6, parse_address, parse_prefix
from rstguard.kernel import KernelError, NotThere, translations
from rstguard.kernel.holders import Holder, holders
from rstguard.kernel.links import Link
from rstguard.kernel.seam import Kernel
from rstguard.kernel.translations import Translation

_MOST_DESTINATIONS: Final = 64
"""Protected destinations whose way is asked for; where there are more, they are believed."""
_PROGRAM: Final = re.compile(r'\(\("([^"]{1,64})"')
_FORWARDS: Final = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}


class Address(NamedTuple):
    """An address of this host; `changes` tells that it may be another one tomorrow."""

    interface: str
    address: int
    length: int
    changes: bool = False


class Network(NamedTuple):
    """A network that a route leads to, but for the default."""

    interface: str
    prefix: Prefix


class Listener(NamedTuple):
    """A TCP port of this host; `address` is None where it takes any, `program` "" if unknown."""

    address: int | None
    port: int
    program: str = ""


class Place(NamedTuple):
    """What was found.

    `reached` are those of the destinations asked for that packets can come to.  From `defaults`
    (interfaces of default routes) on, only `look_around` fills it; `forwards` holds 4 and 6.
    """

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    translations: tuple[Translation, ...] = ()
    reached: frozenset[Prefix] = frozenset()
    unknown: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()
    listeners: tuple[Listener, ...] = ()
    forwards: frozenset[int] = frozenset()
    holders: tuple[Holder, ...] = ()


class _Reader:
    """Runs tools, and notes which of them told nothing."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.unknown: list[str] = []

    def text(self, *words: str, what: str) -> str:
        try:
            return self._kernel.run(words)
        except KernelError:
            if what and what not in self.unknown:
                self.unknown.append(what)
            return ""

    def rows(self, *words: str, what: str) -> list[dict[str, Any]]:
        printed = self.text(*words, what=what)
        try:
            rows = json.loads(printed) if printed.strip() else []
        except ValueError:
            self.unknown.append(what)
            return []
        return [row for row in rows if isinstance(row, dict)]


def look(kernel: Kernel, destinations: Iterable[Prefix] = ()) -> Place:
    """Return interfaces, addresses and translations, and which destinations can be reached.

    Raises:
        KernelError: the interfaces could not be asked for.
    """
    reader = _Reader(kernel)
    links = tuple(kernel.links())
    addresses = tuple(_addresses(reader))
    asked = list(destinations)
    reached = frozenset(asked)
    if addresses and len(asked) <= _MOST_DESTINATIONS:
        reached = frozenset(one for one in asked if _is_reached(kernel, one, addresses))
    return Place(
        links, addresses, tuple(_translations(reader)), reached, tuple(reader.unknown)
    )  # fmt: skip


def look_around(kernel: Kernel) -> Place:
    """Return all of it; takes longer where there are very many routes.

    Raises:
        KernelError: the interfaces could not be asked for.
    """
    place, reader = look(kernel), _Reader(kernel)
    defaults: dict[str, None] = {}
    networks = []
    for family in ("-4", "-6"):
        routes = ("ip", "-j", family, "route", "show", "table")
        for row in reader.rows(*routes, "all", "default", what="the default routes"):
            hops = [row, *row.get("nexthops", ())]
            defaults |= dict.fromkeys(str(hop["dev"]) for hop in hops if "dev" in hop)
        networks += list(_networks(reader.rows(*routes, "main", what="the routes")))
    forwards = set()
    for version, name in _FORWARDS.items():
        with contextlib.suppress(KernelError):
            forwards |= {version} if kernel.read_sysctl(name) != "0" else set()
    held: tuple[Holder, ...] = ()
    try:
        held = holders(kernel)
    except KernelError:
        reader.unknown.append("who holds how many connections (needs root)")
    return place._replace(
        unknown=tuple(dict.fromkeys((*place.unknown, *reader.unknown))),
        defaults=tuple(name for name in defaults if name != "lo"),
        networks=tuple(networks),
        listeners=tuple(_listeners(reader)),
        forwards=frozenset(forwards),
        holders=held,
    )


def _addresses(reader: _Reader) -> Iterator[Address]:
    for row in reader.rows("ip", "-j", "address", "show", what="the addresses"):
        for one in row.get("addr_info", ()):
            if one.get("scope") == "global" and "local" in one:
                # A provider gives an address of PPP anew with each call, and no lifetime with it.
                changes = bool(
                    one.get("dynamic") or one.get("temporary") or row.get("link_type") == "ppp"
                )
                address = parse_address(one["local"])
                yield Address(str(row["ifname"]), address, int(one["prefixlen"]), changes)


def _networks(rows: Iterable[dict[str, Any]]) -> Iterator[Network]:
    for row in rows:
        with contextlib.suppress(ValueError):  # "default"
            if row.get("type", "unicast") == "unicast" and "dev" in row:
                yield Network(str(row["dev"]), parse_prefix(row["dst"]))


def _translations(reader: _Reader) -> Iterator[Translation]:
    found: dict[Translation, None] = {}
    for tool in ("iptables-save", "ip6tables-save"):
        printed = reader.text(tool, "-t", "nat", what="what is translated (needs root)")
        found |= dict.fromkeys(translations.of_iptables(printed))
    # The command is needed by nobody who has no rules of its own.
    found |= dict.fromkeys(
        translations.of_nft(reader.text("nft", "-j", "list", "ruleset", what=""))
    )
    yield from found


def _listeners(reader: _Reader) -> Iterator[Listener]:
    """Read lines as ``LISTEN 0 511 0.0.0.0:80 0.0.0.0:* users:(("nginx",pid=7,fd=6))``."""
    found: dict[Listener, None] = {}
    for line in reader.text("ss", "-Htlnp", what="the ports that listen").splitlines():
        words = line.split()
        address, _, port = (words[3] if len(words) > 3 else "").rpartition(":")
        if not port.isdecimal():
            continue
        bare = address.partition("%")[0].strip("[]").removeprefix("::ffff:")
        program = _PROGRAM.search(line)
        where = None if bare in ("*", "0.0.0.0", "::") else parse_address(bare)  # noqa: S104
        name = "".join(filter(str.isprintable, program[1])) if program else ""
        found[Listener(where, int(port), name)] = None
    yield from found


def _is_reached(kernel: Kernel, destination: Prefix, addresses: Iterable[Address]) -> bool:
    """Tell whether packets for some of a network come to this host, or go on by a route of theirs.

    A default route is none: what would leave by it again never came here for good.
    """
    if any(destination.covers(one.address) for one in addresses):
        return True
    probe = destination.network + (1 if destination.shift > 1 else 0)
    rows = _routes(kernel, "get", "fibmatch", address_text(probe))
    if any(row.get("dst") != "default" for row in rows):
        return True
    if destination.shift == 0:
        return False
    family = "-6" if is_v6(destination.network) else "-4"
    return bool(_routes(kernel, "show", "table", "all", "root", str(destination), family=family))


def _routes(kernel: Kernel, *words: str, family: str = "-o") -> list[dict[str, Any]]:
    try:
        printed = kernel.run(("ip", "-j", family, "route", *words))
        return [row for row in json.loads(printed or "[]") if isinstance(row, dict)]
    except NotThere:
        return [{}]  # nobody can tell: it is believed
    except (KernelError, ValueError):
        return []  # "Network is unreachable"
