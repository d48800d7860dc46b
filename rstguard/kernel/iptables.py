"""Put the planned chains into the kernel, see that they are there, and take them out again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rstguard.kernel import KernelError
from rstguard.kernel.chains import Plan
from rstguard.kernel.command import run
from rstguard.kernel.counting import PREFIX

_COMMANDS = {4: "iptables", 6: "ip6tables"}
_WAIT_SECONDS = "10"  # another tool may hold the xtables lock


@dataclass(frozen=True, slots=True)
class Present:
    """What of ours is in the kernel: rules of built-in chains that name us, and our chains."""

    jumps: tuple[tuple[str, str, str], ...]
    """Table, built-in chain, rule without the ``-A CHAIN``."""
    chains: dict[tuple[str, str], tuple[str, ...]]
    """(table, chain) -> rules."""


def read(family: int) -> Present:
    """Return what of ours one address family holds."""
    jumps: list[tuple[str, str, str]] = []
    chains: dict[tuple[str, str], list[str]] = {}
    table = ""
    for line in run([f"{_COMMANDS[family]}-save"]).splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(f":{PREFIX}-"):
            chains[table, line[1:].split()[0]] = []
        elif line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            if (table, chain) in chains:
                chains[table, chain].append(rule)
            elif f" {PREFIX}-" in rule and rule.split()[-1].startswith(f"{PREFIX}-"):
                jumps.append((table, chain, rule))
    return Present(tuple(jumps), {place: tuple(rules) for place, rules in chains.items()})


def _read_all(families: Iterable[int]) -> dict[int, Present]:
    """Read several families at once: under load it is waiting for a processor that takes long."""
    families = list(families)
    with ThreadPoolExecutor() as pool:
        return dict(zip(families, pool.map(read, families), strict=True))


def apply(plans: dict[int, Plan]) -> None:
    """Bring the plans (family -> plan) about and verify them; what is there already stays.

    A table that is as planned is not touched: to replace one takes the kernel some 15 ms.

    Raises:
        KernelError: iptables refused, or something is missing afterwards.
    """
    present = _read_all(plans)
    texts = {family: _transition(present[family], plan) for family, plan in plans.items()}
    for family, text in texts.items():
        if not text:
            continue
        try:
            run([f"{_COMMANDS[family]}-restore", "--noflush", "-w", _WAIT_SECONDS], text)
        except KernelError as error:
            raise KernelError(f"{error}; `rstguard doctor` says what this machine lacks") from error
    lacking = missing(plans) if any(texts.values()) else []
    if lacking:
        raise KernelError(
            f"iptables accepted the rules but {lacking[0]} is not there; another tool may be "
            "rewriting the firewall: stop it or try again"
        )


def missing(plans: dict[int, Plan]) -> list[str]:
    """Return what of the plans is not in the kernel, in words; empty if all is well."""
    lacking = []
    for family, present in _read_all(plans).items():
        plan = plans[family]
        for jump in plan.jumps:
            wanted = (jump.table, jump.builtin)
            if not any(h[:2] == wanted and _same(h[2], jump.rule) for h in present.jumps):
                lacking.append(f"the jump from {jump.table} {jump.builtin} (IPv{family})")
        for table, chains in plan.chains.items():
            for chain, rules in chains.items():
                if len(present.chains.get((table, chain), ())) != len(rules):
                    lacking.append(f"the chain {chain} in {table} (IPv{family})")
    return lacking


def remove() -> bool:
    """Take away every chain of ours and every jump to one; True if there was anything.

    Raises:
        KernelError: iptables refused.
    """
    found = False
    for family, present in _read_all(_COMMANDS).items():
        command = _COMMANDS[family]
        if present.jumps or present.chains:
            found = True
            text = _transition(present, Plan({}))
            run([f"{command}-restore", "--noflush", "-w", _WAIT_SECONDS], text)
    return found


def _same(left: str, right: str) -> bool:
    return shlex.split(left) == shlex.split(right)


def _transition(present: Present, plan: Plan) -> str:
    """Return the restore text from what is there to the plan: one transaction per table.

    Only the tables that differ from the plan are in it.
    """
    wanted = [(jump.table, jump.builtin, jump.rule) for jump in plan.jumps]
    kept: set[tuple[str, str, str]] = set()
    stale = []
    for held in present.jumps:
        match = next((w for w in wanted if w[:2] == held[:2] and _same(w[2], held[2])), None)
        if match is None or match in kept:
            stale.append(held)
        else:
            kept.add(match)
    tables = dict.fromkeys([*plan.chains, *(place[0] for place in present.chains)])
    tables.update(dict.fromkeys(table for table, _, _ in stale))
    return "".join(_table_text(table, present, plan, kept, stale) for table in tables)


def _table_text(
    table: str,
    present: Present,
    plan: Plan,
    kept: set[tuple[str, str, str]],
    stale: Iterable[tuple[str, str, str]],
) -> str:
    chains = plan.chains.get(table, {})
    held = {chain: rules for (where, chain), rules in present.chains.items() if where == table}
    jumps = [j for j in plan.jumps if j.table == table and (table, j.builtin, j.rule) not in kept]
    stale = [jump for jump in stale if jump[0] == table]
    if held == chains and not jumps and not stale:
        return ""
    gone = [chain for chain in held if chain not in chains]
    lines = [f"*{table}"]
    lines += [f":{chain} - [0:0]" for chain in (*chains, *gone)]
    lines += [f"-D {builtin} {rule}" for _, builtin, rule in stale]
    lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    for jump in jumps:
        place = f"-A {jump.builtin}" if jump.last else f"-I {jump.builtin} 1"
        lines.append(f"{place} {jump.rule}")
    lines += [f"-X {chain}" for chain in gone]
    return "\n".join([*lines, "COMMIT", ""])
