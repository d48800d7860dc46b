"""How many small packets a client has sent beyond those that large data explain.  Pure.

A flood of requests on connections that stay open shows as many small packets.  So do the
acknowledgements of a download, and an upload is many packets, too, but large ones.  The kernel
counts packets and bytes of each direction, not what each packet was, so what is counted here is
what cannot be explained otherwise:

- An upload's packets have `SEGMENT` bytes and more.  The smaller they are on the average, the fewer
  are taken for such.
- A receiver acknowledges each second full segment (RFC 9293, 3.8.6.3; RFC 5681, 4.2): one packet
  for `ACKED` bytes of the server.  It may acknowledge each one, as it does at first and after a
  loss: as long as its packets are bare, one for `SEGMENT` bytes.
- Bare packets have headers alone.  Whoever sends more of them than the server's bytes explain is
  counted none the less.

Where a request is answered by much data it is counted in part, down to a half.  And a client whose
header is shorter than that of most (no time stamps) can pass off tiny requests as acknowledgements
of answers of ten kilobytes and more: those move bytes enough for `byte_rate`.
"""

from __future__ import annotations

from typing import Final

from rstguard.engine.lenient import HEADERS4, HEADERS6

SEGMENT: Final = 1000
"""Bytes below those of a full segment on any usual link."""
ACKED: Final = 3000
"""Bytes of two full segments, with headers."""
LEAST4, LEAST6 = 40, 60
"""Bytes of the shortest packet: headers without options."""
LEAST_DATA: Final = 20
"""Bytes of data in the smallest request."""


def small_packets(packets: int, client: int, server: int, v6: bool) -> int:
    """Return how many a client has sent, by its packets and bytes and its server's bytes.

    Bytes are with IP headers, as the kernel counts.
    """
    packets = min(packets, client // (LEAST6 if v6 else LEAST4))  # of a reused entry: another's
    if packets <= 0 or server < 0:
        return 0
    bare = client - (HEADERS6 if v6 else HEADERS4) * packets
    beyond = packets - (client + server) // SEGMENT
    uploaded = client // SEGMENT * (client // packets) // SEGMENT
    requests = min(packets - uploaded - server // ACKED, bare // LEAST_DATA)
    return max(beyond, requests, 0)
