"""Who uses a calm gateway, and how: each kind of client, as data.

Both forms of the trial draw from this, with simulated packets and with real sockets.  A range is
drawn from evenly by its logarithm: short waits and small answers are frequent, long ones rare.
Times are seconds, sizes bytes of TCP payload.  Where no source stands beside a number it is an
ordinary one, to be changed by whoever knows better.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Final, NamedTuple

Range = tuple[float, float]
"""The least and the most."""

MINUTE: Final = 60.0
HOUR: Final = 3600.0

WEB, TLS, APP, SSH = 80, 443, 8080, 22
SMTP, POP3, IMAP, SUBMISSION, IMAPS, POP3S = 25, 110, 143, 587, 993, 995
POSTGRES = 5432

OFFICE, CARRIER, CDN, MONITOR = "office", "carrier", "cdn", "monitor"
"""Addresses that many clients, or several services, share."""


class Turn(NamedTuple):
    """One exchange: after a pause the client says something, and after a wait it is answered.

    `says` or `answers` of 0 bytes is nothing said by that end.
    """

    says: Range
    answers: Range
    pause: Range = (0.001, 0.02)
    wait: Range = (0.005, 0.3)


class End(Enum):
    """How a connection ends."""

    CLIENT = "the client closes"
    SERVER = "the server closes"
    ABORT = "the client resets it"
    VANISH = "the client is gone without a word; the server closes in the end"
    REFUSED = "there is no such service: the server answers the SYN by a RST"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of client.

    `clients` are there in the busiest hour, each with an address of its own or all with the one
    that `shares` names.  A client makes visits: `together` connections to each of `ports`, of
    which each `lasts` so long and then `ends`; from the end of the last one to the next visit it
    is a `pause`.  On a connection come the turns of `opening`, and then `going` again and again
    until it ends.  `by_day`: by night there are fewer visits (`activity`).  `again` on a restart of
    the server: it closes the connection, and the client comes back.
    """

    name: str
    ports: tuple[int, ...]
    clients: int
    pause: Range
    lasts: Range
    opening: tuple[Turn, ...] = ()
    going: Turn | None = None
    together: Range = (1, 1)
    ends: End = End.CLIENT
    shares: str = ""
    by_day: bool = True
    window: int = 64240
    """What the client advertises once it has asked: 0, if it reads no further."""


def activity(hour: float) -> float:
    """Return how much of the busiest hour's there is at an hour of the day, 0.1 to 1.

    The usual course of a site used in one time zone: least at four in the morning, most from ten
    to sixteen o'clock, a second and lower top in the evening.
    """
    marks = ((0, 0.25), (2, 0.12), (4, 0.1), (6, 0.2), (8, 0.7), (10, 1), (16, 1), (18, 0.7),
             (21, 0.8), (24, 0.25))  # fmt: skip
    for (before, low), (after, high) in pairwise(marks):
        if before <= hour % 24 <= after:
            return low + (high - low) * (hour % 24 - before) / (after - before)
    raise AssertionError(hour)


# A ClientHello pads to 517 bytes (RFC 7685); certificates take some thousands.
_HELLO: Final = Turn(says=(517, 1800), answers=(2500, 6000), wait=(0.005, 0.05))
# A request's headers with cookies, and what web pages and their parts weigh (HTTP Archive: the
# median page is 2.5 MB in 70 requests).
_GET: Final = Turn(says=(350, 1500), answers=(1000, 200_000), pause=(0.01, 2.0))
_CALL: Final = Turn(says=(300, 3000), answers=(200, 20_000), pause=(0.001, 0.05))
_UPGRADE: Final = Turn(says=(500, 1200), answers=(129, 300))
_BANNER: Final = Turn(says=(0, 0), answers=(20, 90))
_LINE: Final = Turn(says=(6, 60), answers=(8, 120), pause=(0.01, 0.1))
# Versions, key exchange, authentication.
_SSH_OPEN: Final = (
    Turn(says=(21, 40), answers=(21, 40)),
    Turn(says=(1100, 1500), answers=(1000, 1100)),
    Turn(says=(48, 1200), answers=(400, 700)),
    Turn(says=(60, 600), answers=(28, 60), pause=(0.05, 2.0), wait=(0.01, 0.4)),
)
# What a ping and its answer take in frames of a WebSocket (RFC 6455, 5.5.2).
_PING: Final = Turn(says=(6, 10), answers=(2, 8), pause=(30, 30))

BROWSERS: Final = (
    # Browsers open six connections to a host over HTTP/1.1 and keep them for what the server
    # allows: 5 s at Apache (KeepAliveTimeout), 75 s at nginx (keepalive_timeout).
    Kind(
        "browser, HTTP/1.1",
        (WEB,),
        40,
        pause=(10, 300),
        lasts=(5, 75),
        opening=(_GET, _GET),
        together=(4, 6),
        ends=End.SERVER,
    ),
    # One connection for all over HTTP/2; nginx closes it after 75 s without a request, others 180.
    Kind(
        "browser, HTTP/2",
        (TLS,),
        80,
        pause=(10, 300),
        lasts=(30, 180),
        opening=(_HELLO, _GET, _GET, _GET, _GET),
        together=(1, 2),
        ends=End.SERVER,
    ),
    # Opened in advance and never used: the server gives up after 60 s (nginx's
    # client_header_timeout), or the browser closes it.
    Kind("browser, spare connection", (TLS,), 15, pause=(30, 600), lasts=(10, 60), ends=End.SERVER),
    Kind(
        "browser, page left early",
        (TLS,),
        10,
        pause=(30, 600),
        lasts=(0.3, 3),
        opening=(_HELLO, _GET),
        together=(1, 2),
        ends=End.ABORT,
    ),
    # A tab in the background that shows a video: the window is full until somebody plays it on.
    Kind(
        "browser, paused video",
        (TLS,),
        3,
        pause=(60, 900),
        lasts=(60, 1800),
        opening=(_HELLO, Turn(says=(400, 900), answers=(300_000, 300_000))),
        window=0,
    ),
    Kind(
        "download",
        (TLS,),
        3,
        pause=(60, 900),
        lasts=(20, 300),
        opening=(_HELLO, _CALL),
        going=Turn(says=(0, 0), answers=(200_000, 500_000), pause=(0.4, 0.6)),
    ),
    # A photograph over a poor mobile line: 2 to 5 kB/s.
    Kind(
        "upload, slow",
        (TLS,),
        4,
        pause=(60, 900),
        lasts=(60, 600),
        opening=(_HELLO,),
        going=Turn(says=(1200, 2400), answers=(0, 0), pause=(0.5, 1.0)),
    ),
)
"""Who reads pages."""

LONG: Final = (
    Kind(
        "WebSocket",
        (TLS,),
        60,
        pause=(1, 30),
        lasts=(10 * MINUTE, 12 * HOUR),
        opening=(_HELLO, _UPGRADE),
        going=_PING,
        by_day=False,
    ),
    # Of an application that sends no pings, and says nothing unless something happens.
    Kind(
        "WebSocket, silent",
        (TLS,),
        20,
        pause=(1, 30),
        lasts=(HOUR, 18 * HOUR),
        opening=(_HELLO, _UPGRADE),
        by_day=False,
    ),
    # Server-sent events: a comment line each 15 s is what the HTML standard advises (9.2.7).
    Kind(
        "event stream",
        (TLS,),
        30,
        pause=(1, 5),
        lasts=(5 * MINUTE, 4 * HOUR),
        opening=(_HELLO, _GET),
        going=Turn((0, 0), (3, 400), pause=(15, 60)),
        by_day=False,
    ),
    # RFC 6202, 5.5: 30 s is a safe time-out, and up to 120 s are seen.
    Kind(
        "long poll",
        (TLS,),
        30,
        pause=(1, 10),
        lasts=(5 * MINUTE, 2 * HOUR),
        opening=(_HELLO,),
        going=Turn((350, 900), (150, 900), pause=(0.1, 1), wait=(30, 60)),
        by_day=False,
    ),
)
"""Who stays on the web."""

MACHINES: Final = (
    # One connection for each call, as simple clients do, and a pool that keeps some.
    Kind("API client", (TLS,), 12, pause=(1, 20), lasts=(0.1, 1), opening=(_HELLO, _CALL)),
    Kind(
        "API client, keeps alive",
        (TLS,),
        8,
        pause=(1, 10),
        lasts=(MINUTE, HOUR),
        opening=(_HELLO,),
        going=Turn((300, 3000), (200, 20_000), pause=(1, 40)),
        together=(1, 4),
    ),
    # Of one application's host: HikariCP keeps all its connections for 30 minutes (maxLifetime),
    # others until somebody closes them.
    Kind(
        "database pool",
        (POSTGRES,),
        1,
        pause=(0.1, 1),
        lasts=(28 * MINUTE, 30 * MINUTE),
        opening=(Turn((80, 120), (300, 500)),),
        together=(60, 60),
        by_day=False,
    ),
    Kind(
        "database pool, at rest",
        (POSTGRES,),
        1,
        pause=(1, 1),
        lasts=(20 * HOUR, 40 * HOUR),
        opening=(Turn((80, 120), (300, 500)),),
        together=(20, 20),
        by_day=False,
    ),
    Kind(
        "application pool",
        (APP,),
        1,
        pause=(1, 1),
        lasts=(2 * HOUR, 40 * HOUR),
        opening=(_CALL,),
        together=(40, 40),
        by_day=False,
    ),
    # One to five pages a second, each on a connection of its own.
    Kind(
        "crawler",
        (TLS,),
        1,
        pause=(0.05, 0.7),
        lasts=(0.15, 0.3),
        opening=(_HELLO, _GET),
        by_day=False,
    ),
    # Opens and closes a connection each 30 s, without a byte, to all that it watches.
    Kind(
        "monitoring probe",
        (SSH, SMTP, WEB, POP3, IMAP, TLS, SUBMISSION, IMAPS, APP),
        1,
        pause=(30, 30),
        lasts=(0.01, 0.05),
        shares=MONITOR,
        by_day=False,
    ),
    # HAProxy each 2 s, Amazon's balancers from 5 s on; HAProxy ends its own by a RST.
    Kind(
        "health check",
        (WEB, TLS),
        2,
        pause=(2, 5),
        lasts=(0.001, 0.01),
        ends=End.ABORT,
        by_day=False,
    ),
    # A gateway that has an address wrong, and tries again and again.
    Kind(
        "misconfigured client",
        (8090,),
        3,
        pause=(20, 600),
        lasts=(0, 0),
        ends=End.REFUSED,
        by_day=False,
    ),
)
"""Programs."""

SHELLS: Final = (
    # ServerAliveInterval 60, as many set it, and none, which is the default.
    Kind(
        "SSH at rest, keepalive",
        (SSH,),
        10,
        pause=(MINUTE, HOUR),
        lasts=(HOUR, 20 * HOUR),
        opening=_SSH_OPEN,
        going=Turn((36, 64), (36, 64), pause=(60, 60)),
        by_day=False,
    ),
    Kind(
        "SSH at rest",
        (SSH,),
        10,
        pause=(MINUTE, HOUR),
        lasts=(HOUR, 30 * HOUR),
        opening=_SSH_OPEN,
        by_day=False,
    ),
    Kind(
        "SSH at work",
        (SSH,),
        6,
        pause=(MINUTE, HOUR),
        lasts=(MINUTE, 2 * HOUR),
        opening=_SSH_OPEN,
        going=Turn((36, 100), (36, 4000), pause=(0.3, 60)),
    ),
    # git, scp, a remote command: over in seconds.
    Kind(
        "SSH, one command",
        (SSH,),
        8,
        pause=(5 * MINUTE, HOUR),
        lasts=(0.6, 8),
        opening=(*_SSH_OPEN, Turn((100, 5000), (200, 200_000))),
    ),
    # A build server that looks for changes each minute.
    Kind(
        "build server, polling git",
        (SSH,),
        1,
        pause=(55, 60),
        lasts=(0.6, 2),
        opening=(*_SSH_OPEN, Turn((100, 500), (200, 2000))),
        by_day=False,
    ),
)
"""Who comes by SSH."""

MAIL: Final = (
    # Postscreen greets after up to 6 s (postscreen_greet_wait); a sender waits for 5 minutes
    # (RFC 5321, 4.5.3.2.1).
    Kind(
        "mail sender",
        (SMTP,),
        15,
        pause=(2 * MINUTE, HOUR),
        lasts=(2, 20),
        opening=(
            _BANNER._replace(wait=(0.1, 6)),
            *(_LINE,) * 4,
            Turn((2000, 80_000), (30, 60)),
            _LINE,
        ),
    ),
    # Refused for now, it comes again after 5 to 30 minutes.
    Kind(
        "mail sender, greylisted",
        (SMTP,),
        8,
        pause=(5 * MINUTE, 30 * MINUTE),
        lasts=(1, 8),
        opening=(_BANNER._replace(wait=(0.1, 6)), *(_LINE,) * 4),
    ),
    # A tarpit lets its client wait for each line.
    Kind(
        "mail sender, tarpitted",
        (SMTP,),
        2,
        pause=(5 * MINUTE, HOUR),
        lasts=(60, 240),
        opening=(_BANNER._replace(wait=(20, 60)), *(_LINE._replace(wait=(5, 20)),) * 3),
    ),
    # IDLE is renewed each 29 minutes (RFC 2177, 3).
    Kind(
        "IMAP, idle",
        (IMAPS,),
        30,
        pause=(10, 10 * MINUTE),
        lasts=(30 * MINUTE, 12 * HOUR),
        opening=(_HELLO, *(_LINE,) * 3),
        going=Turn((12, 40), (12, 200), pause=(29 * MINUTE,) * 2),
        together=(1, 2),
        by_day=False,
    ),
    # Mail programs look each 10 minutes or so.
    Kind(
        "POP3, looking for mail",
        (POP3S,),
        10,
        pause=(5 * MINUTE, 15 * MINUTE),
        lasts=(0.6, 3),
        opening=(_HELLO, *(_LINE,) * 4),
    ),
    Kind(
        "mail program, sending",
        (SUBMISSION,),
        8,
        pause=(10 * MINUTE, 2 * HOUR),
        lasts=(2, 10),
        opening=(_BANNER, _LINE, _HELLO, *(_LINE,) * 4, Turn((2000, 2_000_000), (30, 60))),
    ),
)
"""Who sends and reads mail."""

OFFICE_OF_300: Final = (
    # 300 people behind one address who all work with the application that is guarded: two thirds of
    # them have it open in the busiest hour, each in one tab with a WebSocket, and half read pages.
    Kind(
        "office, browser",
        (TLS,),
        150,
        pause=(20, 300),
        lasts=(30, 180),
        opening=(_HELLO, _GET, _GET, _GET),
        together=(1, 2),
        ends=End.SERVER,
        shares=OFFICE,
    ),
    Kind(
        "office, browser, HTTP/1.1",
        (WEB,),
        15,
        pause=(20, 300),
        lasts=(5, 75),
        opening=(_GET, _GET),
        together=(4, 6),
        ends=End.SERVER,
        shares=OFFICE,
    ),
    Kind(
        "office, WebSocket",
        (TLS,),
        200,
        pause=(1, 30),
        lasts=(30 * MINUTE, 9 * HOUR),
        opening=(_HELLO, _UPGRADE),
        going=_PING,
        shares=OFFICE,
    ),
    Kind(
        "office, SSH at rest",
        (SSH,),
        6,
        pause=(MINUTE, HOUR),
        lasts=(HOUR, 9 * HOUR),
        opening=_SSH_OPEN,
        shares=OFFICE,
    ),
    # Ten developers who fetch and push.
    Kind(
        "office, git over SSH",
        (SSH,),
        10,
        pause=(10 * MINUTE, HOUR),
        lasts=(0.6, 6),
        opening=(*_SSH_OPEN, Turn((100, 5000), (200, 200_000))),
        shares=OFFICE,
    ),
    Kind(
        "office, IMAP",
        (IMAPS,),
        40,
        pause=(10, 10 * MINUTE),
        lasts=(HOUR, 9 * HOUR),
        opening=(_HELLO, *(_LINE,) * 3),
        going=Turn((12, 40), (12, 200), pause=(29 * MINUTE,) * 2),
        together=(1, 2),
        shares=OFFICE,
    ),
    Kind(
        "office, POP3",
        (POP3S,),
        20,
        pause=(5 * MINUTE, 15 * MINUTE),
        lasts=(0.6, 3),
        opening=(_HELLO, *(_LINE,) * 4),
        shares=OFFICE,
    ),
    Kind(
        "office, sending mail",
        (SUBMISSION,),
        10,
        pause=(10 * MINUTE, 2 * HOUR),
        lasts=(2, 10),
        opening=(_BANNER, _LINE, _HELLO, *(_LINE,) * 4, Turn((2000, 2_000_000), (30, 60))),
        shares=OFFICE,
    ),
)
"""An office of 300 behind one address."""

CARRIER_NAT: Final = (
    # Telephones behind a carrier's NAT; whose radio sleeps says no goodbye.
    Kind(
        "telephone, application",
        (TLS,),
        40,
        pause=(10, 600),
        lasts=(5, 60),
        opening=(_HELLO, _CALL, _CALL),
        shares=CARRIER,
    ),
    Kind(
        "telephone, out of reach",
        (TLS,),
        15,
        pause=(60, 900),
        lasts=(65, 180),
        opening=(_HELLO, _GET),
        ends=End.VANISH,
        shares=CARRIER,
    ),
)
"""Telephones behind one address."""

ONE_CDN: Final = (
    # All that a site has, through one address of a CDN: requests over connections that it keeps,
    # each WebSocket and stream on one of its own.
    Kind(
        "CDN, requests",
        (TLS,),
        300,
        pause=(0.2, 20),
        lasts=(5, 90),
        opening=(_HELLO, _GET, _CALL),
        going=Turn((350, 1500), (1000, 200_000), pause=(1, 30)),
        together=(1, 2),
        shares=CDN,
    ),
    Kind(
        "CDN, WebSocket",
        (TLS,),
        350,
        pause=(1, 30),
        lasts=(10 * MINUTE, 12 * HOUR),
        opening=(_HELLO, _UPGRADE),
        going=_PING,
        shares=CDN,
        by_day=False,
    ),
    Kind(
        "CDN, event stream",
        (TLS,),
        30,
        pause=(1, 5),
        lasts=(5 * MINUTE, 4 * HOUR),
        opening=(_HELLO, _GET),
        going=Turn((0, 0), (3, 400), pause=(15, 60)),
        shares=CDN,
        by_day=False,
    ),
)
"""Everything through one address."""

KINDS: Final = (
    *BROWSERS, *LONG, *MACHINES, *SHELLS, *MAIL, *OFFICE_OF_300, *CARRIER_NAT, *ONE_CDN,
)  # fmt: skip
"""All of them."""

LOST: Final = 0.003
"""Share of SYNs, or of their answers, that are lost and sent again after a second (RFC 6298, 2.1);
losses of 0.1 to 1 % are usual."""

LOST_AGAIN: Final = 1.0
"""Seconds after which a lost SYN is sent again."""

ROUND_TRIPS: Final[Range] = (0.002, 0.25)
"""Round trip times of clients, near to far."""

RESTARTS: Final = (9.5, 14.25)
"""Hours of the day at which the web server is restarted: it closes what it has, and all come back
within their pauses."""

RESTARTED: Final = frozenset({WEB, TLS})
"""The ports of which that is so."""
