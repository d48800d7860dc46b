"""Matches that several chains share: who is blocked, trusted, or not protected.  Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rstguard.engine.address import is_v6
from rstguard.engine.ruleset import RuleSet
from rstguard.kernel.marks import Marks
from rstguard.kernel.names import set_name

SYN_ONLY = "FIN,SYN,RST,ACK SYN"
UNTRACKED = "-m conntrack --ctstate UNTRACKED"
"""What was kept from the tracker in the raw table, such as SYNs that a cookie is to answer."""
_MOST_PORTS = 15
"""What the multiport match takes at once; a range counts as two."""
SYN_ACK = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN,ACK"


@dataclass(frozen=True, slots=True)
class Matching:
    """What a policy says of packets in one address family (4 or 6)."""

    ruleset: RuleSet
    family: int

    @property
    def marks(self) -> Marks:
        """The bits of connections and packets, where this policy has them."""
        return Marks(self.ruleset.marks)

    def in_set(self, name: str, direction: str = "src") -> str:
        """Match an address ("src" or "dst") that one of our sets of this family holds."""
        return f"-m set --match-set {set_name(name, self.family)} {direction}"

    def hit(self, name: str) -> str:
        """Match who is banned or shunned; protected and trusted ones amid a banned network are not.

        The block is asked first: that is the only question for nearly every packet.
        """
        protected = negated(self.in_set("protected"))
        trusted = f" {negated(self.in_set('trusted'))}" if self.trusts else ""
        return f"{self.in_set(name)} {protected}{trusted}"

    def on_interfaces(self, chain: str, outbound: bool, tcp: bool = False) -> tuple[str, ...]:
        """Return rules that send what comes in, or goes out, on protected interfaces to a chain."""
        protocol = "-p tcp " if tcp else ""
        way = "-o" if outbound else "-i"
        names = interface_names(self.ruleset)
        return tuple(f"{way} {name} {protocol}-j {chain}" for name in names)

    @property
    def trusts(self) -> bool:
        """Whether the policy trusts anybody of this family."""
        v6 = self.family == 6
        return any(is_v6(prefix.network) == v6 for prefix in self.ruleset.scope.trusted)

    def unless_trusted(self) -> list[str]:
        """Return the rule by which trusted sources leave the chain, if there are any."""
        return [f"{self.in_set('trusted')} -j RETURN"] if self.trusts else []

    def covered(self) -> list[str]:
        """Return rules by which leaves the chain what a ban or shun does not cover."""
        return [] if self.ruleset.covers_all else ["! -p tcp -j RETURN", *self.in_scope()]

    def in_scope(self) -> list[str]:
        """Return rules that leave the chain if the target is not protected."""
        scope = self.ruleset.scope
        rules = []
        if scope.destinations:
            rules.append(f"{negated(self.in_set('dst', 'dst'))} -j RETURN")
        if scope.ports is not None:
            rules.append(f"-p tcp -m set ! --match-set {set_name('ports')} dst -j RETURN")
        return rules


def interface_names(ruleset: RuleSet) -> list[str]:
    """Return the protected interfaces as iptables names them: a glob ends in "+"."""
    return [name.replace("*", "+") for name in ruleset.scope.interfaces]


def negated(match: str) -> str:
    """Return a match on a set turned into its opposite."""
    return match.replace("-m set ", "-m set ! ", 1)


def ports_named(ports: frozenset[int] | None) -> tuple[str, ...]:
    """Return matches, of which one fits, for what goes to these ports; "" if they are None: all."""
    if ports is None:
        return ("",)
    several: list[list[str]] = [[]]
    room = _MOST_PORTS
    for first, last in _runs(ports):
        needed = 1 if first == last else 2
        if needed > room:
            several.append([])
            room = _MOST_PORTS
        several[-1].append(str(first) if first == last else f"{first}:{last}")
        room -= needed
    return tuple(f"-p tcp -m multiport --dports {','.join(some)} " for some in several if some)


def _runs(ports: frozenset[int]) -> list[tuple[int, int]]:
    """Return the first and the last of each run of ports."""
    runs: list[tuple[int, int]] = []
    for port in sorted(ports):
        if runs and runs[-1][1] == port - 1:
            runs[-1] = runs[-1][0], port
        else:
            runs.append((port, port))
    return runs
