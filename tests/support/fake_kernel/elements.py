"""The netlink way to the elements of sets: `rstguard.kernel.seam.ElementSets` that remembers."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Self

from rstguard.engine.address import Prefix, address_text, is_v6
from rstguard.kernel.elements import MAX_SECONDS, Element
from rstguard.kernel.names import BAN_SETS, BLOCK_SETS, GATE_SETS
from rstguard.kernel.seam import Counted
from rstguard.kernel.sets import refusal
from tests.support.fake_kernel.ipsets import IpSets
from tests.support.fake_kernel.members import KernelSet, Member, Refused

# linux/netfilter/ipset/ip_set.h
_PROTOCOL, _INVALID_CIDR, _TIMEOUT, _COMMENT = 4097, 4104, 4107, 4112
_IPV4, _IPV6, _FULL = 4109, 4110, 4352

Around = Callable[[str, str], AbstractContextManager[None]]
"""Meets the faults of an operation (name, subject)."""


class FakeSets:
    """Adds, removes and looks up elements."""

    def __init__(self, sets: IpSets, around: Around) -> None:
        self._sets = sets
        self._around = around

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held."""

    def add(self, elements: Iterable[Element], shorten: bool = False) -> None:
        """Put elements into their sets; those that last longer stay, unless `shorten`."""
        wanted: dict[str, dict[Prefix, Element]] = {}
        for element in elements:
            of_set = wanted.setdefault(element.set_name, {})
            other = of_set.get(element.source)
            if other is None or element.lasts > other.lasts:
                of_set[element.source] = element
        with self._around("sets.add", " ".join(wanted)):
            for name, of_set in wanted.items():
                for element in of_set.values():
                    _check(element)
                for element in of_set.values():
                    self._add(name, element, shorten)

    def _add(self, name: str, element: Element, shorten: bool) -> None:
        held = self._held(name, element.source)
        if "comment" not in held.options:
            raise refusal(name, _COMMENT)
        member = held.members.get(element.source)
        if member is not None and not shorten:
            left = self._sets.left(member) or float("inf")
            if element.lasts <= left:
                return
        self._place(name, held, element.source, element.remaining or 0, element.comment)

    def remove(self, source: Prefix) -> bool:
        """Take exactly this prefix out of the banned and shunned; tell whether it was there."""
        found = False
        names = _names(source.network)
        with self._around("sets.remove", " ".join(names)):
            for name in names:
                found |= self._held(name, source).members.pop(source, None) is not None
        return found

    def put(self, name: str, prefixes: Iterable[Prefix], seconds: int) -> None:
        """Put prefixes into a set that has times but no comments, or renew them there."""
        with self._around("sets.put", name):
            for prefix in prefixes:
                self._place(name, self._held(name, prefix), prefix, seconds, "")

    def count(self, name: str, elements: Iterable[Counted], seconds: int) -> None:
        """Put elements into a set with times and counters, or change what they count there."""
        with self._around("sets.count", name):
            held = self._get(name)
            for address, port, packets in elements:
                key = held.key(f"{address_text(address)},tcp:{port}".removesuffix(",tcp:-1"))
                try:
                    self._sets.place(held, key, seconds)
                except Refused:
                    raise refusal(name, _FULL) from None
                held.members[key].packets = packets

    def take(self, name: str, prefixes: Iterable[Prefix]) -> None:
        """Take prefixes out of a set; those that are not there do not matter."""
        with self._around("sets.take", name):
            for prefix in prefixes:
                self._held(name, prefix).members.pop(prefix, None)

    def list(self) -> list[Element]:
        """Return who is banned or shunned, bans first."""
        with self._around("sets.list", " ".join(BLOCK_SETS)):
            return [
                self._element(prefix, member, name)
                for name in BLOCK_SETS
                for prefix, member in self._get(name).members.items()
                if isinstance(prefix, Prefix)
            ]

    def _element(self, prefix: Prefix, member: Member, name: str) -> Element:
        kind, _, rule = member.comment.partition(" ")
        if kind not in ("ban", "shun"):  # somebody added it by hand
            kind, rule = ("ban" if name in BAN_SETS else "shun"), ""
        banned = kind == "ban"
        left = self._sets.left(member) or None
        return Element(prefix, "ban" if banned else "shun", rule, left, name in GATE_SETS)

    def entries(self, name: str) -> int:
        """Return how many elements a set holds."""
        with self._around("sets.entries", name):
            return len(self._get(name).members)

    def contains(self, address: int) -> bool:
        """Tell whether a tagged address is banned or shunned, itself or in a wider prefix."""
        names = _names(address)
        with self._around("sets.contains", " ".join(names)):
            return any(self._get(name).covers(address) for name in names)

    def proven(self, address: int) -> bool:
        """Tell whether the source of a tagged address has lately proved itself."""
        name = f"rstguard-proven{6 if is_v6(address) else 4}"
        with self._around("sets.proven", name):
            return self._get(name).covers(address)

    def one_sided(self, address: int, port: int) -> bool:
        """Tell whether only one side is seen of a service."""
        name = f"rstguard-oneway{6 if is_v6(address) else 4}"
        with self._around("sets.one_sided", name):
            return (address, port) in self._get(name).members

    def _get(self, name: str) -> KernelSet:
        try:
            return self._sets.get(name)
        except Refused:
            raise refusal(name, errno.ENOENT) from None

    def _held(self, name: str, prefix: Prefix) -> KernelSet:
        """Return the set, if it can have to do with that prefix."""
        held = self._get(name)
        if held.type not in ("hash:net", "hash:ip"):
            raise refusal(name, _PROTOCOL)
        if is_v6(prefix.network) is not (held.options.get("family") == "inet6"):
            raise refusal(name, _IPV4 if is_v6(prefix.network) else _IPV6)
        if prefix.length == 0:
            raise refusal(name, _INVALID_CIDR)
        return held

    def _place(
        self, name: str, held: KernelSet, prefix: Prefix, seconds: int, comment: str
    ) -> None:
        if "timeout" not in held.options:
            raise refusal(name, _TIMEOUT)
        try:
            self._sets.place(held, prefix, seconds, comment)
        except Refused:
            raise refusal(name, _FULL) from None


def _check(element: Element) -> None:
    """Raise what the real one raises before it asks the kernel."""
    if element.remaining is not None and not 1 <= element.remaining <= MAX_SECONDS:
        seconds = element.remaining
        raise ValueError(f"an element lasts 1 to {MAX_SECONDS} seconds, not {seconds}")
    assert element.comment


def _names(address: int) -> tuple[str, ...]:
    return BLOCK_SETS[is_v6(address) :: 2]
