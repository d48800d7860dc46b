"""A flood of SYNs from sources that nobody stands behind, as fast as one core sends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rstguard.lab.bench.floods import trafgen_syn
from tests.support.network import SERVER4, ThreeHosts


@contextmanager
def syn_flood(
    lab: ThreeHosts, directory: Path, sources: str, port: int, core: int | None = None
) -> Iterator[None]:
    """Flood a port of the server, from one core if it is named.

    `sources` are the bytes of the address in trafgen's language.
    """
    shown = json.loads(lab.run("gateway", "ip", "-j", "link", "show", "out"))
    file = directory / "syn.trafgen"
    file.write_text(trafgen_syn(sources, SERVER4, port, shown[0]["address"]))
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
