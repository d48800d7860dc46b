"""The control socket: one JSON request a line, one JSON answer a line.

A request is ``{"command": NAME, ...}``; the answer is ``{"ok": true, "data": ...}`` or
``{"ok": false, "error": "one sentence"}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import pwd
import socket
import struct
from pathlib import Path
from typing import Any, Final

from rstguard.control.crowd import ACCEPTED_AT_ONCE, BACKLOG, Crowd, Guest
from rstguard.control.lines import line_of, list_line, parsed, refusal, told
from rstguard.ipc.requests import Answer, ControlError, Request
from rstguard.kernel import KernelError
from rstguard.observe.text import plain

log = logging.getLogger(__name__)

SOCKET_NAME = "control.sock"
GROUP = "rstguard"
LARGEST: Final = 2 << 20
"""Bytes of a request: 25,000 bans take 1.5 MB, a policy of 64 KiB at most 400 kB of JSON."""
MOST_CONNECTED: Final = 64
MOST_ANSWERED: Final = 256
"""Whoever asks while so many wait for their answers is told to try again."""
PATIENCE: Final = 60.0
"""Seconds in which a request is to arrive, and its answer is to be read."""
_MOST_HELD: Final = 16 << 20
_AT_ONCE: Final = 64 << 10
"""Bytes that are read at once; what is longer is taken apart and put together in a thread."""
_CREDENTIALS = struct.Struct("iII")
_MANY: Final = 50
"""Rows of a list from which on its answer is made in a thread."""


class NoDaemon(ControlError):
    """No guard answers at the socket."""


class _TooLong(Exception):
    """More bytes than a request may have."""


async def serve(directory: Path, answer: Answer) -> asyncio.Server:
    """Listen in `directory`; the socket is for root, and for the group rstguard if there is one.

    Raises:
        KernelError: no socket can be made there.
    """
    listener = _listener(directory / SOCKET_NAME)
    talk = _Conversations(answer).talk
    server = await asyncio.start_unix_server(
        talk, sock=listener, limit=_AT_ONCE, backlog=ACCEPTED_AT_ONCE
    )
    listener.listen(BACKLOG)
    return server


def _listener(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    old = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise KernelError(
            f"the control socket {path} cannot be made ({error.strerror or error}); "
            "name another --runtime-dir"
        ) from None
    finally:
        os.umask(old)
    with contextlib.suppress(KeyError, PermissionError):
        os.chown(path, -1, grp.getgrnam(GROUP).gr_gid)
        path.chmod(0o660)
    return listener


class _Conversations:
    """Talks to all who are connected."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._crowd = Crowd(MOST_CONNECTED, _MOST_HELD, MOST_ANSWERED)
        self._turn = asyncio.Lock()
        """Of those who have had an answer and want another."""
        self._large = asyncio.Lock()
        """Of long requests and answers: of many threads at work each would delay the loop."""

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one after the other what somebody asks."""
        user = _user(writer)
        try:
            with self._crowd.entered(writer, user) as guest, contextlib.suppress(ConnectionError):
                account = await asyncio.to_thread(_account, user) if user else "root"
                while line := await self._heard(reader, guest):
                    await self._reply(guest, line, account)
            writer.close()
        except TimeoutError:
            writer.transport.abort()  # else it would go on waiting for its reader

    async def _heard(self, reader: asyncio.StreamReader, guest: Guest) -> bytes:
        """Return the next request, or b"" if there will be none."""
        async with asyncio.timeout(PATIENCE):
            try:
                return await _request(reader, guest, self._crowd)
            except _TooLong:
                said = refusal(f"the request is too long (over {LARGEST >> 20} MiB)")
                guest.writer.write(said)
                await guest.writer.drain()
                return b""

    async def _reply(self, guest: Guest, line: bytes, account: str) -> None:
        if self._crowd.full:
            said = refusal("the guard answers too many others at this moment: try again")
        else:
            with self._crowd.answering(guest):
                said = await self._answered(line, account)
        self._crowd.holds(guest, 0)
        async with asyncio.timeout(PATIENCE):
            guest.writer.write(said)
            await guest.writer.drain()
        # Who sends many questions at once has one answered in a pass of the loop, in turn with
        # others who do, so that whoever asks only once need not wait for them.
        async with self._turn:
            await asyncio.sleep(0)

    async def _answered(self, line: bytes, account: str) -> bytes:
        try:
            data = await self._answer(await self._read(line) | {"account": account})
        except ControlError as error:
            return refusal(str(error))
        except Exception:
            log.exception("a request failed")
            return refusal("the guard failed on this request; its log says more")
        if isinstance(data, list) and len(data) > _MANY:
            async with self._large:
                return await asyncio.to_thread(list_line, data)
        return line_of({"ok": True, "data": data})

    async def _read(self, line: bytes) -> Request:
        if len(line) <= _AT_ONCE:
            return parsed(line)
        async with self._large:
            return await asyncio.to_thread(parsed, line)


async def _request(reader: asyncio.StreamReader, guest: Guest, crowd: Crowd) -> bytes:
    """Return the next line, or b"" at the end.

    Raises:
        _TooLong: it is longer than `LARGEST`.
    """
    held = bytearray()
    while True:
        try:
            return bytes(held + await reader.readuntil())
        except asyncio.IncompleteReadError:
            return b""
        except asyncio.LimitOverrunError as over:
            held += await reader.readexactly(over.consumed)
        if len(held) > LARGEST:
            raise _TooLong
        crowd.holds(guest, len(held))


def _user(writer: asyncio.StreamWriter) -> int:
    """Return the number of the account at the other end, as the kernel knows it (unix(7))."""
    raw = writer.get_extra_info("socket").getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
    )
    number: int = _CREDENTIALS.unpack(raw)[1]
    return number


def _account(number: int) -> str:
    try:
        return plain(pwd.getpwuid(number).pw_name)
    except KeyError:
        return f"account {number}"


def listens(directory: Path) -> bool:
    """Tell whether a guard has its socket in a directory, also one that does not answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect(str(directory / SOCKET_NAME))
        except BlockingIOError:  # it is there, and many wait for it
            return True
        except OSError:
            return False
    return True


def ask(directory: Path, request: Request, timeout: float = 30.0) -> Any:
    """Send one request to the guard of a runtime directory and return the data it answers.

    Raises:
        NoDaemon: nobody listens there.
        ControlError: the guard refused; the text is its sentence.
    """
    path = directory / SOCKET_NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            raise NoDaemon(
                f"no guard is running with the runtime directory {directory}; "
                "start it with `rstguard run --policy FILE`, or name another with --runtime-dir"
            ) from None
        except PermissionError:
            raise ControlError(
                f"you may not talk to the guard at {path}; run this as root or join group {GROUP}"
            ) from None
        except (BlockingIOError, TimeoutError):
            raise ControlError(
                f"too many wait for the guard at {path}, or it hangs; try again"
            ) from None
        except OSError as error:
            raise ControlError(f"{path} cannot be used ({error.strerror or error})") from None
        try:
            client.sendall(line_of(request))
            with client.makefile("rb") as stream:
                line = stream.readline()
        except TimeoutError:
            raise ControlError(f"the guard did not answer within {timeout:.0f} s") from None
        except OSError as error:
            raise ControlError(f"the connection to the guard broke ({error.strerror})") from None
    if not line:
        raise NoDaemon("the guard stopped before it answered, or too many ask it: try again")
    return told(line)
