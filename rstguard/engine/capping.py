"""When a rule bans too many, and when a network holds too many of the banned.  Pure.

Both count *wide prefixes*, an IPv4 /24 or an IPv6 /48: who owns one has all its addresses, so a
thousand bans in it say no more than one does.  Times are in whatever unit the caller uses for all.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from rstguard.engine.address import Prefix, prefix_of

WIDE: Final = (24, 48)
"""How wide a wide prefix is, IPv4 and IPv6."""
MOST_MEMBERS: Final = 16
"""Bans in force in one wide prefix beyond which it is gated as a whole."""
_MOST_PREFIXES: Final = 65_536


def wide(source: Prefix) -> Prefix:
    """Return the wide prefix that a source lies in; one that is as wide stands for itself."""
    around = prefix_of(source.network, *WIDE)
    return around if around.length < source.length else source


class BanCap:
    """Counts, for each rule, in how many wide prefixes it banned within the last minute."""

    def __init__(self, minute: float) -> None:
        """`minute` is its length in the unit of all times."""
        self._minute = minute
        self._seen: dict[str, OrderedDict[Prefix, float]] = {}

    def over(self, rule: str, source: Prefix, most: int, now: float) -> bool:
        """Note a ban by a rule; tell whether it bans in more than `most` wide prefixes a minute.

        No more than these are remembered of each rule.
        """
        seen = self._seen.setdefault(rule, OrderedDict())
        network = wide(source)
        seen[network] = now
        seen.move_to_end(network)
        if len(seen) > most + 1:
            seen.popitem(last=False)
        return self.count(rule, now) > most

    def count(self, rule: str, now: float) -> int:
        """Return in how many wide prefixes a rule has banned within the last minute."""
        seen = self._seen.get(rule)
        if seen is None:
            return 0
        while seen and next(iter(seen.values())) <= now - self._minute:
            seen.popitem(last=False)
        return len(seen)

    def forget(self) -> None:
        """Begin anew."""
        self._seen.clear()


class Members:
    """The bans in force of each wide prefix, as far as they were heard of.

    Of each prefix no more are kept than tell that there are too many; and if there are more
    prefixes than 65,536 those are forgotten that have not been heard of for the longest time.
    """

    def __init__(self) -> None:
        self._until: OrderedDict[Prefix, dict[Prefix, float]] = OrderedDict()
        self._gated: dict[Prefix, float] = {}

    def gate(self, source: Prefix, until: float, now: float) -> tuple[Prefix, float] | None:
        """Note a ban that ends at `until`; return what is to be gated because of it, and till when.

        That is the end of the longest ban in it.  None if there are few, or it is gated already.
        """
        network = wide(source)
        if network == source:
            return None
        members = self._until.setdefault(network, {})
        self._until.move_to_end(network)
        members[source] = max(until, members.get(source, until))
        if len(members) > MOST_MEMBERS:
            for one in [one for one, ends in members.items() if ends <= now]:
                del members[one]
        self._make_room()
        if len(members) <= MOST_MEMBERS:
            return None
        del members[min(members, key=members.__getitem__)]  # of those left the number tells enough
        longest = max(members.values())
        if self._gated.get(network, now) >= longest:
            return None
        self._gated[network] = longest
        return network, longest

    def freed(self, source: Prefix) -> None:
        """Note that a ban was lifted, or that of a whole gated prefix."""
        self._gated.pop(source, None)
        if members := self._until.get(wide(source)):
            members.pop(source, None)

    def _make_room(self) -> None:
        while len(self._until) > _MOST_PREFIXES:
            network, _ = self._until.popitem(last=False)
            self._gated.pop(network, None)
