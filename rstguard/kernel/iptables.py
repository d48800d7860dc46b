"""Put the planned chains into the kernel, see that they are there, and take them out again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from rstguard.kernel import KernelError, Undone
from rstguard.kernel.chains import Plan
from rstguard.kernel.jumps import Jump
from rstguard.kernel.names import PREFIX
from rstguard.kernel.seam import Kernel

_COMMANDS = {4: "iptables", 6: "ip6tables"}
_WAIT_SECONDS = "10"  # another tool may hold the xtables lock
_REMOVALS = 3

_GO_ON = ("LOG", "NFLOG", "MARK", "CONNMARK")
"""Targets after which a packet goes on to the next rule."""


class Held(NamedTuple):
    """A jump to a chain of ours, and what of others is around it in its built-in chain."""

    table: str
    builtin: str
    rule: str
    """Without the ``-A CHAIN``."""
    ending_before: int
    """Rules before it that may end a packet's way, so that it never comes here."""
    after: int

    def answers_for(self, jump: Jump) -> bool:
        """Tell whether it is the jump that a plan wants, be it at its place or not."""
        same = (self.table, self.builtin) == (jump.table, jump.builtin)
        if not same or self.rule == jump.rule:
            return same
        return shlex.split(self.rule) == shlex.split(jump.rule)

    def at_its_place(self, jump: Jump) -> bool:
        """Tell whether no rule of others keeps packets from it, or is itself passed over."""
        return not (self.after if jump.last else self.ending_before)


@dataclass(frozen=True, slots=True)
class Present:
    """What of ours is in the kernel: rules of built-in chains that name us, and our chains."""

    jumps: tuple[Held, ...]
    chains: dict[tuple[str, str], tuple[str, ...]]
    """(table, chain) -> rules."""


def read(kernel: Kernel, family: int) -> Present:
    """Return what of ours one address family holds."""
    return _read_all(kernel, (family,))[family]


def _read_all(kernel: Kernel, families: Iterable[int]) -> dict[int, Present]:
    """Read several families at once: under load it is waiting for a processor that takes long."""
    families = list(families)
    printed = kernel.run_each([[f"{_COMMANDS[family]}-save"] for family in families])
    return dict(zip(families, map(_present, printed), strict=True))


def _present(printed: str) -> Present:
    """Return what of ours is in the text that iptables-save has printed."""
    jumps: list[Held] = []
    chains: dict[tuple[str, str], list[str]] = {}
    others: dict[tuple[str, str], list[str]] = {}
    table = ""
    for line in printed.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(f":{PREFIX}-"):
            chains[table, line[1:].split()[0]] = []
        elif line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            place = (table, chain)
            if place in chains:
                chains[place].append(rule)
            elif f" {PREFIX}-" in rule and rule.split()[-1].startswith(f"{PREFIX}-"):
                before = others.get(place, [])
                jumps.append(Held(*place, rule, sum(map(_may_end, before)), -len(before)))
            else:
                others.setdefault(place, []).append(rule)
    counted = (held._replace(after=held.after + len(others.get(held[:2], ()))) for held in jumps)
    return Present(tuple(counted), {place: tuple(rules) for place, rules in chains.items()})


def _may_end(rule: str) -> bool:
    """Tell whether a packet may not come to the rule after this one."""
    words = rule.split()
    target = next((words[at + 1] for at, word in enumerate(words) if word in ("-j", "-g")), "")
    return target not in ("", *_GO_ON)


def apply(kernel: Kernel, plans: dict[int, Plan]) -> dict[int, Present]:
    """Bring the plans (family -> plan) about and verify them; what is there already stays.

    A table that is as planned is not touched: to replace one takes the kernel some 15 ms.
    Returns what then is in the kernel: it may write a rule in another way than we do.

    Raises:
        KernelError: iptables refused, or something is missing afterwards.
    """
    present = _read_all(kernel, plans)
    texts = {family: _transition(present[family], plan) for family, plan in plans.items()}
    for family, text in texts.items():
        if not text:
            continue
        try:
            _restore(kernel, family, text)
        except KernelError as error:
            said = f"{error}; `rstguard doctor` says what this machine lacks"
            raise type(error)(said) from error
    if not any(texts.values()):
        return present
    present = _read_all(kernel, plans)
    lacking = _lacking(plans, present, {})
    if lacking:
        raise Undone(
            f"iptables accepted the rules but {lacking[0]} is not there; another tool may be "
            "rewriting the firewall: stop it or try again"
        )
    return present


def missing(
    kernel: Kernel, plans: dict[int, Plan], placed: dict[int, Present] | None = None
) -> list[str]:
    """Return what of the plans is not in the kernel, in words; empty if all is well.

    With what `apply` has returned for them, rules that were changed since are found, too.
    """
    return _lacking(plans, _read_all(kernel, plans), placed or {})


def _lacking(
    plans: dict[int, Plan], found: dict[int, Present], placed: dict[int, Present]
) -> list[str]:
    lacking = []
    for family, present in found.items():
        plan = plans[family]
        before = placed[family].chains if family in placed else {}
        for jump in plan.jumps:
            held = [held for held in present.jumps if held.answers_for(jump)]
            where = f"{jump.table} {jump.builtin} (IPv{family})"
            if not held:
                lacking.append(f"the jump from {where}")
            elif not held[0].at_its_place(jump):
                place = "last" if jump.last else "first"
                lacking.append(f"the place of the jump from {where}, which is to come {place}")
        for table, chains in plan.chains.items():
            for chain, rules in chains.items():
                says = present.chains.get((table, chain), ())
                if len(says) != len(rules):
                    lacking.append(f"the chain {chain} in {table} (IPv{family})")
                elif says not in (rules, before.get((table, chain), says)):
                    lacking.append(f"what the chain {chain} in {table} says (IPv{family})")
    return list(dict.fromkeys(lacking))


def remove(kernel: Kernel) -> bool:
    """Take away every chain of ours and every jump to one; True if there was anything.

    A guard and `rstguard panic` may do so at once: what was refused, because the other one was
    faster, is tried anew with what is there then.

    Raises:
        KernelError: iptables refused.
    """
    found = False
    for tries_left in reversed(range(_REMOVALS)):
        try:
            for family, present in _read_all(kernel, _COMMANDS).items():
                if present.jumps or present.chains:
                    found = True
                    _restore(kernel, family, _transition(present, Plan({})))
            break
        except KernelError:
            if not tries_left:
                raise
    return found


def _restore(kernel: Kernel, family: int, text: str) -> None:
    kernel.run([f"{_COMMANDS[family]}-restore", "--noflush", "-w", _WAIT_SECONDS], text)


def _transition(present: Present, plan: Plan) -> str:
    """Return the restore text from what is there to the plan: one transaction per table.

    Only the tables that differ from the plan are in it.
    """
    kept: set[Jump] = set()
    stale = []
    for held in present.jumps:
        jump = next((jump for jump in plan.jumps if held.answers_for(jump)), None)
        if jump is None or jump in kept or not held.at_its_place(jump):
            stale.append(held)
        else:
            kept.add(jump)
    tables = dict.fromkeys([*plan.chains, *(place[0] for place in present.chains)])
    tables.update(dict.fromkeys(held.table for held in stale))
    return "".join(_table_text(table, present, plan, kept, stale) for table in tables)


def _table_text(
    table: str,
    present: Present,
    plan: Plan,
    kept: set[Jump],
    stale: Iterable[Held],
) -> str:
    chains = plan.chains.get(table, {})
    held = {chain: rules for (where, chain), rules in present.chains.items() if where == table}
    jumps = [jump for jump in plan.jumps if jump.table == table and jump not in kept]
    stale = [jump for jump in stale if jump.table == table]
    if held == chains and not jumps and not stale:
        return ""
    gone = [chain for chain in held if chain not in chains]
    lines = [f"*{table}"]
    lines += [f":{chain} - [0:0]" for chain in (*chains, *gone)]
    lines += [f"-D {jump.builtin} {jump.rule}" for jump in stale]
    lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    for jump in jumps:
        place = f"-A {jump.builtin}" if jump.last else f"-I {jump.builtin} 1"
        lines.append(f"{place} {jump.rule}")
    lines += [f"-X {chain}" for chain in gone]
    return "\n".join([*lines, "COMMIT", ""])
