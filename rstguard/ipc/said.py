"""What a child's messages have in common, and those of the asker: see `rstguard.ipc.messages`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from rstguard.engine.flow import Tuple
from rstguard.engine.holding import Outcome
from rstguard.ipc import values
from rstguard.ipc.values import Count

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
