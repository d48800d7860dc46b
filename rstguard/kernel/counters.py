"""Reads how often rules were hit, as ``iptables-save -c`` prints it.  Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

_LINE: Final = re.compile(r"\[(\d+):(\d+)\] -A (\S+) (.*)")


class Hit(NamedTuple):
    """A rule of a chain, and what has come to it."""

    packets: int
    bytes: int
    chain: str
    rule: str


def hits(printed: str) -> Iterator[Hit]:
    """Read lines as ``[12:720] -A rstguard-foreign -j MARK --set-xmark 0x0/0xff000000``."""
    for line in printed.splitlines():
        if match := _LINE.fullmatch(line):
            yield Hit(int(match[1]), int(match[2]), match[3], match[4])
