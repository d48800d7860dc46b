"""One connection as the kernel's table shows it, and how it is named."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from rstguard.engine.address import address_text, is_v6


class TcpState(IntEnum):
    """Connection states of the tracker (linux/netfilter/nf_conntrack_tcp.h)."""

    NONE = 0
    SYN_SENT = 1
    SYN_RECV = 2
    ESTABLISHED = 3
    FIN_WAIT = 4
    CLOSE_WAIT = 5
    LAST_ACK = 6
    TIME_WAIT = 7
    CLOSE = 8
    SYN_SENT2 = 9


HALF_CLOSED = frozenset(
    {TcpState.FIN_WAIT, TcpState.CLOSE_WAIT, TcpState.LAST_ACK, TcpState.TIME_WAIT}
)
"""States that a connection comes to by FINs of its client alone: the tracker takes the second for
its server's, also if it is the first once more (tcp_conntracks in nf_conntrack_proto_tcp.c)."""

BOTH_FINS = frozenset({TcpState.LAST_ACK, TcpState.TIME_WAIT})
"""Those to which it takes two."""

LIVE = frozenset({TcpState.ESTABLISHED, TcpState.FIN_WAIT, TcpState.CLOSE_WAIT})
"""States in which an established connection is still to be judged."""


class Tuple(NamedTuple):
    """Addresses (tagged integers) and ports of one direction of a connection."""

    source: int
    destination: int
    source_port: int
    destination_port: int

    @property
    def turned(self) -> Tuple:
        """The opposite direction, where nothing is translated."""
        return Tuple(self.destination, self.source, self.destination_port, self.source_port)

    def __str__(self) -> str:
        return (
            f"{endpoint(self.source, self.source_port)} > "
            f"{endpoint(self.destination, self.destination_port)}"
        )


class Flow(NamedTuple):
    """One TCP entry of the connection table.

    `original` is what the client sent, `reply` what the server sends; with NAT they are not each
    other's mirror.  Bytes and packets are counted by the kernel since the connection began
    (IP headers included), and are 0 while accounting is off.  `age` is in nanoseconds, or -1 while
    the kernel does not stamp connections.  `timeout` is what the entry has left, in seconds.
    `labels` has a bit for each connection label that is set.  `server_first`: the first FIN was the
    server's.
    """

    ident: int
    original: Tuple
    reply: Tuple
    state: int
    mark: int
    seen_reply: bool
    client_packets: int
    client_bytes: int
    server_packets: int
    server_bytes: int
    age: int
    timeout: int
    zone: int
    labels: int = 0
    server_first: bool = False


def held_on(flow: Flow, closing: int) -> bool:
    """Tell whether only FINs of its client have ended a connection, which its server may hold.

    `closing` is the bit of a mark that says so.  The tracker takes the second FIN for the server's
    (`HALF_CLOSED`).
    """
    return bool(flow.mark & closing) and not flow.server_first and flow.state != TcpState.CLOSE


def as_held(flow: Flow, closing: int) -> Flow:
    """Return a connection as its server holds it: half-closed, if it has not closed it."""
    if flow[3] in BOTH_FINS and held_on(flow, closing):
        return flow._replace(state=TcpState.FIN_WAIT)
    return flow


Name = tuple[int, ...]
"""What names a connection in the table."""


def name_of(flow: Flow) -> Name:
    """Return its original tuple, and behind it the zone if that is not 0, which most are in."""
    return (*flow.original, flow.zone) if flow.zone else flow.original


def endpoint(address: int, port: int) -> str:
    """Return ``192.0.2.1:80`` or ``[2001:db8::1]:80``."""
    text = address_text(address)
    return f"[{text}]:{port}" if is_v6(address) else f"{text}:{port}"
