"""What a child's messages have in common, and some of them: see `rstguard.ipc.messages`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from rstguard.engine.address import Prefix
from rstguard.engine.flow import Tuple
from rstguard.engine.holding import Outcome
from rstguard.engine.large import MOST, LargeSource, spared
from rstguard.ipc import values
from rstguard.ipc.values import MOST_NAMES, Count

Hops = Annotated[int, Meta(ge=-1, le=255)]


class Said(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """A message that a child can send: on the wire a list of its name and its values."""


class Weighed(Said, frozen=True):
    """Asker to supervisor: what was found of a RST.

    `hops` is what was left of its TTL or hop limit, `true_hops` that of the end that it named, -1
    where nothing is known; `fin` tells that it was a FIN, `inside` that it came in on an interface
    that is not protected.  `waited` is in microseconds.
    """

    flow: Tuple
    outcome: Outcome
    by_client: bool
    inside: bool
    fin: bool
    hops: Hops
    true_hops: Hops
    waited: Count
    held: bool

    def __post_init__(self) -> None:
        values.check_flow(self.flow)


class PressedService(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A service in distress: what it holds, and between which marks patience shrinks to nothing."""

    address: int
    port: Annotated[int, Meta(ge=0, le=65535)]
    live: Count
    start: Count
    end: Count

    def __post_init__(self) -> None:
        values.check_address(self.address)


class UnderPressure(Said, frozen=True):
    """Sweeper: the services that are pressed now, all of them."""

    services: Annotated[tuple[PressedService, ...], Meta(max_length=MOST_NAMES)]


class Large(Said, frozen=True):
    """Sweeper to supervisor, and on to workers and the next sweeper: all large sources."""

    sources: Annotated[tuple[LargeSource, ...], Meta(max_length=MOST)]

    def __post_init__(self) -> None:
        for source, share, *counts in self.sources:
            values.check_prefix(source)
            values.check_range(share, 100)
            for count in counts:
                values.check_range(count)

    @property
    def spared(self) -> tuple[Prefix, ...]:
        """Those of them that rules for numbers spare."""
        return spared(self.sources)

    def later(self, elapsed: int) -> Large:
        """Return the same, so many nanoseconds later."""
        return Large(
            tuple(
                one._replace(age=one.age + elapsed, quiet=one.quiet + elapsed)
                for one in self.sources
            )
        )
