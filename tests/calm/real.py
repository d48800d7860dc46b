"""`python -m tests.calm.real`: all kinds of clients as real sockets, beside a real guard.

In namespaces of its own, the tracker's time-outs shortened, so that what is silent for half a
minute is forgotten and has to be taken up again.

MINUTES=60    how long at each policy
POLICY=NAME   one sample alone
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse
from tests.calm.conversation import drawn
from tests.calm.expected import ANNOUNCED, texts
from tests.calm.kinds import KINDS, End, Kind
from tests.calm.script import Script, script
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import give_sources, server_address, source
from tests.support.traffic import bind

_SETTLES: Final = 30.0
"""Seconds over which clients come at the beginning; who comes seldom, over his longest pause."""
_PATIENCE: Final = 60.0
"""Seconds that an end waits for what the other should have sent."""
_CHUNK: Final = 1 << 16
_TIMEOUTS: Final = {
    "established": 25, "close_wait": 10, "fin_wait": 10, "time_wait": 10, "last_ack": 10,
    "unacknowledged": 25, "max_retrans": 25,
}  # fmt: skip
"""The tracker's, in seconds."""
_SEVERE: Final = ("ban", "shun", "reset", "drop")


class Hour:
    """Clients of all kinds between real hosts, for some seconds; what broke, by kind."""

    def __init__(self, network: ThreeHosts, seconds: float, seed: int = 1) -> None:
        self.visited: Counter[str] = Counter()
        self.broken: dict[str, list[str]] = {}
        self._network, self._draw = network, random.Random(seed)
        self._began = time.monotonic()
        self._until = self._began + seconds
        self._scripts: dict[tuple[str, int], Script] = {}
        self._addresses: dict[str, str] = {}

    async def run(self) -> None:
        """Let all happen."""
        async with contextlib.AsyncExitStack() as stack:
            ports = {port for kind in KINDS if kind.ends is not End.REFUSED for port in kind.ports}
            for port in ports:
                for v6 in (False, True):
                    listener = self._network.listen("server", port, v6)
                    server = await asyncio.start_server(self._serve, sock=listener)
                    await stack.enter_async_context(server)
            async with asyncio.TaskGroup() as group:
                for kind in KINDS:
                    for number in range(kind.clients):
                        v6 = not kind.shares and number % 3 == 2
                        group.create_task(self._visit(kind, self._address(kind, v6), v6))

    def _address(self, kind: Kind, v6: bool) -> str:
        if not kind.shares:
            return source(v6)
        return self._addresses.setdefault(kind.shares, source(False))

    async def _visit(self, kind: Kind, address: str, v6: bool) -> None:
        await asyncio.sleep(
            min(
                self._draw.uniform(0, max(_SETTLES, kind.pause[1])),
                max(0.0, self._until - time.monotonic()),
            )
        )
        while time.monotonic() < self._until:
            async with asyncio.TaskGroup() as group:
                for port in kind.ports:
                    for _ in range(round(drawn(self._draw, kind.together))):
                        group.create_task(self._connect(kind, address, port, v6))
            pause = drawn(self._draw, kind.pause)
            if time.monotonic() + pause >= self._until:
                return
            await asyncio.sleep(pause)

    async def _connect(self, kind: Kind, address: str, port: int, v6: bool) -> None:
        self.visited[kind.name] += 1
        one = self._socket(address, v6)
        loop = asyncio.get_running_loop()
        own = one.getsockname()[:2]
        drawn_up = script(kind, self._draw, max(0.0, self._until - time.monotonic()))
        self._scripts[own] = drawn_up
        try:
            async with asyncio.timeout(_PATIENCE):
                await loop.sock_connect(one, (server_address(v6), port))
            if kind.ends is End.REFUSED:
                self._broke(kind, "it was not refused")
                return
            await self._talk(one, drawn_up)
        except ConnectionRefusedError:
            if kind.ends is not End.REFUSED:
                self._broke(kind, "refused")
        except (OSError, EOFError) as error:
            self._broke(kind, f"client: {error!r}")
        finally:
            self._scripts.pop(own, None)
            one.close()

    def _socket(self, address: str, v6: bool) -> socket.socket:
        with self._network.inside("client"):
            one = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
        bind(one, address)
        one.setblocking(False)
        return one

    async def _talk(self, one: socket.socket, drawn_up: Script) -> None:
        """Be the client; `drawn_up` says what of."""
        loop, kind, began = asyncio.get_running_loop(), drawn_up.kind, time.monotonic()
        for number, turn in enumerate(drawn_up.turns):
            if turn.says:
                await asyncio.sleep(turn.pause)
                await loop.sock_sendall(one, bytes(turn.says))
            if not kind.window and number == len(drawn_up.turns) - 1:
                await asyncio.sleep(drawn_up.lasts)
            await self._take(one, turn.answers, turn.wait + (0 if turn.says else turn.pause))
        await asyncio.sleep(max(0.0, began + drawn_up.lasts - time.monotonic()))
        if kind.ends is End.ABORT:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        if kind.ends is not End.SERVER:
            one.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(_PATIENCE):
            if await loop.sock_recv(one, 1):
                raise EOFError("more than was to come")

    @staticmethod
    async def _take(one: socket.socket, count: int, wait: float) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_PATIENCE + wait):
            while count:
                data = await loop.sock_recv(one, min(count, _CHUNK))
                if not data:
                    raise EOFError(f"closed, {count} bytes before the end")
                count -= len(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        drawn_up = self._scripts.get(writer.get_extra_info("peername")[:2])
        try:
            if drawn_up is not None:
                await self._answer(reader, writer, drawn_up)
        except (OSError, EOFError) as error:
            if drawn_up is not None and drawn_up.kind.ends is not End.ABORT:
                self._broke(drawn_up.kind, f"server: {error!r}")
        finally:
            writer.close()

    @staticmethod
    async def _answer(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, drawn_up: Script
    ) -> None:
        began = time.monotonic()
        for turn in drawn_up.turns:
            if turn.says:
                async with asyncio.timeout(_PATIENCE + turn.pause):
                    await reader.readexactly(turn.says)
            await asyncio.sleep(turn.wait + (0 if turn.says else turn.pause))
            writer.write(bytes(turn.answers))
            await writer.drain()
        if drawn_up.kind.ends is End.SERVER:
            await asyncio.sleep(max(0.0, began + drawn_up.lasts - time.monotonic()))
            return
        if await reader.read(1):
            raise EOFError("more than was to come")

    def _broke(self, kind: Kind, what: str) -> None:
        after = f"after {time.monotonic() - self._began:.0f} s: {what}"
        self.broken.setdefault(kind.name, []).append(after)


def _fitted(text: str) -> str:
    """Return a sample, changed in nothing but interfaces and addresses."""
    text = re.sub(r"interfaces: \[[^]]*\]", "interfaces: [out]", text)
    servers = f'"{server_address(v6=False)}", "{server_address(v6=True)}"'
    text = re.sub(r"destinations: \[[^]]*\]", f"destinations: [{servers}]", text)
    return re.sub(r"^trusted: \[[^]]*\]", "trusted: [192.0.2.0/24]", text, flags=re.MULTILINE)


def _tried(name: str, text: str, seconds: float, directory: Path) -> Iterator[tuple[str, bool]]:
    """Yield what is to be said of one sample, and whether it hurt somebody unannounced."""
    with ThreeHosts() as network:
        give_sources(network)
        base = "net/netfilter/nf_conntrack_tcp_timeout_"
        network.set("gateway", {f"{base}{state}": str(s) for state, s in _TIMEOUTS.items()})
        with Guard(network, _fitted(text), directory) as guard:
            hour = Hour(network, seconds)
            asyncio.run(hour.run())
            status = guard.status()
    announced = [one for one in ANNOUNCED if one.policy == name]
    kinds = frozenset[str]().union(*(one.who for one in announced))
    rules = frozenset[str]().union(*(one.rules for one in announced))
    yield f"{name}: {seconds / 60:g} minutes, {hour.visited.total():,} connections", False
    for kind, said in sorted(hour.broken.items()):
        yield (
            f"  {kind}: {len(said)} of {hour.visited[kind]} broke, first {said[0]}",
            (kind not in kinds),
        )
    enforces = compile_policy(parse(text, name).policy).enforce
    for action in _SEVERE:
        for rule, count in sorted(status["counts"].get(action, {}).items()):
            yield f"  rule {rule}: {action}, {count} times", enforces and rule not in rules


def main() -> int:
    """Run what the environment asks for; return the exit status."""
    seconds = 60 * float(os.environ.get("MINUTES", "60"))
    only = os.environ.get("POLICY")
    hurt = False
    for name, text in texts().items():
        if name.startswith("new") or only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as directory:
            for line, bad in _tried(name, text, seconds, Path(directory)):
                print(f"{line}{'  FINDING' if bad else ''}", flush=True)
                hurt |= bad
    return hurt


if __name__ == "__main__":
    sys.exit(main())
