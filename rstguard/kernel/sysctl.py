"""Change sysctls of this network namespace, and give the old values back, also after a crash.

Before the first change the old values go into a record, a JSON file in the runtime directory.
Whoever finds that record later, the daemon that ends or `rstguard cleanup` after a kill -9, can
undo what was done.  A value that somebody else has changed in the meantime is left as it is.  The
record is believed only if it is root's alone, and only of settings that the guard changes.

Accounting and time stamps count for connections that begin after they are switched on: older ones
show no bytes and no age (net/netfilter/nf_conntrack_acct.c, nf_conntrack_timestamp.c).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rstguard.kernel import KernelError, NotThere, owned
from rstguard.kernel.seam import Kernel

TRACKING: Mapping[str, str] = MappingProxyType(
    {
        "net.netfilter.nf_conntrack_acct": "1",
        "net.netfilter.nf_conntrack_timestamp": "1",
    }
)
"""What the guard needs of the connection tracker at any time: bytes and ages."""

FORMER: frozenset[str] = frozenset(
    {"net.netfilter.nf_conntrack_tcp_be_liberal", "net.netfilter.nf_conntrack_tcp_loose"}
)
"""What earlier versions changed: they decide for all traffic of the host, whose connections would
not outlive a flush of the table.  From a record that such a version left they are given back."""

CHANGED: frozenset[str] = frozenset(TRACKING) | FORMER
"""All that a guard ever changed; a record that names another is not of its making."""

_VALUE = re.compile("[0-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-5]")
"""These settings are bytes in the kernel (nf_conntrack_standalone.c)."""


class Outcome(Enum):
    """What became of one value."""

    SET = "set"
    RESTORED = "restored"
    UNCHANGED = "unchanged"
    LEFT = "left: somebody else changed it meanwhile"
    GONE = "gone: the kernel no longer has it"


class Change(NamedTuple):
    """One sysctl, the value it had, the value it has now, and what was done."""

    name: str
    before: str
    now: str
    outcome: Outcome

    def __str__(self) -> str:
        """Return a sentence for a report."""
        if self.outcome in (Outcome.SET, Outcome.RESTORED):
            return f"{self.name}: {self.outcome.value} to {self.now} (was {self.before})"
        return f"{self.name} = {self.now}: {self.outcome.value}"


class _Saved(NamedTuple):
    before: str
    ours: str


def apply(kernel: Kernel, wanted: Mapping[str, str], record: Path) -> list[Change]:
    """Set sysctls to the wanted values, having recorded what they were.

    May be called again, with other values too, and after a crash: a value that is still what an
    earlier call made it is never taken for an old one.  What is `FORMER` is given back.

    Raises:
        KernelError: a sysctl does not exist or may not be written, or the record cannot be kept.
            Nothing has been changed then that the record does not tell.
    """
    saved = _load(record)
    for name in FORMER & saved.keys():
        _give_back(kernel, name, saved.pop(name))
    found = {name: kernel.read_sysctl(name) for name in wanted}
    for name, value in wanted.items():
        earlier = saved.pop(name, None)
        ours = earlier is not None and found[name] == earlier.ours
        before = earlier.before if earlier is not None and ours else found[name]
        if before != value:
            saved[name] = _Saved(before, value)
    _save(saved, record)
    changes = []
    for name, value in wanted.items():
        outcome = Outcome.UNCHANGED
        if found[name] != value:
            write(kernel, name, value)
            outcome = Outcome.SET
        changes.append(Change(name, found[name], value, outcome))
    return changes


def altered(kernel: Kernel, wanted: Mapping[str, str]) -> list[Change]:
    """Return the sysctls that have not the wanted value now; `now` is what they should have.

    Raises:
        KernelError: one of them cannot be read.
    """
    found = ((name, kernel.read_sysctl(name), value) for name, value in wanted.items())
    return [Change(name, now, value, Outcome.LEFT) for name, now, value in found if now != value]


def restore(kernel: Kernel, record: Path) -> list[Change]:
    """Give the recorded values back and remove the record; without a record, do nothing.

    Raises:
        KernelError: the record cannot be read, or a value cannot be written; the record stays.
    """
    changes = [_give_back(kernel, name, saved) for name, saved in _load(record).items()]
    record.unlink(missing_ok=True)
    return changes


def _give_back(kernel: Kernel, name: str, saved: _Saved) -> Change:
    try:
        now = kernel.read_sysctl(name)
    except NotThere:
        return Change(name, saved.ours, saved.before, Outcome.GONE)
    if now == saved.ours:
        write(kernel, name, saved.before)
        return Change(name, now, saved.before, Outcome.RESTORED)
    outcome = Outcome.UNCHANGED if now == saved.before else Outcome.LEFT
    return Change(name, saved.before, now, outcome)


def write(kernel: Kernel, name: str, value: str) -> None:
    """Give a sysctl a value, and see that it took it.

    Raises:
        KernelError: it did not.
    """
    kernel.write_sysctl(name, value)
    if kernel.read_sysctl(name) != value:
        raise KernelError(f"the sysctl {name} did not take the value {value}: set it by hand")


def _load(record: Path) -> dict[str, _Saved]:
    text = owned.read(record)
    if text is None:
        return {}
    try:
        entries = json.loads(text)["sysctls"]
        saved = {str(name): _Saved(str(e["before"]), str(e["ours"])) for name, e in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise _not_ours(record, "is damaged") from problem
    for name, values in saved.items():
        if name not in CHANGED:
            raise _not_ours(record, f"names {name[:100]!r}, which rstguard does not change")
        if not all(map(_VALUE.fullmatch, values)):
            raise _not_ours(record, f"has a value of {name} that is no number from 0 to 255")
    return saved


def _not_ours(record: Path, why: str) -> KernelError:
    return KernelError(
        f"the record of old sysctl values {record} {why}: look at it, set the values by hand, "
        "and remove it"
    )


def _save(saved: Mapping[str, _Saved], record: Path) -> None:
    document = {"version": 1, "sysctls": {name: s._asdict() for name, s in saved.items()}}
    try:
        owned.write(record, json.dumps(document, indent=2) + "\n")
    except OSError as problem:
        raise KernelError(
            f"the record of old sysctl values {record} cannot be written ({problem.strerror}): "
            "choose another --runtime-dir"
        ) from problem
