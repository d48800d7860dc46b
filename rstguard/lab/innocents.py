"""Those at whose cost an attack is made: each holds a connection through the gateway.

A program of its own (``python -m rstguard.lab.innocents --idle N --busy N``): each innocent has an
address of his own, connects and makes one request.  Then it writes the line ``ready``.  The busy
ones go on to make requests, the idle ones are silent, until standard input is closed.  At last each
makes one more request on the connection that he has, and one on a new connection; what came of it
is written as one line of JSON, a list of `Innocent`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from contextlib import suppress
from ipaddress import ip_network
from itertools import islice
from typing import NamedTuple

from rstguard.lab.client import fetch
from rstguard.lab.server import BODY
from rstguard.lab.topology import INNOCENTS, SERVER

_REQUEST = b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n"
_BETWEEN = 0.05
"""Seconds between two requests of a busy innocent."""
_PATIENCE = 4.0
"""Seconds to wait for the last answers: the second or third SYN may be the first to get through."""


class Innocent(NamedTuple):
    """One innocent: whether his old connection carries data, and whether he gets a new one."""

    source: str
    keeps: bool
    served: bool


class _Connection:
    """A connection that is used again and again."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.works = True
        """False from the first request on that was not answered."""

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(
            SERVER, 80, local_addr=(self.source, 0)
        )

    async def ask(self) -> None:
        """Make a request and see whether the answer comes."""
        try:
            async with asyncio.timeout(_PATIENCE):
                self._writer.write(_REQUEST)
                self.works &= (await self._reader.readuntil(BODY.encode())).startswith(
                    b"HTTP/1.1 2"
                )
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            self.works = False

    async def be_busy(self, over: asyncio.Event) -> None:
        """Make requests until it is over, or one fails."""
        while self.works and not over.is_set():
            await self.ask()
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), _BETWEEN)

    async def last_words(self) -> Innocent:
        """Return how it stands now."""
        if self.works:
            await self.ask()
        served = not (await fetch(self.source, timeout=_PATIENCE)).failure
        return Innocent(self.source, self.works, served)


async def _live(idle: int, busy: int) -> list[Innocent]:
    names = map(str, islice(ip_network(INNOCENTS).hosts(), idle + busy))
    connections = [_Connection(name) for name in names]
    await asyncio.gather(*(one.open() for one in connections))
    await asyncio.gather(*(one.ask() for one in connections))
    if not all(one.works for one in connections):
        sys.exit("An innocent was not served before the attack.")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)
    await asyncio.gather(over.wait(), *(one.be_busy(over) for one in connections[idle:]))
    return await asyncio.gather(*(one.last_words() for one in connections))


def main() -> None:
    """Live as the command line says, then write how it ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idle", type=int, required=True)
    parser.add_argument("--busy", type=int, required=True)
    options = parser.parse_args()
    json.dump(asyncio.run(_live(options.idle, options.busy)), sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
