"""What an administrator says of sources that carry a large share of all connections."""

from __future__ import annotations

from typing import Final, NamedTuple

from rstguard.engine.address import Prefix


class Shares(NamedTuple):
    """What makes a source large, and which are like any other (`rstguard.engine.large`).

    It has carried `least` percent of all proven connections, 10 to 90, for `after` nanoseconds.
    Sources that meet a network of `ordinary` never are.
    """

    least: int = 25
    after: int = 600_000_000_000
    ordinary: tuple[Prefix, ...] = ()


DEFAULT_SHARES: Final = Shares()
