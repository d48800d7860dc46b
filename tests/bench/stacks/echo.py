"""The echo server behind libslirp: it ends TCP itself and speaks to this machine's loopback.

echo.py PORT PROGRAM...: serve, and run a program.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys

_open = 0


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    global _open  # noqa: PLW0603 - one number for all connections
    _open += 1
    with contextlib.suppress(OSError):
        while data := await reader.read(100):
            if data[:1] == b"!":
                one: socket.socket = writer.get_extra_info("socket")
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                break
            writer.write(b"%d\n" % _open if data[:1] == b"?" else data)
    _open -= 1
    writer.transport.abort()


async def _main() -> None:
    await asyncio.start_server(_serve, "127.0.0.1", int(sys.argv[1]))
    subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *sys.argv[2:]])
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
