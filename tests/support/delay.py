"""A wire that takes time: ``python -m tests.support.delay MILLISECONDS DEVICE DEVICE``.

What comes in on one device leaves by the other, so much later; the kernel here has no netem.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque

_ALL = 0x0003
_SOL_PACKET, _VNET_HEADER, _OUTGOING = 263, 15, 4
"""From linux/if_packet.h.  With the header, segments and checksums that wait to be made stay so."""
_LONGEST = 1 << 17


def _open(device: str) -> socket.socket:
    one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
    one.setsockopt(_SOL_PACKET, _VNET_HEADER, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 20)
    one.bind((device, _ALL))
    one.setblocking(False)
    return one


def carry(delay: float, one: socket.socket, other: socket.socket) -> None:
    """Carry frames both ways, until ended."""
    across = {one.fileno(): (one, other), other.fileno(): (other, one)}
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    poll = select.poll()
    for number in across:
        poll.register(number, select.POLLIN)
    while True:
        left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 1.0
        for number, _ in poll.poll(1000 * left):
            come, go = across[number]
            try:
                for _ in range(64):
                    frame, address = come.recvfrom(_LONGEST)
                    if address[2] != _OUTGOING:
                        waiting.append((time.monotonic() + delay, go, frame))
            except BlockingIOError:
                pass
        while waiting and waiting[0][0] <= time.monotonic():
            _, go, frame = waiting.popleft()
            try:
                go.send(frame)
            except OSError as error:  # as on any wire: what does not fit is lost
                print(error, file=sys.stderr, flush=True)


if __name__ == "__main__":
    print("ready", flush=True)
    carry(float(sys.argv[1]) / 1000, *map(_open, sys.argv[2:]))
