"""The server under attack: a real nginx with modest limits, and an SSH banner on port 22."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rstguard.kernel.command import own_program
from rstguard.lab import LabError
from rstguard.lab.topology import Lab

BODY = "the lab's server is well\n"
CAPACITY = 512
"""nginx's worker_connections: connections that the server can hold at once."""


def bearable(connections: int) -> int:
    """Return how many of so many worker_connections nginx can hold and still serve who comes.

    With less than a sixteenth of them free it ends those that have not asked yet, in the order in
    which they came (ngx_drain_connections).
    """
    return connections * 15 // 16


_BANNER = "SSH-2.0-OpenSSH_9.6"
_MODULES = (
    Path("/usr/lib/nginx/modules/ngx_stream_module.so"),
    Path("/usr/share/nginx/modules/ngx_stream_module.so"),
)


def start_server(
    lab: Lab, access_log: str = "off", connections: int = CAPACITY, listens: Sequence[str] = ()
) -> None:
    """Start nginx in the server's namespace; the first answered request tells that it is up.

    `access_log` is the name of a log file in the lab's directory, "off" for none; `connections` are
    its worker_connections, and it `listens` where these values of the directive say, beside ports
    22 and 80 of all addresses.

    Raises:
        LabError: nginx is not installed.
    """
    if shutil.which("nginx") is None:
        raise LabError("nginx is missing: apt-get install nginx-light libnginx-mod-stream.")
    stream = _stream_module()
    path = lab.directory / "nginx.conf"
    text = configuration(lab.directory, stream, access_log, connections, listens)
    path.write_text(text, encoding="utf-8")
    lab.start("server", "nginx", "-c", str(path), "-p", str(lab.directory), log="nginx.log")
    if stream is None:
        lab.start("server", *own_program("rstguard.lab.server"), log="banner.log")


def configuration(
    directory: Path,
    stream: str | None,
    access_log: str = "off",
    connections: int = CAPACITY,
    listens: Sequence[str] = (),
) -> str:
    """Return nginx's configuration.

    `stream` is the line that loads the stream module, "" if nginx has it built in, or None if
    there is none.  One listener serves both families, so that a full backlog is full for all.
    An upload is read whole before it is passed on, which is what a slow body lives on.
    """
    banner = f'stream {{ server {{ listen [::]:22 ipv6only=off; return "{_BANNER}\\r\\n"; }} }}'
    temporary = "\n  ".join(
        f"{name}_temp_path {directory / name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    more = " ".join(f"listen {at};" for at in listens)
    page = BODY.replace("\n", "\\n")
    return f"""{stream or ""}
user root;
daemon off;
worker_processes 1;
worker_rlimit_nofile 4096;
pid {directory / "nginx.pid"};
error_log {directory / "nginx-error.log"} crit;
events {{ worker_connections {connections}; multi_accept on; }}
http {{
  access_log {access_log if access_log == "off" else directory / access_log};
  {temporary}
  server {{
    listen [::]:80 ipv6only=off backlog=511; {more}
    default_type text/plain;
    location / {{ return 200 "{page}"; }}
    location /upload {{ proxy_pass http://127.0.0.1:8080; }}
  }}
  server {{
    listen 127.0.0.1:8080;
    location / {{ return 200 "{page}"; }}
  }}
}}
{banner if stream is not None else ""}
"""


def _stream_module() -> str | None:
    built = subprocess.run(["nginx", "-V"], capture_output=True, text=True, check=False).stderr
    if "--with-stream" in built.split():
        return ""
    for path in _MODULES:
        if path.exists():
            return f"load_module {path};"
    return None


async def _serve_banner() -> None:
    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_BANNER.encode() + b"\r\n")
        writer.close()

    server = await asyncio.start_server(greet, None, 22)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve_banner())
