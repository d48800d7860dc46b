"""What values a child's messages may hold: types with their ranges, and checks of the rest.

A check raises ValueError; the text is for the log.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Final

from msgspec import Meta

from rstguard.engine.address import V6, Prefix
from rstguard.engine.flow import Tuple
from rstguard.kernel.elements import MAX_SECONDS, Element

_LONGEST_TEXT: Final = 1000
_LARGEST_KEY: Final = V6 << 17
"""More than a service's key: an address and a port (`rstguard.engine.rules.key_of`)."""

MOST_NAMES: Final = 4096
"""Rules, counters or connections in one message; a policy has 500 rules at most."""

LATEST: Final = frozenset(
    {"flows", "pending", "sweep_period_ms", "watched", "cannot_count", "uncounted"}
)
"""Counts that tell what is now: nothing to be added up over processes that died."""

_LARGEST: Final = (1 << 63) - 1
Count = Annotated[int, Meta(ge=0, le=_LARGEST)]
RuleName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,47}\Z")]
"""As in a policy, or one of the guard's own, such as "overload" (`rstguard.engine.engine`)."""
LONGEST_NAME: Final = 64
"""Characters of a counter's name, or of a source, prefix or service as people write it."""
CountName = Annotated[str, Meta(min_length=1, max_length=LONGEST_NAME)]
Text = Annotated[str, Meta(max_length=_LONGEST_TEXT)]


def one_line(text: str, most: int = _LONGEST_TEXT) -> str:
    """Return a text as one line that can be shown anywhere, cut off after `most` characters."""
    shown = "".join(character if character.isprintable() else " " for character in text[:most])
    return " ".join(shown.split())


def check_printable(text: str, most: int | None = None) -> None:
    """Refuse control characters, line ends, and more than `most` characters."""
    if not text.isprintable():
        raise ValueError("a text holds control characters")
    if most is not None and len(text) > most:
        raise ValueError("a name is too long")


def check_range(number: int, largest: int = _LARGEST) -> None:
    """Refuse numbers below 0 and above `largest`."""
    if not 0 <= number <= largest:
        raise ValueError("a number is out of its range")


def check_address(address: int) -> None:
    """Refuse what is no tagged address (`rstguard.engine.address`)."""
    if not (0 <= address < 1 << 32 or V6 <= address < V6 << 1):
        raise ValueError("a number is no address")


def check_flow(flow: Tuple) -> None:
    """Refuse addresses and ports that do not exist."""
    source, destination, source_port, destination_port = flow
    check_address(source)
    check_address(destination)
    if not (0 <= source_port <= 65535 and 0 <= destination_port <= 65535):
        raise ValueError("a number is no port")


def check_prefix(prefix: Prefix) -> None:
    """Refuse impossible lengths, and host bits that are set."""
    network, length = prefix
    check_address(network)
    shift = prefix.shift
    if length < 0 or shift < 0 or network >> shift << shift != network:
        raise ValueError("a pair of numbers is no prefix")


def check_element(element: Element) -> None:
    """Refuse what no set can hold: a prefix of everybody, or another rule name or time."""
    check_prefix(element.source)
    if not element.source.length:
        raise ValueError("a prefix holds every address")
    seconds = element.remaining
    if seconds is not None and not 1 <= seconds <= MAX_SECONDS:
        raise ValueError("a number is no time that an element can have")
    _ = element.comment  # raises for a rule's name


def check_keys(keys: Collection[int]) -> None:
    """Refuse what is no key by which rules count a source or service."""
    if keys and not (min(keys) >= 0 and max(keys) < _LARGEST_KEY):
        raise ValueError("a number is no key of a source or service")
