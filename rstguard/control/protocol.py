"""The control socket: one JSON request a line, one JSON answer a line.

A request is ``{"command": NAME, ...}``; the answer is ``{"ok": true, "data": ...}`` or
``{"ok": false, "error": "one sentence"}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import logging
import os
import pwd
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rstguard.ipc.requests import Answer, ControlError, Request
from rstguard.kernel import KernelError

log = logging.getLogger(__name__)

SOCKET_NAME = "control.sock"
GROUP = "rstguard"
_LARGEST = 8 << 20  # a policy of 1 MiB, as JSON
_IDLE_SECONDS = 60
_BACKLOG = 1024
_MOST_CONNECTED = 64
_CREDENTIALS = struct.Struct("iII")


class NoDaemon(ControlError):
    """No guard answers at the socket."""


async def serve(directory: Path, answer: Answer) -> asyncio.Server:
    """Listen in `directory`; the socket is for root, and for the group rstguard if there is one.

    Raises:
        KernelError: no socket can be made there.
    """
    path = directory / SOCKET_NAME
    path.unlink(missing_ok=True)

    crowd = _Crowd()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        crowd.enter(writer)
        try:
            with contextlib.suppress(ConnectionError):
                await _talk(reader, writer, answer, crowd)
            writer.close()
        except TimeoutError:
            writer.transport.abort()  # else it would go on waiting for its reader
        finally:
            crowd.leave(writer)

    old = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(talk, path, limit=_LARGEST, backlog=_BACKLOG)
    except OSError as error:
        raise KernelError(
            f"the control socket {path} cannot be made ({error.strerror or error}); "
            "name another --runtime-dir"
        ) from None
    finally:
        os.umask(old)
    with contextlib.suppress(KeyError, PermissionError):
        os.chown(path, -1, grp.getgrnam(GROUP).gr_gid)
        path.chmod(0o660)
    return server


class _Crowd:
    """Who is connected: not more than `_MOST_CONNECTED`, each of whom may hold a long request."""

    def __init__(self) -> None:
        self._silent: dict[asyncio.StreamWriter, None] = {}
        """Those who wait for no answer, the longest silent first."""

    def enter(self, writer: asyncio.StreamWriter) -> None:
        """Let somebody in; whoever has been silent longest goes if there are too many."""
        self._silent[writer] = None
        if len(self._silent) > _MOST_CONNECTED:
            longest = next(iter(self._silent))
            del self._silent[longest]
            longest.transport.abort()

    def leave(self, writer: asyncio.StreamWriter) -> None:
        """Forget somebody."""
        self._silent.pop(writer, None)

    @contextlib.contextmanager
    def served(self, writer: asyncio.StreamWriter) -> Iterator[None]:
        """Count somebody who has asked as not silent until the answer is read."""
        self.leave(writer)
        yield
        self.enter(writer)


async def _talk(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answer, crowd: _Crowd
) -> None:
    account = _account(writer)
    while True:
        try:
            line = await asyncio.wait_for(reader.readline(), _IDLE_SECONDS)
        except ValueError:
            writer.write(_line({"ok": False, "error": "the request is too long (over 8 MiB)"}))
            await writer.drain()
            return
        if not line:
            return
        with crowd.served(writer):
            writer.write(_line(await _answered(line, answer, account)))
            await asyncio.wait_for(writer.drain(), _IDLE_SECONDS)


def _account(writer: asyncio.StreamWriter) -> str:
    """Return the name of the account at the other end, as the kernel knows it (unix(7))."""
    raw = writer.get_extra_info("socket").getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
    )
    number = _CREDENTIALS.unpack(raw)[1]
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"account {number}"


async def _answered(line: bytes, answer: Answer, account: str) -> dict[str, object]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return {"ok": False, "error": "the request is no JSON"}
    if not isinstance(request, dict) or not isinstance(request.get("command"), str):
        return {"ok": False, "error": 'a request is a JSON object with a "command"'}
    try:
        return {"ok": True, "data": await answer(request | {"account": account})}
    except ControlError as error:
        return {"ok": False, "error": str(error)}
    except Exception:
        log.exception("the request %s failed", request["command"])
        return {"ok": False, "error": "the guard failed on this request; its log says more"}


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


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
            client.sendall(_line(request))
            with client.makefile("rb") as stream:
                line = stream.readline()
        except TimeoutError:
            raise ControlError(f"the guard did not answer within {timeout:.0f} s") from None
        except OSError as error:
            raise ControlError(f"the connection to the guard broke ({error.strerror})") from None
    if not line:
        raise NoDaemon("the guard stopped before it answered")
    answer = json.loads(line)
    if not answer["ok"]:
        raise ControlError(answer["error"])
    return answer["data"]
