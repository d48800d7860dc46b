"""What fits no connection, and RSTs: the kernel itself drops what is beyond the rules.  Pure.

A worker that is overrun, stuck or dead lets pass what comes, or all of it waits in a full queue.
Segments of no connection and with impossible flags are cheap to send and no honest client waits for
them, so what a rule would not let pass is dropped in front of the queue, whatever the load:

- *Each rule's own limit*, by hashlimit: its token bucket is the engine's, of the same sources and
  ports.  What is within it goes on to the engine, which counts it again, for events and answers.
- *One valve over all sources*, before it (`forgotten` has another for what makes entries): forged
  sources all have a full bucket each.  It also bounds what the tables must hold: an entry for each
  source that came past it while its bucket filled again.  A full table drops who is new to it.
- *A sample*, one a second of each source, of what is beyond a rule that bans goes to the engine,
  with the bit OVER: it is dropped in any case, and its source is shunned.  There is no bypass for
  it: where nobody reads the queue it is dropped.

RSTs of connections (`reset_rate`) have no valve: they fit a connection.  A rule that resets or bans
must see what crosses it, so the kernel drops what is beyond twice its limit; of one that drops,
what is beyond its limit.

Who is trusted is exempt, and of rules that reset or ban whoever is protected, as in the engine
(`Engine._object`).  The way of a segment that fits no connection, in mangle PREROUTING:

    rstguard-invalid -> rstguard-flags -> rstguard-valve-flags   -> rstguard-limit-flags
                     -> rstguard-unfit -> rstguard-valve-strays  -> rstguard-lost (`forgotten`)
                     -> rstguard-valve (`forgotten`)             -> rstguard-lost
                                                  rstguard-lost  -> rstguard-limit-strays
    rstguard-limit-* -> rstguard-strays -> the queue; or rstguard-over-*, rstguard-block-* -> drop
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rstguard.engine.ruleset import SECOND, Measure, Rule
from rstguard.engine.verdict import Action
from rstguard.kernel import oneway
from rstguard.kernel.counting import LARGEST_RATE, UNITS, kept_in, printed_alike, up_to
from rstguard.kernel.forgotten import few
from rstguard.kernel.matching import Matching, negated, ports_named
from rstguard.kernel.names import PREFIX

STRAYS: Final = "strays"
FLAGS: Final = "flags"
RESETS: Final = "resets"
KINDS: Final = {
    STRAYS: Measure.OUT_OF_STATE,
    FLAGS: Measure.BAD_FLAGS,
    RESETS: Measure.RESET_RATE,
}
"""What is limited, as chains and tables are named, and the measure of the rules that do it."""

OTHERS: Final = {STRAYS: 50, FLAGS: 20}
"""Segments a second, and at once, that pass a valve, of all sources of a family together.

Or twice what a rule lets pass of one source, if that is more: to cross it must be possible."""
KNOWN: Final = 500
"""So many more of those that were proven lately, a few a second of each (`forgotten.few`)."""
_RST: Final = "-m tcp --tcp-flags RST RST "


@dataclass(frozen=True, slots=True)
class Limits(Matching):
    """The chains of one policy and address family."""

    def rules(self, kind: str) -> tuple[Rule, ...]:
        """Return the rules that the kernel enforces for a kind, the most severe first."""
        return self.ruleset.kept_by_kernel(KINDS[kind])

    def door(self, kind: str, to: str) -> tuple[str, ...]:
        """Return the rules that send to a chain what some rule limits: what goes to its ports."""
        rules = self.rules(kind)
        if not rules:
            return ()
        named = [rule.ports for rule in rules]
        every = None if None in named else frozenset().union(*(ports or () for ports in named))
        return tuple(f"{ports}-g {to}" for ports in ports_named(every))

    def chains(self, steering: tuple[str, ...], queues: range) -> dict[str, tuple[str, ...]]:
        """Return the chains by name; `steering` matches the sources of each queue."""
        found = {f"{PREFIX}-flags": (*self.door(FLAGS, _valve(FLAGS)), f"-g {PREFIX}-strays")}
        found[f"{PREFIX}-limit-{STRAYS}"] = (*self.limits(STRAYS), f"-g {PREFIX}-strays")
        if self.rules(STRAYS):
            found[f"{PREFIX}-unfit"] = self.unfit()
            found[_valve(STRAYS)] = (*self.known(), *self.others(STRAYS, f"{PREFIX}-lost"))
        if self.rules(FLAGS):
            limit = f"{PREFIX}-limit-{FLAGS}"
            found[_valve(FLAGS)] = self.others(FLAGS, limit)
            found[limit] = (*self.limits(FLAGS), f"-g {PREFIX}-strays")
        for kind in KINDS:
            rules = self.rules(kind)
            if rules:
                found[f"{PREFIX}-over-{kind}"] = ("-j DROP",)
            if kind != RESETS and any(rule.action is Action.BAN for rule in rules):
                found[f"{PREFIX}-block-{kind}"] = self.block()
                found[f"{PREFIX}-sample-{STRAYS}"] = self.sample(steering, queues)
        return found

    def unfit(self) -> tuple[str, ...]:
        """What would make no entry.  Answers are awaited as for what does (`forgotten.lost`)."""
        answered = f"{self.in_set('answered')} -j RETURN"
        door = self.door(STRAYS, _valve(STRAYS))
        return (*oneway.strays(self), answered, *door, f"-g {PREFIX}-lost")

    def known(self) -> tuple[str, ...]:
        """Whose connection goes on must not be starved by somebody's flood."""
        each = f"{self.in_set('proven')} {few(self.family, f'few-{STRAYS}')}"
        return (f"{each} {self._at_most(KNOWN, KNOWN, f'known-{STRAYS}')} -g {PREFIX}-lost",)

    def others(self, kind: str, to: str) -> tuple[str, ...]:
        """The valve; the last rule counts what does not pass it."""
        rules = self.rules(kind)
        rate = max(OTHERS[kind], *(-(-2 * rule.limit * SECOND // rule.period) for rule in rules))
        rate = printed_alike(min(rate, LARGEST_RATE))
        burst = min(max(rate, *(2 * rule.burst for rule in rules)), LARGEST_RATE)
        return f"{self._at_most(rate, burst, kind)} -g {to}", "-j DROP"

    def _at_most(self, rate: int, burst: int, name: str) -> str:
        return (
            f"-m hashlimit --hashlimit-upto {rate}/sec --hashlimit-burst {burst}"
            f" --hashlimit-name {PREFIX}{self.family}-{name}-{rate}-{burst}"
        )

    def limits(self, kind: str) -> tuple[str, ...]:
        """The limits of all rules for a kind, the most severe first."""
        return tuple(
            f"{ports}{match}"
            for rule in self.rules(kind)
            for ports, match in self._over(rule, kind)
        )

    def _over(self, rule: Rule, kind: str) -> list[tuple[str, str]]:
        bans = rule.action is Action.BAN and kind != RESETS
        to = f"{PREFIX}-{'block' if bans else 'over'}-{kind}"
        exempt = [negated(self.in_set("trusted"))] if kind == RESETS and self.trusts else []
        if rule.action is not Action.DROP:
            exempt.append(negated(self.in_set("protected")))
        whom = "".join(f"{match} " for match in exempt)
        limit = f"{whom}-m hashlimit {limit_of(rule, self.family)} -g {to}"
        if kind != RESETS:
            return [(ports, limit) for ports in ports_named(rule.ports)]
        return [(ports or "-p tcp ", f"{_RST}{limit}") for ports in ports_named(rule.ports)]

    def block(self) -> tuple[str, ...]:
        """What is beyond a rule that bans: one a second of each source is shown to the engine."""
        return f"{up_to(self.family, 'sample', (1, 1))} -g {PREFIX}-sample-{STRAYS}", "-j DROP"

    def sample(self, steering: tuple[str, ...], queues: range) -> tuple[str, ...]:
        """The way of the sample to its worker."""
        marks = self.marks
        bits = (marks.to_queue_stray, marks.to_queue_over)
        ways = zip(steering, queues, strict=True)
        return (
            *(f"-j MARK --set-xmark {bit}" for bit in bits),
            *(f"{match}-j NFQUEUE --queue-num {number}" for match, number in ways),
        )


def _valve(kind: str) -> str:
    return f"{PREFIX}-valve-{kind}"


def limit_of(rule: Rule, family: int) -> str:
    """Return the options of the hashlimit match for what is beyond a rule."""
    times, most = _times(rule), LARGEST_RATE * rule.period // SECOND
    return (
        f"--hashlimit-above {min(times * rule.limit, most)}/{UNITS[rule.period]}"
        f" --hashlimit-burst {min(times * rule.burst, LARGEST_RATE)}"
        f" {kept_in(rule, family, table_of(rule, family))}"
    )


def _times(rule: Rule) -> int:
    """Return how many times its limit the kernel lets pass: a worker must see what crosses it."""
    return 2 if rule.measure is Measure.RESET_RATE and rule.action is not Action.DROP else 1


def table_of(rule: Rule, family: int) -> str:
    """Return the name of a rule's table: it lives on under it, so whatever differs is in it."""
    length = rule.ipv4_length if family == 4 else rule.ipv6_length
    numbers = f"{rule.limit}-{rule.period // SECOND}-{rule.burst}-{length}"
    how = f"{_times(rule)}-{numbers}-{rule.per.value}"
    return f"{PREFIX}{family}-{rule.measure.value}-{rule.name}-{how}"
