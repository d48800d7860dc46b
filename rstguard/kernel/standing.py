"""Whether traffic can come under a policy where this machine stands, and what to do if not.  Pure.

The one judgement for `policy check`, `policy apply`, `doctor` and the running guard's `status`.
Rules see a packet before it is translated: what clients send to is what a policy must name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from rstguard.engine.address import Prefix, address_text, is_v6, parse_prefix
from rstguard.engine.ruleset import Scope
from rstguard.kernel.links import Link, complaint, protected
from rstguard.kernel.place import Place
from rstguard.kernel.translations import Translation

_MOST_NAMED: Final = 3
_PRIVATE: Final = tuple(
    map(
        parse_prefix,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),
    )
)
"""RFC 1918, RFC 6598 and RFC 4193: who sends from the Internet never names these."""


class Amiss(NamedTuple):
    """What cannot match, in a sentence that says what to do.

    `path` is the part of the policy that it is about.
    """

    path: tuple[str | int, ...]
    sentence: str


def is_private(address: int) -> bool:
    """Tell whether a tagged address is one that the Internet does not route."""
    return any(prefix.covers(address) for prefix in _PRIVATE)


def unmatched(patterns: Sequence[str], here: Iterable[str]) -> str:
    """Return why no interface of these names comes under a policy, or ""."""
    names = list(here)
    if protected(patterns, [Link(name, True) for name in names]):
        return ""
    return (
        f"nothing can match: no interface here is called {' or '.join(patterns)} "
        f"(there are {', '.join(names)}); name the right one under protect: interfaces"
    )


def amiss(scope: Scope, place: Place) -> list[Amiss]:
    """Return what of a policy's scope cannot match here."""
    if said := unmatched(scope.interfaces, (link.name for link in place.links)):
        return [Amiss(("protect", "interfaces"), said)]
    return [
        *_of_interfaces(scope.interfaces, place.links),
        *_of_destinations(scope, place),
        *_of_ports(scope, place),
    ]


def _of_interfaces(patterns: Sequence[str], links: Sequence[Link]) -> Iterator[Amiss]:
    """Yield what is wrong with the interfaces that a policy names."""
    names = ", ".join(link.name for link in links)
    for index, pattern in enumerate(patterns):
        path = ("protect", "interfaces", index)
        found = protected([pattern], links)
        if not found:
            yield Amiss(path, f"no interface here is called {pattern} now (there are {names})")
        for link in found:
            if said := complaint(link):
                yield Amiss(path, said)


def _of_destinations(scope: Scope, place: Place) -> Iterator[Amiss]:
    """Yield what is wrong with the destinations: all of them at once if none can match."""
    bad = []
    for index, destination in enumerate(scope.destinations):
        if said := _hidden(scope, place, destination) or _nowhere(scope, place, destination):
            bad.append(Amiss(("protect", "destinations", index), said))
    if bad and len(bad) == len(scope.destinations):
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        said = f"nothing can match: {bad[0].sentence}{more}"
        bad = [Amiss(("protect", "destinations"), said)]
    yield from bad


def _hidden(scope: Scope, place: Place, destination: Prefix) -> str:
    """Tell of an inside address whose clients know it by another one, which is not protected."""
    if destination.shift and not is_private(destination.network):
        return ""
    own = {one.address for one in place.addresses}
    for one in _of_protected(scope, place):
        if one.to is None or not destination.covers(one.to) or not is_private(one.to):
            continue
        if not _concerns(scope, one):
            continue  # at the ports that are protected clients may reach it as it is
        known = one.destination.network if one.destination else None
        if known is not None and is_private(known) and known not in own:
            continue  # an address inside a cluster, which nobody outside knows
        outside = [one.destination] if one.destination else _outside(scope, place, is_v6(one.to))
        open_ = [p for p in outside if not any(d.covers(p.network) for d in scope.destinations)]
        if open_ and len(open_) == len(outside):
            named = ", ".join(map(str, open_[:_MOST_NAMED]))
            return (
                f"{destination} is protected, but clients reach {address_text(one.to)} as {named}, "
                "which is translated here (DNAT) after the guard's rules have seen it: name "
                f"{named} instead, or leave destinations out"
            )
    return ""


def _concerns(scope: Scope, one: Translation) -> bool:
    """Tell whether it is about a port that is protected, by either number."""
    if scope.ports is None or one.ports is None:
        return True
    first, last = one.ports
    return one.to_port in scope.ports or bool(scope.ports.intersection(range(first, last + 1)))


def _nowhere(scope: Scope, place: Place, destination: Prefix) -> str:
    """Tell of a destination that is neither here, nor behind here, nor translated here."""
    if destination in place.reached or _bridges(scope, place):
        return ""
    if any(t.destination and destination.covers(t.destination.network) for t in place.translations):
        return ""
    here = _outside(scope, place, is_v6(destination.network))
    own = f" (this host is {', '.join(map(str, here[:_MOST_NAMED]))} there)" if here else ""
    return (
        f"nothing comes for {destination}: it is no address of this host, no route leads to it, "
        "and nothing here translates it; if a router before this one does, name what it is "
        f"translated to{own}, or leave destinations out"
    )


def _of_ports(scope: Scope, place: Place) -> Iterator[Amiss]:
    """Yield ports that clients know by another number, as they are translated here."""
    if scope.ports is None:
        return
    told = set()
    for one in _of_protected(scope, place):
        if one.ports is None or one.to_port is None or one.to_port not in scope.ports:
            continue
        first, last = one.ports
        listens = any(listener.port == one.to_port for listener in place.listeners)
        if listens or one.to_port in told or scope.ports.intersection(range(first, last + 1)):
            continue
        told.add(one.to_port)
        yield Amiss(
            ("protect", "ports"),
            f"port {one.to_port} is protected, but clients reach it as port {first}, which is "
            f"translated here (DNAT) after the guard's rules have seen it: name {first}, too",
        )


def _of_protected(scope: Scope, place: Place) -> Iterator[Translation]:
    """Return the translations of what comes in by protected interfaces."""
    names = _names(scope, place)
    return (one for one in place.translations if one.comes_by(names))


def _names(scope: Scope, place: Place) -> set[str]:
    """Return the names of the protected interfaces that are here."""
    return {link.name for link in protected(scope.interfaces, place.links)}


def _outside(scope: Scope, place: Place, v6: bool) -> list[Prefix]:
    """Return this host's addresses on protected interfaces."""
    names = _names(scope, place)
    return [
        Prefix(one.address, 128 if v6 else 32)
        for one in place.addresses
        if one.interface in names and is_v6(one.address) == v6
    ]


def _bridges(scope: Scope, place: Place) -> bool:
    """Tell whether a protected interface is a bridge: what it carries needs no route here."""
    names = _names(scope, place)
    return any(link.master in names for link in place.links if link.master_kind == "bridge")
