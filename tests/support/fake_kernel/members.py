"""One set of the kernel: its type and options, and the elements that it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from rstguard.engine.address import Prefix, address_text, is_v6, parse_address

_VALUED = ("family", "hashsize", "maxelem", "netmask", "timeout", "range")
_BITS: Final = {"inet": 32, "inet6": 128}

Key = Prefix | tuple[int, int] | int
"""hash:net and hash:ip: a prefix; hash:ip,port: address and port; bitmap:port: a port."""


class Refused(Exception):
    """What ipset complains of."""


@dataclass(slots=True)
class Member:
    """What is kept beside an element: when it ends (ns of the clock), None for never."""

    until: int | None = None
    comment: str = ""
    packets: int = 0
    """What a set with counters has counted for it."""


@dataclass(slots=True)
class KernelSet:
    """One set."""

    type: str
    options: dict[str, str]
    members: dict[Key, Member] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[str, str]:
        """What must be equal for two sets to be swapped."""
        return self.type, self.options.get("family", "")

    @property
    def header(self) -> str:
        """Type and options as ``ipset save`` prints them; forceadd it does not print."""
        words = [f"{name} {self.options[name]}" for name in _VALUED if name in self.options]
        words += [word for word in ("counters", "comment") if word in self.options]
        words += ["bucketsize 12 initval 0x00000000"] if self.type != "bitmap:port" else []
        return " ".join(words)

    @property
    def is_full(self) -> bool:
        """Whether no element can be added."""
        return len(self.members) >= int(self.options.get("maxelem", "65536"))

    def key(self, text: str) -> Key:
        """Return the element that a text means.

        Raises:
            Refused: none of this set.
        """
        address, _, port = text.partition(",")
        network, _, length = address.partition("/")
        try:
            if self.type == "bitmap:port":
                return int(text)
            value = int(network) if network.isdigit() else parse_address(network)
        except ValueError:
            raise Refused(f"Syntax error: cannot parse {text}") from None
        family = self.options["family"]
        if is_v6(value) is not (family == "inet6"):
            raise Refused(f"Syntax error: cannot parse {text}: resolving to {family} failed")
        if self.type == "hash:ip,port":
            return value, int(port.removeprefix("tcp:"))
        bits = _BITS[family]
        width = int(length or self.options.get("netmask", str(bits)))
        if width == 0:
            raise Refused("The value of the CIDR parameter of the IP address is invalid")
        return Prefix(value >> bits - width << bits - width, width)

    def keys(self, text: str) -> list[Key]:
        """Return the elements that a text means, which may be a range of ports.

        Raises:
            Refused: none of this set.
        """
        first, _, last = text.partition("-")
        start, end = self.key(first), self.key(last or first)
        if isinstance(start, int) and isinstance(end, int):
            return list(range(start, end + 1))
        return [start]

    def covers(self, address: int) -> bool:
        """Tell whether an address is an element, or lies in one."""
        return any(isinstance(key, Prefix) and key.covers(address) for key in self.members)


def key_text(key: Key) -> str:
    """Return an element as ``ipset save`` prints it."""
    if isinstance(key, Prefix):
        return str(key)
    if isinstance(key, tuple):
        return f"{address_text(key[0])},tcp:{key[1]}"
    return str(key)
