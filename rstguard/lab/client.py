"""Legitimate clients: one new connection and one GET per request, at a steady modest pace.

A program of its own, to be run inside the clients' namespace as ``python -m rstguard.lab.client``,
with ``--new`` to let every other request come from an address that nobody has seen before, with
``--slow`` to let every third take `SLOW` seconds to be sent, and with ``--hosted`` to ask port 443
(not encrypted) of each of the addresses of `HOSTED` in turn, over IPv4.
It writes the line ``ready`` after the first good answer, then works until its standard input is
closed, and ends with one line of JSON: a list of `Request`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_network
from typing import NamedTuple

from rstguard.lab.server import BODY
from rstguard.lab.topology import CLIENTS, CLIENTS6, HOSTED, NEW_CLIENTS, SERVER, SERVER6

PER_SECOND = 40
"""Requests a second, all sources together."""
PER_SECOND_WITH_NEW = 100
"""The same with those of new clients, which are half."""
TIMEOUT = 3.0
"""Seconds after which a person would have given up."""

SLOW = 1.5
"""Seconds that a slow client needs to send a request."""

_SOURCES = len(CLIENTS) + len(CLIENTS6)
_REQUEST = b"GET / HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n"


class Request(NamedTuple):
    """One request: when it began (monotonic seconds), how long it took, "" or why it failed."""

    start: float
    seconds: float
    source: str
    failure: str


async def fetch(
    source: str,
    *,
    timeout: float = TIMEOUT,
    sending: float = 0,
    service: tuple[str, int] | None = None,
) -> Request:
    """Make one request from a source address and tell how it went.

    `service` is asked over IPv4, by default port 80 of `SERVER`; over IPv6 port 80 of `SERVER6`.
    `sending` are the seconds it takes to be sent, line by line; its time-out begins after them.
    """
    start = time.monotonic()
    try:
        async with asyncio.timeout(timeout + sending):
            failure = await _exchange(source, service, sending)
    except TimeoutError:
        failure = "timed out"
    except ConnectionRefusedError:
        failure = "refused"
    except ConnectionResetError:
        failure = "reset"
    except OSError as error:
        failure = os.strerror(error.errno) if error.errno else "failed"
    return Request(start, time.monotonic() - start, source, failure)


async def _exchange(source: str, service: tuple[str, int] | None, sending: float) -> str:
    host, port = (SERVER6, 80) if ":" in source else service or (SERVER, 80)
    reader, writer = await asyncio.open_connection(host, port, local_addr=(source, 0))
    try:
        lines = _REQUEST.splitlines(keepends=True) if sending else [_REQUEST]
        writer.write(lines[0])
        for line in lines[1:]:
            await asyncio.sleep(sending / (len(lines) - 1))
            writer.write(line)
        answer = await reader.read(-1)
    finally:
        writer.close()
    if not answer:
        return "closed early"
    whole = answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(BODY.encode())
    return "" if whole else "wrong answer"


async def _first_answer(sources: tuple[str, ...]) -> None:
    """Try until each source has had an answer once; neighbours are resolved after that."""
    for source in sources:
        while (await fetch(source, timeout=0.5)).failure:
            await asyncio.sleep(0.02)


def _sources(new: bool) -> Iterator[str]:
    known = itertools.cycle((*CLIENTS, *CLIENTS6))
    if not new:
        return known
    strangers = map(str, ip_network(NEW_CLIENTS).hosts())
    return itertools.chain.from_iterable(zip(known, strangers, strict=False))


async def _work(new: bool, slow: bool, hosted: bool) -> list[Request]:
    sources = _sources(new)
    sites = [(str(address), 443) for address in ip_network(HOSTED).hosts()]
    services = itertools.cycle(sites if hosted else [None])
    await _first_answer((*CLIENTS, *CLIENTS6))
    rate = PER_SECOND_WITH_NEW if new else PER_SECOND
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    running: list[asyncio.Task[Request]] = []
    begin = time.monotonic()
    for number in itertools.count():
        # A third of each source's requests, whatever the count of sources.
        sending = SLOW if slow and number // _SOURCES % 3 == 0 else 0
        request = fetch(next(sources), sending=sending, service=next(services))
        running.append(asyncio.create_task(request))
        wait = begin + (number + 1) / rate - time.monotonic()
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), max(wait, 0.001))
        if ended.is_set():
            break
    return list(await asyncio.gather(*running))


def main() -> None:
    """Run until standard input ends, then write the requests as JSON."""
    requests = asyncio.run(_work("--new" in sys.argv, "--slow" in sys.argv, "--hosted" in sys.argv))
    json.dump(requests, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
