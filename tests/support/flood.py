"""A flood of SYNs from sources that nobody stands behind, as fast as one core sends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.network import SERVER4, ThreeHosts

_SYN = """{{
  {mac}, 0x02,0x00,0x00,0x00,0x00,0x66, const16(0x0800),
  0x45, 0, const16(40), drnd(2), 0x40, 0, 64, 6, csumip(14, 33),
  {sources}, {target},
  drnd(2), const16({port}), drnd(4), const32(0), const16(0x5002), const16(64240),
  csumtcp(14, 34), const16(0)
}}
"""


@contextmanager
def syn_flood(
    lab: ThreeHosts, directory: Path, sources: str, port: int, core: int | None = None
) -> Iterator[None]:
    """Flood a port of the server, from one core if it is named.

    `sources` are the bytes of the address in trafgen's language.
    """
    shown = json.loads(lab.run("gateway", "ip", "-j", "link", "show", "out"))
    mac = ",".join(f"0x{byte}" for byte in shown[0]["address"].split(":"))
    file = directory / "syn.trafgen"
    target = SERVER4.replace(".", ",")
    file.write_text(_SYN.format(mac=mac, sources=sources, target=target, port=port))
    command = ["trafgen", "-i", str(file), "-o", "eth0", "-P", "1", "-C", "-t", "1us"]
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    quiet = subprocess.DEVNULL
    with lab.inside("client"):
        sender = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(sender.pid, signal.SIGKILL)  # it sends in a process of its own
        sender.wait()
