"""All that the guard changes on a machine, made, checked and undone: sysctls, sets and chains."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rstguard.engine.offers import Offer
from rstguard.engine.ruleset import RuleSet
from rstguard.engine.service import Service
from rstguard.kernel import (
    KernelError,
    chains,
    clearing,
    cookies,
    holding,
    ipset,
    iptables,
    syn_budget,
    sysctl,
    tracker,
)
from rstguard.kernel.diversion import queues_for
from rstguard.kernel.dnat import Translation
from rstguard.kernel.marks import Marks
from rstguard.kernel.names import PREFIX
from rstguard.kernel.seam import Kernel
from rstguard.kernel.untracked import Hits

log = logging.getLogger(__name__)

RECORD_NAME = "sysctls.json"
_MOVED = "what nf_conntrack_max and nf_conntrack_tcp_be_liberal were when the rules were made"

_KEPT = "-p tcp -m conntrack --ctstate INVALID,UNTRACKED -j SYNPROXY --mss 1460"


class Footprint:
    """What a guard with a given runtime directory and queues has changed in its namespace."""

    def __init__(self, kernel: Kernel, directory: Path, queues: range) -> None:
        """`directory` keeps the record of old sysctl values; `queues` are the workers'."""
        self._kernel = kernel
        self._record = directory / RECORD_NAME
        self.queues = queues
        self.known: dict[Service, Offer] = {}
        """The services that SYN cookies may be given out for; takes effect with `divert`."""
        self.answered: dict[Service, Offer] = {}
        """Those for which the rules in place give some out."""
        self._placed: dict[int, iptables.Present] = {}
        """What is in the kernel since the last `divert`."""
        self._clears = True
        """Whether our bits come off packets before they are routed (`rstguard.kernel.clearing`)."""
        self.no_cookies = ""
        """Why no cookies are given out though the policy would have some given, or ""."""
        self._proxied: set[int] = set()
        """Families in which there is a rule with SYNPROXY since this guard began."""
        self.translation = Translation(kernel)
        """What translates connections that SYNPROXY opens to services behind DNAT."""
        self._tracker = tracker.USUAL
        """How the connection tracker was set when rules were last put in place."""
        self.hits = Hits()
        """What the rules have dropped before the tracker."""
        self.changed: list[sysctl.Change] = []
        """The sysctls that `prepare` has given another value."""
        self._whole = threading.RLock()  # nobody is to see the rules half changed
        self._ended = False

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._whole:
            if self._ended:
                raise KernelError("the guard is stopping, and changes nothing any more")
            yield

    def prepare(self, ruleset: RuleSet) -> None:
        """Set sysctls and make the sets.  Nothing is diverted yet.

        Raises:
            KernelError: something was refused.
        """
        with self._changing():
            done = sysctl.apply(self._kernel, sysctl.TRACKING, self._record)
            self.changed = [change for change in done if change.outcome is sysctl.Outcome.SET]
            self._make_sets(ruleset)
            ipset.forget_services(self._kernel)

    def _make_sets(self, ruleset: RuleSet) -> None:
        ipset.apply(self._kernel, ruleset, len(self.queues), self.known)

    def altered(self) -> list[sysctl.Change]:
        """Return the sysctls that others have changed since.

        Raises:
            KernelError: one cannot be read.
        """
        return sysctl.altered(self._kernel, sysctl.TRACKING)

    def set_again(self) -> None:
        """Give the sysctls the values that the guard needs, whatever others have made of them.

        Raises:
            KernelError: one could not be set.
        """
        with self._changing():
            sysctl.apply(self._kernel, sysctl.TRACKING, self._record)

    def divert(self, ruleset: RuleSet) -> None:
        """Put the chains in place, or exchange them for those of another policy.

        Sets that only the other policy needed go, also those of a guard that was killed.

        Raises:
            KernelError: iptables refused.
        """
        with self._changing():
            self._tracker = tracker.look(self._kernel)
            self._clear(ruleset)
            self.translation.apply(Marks(ruleset.marks), self._answerable(ruleset))
            ipset.complete(self._kernel, ruleset, len(self.queues), self.known)
            counted = bool(self._placed)  # before the first rules nothing is
            if counted:
                self.hits.look(self._kernel)
            self._placed = self._put(ruleset)
            self.answered = self.translation.usable(self.known)
            self._proxied |= {f for f, plan in self._plans(ruleset).items() if _proxies(plan)}
            self.hits.replaced += 1
            if counted:
                self.hits.look(self._kernel)
            self._prune(ruleset)

    def _put(self, ruleset: RuleSet) -> dict[int, iptables.Present]:
        """Without SYN cookies the guard works as well: who is shunned is then dropped."""
        before, self.no_cookies = self.no_cookies, ""
        try:
            return iptables.apply(self._kernel, self._plans(ruleset))
        except KernelError as error:
            if not cookies.wanted(ruleset) or syn_budget.has_rate(ruleset):
                raise
            self.no_cookies = str(error)
            placed = iptables.apply(self._kernel, self._plans(ruleset))
            if not before:
                log.warning(
                    "shunned sources are dropped, not challenged, and open handshakes are not "
                    "counted: %s",
                    error,
                )
            return placed

    def _clear(self, ruleset: RuleSet) -> None:
        """Without it the guard works as well; who marks packets for routing must know."""
        cleared = self._clears
        try:
            clearing.apply(self._kernel, clearing.Place.of(ruleset))
            self._clears = True
        except KernelError as error:
            self._clears = False
            if cleared:
                log.warning(
                    "packets are routed with the guard's mark bits on them, so every `ip rule` "
                    "with a fwmark needs a mask without 0x%08x: %s",
                    ruleset.marks,
                    error,
                )

    def _prune(self, ruleset: RuleSet) -> None:
        try:
            ipset.prune(self._kernel, ruleset, len(self.queues), self.known)
        except KernelError as error:  # it matches nothing any more, and the next change tries again
            log.warning("a set that no rule of the guard needs could not be removed: %s", error)

    def replace(self, old: RuleSet, new: RuleSet, divert: bool = True) -> None:
        """Exchange one policy's sets and chains for another's; on failure the old ones return.

        Without `divert` there are no chains at present, and only the sets change.

        Raises:
            KernelError: the new ones were refused; the old ones are in force.
        """
        if (old.marks, old.labels) != (new.marks, new.labels):
            raise KernelError(
                "marks and labels cannot change while connections bear them: restart the guard with"
                " the new policy, or leave these two keys as they are"
            )
        with self._changing():
            try:
                self._make_sets(new)
                if divert:
                    self.divert(new)
                if old.scope != new.scope:
                    ipset.forget_services(self._kernel)
            except KernelError:
                self._make_sets(old)
                if divert:
                    self.divert(old)
                raise
            if not divert:
                self._prune(new)

    def missing(self, ruleset: RuleSet) -> list[str]:
        """Return which rules should be in the kernel and are not, in words.

        Raises:
            KernelError: the kernel could not be asked.
        """
        with self._whole:
            place = clearing.Place.of(ruleset)
            uncleared = clearing.missing(self._kernel, place) if self._clears else []
            rules = iptables.missing(self._kernel, self._plans(ruleset), self._placed)
            moved = tracker.look(self._kernel) != self._tracker and bool(self._placed)
            known = self.translation.usable(self._answerable(ruleset))
            untranslated = self.translation.missing(Marks(ruleset.marks), known)
            return [*uncleared, *untranslated, *rules, *([_MOVED] if moved else [])]

    def lost(self, ruleset: RuleSet) -> list[str]:
        """Return which rules and sets others have taken away, in words.

        Raises:
            KernelError: the kernel could not be asked.
        """
        with self._whole:
            return [
                *self.missing(ruleset),
                *ipset.lost(self._kernel, ruleset, len(self.queues), self.answered),
            ]

    def restore(self, ruleset: RuleSet) -> None:
        """Put sets and rules in place again.

        Raises:
            KernelError: something was refused.
        """
        with self._changing():
            self._make_sets(ruleset)
            self.divert(ruleset)

    def rules(self, ruleset: RuleSet) -> dict[str, str]:
        """Return the rules of a policy as text, by "IPv4" and "IPv6"."""
        return _texts(self._plans(ruleset))

    def _plans(self, ruleset: RuleSet) -> dict[int, chains.Plan]:
        if self.no_cookies:
            ruleset = replace(ruleset, challenge=False, syn_budget=None)
        known = self.translation.usable(self.known)
        plans = _plans(ruleset, self.queues, known, self._tracker)
        if self._clears:
            plans = {family: chains.unsaved(plan) for family, plan in plans.items()}
        return {family: self._keeping(family, plan) for family, plan in plans.items()}

    def _answerable(self, ruleset: RuleSet) -> dict[Service, Offer]:
        """Return the services for which a policy may have cookies given out."""
        if not cookies.wanted(ruleset):
            return {}
        return {s: offer for s, offer in self.known.items() if ruleset.scope.protects(*s)}

    def _keeping(self, family: int, plan: chains.Plan) -> chains.Plan:
        """Add a rule with SYNPROXY that no packet comes to, if there was one and would be none.

        With the last one the kernel takes its hook functions away, and with any hook function all
        that waits in a queue (nf_queue_nf_hook_drop in __nf_unregister_net_hook): SYNs would be
        lost because a policy changes.
        """
        if family not in self._proxied or _proxies(plan):
            return plan
        filters = {**plan.chains["filter"], f"{PREFIX}-kept": (_KEPT,)}
        return replace(plan, chains={**plan.chains, "filter": filters})

    def end(self) -> None:
        """Take the chains away for good: whoever wants to change something yet, comes too late.

        What is under way is waited for.  Sets and sysctls are left for `remove`.

        Raises:
            KernelError: iptables refused.
        """
        with self._whole:
            self._ended = True
            self.withdraw()

    def withdraw(self) -> bool:
        """Take the chains away, so that traffic passes as if there were no guard.

        Raises:
            KernelError: iptables refused.
        """
        with self._whole:
            removed = iptables.remove(self._kernel)
            removed = self.translation.remove() or removed
            return clearing.remove(self._kernel) or removed

    def remove(self, keep_bans: bool = False) -> list[str]:
        """Undo everything, whoever left it in this namespace; return what was done, in words.

        Every part is tried even if another fails.

        Raises:
            KernelError: something could not be undone.
        """
        done: list[str] = []
        problems: list[str] = []
        try:
            if self.withdraw():
                done.append("chains and jumps removed")
        except KernelError as error:
            problems.append(str(error))
        try:
            if removed := ipset.destroy(self._kernel, keep_bans):
                done.append(f"sets removed: {', '.join(sorted(removed))}")
        except KernelError as error:
            problems.append(str(error))
        try:
            done += [str(change) for change in sysctl.restore(self._kernel, self._record)]
        except KernelError as error:
            problems.append(str(error))
        if problems:
            raise KernelError("; ".join(problems))
        return done


def rules_text(
    ruleset: RuleSet, queues: range, known: Mapping[Service, Offer] | None = None
) -> dict[str, str]:
    """Return the iptables rules of a policy as iptables-restore reads them, by address family."""
    return _texts(_plans(ruleset, queues, known or {}, tracker.USUAL))


def _proxies(plan: chains.Plan) -> bool:
    """Tell whether a plan has a rule with SYNPROXY."""
    rules = (
        rule for of_table in plan.chains.values() for rules in of_table.values() for rule in rules
    )
    return any(" -j SYNPROXY" in rule for rule in rules)


def _texts(plans: Mapping[int, chains.Plan]) -> dict[str, str]:
    return {f"IPv{family}": _text(plan) for family, plan in plans.items()}


def _text(plan: chains.Plan) -> str:
    lines = []
    for table, of_table in plan.chains.items():
        lines.append(f"*{table}")
        here = (jump for jump in plan.jumps if jump.table == table)
        lines += [f"-A {jump.builtin} {jump.rule}" for jump in here]
        lines += [f"-A {chain} {rule}" for chain, rules in of_table.items() for rule in rules]
    return "\n".join(lines) + "\n"


def _plans(
    ruleset: RuleSet, queues: range, known: Mapping[Service, Offer], how: tracker.Tracker
) -> dict[int, chains.Plan]:
    ours = holding.queues_of(queues)
    queues = queues_for(ruleset, queues)
    plans = {}
    for family in (4, 6):
        plan = chains.plan(ruleset, family, queues, how)
        plan = cookies.with_cookies(plan, ruleset, family, known)
        plans[family] = holding.with_holding(plan, ruleset, family, ours)
    return plans
