"""No rule of the guard touches what no rule of the policy concerns.

Packets of every kind are sent through the generated rules of each sample policy, in a model of the
chains (tests/support/netfilter.py): those outside `protect`, of connections that the guard has no
part in and of no source that it blocks, must come out as they went in.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Final

import pytest

from rstguard.engine.address import Prefix, parse_address, prefix_of
from rstguard.engine.offers import Offer
from rstguard.engine.ruleset import RuleSet, SynBudget
from rstguard.engine.service import Service
from rstguard.engine.wire import ACK, FIN, PSH, RST, SYN, URG
from rstguard.kernel.footprint import rules_text
from rstguard.kernel.marks import Marks
from rstguard.kernel.names import set_name
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse
from tests.support.netfilter import Effect, Element, Netfilter, Seen, World

PACKETS: Final = 100_000
SAMPLES: Final = sorted((Path(__file__).parents[2] / "policies").glob("*.yaml"))
FAMILIES: Final = (4, 6)
FLAGS: Final = (SYN, SYN, SYN | ACK, ACK, ACK, ACK | PSH, FIN | ACK, RST, RST | ACK, 0, FIN | URG)
STATES: Final = ("NEW", "NEW", "ESTABLISHED", "ESTABLISHED", "INVALID", "UNTRACKED", "RELATED")
QUEUES: Final = range(5640, 5642)


def variants() -> Iterator[tuple[str, RuleSet]]:
    """Return the compiled samples, and with what they leave out."""
    for path in SAMPLES:
        loaded = parse(path.read_bytes(), path.name)
        ruleset = compile_policy(loaded.policy)
        yield path.stem, ruleset
        budget = SynBudget(1000, frozenset({80, 443}), 128)
        yield (
            f"{path.stem}-all",
            replace(
                ruleset,
                syn_budget=budget,
                forged_resets="hold",
                forged_fins=True,
                fail_open=not ruleset.fail_open,
                covers_all=path.stem != "strict-gateway",
                blocking="reset" if ruleset.blocking == "drop" else "drop",
                challenge=True,
                drops_spoofed=True,
                enforce=True,
            ),
        )


RULESETS: Final = dict(variants())


def address(text4: str, text6: str, family: int) -> int:
    return parse_address(text4 if family == 4 else text6)


@dataclass(frozen=True)
class Place:
    """Who and what there is around a gateway with one policy, in one address family."""

    ruleset: RuleSet
    family: int

    @property
    def outside(self) -> str:
        """A protected interface."""
        return self.ruleset.scope.interfaces[0].replace("*", "0")

    @property
    def sources(self) -> dict[str, int]:
        of = self.family
        trusted = {prefix.network + 9 for prefix in self.ruleset.scope.trusted}
        here = [one for one in trusted if (one >> 128) == (of == 6)]
        return {
            "plain": address("100.64.1.1", "2001:db8:f1::1", of),
            "proven": address("100.64.2.1", "2001:db8:f2::1", of),
            "banned": address("100.64.3.1", "2001:db8:f3::1", of),
            "shunned": address("100.64.4.1", "2001:db8:f4::1", of),
            "gated": address("100.64.9.5", "2001:db8:e:5::1", of),
            "own": address("100.64.6.1", "2001:db8:f6::1", of),
            **({"trusted": here[0]} if here else {}),
        }

    @property
    def servers(self) -> dict[str, int]:
        of = self.family
        scope = [
            p.network for p in self.ruleset.scope.destinations if (p.network >> 128) == (of == 6)
        ]
        served = scope[0] if scope else address("203.0.113.10", "2001:db8:0:1::a", of)
        return {
            "served": served,
            "other": address("100.127.0.1", "2001:db8:ffff::1", of),
            "here": address("100.127.0.2", "2001:db8:ffff::2", of),
        }

    def world(self, chance: random.Random) -> World:
        """Return what is in the sets: somebody of each kind."""
        at, served = self.sources, self.servers["served"]
        scope = self.ruleset.scope
        world = World(chance=lambda _: chance.random() < 0.5)

        def fill(name: str, *elements: Element) -> None:
            world.sets[set_name(name, self.family)] |= set(elements)

        whole = {name: one(value) for name, value in at.items()}
        fill("ban", (whole["banned"],))
        fill("shun", (whole["shunned"],))
        fill("gate", (prefix_of(at["gated"], 24, 48),))
        fill("protected", (whole["own"],))
        fill("proven", (whole["proven"],), (whole["shunned"],))
        fill("challenged", (whole["shunned"],))
        fill("inside", (one(served),))
        fill("serving", *((one(served), port) for port in self.serving))
        fill("translated", (one(served), 80))
        fill("engaged", (one(served), 80), (one(served), 443))
        fill("trusted", *((p,) for p in scope.trusted if (p.network >> 128) == (self.family == 6)))
        fill("dst", *((p,) for p in scope.destinations if (p.network >> 128) == (self.family == 6)))
        for name in ("ports", "close-ports", "budget-ports"):
            world.sets[set_name(name)] = {(port,) for port in scope.ports or ()}
        return world

    def known(self) -> dict[Service, Offer]:
        """Return the services whose SYNs may be answered by cookies."""
        served = self.servers["served"]
        known = {Service(served, port): Offer(1460, 7, True, True) for port in (22, 80, 443)}
        inside = Service(self.servers["other"], 8001)
        known[Service(served, 443)] = Offer(1460, 7, True, True, (inside,))
        return known

    def rules(self) -> Netfilter:
        text = rules_text(self.ruleset, QUEUES, self.known())
        return Netfilter(text[f"IPv{self.family}"])

    def packet(self, draw: random.Random) -> Seen:
        """Return a packet of any kind."""
        way = draw.choice(("forward", "forward", "forward", "input", "output"))
        devices = (self.outside, "lan0", "tun0", "eth9")
        sources, servers = [*self.sources.values()], [*self.servers.values()]
        ends = [draw.choice(sources), draw.choice(servers)]
        ports = [draw.choice((40000, 80)), draw.choice((22, 80, 443, 25, 8080, 8001))]
        reply = draw.random() < 0.4
        if reply:
            ends, ports = ends[::-1], ports[::-1]
        marks = self.marks
        foreign = draw.choice((0, 0, 0x1234, 0x00FF00FF)) & ~marks.mask
        guarded = draw.choice((0, 0, 0, draw.getrandbits(32))) & marks.mask
        seen = Seen(
            way,
            "" if way == "output" else draw.choice(devices),
            "" if way == "input" else draw.choice(devices),
            tcp=draw.random() < 0.85,
            source=ends[0],
            destination=ends[1],
            source_port=ports[0],
            destination_port=ports[1],
            flags=draw.choice(FLAGS),
            options=frozenset(draw.sample((2, 3, 4, 8), 2)),
            length=draw.choice((40, 60, 100, 1500)),
            payload=draw.random() < 0.5,
            hops=draw.choice((1, 3, 64, 64)),
            states=frozenset({draw.choice(STATES), draw.choice(("", "", "DNAT"))}),
            reply=reply,
            assured=draw.random() < 0.5,
            packets=draw.choice((1, 5, 100)),
            connmark=foreign | guarded,
            labels=frozenset(draw.sample((124, 125, 7), draw.choice((0, 0, 1)))),
            mark=draw.choice((0, 0, 0x77, 0x00AB0000)) & ~marks.mask,
            has_socket=draw.random() < 0.8,
            local_destination=ends[1] == self.servers["here"],
            reverse_path=draw.random() < 0.8,
            small_window=draw.random() < 0.2,
        )
        if not seen.tracked:
            seen.connmark, seen.labels = 0, frozenset()
        return seen

    @property
    def serving(self) -> list[int]:
        """Ports at which the protected server has answered clients."""
        scope, served = self.ruleset.scope, self.servers["served"]
        return [port for port in (22, 80, 443) if scope.protects(served, port)]

    @property
    def marks(self) -> Marks:
        return Marks(self.ruleset.marks)

    def concerns(self, seen: Seen) -> bool:
        """Tell whether some rule of the policy, a block or the guard's own work is about it."""
        scope, at = self.ruleset.scope, self.sources
        if seen.connmark & self.marks.mask:
            return True  # a connection that is guarded, or condemned by hand
        if not seen.has_socket and seen.way == "output" and seen.tcp:
            return True  # what SYNPROXY sends
        if self.is_answer(seen):
            return True
        if seen.came_in != self.outside:
            return False
        trusted = any(prefix.covers(seen.source) for prefix in scope.trusted)
        if trusted:
            return False
        blocked = seen.source in (at["banned"], at["shunned"], at["gated"])
        if blocked and self.ruleset.covers_all:
            return True
        spoofed = seen.source == self.servers["served"] and not seen.reverse_path
        return seen.tcp and (spoofed or scope.protects(seen.destination, seen.destination_port))

    def is_answer(self, seen: Seen) -> bool:
        """Tell whether a protected server speaks to a client whose connection was forgotten."""
        if seen.tracked and not seen.reply:
            return False  # the server has begun it
        served = seen.source == self.servers["served"] and seen.source_port in self.serving
        trusted = any(prefix.covers(seen.destination) for prefix in self.ruleset.scope.trusted)
        return seen.tcp and seen.goes_out == self.outside and served and not trusted


def one(value: int) -> Prefix:
    return Prefix(value, 128 if value >> 128 else 32)


def packets(place: Place, count: int, draw: random.Random) -> Iterator[Seen]:
    """Return packets that no rule concerns."""
    while count:
        seen = place.packet(draw)
        if not place.concerns(seen):
            count -= 1
            yield seen


def touched(
    rules: Netfilter, place: Place, count: int, seed: int
) -> Iterator[tuple[Seen, list[Effect]]]:
    """Return the packets that no rule concerns and that were touched all the same."""
    draw = random.Random(seed)
    world = place.world(random.Random(seed + 1))
    for seen in packets(place, count, draw):
        before = replace(seen)
        if effects := list(rules.pass_through(seen, world)):
            yield before, effects


EVERYWHERE: Final = [
    pytest.param(Place(ruleset, family), id=f"{name}-IPv{family}")
    for (name, ruleset), family in product(RULESETS.items(), FAMILIES)
]


@pytest.mark.parametrize("place", EVERYWHERE)
def test_what_no_rule_concerns_is_left_alone(place: Place) -> None:
    rules = place.rules()
    found = next(touched(rules, place, PACKETS // len(EVERYWHERE), 1), None)
    assert found is None


LIMITS: Final = (
    ("-A rstguard-raw -i eth0 -j rstguard-blocked", "-i eth0"),
    ("-A rstguard-raw -i eth0 -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", "-i eth0"),
    ("-A rstguard-raw -i eth0 -p tcp -m ttl --ttl-lt 4", "-i eth0"),
    ("-A rstguard-raw -i eth0 -p tcp -m set --match-set rstguard-inside4 src", "-i eth0"),
    ("-A rstguard-raw -i eth0 -p tcp -m set --match-set rstguard-inside4 src", "rpfilter --invert"),
    ("-A rstguard-raw -i eth0 -p tcp -m set --match-set rstguard-inside4 src", "--match-set rst"),
    ("-A rstguard-in -i eth0 -p tcp -j rstguard-classify", "-i eth0"),
    ("-A rstguard-cookies -i eth0", "-i eth0"),
    ("-A rstguard-refuse -i eth0", "-i eth0"),
    ("-A rstguard-last -i eth0", "-i eth0"),
    ("-A rstguard-low-ttl -m set --match-set rstguard-trusted4 src -j RETURN", ""),
    ("-A rstguard-low-ttl -m set ! --match-set rstguard-dst4 dst -j RETURN", ""),
    ("-A rstguard-low-ttl -p tcp -m set ! --match-set rstguard-ports dst -j RETURN", ""),
    ("-A rstguard-syn -m set --match-set rstguard-trusted4 src -j RETURN", ""),
    ("-A rstguard-syn -m set ! --match-set rstguard-dst4 dst -j RETURN", ""),
    ("-A rstguard-syn -p tcp -m set ! --match-set rstguard-ports dst -j RETURN", ""),
    ("-A rstguard-classify -m set --match-set rstguard-trusted4 src -j RETURN", ""),
    ("-A rstguard-classify -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK ACK", "connmark !"),
    ("-A rstguard-invalid -m set ! --match-set rstguard-dst4 dst -j RETURN", ""),
    ("-A rstguard-invalid -p tcp -m set ! --match-set rstguard-ports dst -j RETURN", ""),
    ("-A rstguard-adopt -p tcp -m tcp --tcp-flags SYN,RST,ACK ACK", "--match-set rst"),
    ("-A rstguard-out -o eth0 -p tcp -j rstguard-adopt", "-o eth0"),
    ("-A rstguard-spoke -m set --match-set rstguard-trusted4 dst -j RETURN", ""),
    ("-A rstguard-answers -m connmark --mark 0x0/0x3000000 -j RETURN", ""),
    ("-A rstguard-proxy -m set --match-set rstguard-trusted4 src -j RETURN", ""),
    ("-A rstguard-sample -m conntrack ! --ctstate ESTABLISHED -j RETURN", ""),
    ("-A rstguard-sample -m connmark --mark 0x0/0x3000000 -j RETURN", ""),
    ("-A rstguard-hold -m connmark ! --mark 0x2000000/0x2000000 -j RETURN", ""),
    ("-A rstguard-in -p tcp -m connmark --mark 0x20000000/0x20000000", "connmark"),
    ("-A FORWARD -p tcp -m connmark ! --mark 0x0/0x18000000", "connmark"),
)
"""Rules that say what is none of the guard's business, or the match by which they do."""


@pytest.mark.parametrize(("text", "match"), LIMITS)
def test_without_what_limits_a_rule_others_are_touched(text: str, match: str) -> None:
    """The test above can fail: each of these is missed if it is taken away."""
    place = Place(RULESETS["web-edge-all"], 4)
    rules = place.rules()
    taken = 0
    for chains in rules.tables.values():
        for chain in chains.values():
            for rule in [rule for rule in chain if rule.text.startswith(text)]:
                if not match:
                    chain.remove(rule)
                    taken += 1
                    continue
                (place_of,) = (n for n, asked in enumerate(rule.asked) if match in asked)
                del rule.tests[place_of]
                taken += 1
    assert taken
    assert next(touched(rules, place, 20_000, 1), None) is not None
