"""What `rstguard doctor` says of the network around the guard, and of programs beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from rstguard.kernel import KernelError, admission, bypass, cookies, dnat, oneway
from rstguard.kernel.check import Check, Outcome
from rstguard.kernel.links import Link, complaint
from rstguard.kernel.linux import Linux
from rstguard.kernel.names import PREFIX
from rstguard.kernel.seam import Kernel

_LOG: Final = Path("/proc/net/netfilter/nfnetlink_log")
_COUNTING: Final = "refusing connections beyond a limit as they begin"
_GROUPS: Final = {
    cookies.LOG_GROUP: "learning what servers offer, so that nobody gets a cookie",
    dnat.LOG_GROUP: "learning where forwarded ports lead",
    admission.TOLD_GROUP: _COUNTING,
    admission.REFUSED_GROUP: _COUNTING,
}
"""NFLOG groups that the guard reads, and what for."""
_PROTECTED: Final = re.compile(rf"-A {PREFIX}-raw -i (\S+) -j {PREFIX}-blocked")
_STATUS: Final = "rstguard status"


def checks(kernel: Kernel | None = None) -> list[Check]:
    """Return the state of interfaces, services, other programs' rules, and the log groups."""
    kernel = kernel or Linux()
    try:
        links = kernel.links()
    except KernelError as error:
        return [Check("interfaces", Outcome.WARNING, f"they could not be asked for: {error}")]
    found = [_interfaces(kernel, links), _taken_out(kernel, links), _one_sided(kernel)]
    return [*found, *_zones(kernel), _log_groups()]


def _interfaces(kernel: Kernel, links: list[Link]) -> Check:
    """A guard that runs protects some; else it is said which ones a policy cannot name."""
    bad = {link.name: said for link in links if link.name != "lo" and (said := complaint(link))}
    try:
        protected = _PROTECTED.findall(kernel.run(["iptables-save", "-t", "raw"]))
    except KernelError:
        protected = []
    concerned = [said for name, said in bad.items() if name in protected]
    if concerned:
        return Check("interfaces", Outcome.WARNING, "; ".join(concerned), _STATUS)
    good = ", ".join(link.name for link in links if link.name not in bad)
    no_use = f"; no use to protect: {'; '.join(bad.values())}" if bad else ""
    return Check("interfaces", Outcome.OK, f"{good}{no_use}")


def _taken_out(kernel: Kernel, links: list[Link]) -> Check:
    found = bypass.suspects(kernel, links)
    if not found:
        sentence = "nothing was found that takes packets out before the guard's rules"
        return Check("other rules", Outcome.OK, sentence)
    sentence = f"what these match is not guarded, or not by its connections: {'; '.join(found)}"
    return Check("other rules", Outcome.WARNING, sentence, "narrow them if it should be guarded")


def _zones(kernel: Kernel) -> list[Check]:
    """A source is an address: sets match no zone."""
    found = bypass.zoning(kernel)
    if not found:
        return []
    sentence = (
        "connections in zones of the tracker are told apart, but one address in two zones is one "
        f"source, with its limits and bans in common: {'; '.join(found)}"
    )
    return [Check("zones", Outcome.WARNING, sentence, "trust addresses that customers share")]


def _one_sided(kernel: Kernel) -> Check:
    try:
        found = oneway.services(kernel)
    except KernelError as error:
        return Check("answers", Outcome.WARNING, f"not known: {error}", "sudo rstguard doctor")
    if not found:
        return Check("answers", Outcome.OK, "no service is known to answer by another way")
    shown = ", ".join(map(str, found[:3]))
    return Check(
        "answers",
        Outcome.WARNING,
        f"only one side is seen of {shown}: its answers take another way",
        "lead them through this machine, or name under protect: what does answer here",
    )


def _log_groups() -> Check:
    """Columns: group, port id of its reader, … (seq_show in nfnetlink_log.c)."""
    name = f"log groups {min(_GROUPS)} to {max(_GROUPS)}"
    try:
        lines = [line.split() for line in _LOG.read_text().splitlines()]
    except OSError:
        lines = []
    there = {fields[0] for fields in lines if fields}
    read = [group for group in _GROUPS if str(group) in there]
    if not read:
        return Check(name, Outcome.OK, f"nobody reads {name}")
    which = ", ".join(map(str, read))
    lost = " and ".join(dict.fromkeys(_GROUPS[group] for group in read))
    sentence = f"read already, by a guard or by a program that keeps one from {lost}: {which}"
    return Check(name, Outcome.WARNING, sentence, _STATUS)
