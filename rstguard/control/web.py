"""The read-only web page and the metrics: GET only, on loopback unless told otherwise.

It runs in the supervisor's loop.  What it answers is at most a second old, however many ask; of
those who connect and ask nothing, or do not read, the longest silent goes when there are too many.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import socket
from importlib.resources import files
from typing import Any, Final

import h11

from rstguard.control.crowd import ACCEPTED_AT_ONCE, BACKLOG, Crowd, Guest
from rstguard.ipc.requests import Answer
from rstguard.kernel import KernelError
from rstguard.observe.events import sentence
from rstguard.observe.metrics import CONTENT_TYPE, exposition

log = logging.getLogger(__name__)

MOST_CONNECTIONS: Final = 64
PATIENCE: Final = 5.0
"""Seconds that a whole request and its answer may take."""
LARGEST: Final = 8192
"""Bytes of a request."""
_FRESH: Final = 1.0
_HEADERS: Final = (
    (
        "Content-Security-Policy",
        (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
    ("Connection", "close"),
)

Reply = tuple[int, str, bytes]


def listen(where: str, anywhere: bool = False) -> socket.socket:
    """Return a socket that listens at ``address:port``.

    Raises:
        KernelError: no such address, not loopback although not `anywhere`, or in use.
    """
    host, _, number = where.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
        port = int(number)
        if not 0 <= port <= 65535:
            raise ValueError
    except ValueError:
        raise KernelError(
            f"{where!r} is no address and port; say for example 127.0.0.1:9788 or [::1]:9788"
        ) from None
    if not address.is_loopback and not anywhere:
        raise KernelError(
            f"the web page would be open to others at {address}, without a password; "
            "use 127.0.0.1, or add --http-anywhere if that is meant"
        )
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        return socket.create_server((str(address), port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise KernelError(
            f"the web page cannot listen at {where} ({error.strerror}); "
            "name another address and port with --http"
        ) from None


async def run(listener: socket.socket, answer: Answer) -> None:
    """Serve until cancelled."""
    web = Web(listener.getsockname()[0], answer)
    server = await asyncio.start_server(
        web.talk, sock=listener, limit=LARGEST, backlog=ACCEPTED_AT_ONCE
    )
    listener.listen(BACKLOG)
    async with server:
        await server.serve_forever()


class Web:
    """Answers requests with what `answer` tells of the guard."""

    def __init__(self, host: str, answer: Answer) -> None:
        self._names = {host, "localhost"}
        self._answer = answer
        self._crowd = Crowd(MOST_CONNECTIONS, MOST_CONNECTIONS * LARGEST, MOST_CONNECTIONS)
        self._page = files("rstguard.observe").joinpath("page.html").read_bytes()
        self._asking = asyncio.Lock()
        self._snapshot: Any = None
        self._taken: float | None = None

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close."""
        try:
            with self._crowd.entered(writer, _address(writer)) as guest:
                async with asyncio.timeout(PATIENCE):
                    await self._talk(reader, guest)
        except (OSError, TimeoutError):
            pass  # the peer has gone, or takes too long
        except Exception:
            log.exception("a request to the web page failed")
        finally:
            # Waits for nobody: what a peer does not take in time is not sent.
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _talk(self, reader: asyncio.StreamReader, guest: Guest) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=LARGEST)
        method = b"GET"
        try:
            while (event := connection.next_event()) is h11.NEED_DATA:
                connection.receive_data(await reader.read(LARGEST))
            if not isinstance(event, h11.Request):
                return
            method = event.method
            if self._crowd.full:
                status, kind, body = _sentence(503, "too many others ask at this moment: try again")
            else:
                with self._crowd.answering(guest):
                    status, kind, body = await self._reply(event)
        except h11.RemoteProtocolError as error:
            status, kind, body = _sentence(error.error_status_hint, "this is no request")
        if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), *_HEADERS]
        if status == 405:
            headers.append(("Allow", "GET, HEAD"))
        head = connection.send(h11.Response(status_code=status, headers=headers))
        guest.writer.write(head if method == b"HEAD" else head + body)
        await guest.writer.drain()

    async def _reply(self, request: h11.Request) -> Reply:
        if request.method not in (b"GET", b"HEAD"):
            return _sentence(405, "only GET and HEAD are answered")
        host = next((value for name, value in request.headers if name == b"host"), b"").decode(
            "latin-1"
        )
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in self._names and not _is_literal(name):
            # A name of somebody else's that leads here; an address cannot be one.
            return _sentence(421, "ask by the address that the guard was given, or as localhost")
        match request.target.partition(b"?")[0]:
            case b"/":
                return 200, "text/html; charset=utf-8", self._page
            case b"/status.json":
                nearest = await self._answer({"command": "nearest"})
                status = await self._status()
                recent = [event | {"text": sentence(event)} for event in status["recent"]]
                body = json.dumps(status | {"nearest": nearest, "recent": recent}).encode()
                return 200, "application/json", body
            case b"/metrics":
                return 200, CONTENT_TYPE, exposition(await self._status())
        return _sentence(404, "there are /, /metrics and /status.json")

    async def _status(self) -> Any:
        async with self._asking:
            now = asyncio.get_running_loop().time()
            if self._taken is None or now - self._taken >= _FRESH:
                self._snapshot = await self._answer({"command": "status"})
                self._taken = asyncio.get_running_loop().time()
            return self._snapshot


def _address(writer: asyncio.StreamWriter) -> str:
    """Return the address at the other end, or "" if it has gone already."""
    peer = writer.get_extra_info("peername")
    return str(peer[0]) if peer else ""


def _is_literal(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _sentence(status: int, text: str) -> Reply:
    return status, "text/plain; charset=utf-8", f"{text}\n".encode()
