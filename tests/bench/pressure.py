"""A botnet of many sources that asks half of one request each, at a server of known capacity.

``python -m tests.bench pressure``.  Honest clients come all the while, a third of them slow: they
take a second and a half to ask.  The server reads no more than `CAPACITY` connections at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

from rstguard.kernel.command import own_program
from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_least, seen
from tests.bench.gateway import PORT, SERVER, Site, allow_files, cpu_seconds, policy_of
from tests.support.sources import give_sources

CAPACITY: Final = 768
BOTS, NEW_A_SECOND = 5000, 500
GOAL_PERCENT: Final = 97.0
_SECONDS: Final = 20
_CALM: Final = 3
_HONEST_A_SECOND: Final = 40
_BOTS: Final = ("--network", "10.192.0.0/11", "--apart", "256")
_RULE = "name: unanswered, measure: unanswered, over: 30s, then: {then}"

_SERVER = """\
import select, socket, sys
listener = socket.create_server(("", int(sys.argv[1])), backlog=512)
most, held, poll = int(sys.argv[2]), {}, select.epoll()
listener.setblocking(False)
poll.register(listener, select.EPOLLIN)
listens = True
print("ready", flush=True)
while True:
    for number, _ in poll.poll():
        if number == listener.fileno():
            try:
                one = listener.accept()[0]
            except OSError:
                continue
            one.setblocking(False)
            held[one.fileno()] = [one, b""]
            poll.register(one, select.EPOLLIN)
        else:
            entry = held[number]
            try:
                more = entry[0].recv(4096)
            except OSError:
                more = b""
            entry[1] += more
            whole = entry[1].endswith(b"\\r\\n\\r\\n")
            if whole:
                entry[0].send(b"HTTP/1.1 200 OK\\r\\nContent-Length: 200\\r\\n\\r\\n" + bytes(200))
            if whole or not more:
                poll.unregister(number)
                held.pop(number)[0].close()
        wanted = len(held) < most
        if wanted != listens:
            (poll.register(listener, select.EPOLLIN) if wanted else poll.unregister(listener))
            listens = wanted
"""

_HONEST = """\
import asyncio, json, socket, sys, time
target, rate = (sys.argv[1], int(sys.argv[2])), int(sys.argv[3])

async def fetch(number):
    one = socket.socket()
    one.setblocking(False)
    one.setsockopt(0, 15, 1)
    one.bind((f"10.{180 + number // 250 % 10}.{number % 250}.1", 0))
    slow, began = number % 3 == 0, time.monotonic()
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(5):
            await loop.sock_connect(one, target)
            await loop.sock_sendall(one, b"GET / HTTP/1.1\\r\\n")
            for part in (b"Host: example.org\\r\\n", b"Accept: */*\\r\\n", b"\\r\\n"):
                await asyncio.sleep(slow * 0.5)
                await loop.sock_sendall(one, part)
            served = (await loop.sock_recv(one, 4096)).startswith(b"HTTP/1.1 200")
    except (OSError, TimeoutError):
        served = False
    one.close()
    return began, slow, served

async def work():
    loop, ended, running = asyncio.get_running_loop(), asyncio.Event(), []
    loop.add_reader(0, ended.set)
    print("ready", flush=True)
    while not ended.is_set():
        running.append(asyncio.create_task(fetch(len(running))))
        await asyncio.sleep(1 / rate)
    print(json.dumps(await asyncio.gather(*running)))

asyncio.run(work())
"""


def pressure() -> Iterator[Figure]:
    """Honest requests served under a botnet's half requests, without and with a rule."""
    allow_files(BOTS + 1000)
    stated = f"\npressure: {{capacity: {{{PORT}: {CAPACITY}}}}}\nrules:"
    acting = policy_of(_RULE.format(then="reset"))
    ways = {
        "without": policy_of(_RULE.format(then="observe")),
        "capacity stated": acting.replace("\nrules:", stated),
        "what it bore learned": acting,
    }
    for name, policy in ways.items():
        requests, cpu = _attacked(policy)
        quick, slow = ([one[2] for one in requests if one[1] == kind] for kind in (False, True))
        note = f"{len(quick)} quick ones and {len(slow)} of 1.5 s, from the attack's start on"
        all_ = _percent(quick + slow)
        figure = f"botnet of {BOTS:,}, {name}: honest requests served"
        if name == "capacity stated":
            yield at_least(GOAL_PERCENT, figure, [all_], "%", note)
        else:
            yield seen(figure, [all_], "%", note)
        yield seen(f"botnet, {name}: of the quick ones", [_percent(quick)], "%")
        yield seen(f"botnet, {name}: of those that take 1.5 s", [_percent(slow)], "%")
        yield seen(f"botnet, {name}: the sweeper", [100 * cpu / _SECONDS], "% of a core")


def _attacked(policy: str) -> tuple[list[tuple[float, bool, bool]], float]:
    """Return the honest requests under attack, and the processor time of the sweeper."""
    with Site() as site, ExitStack() as stack:
        give_sources(site)
        guard = site.guard(policy)
        stack.callback(guard.stop)
        _script(site, stack, "server", _SERVER, PORT, CAPACITY)
        honest = _script(site, stack, "client", _HONEST, SERVER, PORT, _HONEST_A_SECOND)
        time.sleep(_CALM)
        sweeper = guard.status()["sweeper"]["pid"]
        began, used = time.monotonic(), cpu_seconds(sweeper)
        how_many = ("--sources", BOTS, "--rate", NEW_A_SECOND, "--seconds", 2 * _SECONDS)
        crowd = own_program("rstguard.lab.crowd", *map(str, (SERVER, PORT, *_BOTS, *how_many)))
        bots = _program(site, stack, "client", crowd)
        wait_until(lambda: time.monotonic() - began >= _SECONDS, _SECONDS + 5)
        used = cpu_seconds(sweeper) - used
        last = time.monotonic() - 5  # whoever came later has not had his time
        assert honest.stdin
        assert honest.stdout
        honest.stdin.close()
        requests = json.loads(honest.stdout.read())
        bots.kill()
    return [one for one in requests if began <= one[0] <= last], used


def _script(
    site: Site, stack: ExitStack, place: str, text: str, *arguments: object
) -> subprocess.Popen[bytes]:
    return _program(site, stack, place, [sys.executable, "-c", text, *map(str, arguments)])


def _program(
    site: Site, stack: ExitStack, place: str, command: list[str]
) -> subprocess.Popen[bytes]:
    with site.inside(place):
        program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.callback(program.wait)
    stack.callback(program.kill)
    assert program.stdout
    assert program.stdout.readline() == b"ready\n"
    return program


def _percent(served: list[bool]) -> float:
    return 100 * sum(served) / max(len(served), 1)
