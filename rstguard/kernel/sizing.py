"""How large the connection tracker's table is to be, by memory; made so, and undone.

A full table drops whoever's new connections, and Linux sizes it for a host, not for a gateway that
is under attack.  An entry takes about half a KiB, and the guard's sweeper up to 1.4 KiB while it
reads it.  So a table gets an entry for each 16 KiB of memory, as many buckets as entries, and is
never made smaller.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from rstguard.kernel import KernelError, owned, sysctl
from rstguard.kernel.seam import Kernel

MOST: Final = "net.netfilter.nf_conntrack_max"
BUCKETS: Final = "net.netfilter.nf_conntrack_buckets"
RECORD: Final = "tracker.json"
"""A file of the state directory that says what the values were."""

_BYTES_FOR_ONE: Final = 16 << 10
_LEAST, _LARGEST = 1 << 16, 1 << 21
_DIGITS: Final = 10


class Sizes(NamedTuple):
    """Entries that the table may hold, and its buckets."""

    most: int
    buckets: int

    @property
    def settings(self) -> dict[str, str]:
        """The sysctls; buckets last, as the kernel sets no other value by them."""
        return {MOST: str(self.most), BUCKETS: str(self.buckets)}


def sizes_for(memory: int, now: Sizes) -> Sizes:
    """Return what a table should be with so many bytes of memory; `now` is what it is.  Pure.

    Powers of two, as the kernel rounds buckets up to whole pages.
    """
    fitting = max(_LEAST, min(_LARGEST, 1 << (memory // _BYTES_FOR_ONE or 1).bit_length() - 1))
    most = max(fitting, now.most)
    return Sizes(most, now.buckets if now.buckets >= most // 2 else fitting)


def memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def present(kernel: Kernel) -> Sizes:
    """Return how large the table is.

    Raises:
        KernelError: the tracker is not there, or may not be asked.
    """
    return Sizes(int(kernel.read_sysctl(MOST)), int(kernel.read_sysctl(BUCKETS)))


def enlarge(kernel: Kernel, wanted: Sizes, record: Path) -> None:
    """Give the table these sizes, having noted what they were; what is noted already stays.

    Raises:
        KernelError: a value was not taken, as in a container or a namespace of its own; all is as
            it was.
    """
    before = present(kernel)
    noted = _noted(record) or {"before": before.settings}
    _write(record, json.dumps({**noted, "ours": wanted.settings}, indent=2) + "\n")
    try:
        for name, value in wanted.settings.items():
            sysctl.write(kernel, name, value)
    except KernelError:
        for name, value in before.settings.items():
            if kernel.read_sysctl(name) != value:
                sysctl.write(kernel, name, value)
        if "ours" not in noted:
            record.unlink(missing_ok=True)
        raise


def give_back(kernel: Kernel, record: Path) -> list[str]:
    """Give the noted values back and forget them; say of each what was done.

    A value that somebody else has changed meanwhile is left.

    Raises:
        KernelError: the note is not root's or damaged, or a value was not taken; the note stays.
    """
    noted = _noted(record)
    if noted is None:
        return []
    done = []
    for name, before in noted["before"].items():
        now = kernel.read_sysctl(name)
        if now == before:
            continue
        if now != noted.get("ours", {}).get(name):
            done.append(f"{name} = {now}: left, as somebody else has changed it")
            continue
        sysctl.write(kernel, name, before)
        done.append(f"{name}: {before} again (was {now})")
    record.unlink(missing_ok=True)
    return done


def _noted(record: Path) -> dict[str, Mapping[str, str]] | None:
    text = owned.read(record)
    if text is None:
        return None
    try:
        noted = json.loads(text)
        for values in noted.values():
            right = values.keys() <= {MOST, BUCKETS} and all(map(_is_number, values.values()))
            if not right:
                raise ValueError(text)
        return {"before": {}, **noted}
    except (ValueError, AttributeError, TypeError):
        raise KernelError(
            f"{record}, which says how large the connection table was, is damaged: set the values "
            "by hand, and remove it"
        ) from None


def _is_number(value: str) -> bool:
    return value.isascii() and value.isdecimal() and len(value) <= _DIGITS


def _write(record: Path, text: str) -> None:
    try:
        record.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        owned.write(record, text)
    except OSError as problem:
        raise KernelError(
            f"{record} cannot be written ({problem.strerror}), so nothing of it is changed"
        ) from None
