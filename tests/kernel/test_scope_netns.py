"""The model of the chains (tests/support/netfilter.py) against the kernel: each rule's hits."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest
from scapy.all import IP, TCP, UDP, IPv6, Raw

from rstguard.engine.address import address_text, is_v6
from rstguard.engine.ruleset import Rule
from rstguard.engine.wire import ACK, FIN, PSH, RST, SYN
from rstguard.kernel import limiting
from rstguard.kernel.footprint import Footprint
from rstguard.kernel.linux import Linux
from tests.kernel.test_scope import RULESETS, Place
from tests.support.forged import send_into
from tests.support.netfilter import TABLES, Netfilter, Seen, World
from tests.support.network import CLIENT4, CLIENT6, SERVER4, SERVER6, ThreeHosts
from tests.support.sources import BOTH_FAMILIES

pytestmark = pytest.mark.netns

PACKETS: Final = 1000
"""Of each address family, by each policy."""
SEED: Final = 7
_COUNTED: Final = re.compile(r"\[(\d+):\d+\] (-A .*)")
_OF_ALL: Final = re.compile(
    "-A ((PREROUTING|OUTPUT|POSTROUTING) -j|rstguard-raw -i out -j|rstguard-blocked ! -p tcp)"
)
"""Rules that what neighbours say to each other meets as well."""
_STRAY: Final = (SYN, SYN, SYN, SYN | ACK, ACK, ACK | PSH, RST, FIN | ACK, 0)
_OF_CONNECTION: Final = (ACK, ACK | PSH, FIN | ACK, RST)


@dataclass(frozen=True)
class Sent:
    """A packet as the model has it, and whether the tracker is to know its connection."""

    seen: Seen
    known: bool


def packet(place: Place, number: int, draw: random.Random) -> Sent:
    """Return one whose state in the tracker is known beforehand; no two have the same ports."""
    seen = place.packet(draw)
    reply, tcp, known = draw.random() < 0.4, draw.random() < 0.9, draw.random() < 0.6
    client, server = draw.choice([*place.sources.values()]), place.servers["served"]
    if draw.random() < 0.3:
        server = place.servers["other"]
    ends, ports = [client, server], [20000 + number, draw.choice((22, 80, 443, 25))]
    if reply:
        ends, ports = ends[::-1], ports[::-1]
    known = known and tcp
    flags = draw.choice(_OF_CONNECTION if known else _STRAY) if tcp else 0
    states = "ESTABLISHED" if known else "NEW" if flags == SYN or not tcp else "INVALID"
    payload = tcp and draw.random() < 0.5 and not flags & (SYN | RST)
    header = 40 if is_v6(client) else 20
    devices = ("out", "in")
    return Sent(
        replace(
            seen,
            way="forward",
            came_in=devices[reply],
            goes_out=devices[not reply],
            tcp=tcp,
            source=ends[0],
            destination=ends[1],
            source_port=ports[0],
            destination_port=ports[1],
            flags=flags,
            options=frozenset(),
            length=header + (20 if tcp else 8) + 100 * payload,
            payload=payload,
            hops=draw.choice((3, 64, 64)),
            states=frozenset({states}),
            reply=reply and known,
            assured=known,
            packets=1,
            connmark=seen.connmark if known else 0,
            labels=frozenset(),
            mark=0,
            has_socket=False,
            local_destination=False,
            reverse_path=True,
            small_window=False,
        ),
        known,
    )


def bytes_of(seen: Seen) -> bytes:
    family = IPv6 if is_v6(seen.source) else IP
    hops = {"hlim" if is_v6(seen.source) else "ttl": seen.hops}
    head = family(src=address_text(seen.source), dst=address_text(seen.destination), **hops)
    ports = {"sport": seen.source_port, "dport": seen.destination_port}
    body = (
        TCP(flags=seen.flags, window=8192, seq=1000, ack=2000, **ports)
        if seen.tcp
        else UDP(**ports)
    )
    return bytes(head / body / Raw(b"x" * (100 if seen.payload else 0)))


def entry_of(seen: Seen) -> str:
    """Return the line by which `conntrack --load-file` makes the connection of a packet."""
    ends = [(seen.source, seen.source_port), (seen.destination, seen.destination_port)]
    (source, port), (destination, service) = ends[::-1] if seen.reply else ends
    return (
        f"-I -p tcp -s {address_text(source)} -d {address_text(destination)}"
        f" --sport {port} --dport {service} --state ESTABLISHED -t 300"
        f" -u SEEN_REPLY,ASSURED -m 0x{seen.connmark:x}\n"
    )


def prepare(lab: ThreeHosts, place: Place, v6: bool) -> None:
    """Let the gateway know ways to all addresses, and nobody answer anything."""
    near, far = (CLIENT6, SERVER6) if v6 else (CLIENT4, SERVER4)
    length = 128 if v6 else 32
    for address in place.sources.values():
        lab.ip("gateway", f"route replace {address_text(address)}/{length} via {near}")
    for address in place.servers.values():
        lab.ip("gateway", f"route replace {address_text(address)}/{length} via {far}")
    tool = "ip6tables" if v6 else "iptables"
    for host, chain in (("client", "PREROUTING"), ("server", "PREROUTING"), ("gateway", "OUTPUT")):
        for protocol in ("tcp", "udp"):
            lab.run(host, tool, "-w", "-t", "raw", "-I", chain, "-p", protocol, "-j", "DROP")
    lab.set("gateway", {"net/netfilter/nf_conntrack_tcp_loose": "0"})
    lab.set("gateway", {"net/netfilter/nf_conntrack_tcp_be_liberal": "1"})


def fill(lab: ThreeHosts, world: World) -> None:
    lines = [
        f"add {name} {','.join(str(part) for part in element)} -exist\n"
        for name, elements in world.sets.items()
        for element in elements
    ]
    lab.run("gateway", "ipset", "restore", stdin="".join(lines))


def counted(lab: ThreeHosts, v6: bool) -> Counter[tuple[str, str]]:
    """Return how many packets met each of the guard's rules."""
    found: Counter[tuple[str, str]] = Counter()
    tool = "ip6tables-save" if v6 else "iptables-save"
    for table in TABLES:
        text = lab.run("gateway", tool, "-c", "-t", table)
        for packets, rule in _COUNTED.findall(text):
            if "rstguard" in rule and not _OF_ALL.match(rule):
                found[table, plain(rule)] += int(packets)
    return found


def plain(rule: str) -> str:
    """Return a rule with its words in a fixed order, as iptables-save has one of its own."""
    return " ".join(sorted(re.sub(r"/(32|128)\b", "", rule).replace('"', "").split()))


def unreached(rule: Rule) -> Rule:
    """Return a rule without what so few packets could cross."""
    if rule.measure in limiting.KINDS.values():
        return replace(rule, limit=10 * PACKETS, burst=10 * PACKETS)
    return rule


@BOTH_FAMILIES
@pytest.mark.parametrize("name", ["web-edge-all", "strict-gateway-all"])
def test_the_model_is_right(
    tmp_path: Path, v6: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiting, "OTHERS", dict.fromkeys(limiting.OTHERS, PACKETS))
    ruleset = RULESETS[name]
    ruleset = replace(
        ruleset,
        scope=replace(ruleset.scope, interfaces=("out",)),
        rules=tuple(map(unreached, ruleset.rules)),
    )
    place = Place(ruleset, 6 if v6 else 4)
    draw = random.Random(SEED)
    sent = [packet(place, number, draw) for number in range(PACKETS)]
    sent.sort(key=lambda one: one.seen.came_in == "in")  # as they are sent
    # Nothing comes near a limit; SYNPROXY's and the refusals' are the only ones of one source.
    world = place.world(draw)
    world.chance = lambda asked: asked.startswith("--hashlimit-upto")
    with ThreeHosts("rgs") as lab:
        with lab.inside("gateway"):
            footprint = Footprint(Linux(), tmp_path, range(5640, 5641))
            footprint.known = place.known()
            footprint.prepare(ruleset)
            footprint.divert(ruleset)
            rules = Netfilter(footprint.rules(ruleset)["IPv6" if v6 else "IPv4"], place.marks.mask)
        prepare(lab, place, v6)
        fill(lab, world)
        entries = tmp_path / "entries"
        entries.write_text("".join(entry_of(one.seen) for one in sent if one.known))
        lab.run("gateway", "conntrack", "--load-file", str(entries))
        before = counted(lab, v6)
        for host, device in (("client", "out"), ("server", "in")):
            send_into(lab, host, *(bytes_of(o.seen) for o in sent if o.seen.came_in == device))
        after = counted(lab, v6)
        for one in sent:
            list(rules.pass_through(one.seen, world))
    hits = rules.hits.items()
    expected = Counter({(t, plain(rule)): n for (t, rule), n in hits if not _OF_ALL.match(rule)})
    met = after - before
    wrong = [
        f"{table} {rule}: met {met[table, rule]} times, not {expected[table, rule]}"
        for table, rule in met | expected
        if met[table, rule] != expected[table, rule]
    ]
    assert wrong == []
