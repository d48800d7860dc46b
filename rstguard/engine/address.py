"""Addresses and prefixes as plain integers, so that one code path serves IPv4 and IPv6.

An IPv4 address is its 32-bit value.  An IPv6 address is its 128-bit value plus the tag bit
``V6`` (2**128).  The tag survives a right shift, so a key made by ``address >> shift`` of at least
`LEAST_IPV6` bits of an IPv6 address, as every policy's, can never be that of an IPv4 source,
whatever an attacker puts into the header.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

V6 = 1 << 128
LEAST_IPV6 = 32
"""Bits of an IPv6 address that a key holds at least: with fewer, the tag would come to stand where
IPv4 keys have a bit."""


def is_v6(address: int) -> bool:
    """Tell whether a tagged address is IPv6."""
    return address >= V6


def parse_address(text: str) -> int:
    """Return the tagged integer of an address.

    Raises:
        ValueError: `text` is no IPv4 or IPv6 address.
    """
    address = ipaddress.ip_address(text)
    return int(address) if address.version == 4 else int(address) | V6


def address_text(address: int) -> str:
    """Return the usual text form of a tagged address."""
    if address >= V6:
        return str(ipaddress.IPv6Address(address ^ V6))
    return str(ipaddress.IPv4Address(address))


def packed(address: int) -> bytes:
    """Return the address as it stands in a header: 4 or 16 bytes, network order."""
    return (address ^ V6).to_bytes(16, "big") if address >= V6 else address.to_bytes(4, "big")


def source_key(address: int, ipv4_length: int, ipv6_length: int) -> int:
    """Return the key that a source is counted by, when so many bits of its address make a source.

    The rule: the host bits are cut off, 32 less the length of an IPv4 address and 128 less that of
    an IPv6 address.  As the tag bit stays, no two families share a key; `ipv6_length` must be
    `LEAST_IPV6` or more.
    Three places spell it themselves, for what a call costs with every SYN:
    `rstguard.engine.rules`, `rstguard.engine.newcomers`, and `Engine.at` under load.
    """
    return address >> (128 - ipv6_length if address >= V6 else 32 - ipv4_length)


def source_of_key(key: int, ipv4_length: int, ipv6_length: int) -> Prefix:
    """Return the network that is counted by a key of `source_key`, of the same lengths."""
    v4 = key >> ipv4_length == 0
    length = ipv4_length if v4 else ipv6_length
    return Prefix(key << (32 if v4 else 128) - length, length)


class Prefix(NamedTuple):
    """A network: tagged address with the host bits zero, and its length (0-32 or 0-128)."""

    network: int
    length: int

    @property
    def shift(self) -> int:
        """How many host bits the prefix leaves open."""
        return (128 if self.network >= V6 else 32) - self.length

    def covers(self, address: int) -> bool:
        """Tell whether a tagged address lies in the prefix (never across families)."""
        return address >> self.shift == self.network >> self.shift

    def __str__(self) -> str:
        """Return ``192.0.2.1`` for a whole address, ``192.0.2.0/24`` for a wider network."""
        text = address_text(self.network)
        return text if self.shift == 0 else f"{text}/{self.length}"


class Networks:
    """Many prefixes, of which one that meets another is found without a look at each."""

    def __init__(self, prefixes: Iterable[Prefix]) -> None:
        """Take the prefixes; equal ones count once."""
        self._prefixes = tuple(dict.fromkeys(prefixes))
        self._by_length: dict[int, dict[int, Prefix]] = {}
        """Length -> network -> the prefix itself."""
        for prefix in self._prefixes:
            self._by_length.setdefault(prefix.length, {})[prefix.network] = prefix
        self._inside: dict[int, dict[int, Prefix]] = {}
        """Length -> network of that length -> a longer prefix that lies in it."""

    def meets(self, prefix: Prefix) -> Prefix | None:
        """Return one that covers a prefix or lies in it, or None."""
        for length, networks in self._by_length.items():
            if length <= prefix.length:
                shift = prefix.shift + prefix.length - length
                if found := networks.get(prefix.network >> shift << shift):
                    return found
        inside = self._inside.get(prefix.length)
        if inside is None:
            inside = self._inside[prefix.length] = {
                prefix_of(one.network, prefix.length, prefix.length).network: one
                for one in self._prefixes
                if one.length > prefix.length
            }
        return inside.get(prefix.network)


def parse_prefix(text: str) -> Prefix:
    """Return the prefix of ``address`` or ``address/length``.

    Raises:
        ValueError: no address, a length out of range, or host bits set beyond the length.
    """
    network = ipaddress.ip_network(text)
    value = int(network.network_address)
    return Prefix(value if network.version == 4 else value | V6, network.prefixlen)


def prefix_of(address: int, ipv4_length: int, ipv6_length: int) -> Prefix:
    """Return the prefix of the given width that an address lies in."""
    v6 = address >= V6
    length = ipv6_length if v6 else ipv4_length
    shift = (128 if v6 else 32) - length
    return Prefix(address >> shift << shift, length)
