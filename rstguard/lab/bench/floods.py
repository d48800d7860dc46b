"""The floods: what is sent, at which service, and what the server does by itself."""

from __future__ import annotations

from dataclasses import dataclass

from rstguard.lab import LabError
from rstguard.lab.topology import SERVER

_RANDOM = "33,drnd(3)"
"""16 million sources of 33.0.0.0/8; a number is drawn for each packet."""
_ONE = "33,1,1,7"
_PREFIX = "33,1,1,dinc(1,250)"
_SCATTERED = "33,dinc(1,20),dinc(1,250),7"


@dataclass(frozen=True, slots=True)
class Flood:
    """One flood.

    `sources` are the bytes of the source address in trafgen's language, "" for real clients that
    complete their handshakes (wrk).  `rate` is the most there can be, in SYNs a second (trafgen's
    own work comes on top of its pauses), 0 is flat out.  With `server_cookies` the server answers a
    full backlog with SYN cookies of its own.  `budget` is the SYN budget of rstguard's policy, in
    SYNs a second, 0 for none: what the server can bear.
    """

    name: str
    summary: str
    sources: str
    rate: int
    server_cookies: bool = False
    budget: int = 300

    @property
    def forged(self) -> bool:
        """Whether nobody stands behind the sources."""
        return self.sources == _RANDOM


FLOODS = (
    Flood("forged", "SYNs from 16 million forged sources, flat out", _RANDOM, 0),
    Flood(
        "absorbed",
        "forged SYNs, up to 5,000/s: the server's own cookies do",
        _RANDOM,
        5_000,
        True,
        20_000,
    ),
    Flood(
        "outside",
        "forged SYNs, flat out, a policy without a word of SYN budgets; the server has cookies",
        _RANDOM,
        0,
        True,
        budget=0,
    ),
    Flood("one-source", "SYNs of one source, up to 10,000/s", _ONE, 10_000),
    Flood("prefix", "SYNs of 250 sources of one /24, up to 40/s each", _PREFIX, 10_000),
    Flood("scattered", "SYNs of 5,000 scattered sources, up to 2/s each", _SCATTERED, 10_000),
    Flood("connections", "wrk: one source, a new connection for each request", "", 0),
)


def find(name: str) -> Flood:
    """Return a flood by its name.

    Raises:
        LabError: there is none of that name; the text lists those there are.
    """
    for flood in FLOODS:
        if flood.name == name:
            return flood
    names = ", ".join(flood.name for flood in FLOODS)
    raise LabError(f"There is no flood '{name}'; there are {names}.")


def trafgen_packet(flood: Flood, gateway_mac: str) -> str:
    """Return trafgen's description of one SYN of a flood."""
    return trafgen_syn(flood.sources, SERVER, 80, gateway_mac)


def trafgen_syn(sources: str, target: str, port: int, mac: str) -> str:
    """Return trafgen's description of one SYN: Ethernet, IPv4 and TCP without options.

    `sources` are the bytes of the source address in trafgen's language; `mac` is the next hop's.
    """
    hop = ",".join(f"0x{byte}" for byte in mac.split(":"))
    return f"""{{
  {hop}, 0x02,0x00,0x00,0x00,0x00,0x66, const16(0x0800),
  0x45, 0, const16(40), drnd(2), 0x40, 0, 64, 6, csumip(14, 33),
  {sources}, {target.replace(".", ",")},
  drnd(2), const16({port}), drnd(4), const32(0), const16(0x5002), const16(64240),
  csumtcp(14, 34), const16(0)
}}
"""
