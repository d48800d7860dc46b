"""Connections are counted as they begin, and those beyond a limit never reach the server.  Pure.

A rule `connections` is judged by sweeps, which see what is there already.  What comes between two
sweeps the kernel counts by itself, in a set with counters for each such rule: it holds
each source, prefix or service with a count of the connections that were let in.  The
count goes up with the ACK that completes a handshake and fits, so nobody counts for an address that
is not his (what that ACK proves: `rstguard.kernel.proof`), and SYNs count for nothing.  For a
connection that a SYN cookie begins it goes up with SYNPROXY's own SYN.

- *Beyond the limit* the connection is condemned by this very ACK: its client hears a RST, and the
  server, which has not heard the ACK, drops what is half-open.  However late everybody else is, no
  more than the limit come in.
- *Beyond a quarter of it* the sweeper is told of each beginning, and of FINs and RSTs, by a copy of
  the packet.  It asks the tracker which of these have ended a connection and sets the count anew
  (`rstguard.engine.admission`): so places become free at once.
- *Below that* nobody is told, and the count is forgotten with the element, after two sweeps.

The set rstguard-counting4 holds everything while somebody listens, and nothing 3 s later.  Nobody
is refused without it: then sweeps alone hold the limits.  Rules that ban refuse nobody either, as
the sweep must see who crosses them, but the sweeper looks at once.

A tracker that takes segments of any number (tcp_be_liberal) is fooled by any ACK: there nothing of
this is in force.  Neither is it for a policy that only observes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from rstguard.engine.address import is_v6
from rstguard.engine.admission import admitting, told_from
from rstguard.engine.ruleset import SECOND, Per, Rule, RuleSet
from rstguard.engine.verdict import Action
from rstguard.kernel.counting import up_to
from rstguard.kernel.elements import EVERYTHING
from rstguard.kernel.marks import Labels
from rstguard.kernel.matching import Matching, interface_names, negated, ports_named
from rstguard.kernel.names import PREFIX, set_name, short_id
from rstguard.kernel.proof import label
from rstguard.kernel.seam import ElementSets

TOLD_GROUP: Final = 5642
"""NFLOG group of first ACKs, FINs and RSTs of keys that come near their limit."""
REFUSED_GROUP: Final = 5643
"""NFLOG group of first ACKs beyond a limit; the prefix is the rule's place."""
ALIVE_SECONDS: Final = 3
"""How long is refused without the reader saying again that it listens."""
MOST: Final = 262_144
"""Keys that a set counts.  One new to a full set is not counted."""
_LOG_BYTES: Final = 128
"""IP and TCP header, with an extension header."""
_MOST_ENDS: Final = 5000
_MOST_ENDS_EACH: Final = 500
"""FINs and RSTs that are told of in a second, of all and of one address: a reader of floods of them
would do nothing else, and what it does not hear of a sweep finds."""
_MOST_REFUSALS: Final = 2000
"""Refusals that are told of in a second."""
_FIN_OR_RST: Final = "-p tcp -m tcp ! --tcp-flags FIN,RST NONE"


def live_set(rule: Rule, family: int) -> str:
    """Return the name of the set that counts for a rule: another rule's counts are none of its."""
    ports = None if rule.ports is None else sorted(rule.ports)
    what = rule.name, rule.limit, rule.per, rule.ipv4_length, rule.ipv6_length, ports
    told = repr((*what, rule.action, rule.destinations, rule.excepted))
    return f"{set_name('live', family)}-{short_id(told)}"


def counting_set(family: int) -> str:
    """Return the name of the set that holds everything while somebody listens."""
    return set_name("counting", family)


def alive(sets: ElementSets) -> None:
    """Have connections beyond their limit refused for the next seconds.

    Raises:
        KernelError: the kernel refused.
    """
    for family, prefixes in EVERYTHING.items():
        sets.put(counting_set(family), prefixes, ALIVE_SECONDS)


def lives(ruleset: RuleSet) -> int:
    """Return how many seconds what is counted for a key is kept: two sweeps."""
    return max(2, -(-2 * ruleset.sweep_every // SECOND))


def options(rule: Rule, family: str, seconds: int) -> tuple[str, str]:
    """Return type and options of a rule's set; `family` is what ipset calls it."""
    length, whole = (rule.ipv4_length, 32) if family == "inet" else (rule.ipv6_length, 128)
    netmask = f" netmask {length}" if length < whole and rule.per is not Per.SERVICE else ""
    kind = "hash:ip,port" if rule.per is Per.SERVICE else "hash:ip"
    return kind, f"family {family} maxelem {MOST} timeout {seconds} counters{netmask}"


@dataclass(frozen=True, slots=True)
class Admission:
    """The chains, for a policy and an address family."""

    matching: Matching

    @property
    def ruleset(self) -> RuleSet:
        """The policy."""
        return self.matching.ruleset

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that are counted for, in their places."""
        return admitting(self.ruleset)

    def chains(self) -> dict[str, tuple[str, ...]]:
        """Return the chains by name; none if there is nothing to count."""
        if not self.rules:
            return {}
        found = {
            f"{PREFIX}-admit": tuple(self._admit()),
            f"{PREFIX}-ended": tuple(self._ended(client="src", server="dst")),
            f"{PREFIX}-ended-out": tuple(self._ended(client="dst", server="src")),
            f"{PREFIX}-told": (_told(),),
        }
        for number, rule in enumerate(self.rules):
            found[f"{PREFIX}-full-{number}"] = tuple(self._full(number, rule))
            found[f"{PREFIX}-let-in-{number}"] = tuple(self._let_in(rule))
            if _refuses(rule):
                found[f"{PREFIX}-beyond-{number}"] = self._beyond(number, rule)
        return found

    def first(self, first: str) -> list[str]:
        """Return the rule for the ACK that begins a connection, which `first` matches."""
        return [f"{first} -j {PREFIX}-admit"] if self.rules else []

    def closing(self) -> list[str]:
        """Return the rule for FINs and RSTs that come in."""
        return [f"{self._closes()} -j {PREFIX}-ended"] if self.rules else []

    def closing_out(self) -> tuple[str, ...]:
        """Return the rules for those that go out."""
        if not self.rules:
            return ()
        names = interface_names(self.ruleset)
        return tuple(f"-o {name} {self._closes()} -j {PREFIX}-ended-out" for name in names)

    def _closes(self) -> str:
        """Match what may end a connection that is counted: none that is condemned is."""
        return f"{_FIN_OR_RST} -m connmark --mark {self.matching.marks.swept}"

    def _admit(self) -> Iterator[str]:
        """No rule counts what another one refuses: all are asked before any counts."""
        for number, rule in enumerate(self.rules):
            yield from (f"{match}-j {PREFIX}-full-{number}" for match in self._concerned(rule))
        yield f"-m connmark ! --mark {self.matching.marks.uncondemned} -j RETURN"
        for number, rule in enumerate(self.rules):
            yield from (f"{match}-j {PREFIX}-let-in-{number}" for match in self._concerned(rule))

    def _concerned(self, rule: Rule) -> Iterator[str]:
        v6 = self.matching.family == 6
        to = [f"-d {one} " for one in rule.destinations if is_v6(one.network) is v6]
        if rule.destinations and not to:
            return
        for where in to or [""]:
            yield from (f"{where}{match}" for match in ports_named(rule.ports))

    def _excepted(self, rule: Rule) -> Iterator[str]:
        v6 = self.matching.family == 6
        return (f"-s {one} -j RETURN" for one in rule.excepted if is_v6(one.network) is v6)

    def _full(self, number: int, rule: Rule) -> Iterator[str]:
        """Make an element, if there is none, which counts 1 then; refuse at the limit."""
        yield from self._excepted(rule)
        yield f"-j SET --add-set {live_set(rule, self.matching.family)} {_key(rule)}"
        if not _refuses(rule):
            return
        protected = negated(self.matching.in_set("protected"))
        listened = f"-m set --match-set {counting_set(self.matching.family)} src"
        alive = f"-m connmark --mark {self.matching.marks.uncondemned}"
        full = self._more_than(rule, rule.limit, _key(rule), update=False)
        yield f"{alive} {full} {protected} {listened} -g {PREFIX}-beyond-{number}"

    def _let_in(self, rule: Rule) -> Iterator[str]:
        """Count it, and tell of it if there are many."""
        yield from self._excepted(rule)
        yield f"{self._more_than(rule, told_from(rule) + 1, _key(rule))} -j {_log(TOLD_GROUP)}"

    def _beyond(self, number: int, rule: Rule) -> tuple[str, ...]:
        """Condemn it, label first: without that the mark would count for nothing."""
        marks = self.matching.marks
        value = marks.condemned_for[rule.ends]
        valve = (
            f"-m hashlimit --hashlimit-upto {_MOST_REFUSALS}/sec --hashlimit-burst"
            f" {_MOST_REFUSALS} --hashlimit-name {PREFIX}-refusals"
        )
        return (
            label(Labels(self.ruleset.labels).condemned, add=True),
            f"-j CONNMARK --set-xmark 0x{value:x}/0x{value:x}",
            f"{valve} -j {_log(REFUSED_GROUP, str(number))}",
        )

    def _ended(self, client: str, server: str) -> Iterator[str]:
        """What may be the end of a connection that somebody keeps count of."""
        for rule in self.rules:
            key = _key(rule, client, server)
            many = self._more_than(rule, told_from(rule) + 1, key, update=False)
            most = _MOST_ENDS_EACH, _MOST_ENDS_EACH
            each = up_to(self.matching.family, f"ends-{client}", most, client, ipv6_length=64)
            yield f"{many} {each} -g {PREFIX}-told"

    def _more_than(self, rule: Rule, count: int, key: str, update: bool = True) -> str:
        """Match a key that counts more than this; with `update` it counts one more before."""
        name = live_set(rule, self.matching.family)
        still = "" if update else " ! --update-counters"
        return f"-m set --match-set {name} {key}{still} --packets-gt {count}"


def _refuses(rule: Rule) -> bool:
    return rule.action is Action.RESET


def _key(rule: Rule, client: str = "src", server: str = "dst") -> str:
    """Return which parts of a packet a rule counts by, as the set match takes them."""
    if rule.per is Per.SERVICE:
        return f"{server},{server}"
    return server if rule.per is Per.DESTINATION else client


def _told() -> str:
    """Tell of FINs and RSTs, but of no flood of them."""
    valve = (
        f"-m hashlimit --hashlimit-upto {_MOST_ENDS}/sec --hashlimit-burst {_MOST_ENDS}"
        f" --hashlimit-name {PREFIX}-ends"
    )
    return f"{valve} -j {_log(TOLD_GROUP)}"


def _log(group: int, prefix: str = "") -> str:
    said = f"--nflog-prefix {prefix} " if prefix else ""
    return f"NFLOG {said}--nflog-group {group} --nflog-size {_LOG_BYTES}"
