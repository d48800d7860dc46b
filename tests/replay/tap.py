"""A capture of what passes the gateway of the test network, while the guard is at work there."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rstguard.engine.ruleset import SECOND
from rstguard.replay.capture import Batch
from tests.replay.captures import pcap
from tests.support.network import ThreeHosts

_SO_TIMESTAMPNS = 35


@contextmanager
def captured(lab: ThreeHosts, file: Path) -> Iterator[Callable[[], int]]:
    """Write what passes the gateway's outer interface to a file; give a count of its packets."""
    with lab.inside("gateway"):
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    tap.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE
    tap.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    tap.bind(("out", 3))
    tap.settimeout(0.2)
    frames: Batch = []
    over = threading.Event()

    def read() -> None:
        while True:
            try:
                data, ancillary, _, _ = tap.recvmsg(1 << 17, 64)
            except TimeoutError:
                if over.is_set():
                    return
                continue
            seconds, rest = struct.unpack("=qq", ancillary[0][2])
            frames.append((seconds * SECOND + rest, data[:256]))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield lambda: len(frames)
    finally:
        over.set()
        thread.join()
        tap.close()
        file.write_bytes(pcap(frames, link=1))
