"""What the protected servers offer in their SYN-ACKs, learned from samples of them.  Pure.

When the kernel answers SYNs in a server's place it must offer what the server would: the maximum
segment size, the window scale, selective acknowledgements and timestamps of a connection are fixed
by its SYN and SYN-ACK, and both ends hold to them for good (RFC 9293, 3.7.1; RFC 7323, 2.2).

A server offers a window scale, SACK or timestamps only to a client that offered them first, so a
SYN-ACK without them proves nothing: it may answer a poor SYN.  What was seen is believed until the
server has for a while given only poor answers.  To believe too little is always safe: such
connections are merely slower.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from rstguard.engine.address import is_v6
from rstguard.engine.ruleset import SECOND
from rstguard.engine.service import Service
from rstguard.engine.targets import Targets
from rstguard.engine.wire import ACK, FIN, RST, SYN, Malformed, Packet, options, parse

FORGET_AFTER = 60 * SECOND
"""How long (ns) an answer counts against poorer ones."""
KEPT_FOR = 600 * SECOND
"""How long (ns) a service that answers no more keeps its place from others: where there are more
services than places, the rules must not be rewritten without end."""
FORGET_SAMPLES = 8
"""Poor answers it takes, besides, to forget a better one."""

JUMBO_MSS = 8940
"""The largest segment size that an IPv6 SYN cookie can mean (msstab in net/ipv6/syncookies.c)."""
_MSS, _SCALE, _SACK, _TIMESTAMPS = 2, 3, 4, 8
_LARGEST_SCALE = 14  # RFC 7323, 2.3
_LEAST_MSS = {False: 88, True: 1220}  # below these no cookie can encode it usefully
_DEFAULT_MSS = {False: 536, True: 1220}  # RFC 9293, 3.7.1


class Offer(NamedTuple):
    """What a SYN-ACK offers: `mss` in bytes, `scale` the window scale or -1 for none.

    `to` is where connections of the service are translated to here (DNAT), all servers among which
    they are shared out; empty where nothing is translated.
    """

    mss: int
    scale: int
    sack: bool
    timestamps: bool
    to: tuple[Service, ...] = ()

    def __str__(self) -> str:
        """Return it in words, as `status` shows it."""
        parts = [f"mss {self.mss}"]
        if self.scale >= 0:
            parts.append(f"wscale {self.scale}")
        if self.sack:
            parts.append("sack")
        if self.timestamps:
            parts.append("timestamps")
        if self.to:
            parts.append(f"translated to {' or '.join(map(str, self.to))}")
        return ", ".join(parts)


def read_offer(data: bytes) -> tuple[Service, Offer] | None:
    """Return what an IP packet offers and for which service, or None if it is no SYN-ACK."""
    packet = parse(data)
    if isinstance(packet, Malformed) or packet.flags & (SYN | ACK | FIN | RST) != SYN | ACK:
        return None
    return Service(packet.source, packet.source_port), _offer(packet, options(data))


def has_jumbo_frames(data: bytes) -> bool:
    """Tell whether an IP packet offers a largest segment that no usual frame holds."""
    return int.from_bytes(options(data).get(_MSS, b""), "big") >= JUMBO_MSS


def _offer(packet: Packet, found: dict[int, bytes]) -> Offer:
    v6 = is_v6(packet.source)
    mss = int.from_bytes(found[_MSS], "big") if len(found.get(_MSS, b"")) == 2 else 0
    scale = min(found[_SCALE][0], _LARGEST_SCALE) if len(found.get(_SCALE, b"")) == 1 else -1
    return Offer(
        max(mss, _LEAST_MSS[v6]) if mss else _DEFAULT_MSS[v6],
        scale,
        found.get(_SACK) == b"",
        len(found.get(_TIMESTAMPS, b"")) == 8,
    )


class _Known:
    """What is believed of one service, and since when."""

    __slots__ = ("full_at", "mss_at", "offer", "poor", "seen_at", "targets")

    def __init__(self, offer: Offer, now: int) -> None:
        self.offer = offer
        self.mss_at = self.full_at = self.seen_at = now
        self.poor = 0
        self.targets: Targets | None = None
        """Where it is translated to, if it is."""

    @property
    def usable(self) -> Offer | None:
        """What it offers, if it is known where a connection of it must go."""
        return self.offer if self.targets is None or self.offer.to else None


class Offers:
    """The offers of at most `most` services; one unseen for long makes room for a new one."""

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._known: dict[Service, _Known] = {}

    @property
    def known(self) -> dict[Service, Offer]:
        """What is believed of each service now, in the order of addresses and ports."""
        return {
            service: offer
            for service, known in sorted(self._known.items())
            if (offer := known.usable)
        }

    def learn(
        self,
        service: Service,
        offer: Offer,
        now: int,
        to: Service | None = None,
        client: int = 0,
    ) -> bool:
        """Take up a sample seen at `now` (ns); tell whether what is known has changed.

        `to` is the server that the connection of `client`, a tagged address, was translated to; or
        None if it was not translated.

        Of different maximum segment sizes the largest of the last minute counts: a server can
        receive what it once offered, and Linux offers less where a forged SYN named none.
        """
        known = self._known.get(service)
        if known is None:
            if len(self._known) >= self._most:
                oldest = min(self._known, key=lambda other: self._known[other].seen_at)
                if now - self._known[oldest].seen_at < KEPT_FOR:
                    return False
                del self._known[oldest]
            known = self._known[service] = _Known(offer, now)
            self._learn_target(known, to, client, now)
            return True
        known.seen_at = now
        before, usable = known.offer, known.usable
        self._learn_target(known, to, client, now)
        if offer.mss >= before.mss or now - known.mss_at > FORGET_AFTER:
            known.mss_at = now
            known.offer = known.offer._replace(mss=offer.mss)
        self._learn_extras(known, offer._replace(to=known.offer.to), now)
        return known.usable != usable

    def lapse(self, services: Collection[Service], since: int) -> bool:
        """Forget where services are translated to that was not seen since `since` (ns).

        Tells whether that changes what is known.
        """
        changed = False
        for service in services:
            known = self._known.get(service)
            if known is None or known.targets is None:
                continue
            usable = known.usable
            known.targets.lapse(since)
            known.offer = known.offer._replace(to=known.targets.current(since))
            changed |= known.usable != usable
        return changed

    def _learn_target(self, known: _Known, to: Service | None, client: int, now: int) -> None:
        if to is None:
            known.targets = None
            known.offer = known.offer._replace(to=())
            return
        known.targets = known.targets or Targets()
        known.targets.seen(to, client, now)
        known.offer = known.offer._replace(to=known.targets.current(now))

    def _learn_extras(self, known: _Known, offer: Offer, now: int) -> None:
        before = known.offer
        lacks = (
            (offer.scale < 0 <= before.scale)
            or (before.sack and not offer.sack)
            or (before.timestamps and not offer.timestamps)
        )
        known.poor = known.poor + 1 if lacks else 0
        if not lacks:
            known.full_at = now
        if not lacks or (known.poor >= FORGET_SAMPLES and now - known.full_at > FORGET_AFTER):
            known.poor, known.full_at = 0, now
            known.offer = offer._replace(mss=before.mss)
        elif offer.scale >= 0 and offer.scale != before.scale:
            # Another scale than the one believed is no poor answer: the server has changed.
            known.offer = before._replace(scale=offer.scale)
