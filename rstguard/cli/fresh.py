"""The first policy of a machine: written from what was found there, each line with its reason.

Pure: `rstguard.kernel.place` has looked.  The policy observes; what it would do is to be read
before it is told to enforce.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

from rstguard.engine.address import Prefix, address_text, is_v6
from rstguard.kernel.links import Link, complaint
from rstguard.kernel.place import Address, Place
from rstguard.kernel.standing import is_private
from rstguard.kernel.translations import Translation
from rstguard.policy.quantities import ports_text

_WIDTH: Final = 100
_MOST_NAMED: Final = 12
_MOST_NETWORKS: Final = 64
"""Networks behind a gateway that are named; with more of them all is guarded."""


_HEAD: Final = """\
# Written by `rstguard policy new` from what was found on this machine, with its reasons.
# It observes, and changes nothing.  See what it would do with
#
#     rstguard status; rstguard events
#
# and then set `mode: enforce` and say
# `rstguard policy apply {file} --confirm 60s`.

version: 1
name: {name}
mode: observe
on_failure: open
forged_resets: hold
syn_budget: auto   # SYN cookies for a service of which 128 handshakes wait for their client
"""
_TRUSTED: Final = """\
# Never counted, reset, shunned or banned: your own networks, monitoring, and proxies or load
# balancers through which all clients come.
# trusted: [192.0.2.0/24]
"""
_SYN_RATE: Final = """\
rules:
  # New connections of one source, as no browser opens them; an office behind one address may do
  # more, if something comes of it.
  - {name: syn-rate, measure: syn_rate, over: 100/s, burst: 200, unless: {productive: 80%},
     then: ban, for: 10m}"""
_SCAN: Final = """\
  # Tries many ports, as nobody does by accident.
  - {name: port-scan, measure: distinct_ports, over: 15, within: 10s, then: ban, for: 1h}"""
_EACH: Final = """\
  # Connections held at once; only the newest beyond the limit are reset.
  - {name: hoarder, measure: connections, over: 500, unless: {productive: 80%}, then: reset}
  # Segments that no TCP sends.
  - {name: bad-flags, measure: bad_flags, over: 5/s, then: drop}"""
_SSH: Final = """\
  # Password guessing shows as many connections that end early.
  - {{name: ssh-brute, measure: short_connections, shorter_than: 10s, over: 10/m, ports: [{ports}],
     then: ban, for: 30m, escalate: {{factor: 4, up_to: 24h, memory: 7d}}}}"""
_MAIL: Final = """\
  # The same at mail, whose clients and servers make short connections too, but not so many.
  - {{name: mail-brute, measure: short_connections, shorter_than: 5s, over: 60/m,
     ports: [{ports}],
     then: ban, for: 30m, escalate: {{factor: 4, up_to: 24h, memory: 7d}}}}"""
_IDLE: Final = """\
  # Forgotten connections, while a service holds more than it ever bore (`when: pressed`); else
  # nobody's is touched: WebSockets, database pools and SSH sessions at rest are silent for days.
  - {name: idle, measure: idle, over: 1h, when: pressed, then: reset}"""


class Purpose(NamedTuple):
    """What a port is for: its usual numbers, and programs that serve it on others."""

    ports: frozenset[int]
    programs: frozenset[str]


PURPOSES: Final = MappingProxyType(
    {
        "web": Purpose(
            frozenset({80, 443, 8080, 8443}),
            frozenset({"nginx", "apache2", "httpd", "caddy", "haproxy", "traefik", "lighttpd"}),
        ),
        "ssh": Purpose(frozenset({22}), frozenset({"sshd", "dropbear"})),
        "mail": Purpose(
            frozenset({25, 110, 143, 465, 587, 993, 995, 4190}),
            frozenset({"master", "exim4", "dovecot", "smtpd", "stalwart-mail"}),
        ),
    }
)
"""What `--for` may name."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What whoever asks for a policy has said.

    `interfaces` are named instead of those of the default routes; `purposes` restrict the policy
    to what they are for; `file` is where it will be.
    """

    interfaces: tuple[str, ...] = ()
    purposes: tuple[str, ...] = ()
    file: str = "/etc/rstguard/policy.yaml"


def interfaces(place: Place, wanted: Wanted) -> tuple[str, ...]:
    """Return where the internet comes in; nothing if that cannot be told."""
    if wanted.interfaces:
        return wanted.interfaces
    by_name = {link.name: link for link in place.links}
    return tuple(dict.fromkeys(_whole(by_name.get(name), name) for name in place.defaults))


def _whole(link: Link | None, name: str) -> str:
    """Return the name that packets of an interface bear."""
    bears_another = link is not None and link.master_kind in ("bridge", "bond", "team")
    return link.master if link is not None and bears_another else name


def policy_text(place: Place, wanted: Wanted) -> str:
    """Return the policy file; `place` must show, or `wanted` name, an interface."""
    names = interfaces(place, wanted)
    found = _Found(place, names)
    return "".join(
        f"{line}\n"
        for line in (
            _HEAD.format(file=wanted.file, name="-".join(wanted.purposes) or "first"),
            *_protect(found, names, wanted),
            *_large(found, names),
            _TRUSTED,
            *_rules(found, wanted),
        )
    )


class _Found:
    """What of a place concerns the interfaces that are protected."""

    def __init__(self, place: Place, names: Sequence[str]) -> None:
        self.place = place
        self.addresses = [one for one in place.addresses if one.interface in names]
        own = {one.address for one in self.addresses}
        self.translations = [
            one
            for one in place.translations
            if one.comes_by(names)
            and (one.destination is None or _is_outside(one.destination, own))
        ]
        self.listening: dict[int, str] = {}
        for listener in sorted(place.listeners, key=lambda one: (one.port, one.program)):
            if listener.address is None or listener.address in own:
                self.listening.setdefault(listener.port, listener.program)
        self.behind = [
            network.prefix
            for network in place.networks
            if network.interface not in names
            and (6 if is_v6(network.prefix.network) else 4) in place.forwards
            and not is_private(network.prefix.network)
            and not _is_link_local(network.prefix)
        ]

    def ports_for(self, purpose: str) -> frozenset[int]:
        """Return the ports here, or translated here, that serve a purpose."""
        of = PURPOSES[purpose]
        found = {
            port
            for port, program in self.listening.items()
            if program in of.programs or (port in of.ports and not self._is_other(program, purpose))
        }
        for one in self.translations:
            first = one.ports[0] if one.ports else one.to_port
            if first is not None and {one.to_port or first, first} & of.ports:
                found.add(first)
        return frozenset(found)

    def _is_other(self, program: str, purpose: str) -> bool:
        """Tell whether a program is known to serve something else than the port's usual."""
        return any(program in of.programs for name, of in PURPOSES.items() if name != purpose)


def _is_outside(destination: Prefix, own: Iterable[int]) -> bool:
    """Tell whether a translation's address is known outside: a cluster has others for itself."""
    return not is_private(destination.network) or any(destination.covers(one) for one in own)


def _is_link_local(prefix: Prefix) -> bool:
    return address_text(prefix.network).startswith(("fe80:", "169.254."))


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _protect(found: _Found, names: Sequence[str], wanted: Wanted) -> Iterator[str]:
    place = found.place
    for name in (name for name in place.unknown if name):
        yield from _comment(f"Not known: {name}.")
    yield "protect:"
    if wanted.interfaces:
        yield from _comment("As named.", "  ")
    else:
        plural = "s" if len(names) > 1 else ""
        said = f"The interface{plural} of the default route{plural}: there the internet comes in."
        yield from _comment(said, "  ")
    for link in place.links:
        if link.name in names and (said := complaint(link)):
            yield from _comment(f"Now {said}.", "  ")
    yield f"  interfaces: [{', '.join(names)}]"
    yield from _destinations(found)
    yield from _ports(found, wanted)
    yield ""


def _destinations(found: _Found) -> Iterator[str]:
    if found.addresses:
        yield from _comment(f"Addresses there: {_listed(map(_address, found.addresses))}.", "  ")
    private = [one for one in found.addresses if is_private(one.address) and not is_v6(one.address)]
    public = [one for one in found.addresses if not is_private(one.address)]
    if private and not any(not is_v6(one.address) for one in public):
        yield from _comment(
            "A private address: if a router before this machine translates a public one to it, "
            "this is the one that packets bear here.",
            "  ",
        )
    if found.translations:
        told = _listed(dict.fromkeys(map(_translation, found.translations)))
        yield from _comment(
            f"Translated here (DNAT): {told}. The guard's rules see a packet before that, so what "
            "clients send to is what counts here, in `destinations` and `ports` alike.",
            "  ",
        )
    if found.behind:
        yield from _comment(f"Public networks behind: {_listed(map(str, found.behind))}.", "  ")
    why = _why_any(found)
    if why:
        yield from _comment(f"No `destinations`, so all that comes in there: {why}.", "  ")
        return
    yield from _comment("This machine forwards: what only passes through is left alone.", "  ")
    own = (Prefix(one.address, 128 if is_v6(one.address) else 32) for one in found.addresses)
    translated = (one.destination for one in found.translations if one.destination)
    named = dict.fromkeys((*own, *translated, *found.behind))
    yield f"  destinations: [{', '.join(_quoted(str(one)) for one in named)}]"


def _why_any(found: _Found) -> str:
    if not found.place.links:
        return "nothing is known of its machine"
    if any("translated" in what for what in found.place.unknown):
        return "what is translated here is not known"
    if any(one.changes for one in found.addresses):
        return "an address may be another one tomorrow (DHCP, or made by the kernel itself)"
    if not found.place.forwards:
        return "this machine forwards nothing"
    if not found.addresses and not found.behind:
        return "it has no address of its own"
    if len(found.behind) > _MOST_NETWORKS:
        return "there are too many networks behind to be named"
    return ""


def _ports(found: _Found, wanted: Wanted) -> Iterator[str]:
    if found.listening:
        told = (f"{port} ({program})" if program else str(port)
                for port, program in found.listening.items())  # fmt: skip
        yield from _comment(f"Ports that listen here: {_listed(told)}.", "  ")
    if not wanted.purposes:
        yield from _comment(
            "No `ports`, so every TCP port: who tries many that are closed is seen by that.", "  "
        )
        return
    ports: set[int] = set()
    for purpose in wanted.purposes:
        there = found.ports_for(purpose)
        if not there:
            yield from _comment(f"Nothing was found that serves {purpose}: its usual ports.", "  ")
        ports |= there or PURPOSES[purpose].ports
    yield f"  ports: [{ports_text(frozenset(ports))}]"


def _large(found: _Found, names: Sequence[str]) -> Iterator[str]:
    """Name who holds so many connections that it may stand for many clients."""
    told = set()
    for one in found.place.holders:
        if one.interface in ("", *names) and one.source not in told:
            told.add(one.source)
            of = (
                f"of those that come by {one.interface} now"
                if one.interface
                else "of all proven ones, as the running guard has found"
            )
            source = _quoted(str(one.source))
            yield from _comment(
                f"{one.source} holds {one.connections} connections, {one.percent}% {of}. If it is "
                "a proxy, a load balancer or a health checker, name it under `trusted`, or under "
                f"`except` of rules; if it is a source like any other, say "
                f"`large_sources: {{ordinary: [{source}]}}`."
            )


def _rules(found: _Found, wanted: Wanted) -> Iterator[str]:
    yield _SYN_RATE
    if not wanted.purposes:
        yield _SCAN
    yield _EACH
    for purpose, rule in (("ssh", _SSH), ("mail", _MAIL)):
        ports = found.ports_for(purpose)
        if purpose in wanted.purposes:
            ports = ports or PURPOSES[purpose].ports
        if ports and (purpose in wanted.purposes or not wanted.purposes):
            yield rule.format(ports=ports_text(ports))
    yield _IDLE


def _address(one: Address) -> str:
    kind = "private" if is_private(one.address) else "public"
    changing = ", may change" if one.changes else ""
    return f"{address_text(one.address)} ({kind}{changing})"


def _translation(one: Translation) -> str:
    where = str(one.destination) if one.destination else "any address of this host"
    port = "" if one.ports is None else f" port {_range(one.ports)}"
    to = "this host" if one.to is None else address_text(one.to)
    return f"{where}{port} to {to}{f' port {one.to_port}' if one.to_port else ''}"


def _range(ports: tuple[int, int]) -> str:
    first, last = ports
    return str(first) if first == last else f"{first}-{last}"


def _listed(items: Iterable[str]) -> str:
    named = list(items)
    more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    return ", ".join(named[:_MOST_NAMED]) + more


def _quoted(text: str) -> str:
    return f'"{text}"' if ":" in text else text
