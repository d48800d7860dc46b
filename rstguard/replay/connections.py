"""The connections of a capture: a small model of the kernel's connection tracker.

States and time-outs are those of the kernel's tracker (nf_conntrack_proto_tcp.c).  What differs:

- After the handshake sequence numbers are not compared with windows: a forged FIN, RST or data
  segment that the kernel would call INVALID counts as one of its connection here.
- A connection whose beginning is not in the capture may be older than it.  It is taken in as soon
  as the protected side speaks on it; it counts as proven, and as needing no further look.  Until
  then up to `DOUBTS` such connections of a source, `SEGMENTS` segments of each, get the benefit of
  the doubt: they are no segments "of no known connection".
- There is one table for all interfaces and VLANs, without NAT: a capture that shows a packet twice
  (tcpdump -i any on a gateway) shows two packets.
- An established connection is forgotten only when the table is full, never for its silence.
- Fragments are not put together: all but the first are passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from rstguard.engine.address import V6, packed
from rstguard.engine.flow import LIVE, Flow, TcpState, Tuple
from rstguard.engine.ruleset import CONFIRMED, LIKELY, SECOND
from rstguard.engine.wire import ACK, FIN, RST, SYN, Packet
from rstguard.replay.hits import Hit

MOST = 1 << 18
"""Connections that are remembered at most."""
DOUBTS = 8
SEGMENTS = 3
_MOST_DOUBTS = 1 << 16

_OVERTAKEN = 1 << 20
"""Bytes that may be missing between a SYN and the first ACK that was captured."""

_S = TcpState
TIMEOUTS = {
    _S.SYN_SENT: 120 * SECOND,
    _S.SYN_RECV: 60 * SECOND,
    _S.ESTABLISHED: 5 * 86400 * SECOND,
    _S.FIN_WAIT: 120 * SECOND,
    _S.CLOSE_WAIT: 60 * SECOND,
    _S.LAST_ACK: 30 * SECOND,
    _S.TIME_WAIT: 120 * SECOND,
    _S.CLOSE: 10 * SECOND,
}
"""How long a silent connection is remembered (nanoseconds), by its state."""

_OVER = frozenset({_S.TIME_WAIT, _S.CLOSE})
_ON_FIN = {
    _S.SYN_RECV: _S.FIN_WAIT,
    _S.ESTABLISHED: _S.FIN_WAIT,
    _S.FIN_WAIT: _S.LAST_ACK,
    _S.CLOSE_WAIT: _S.LAST_ACK,
    _S.LAST_ACK: _S.LAST_ACK,
}
_ON_ACK = {
    _S.FIN_WAIT: _S.CLOSE_WAIT,
    _S.CLOSE_WAIT: _S.CLOSE_WAIT,
    _S.LAST_ACK: _S.TIME_WAIT,
}


class Connection:
    """One connection.  `key` names it from the client's side (`key_of`).

    `swift` says that a plain ACK of it changes nothing but the counters.  `hit` is what ended it,
    or never let it begin.
    """

    __slots__ = (
        "began", "client_bytes", "client_number", "client_packets", "confirmed", "guarded", "hit",
        "ident", "key", "last", "likely", "name", "older", "productive", "proven", "server_bytes",
        "server_number", "server_packets", "source", "state", "swift", "trusted",
    )  # fmt: skip

    def __init__(self, ident: int, key: bytes, packet: Packet, now: int) -> None:
        self.ident, self.key = ident, key
        self.name: Tuple | None = None
        self.source = packet.source
        self.began = self.last = now
        self.state = _S.SYN_SENT
        self.client_number, self.server_number = packet.sequence, -1
        self.client_packets = self.client_bytes = self.server_packets = self.server_bytes = 0
        self.guarded = self.proven = self.trusted = self.swift = False
        self.older = self.productive = self.likely = self.confirmed = False
        self.hit: Hit | None = None

    @property
    def begins(self) -> bool:
        """Whether it is guarded, and its handshake not over."""
        return self.guarded and not self.proven

    def flow(self, now: int, labels: int) -> Flow:
        """Return the connection as the kernel's table would show it at `now`.

        `labels` is the first of the guard's labels.
        """
        name = self.name or name_of(self.key)
        self.name = name
        left = max(0, self.last + TIMEOUTS[self.state] - now) // SECOND
        turned = Tuple(name[1], name[0], name[3], name[2])
        age = -1 if self.older else now - self.began
        return Flow(
            self.ident, name, turned, self.state, 0, True, self.client_packets, self.client_bytes,
            self.server_packets, self.server_bytes, age, left, 0,
            (self.likely << LIKELY | self.confirmed << CONFIRMED) << labels,
        )  # fmt: skip

    def expired(self, now: int) -> bool:
        """Tell whether the kernel would have forgotten it."""
        return now - self.last > TIMEOUTS[self.state]

    def advance(self, packet: Packet, from_client: bool) -> bool:
        """Change the state by a segment; False if it does not belong to the connection.

        `packet` is as on the wire.  The caller has seen to SYNs that begin a connection anew.
        """
        flags, state = packet.flags & (FIN | SYN | RST | ACK), self.state
        if flags & SYN:
            return self._synchronise(packet, from_client, flags)
        if flags & RST:
            self.state = _S.CLOSE
            return True
        if state == _S.SYN_SENT:
            return not from_client  # what a server sends before its SYN-ACK says nothing
        if state == _S.SYN_RECV and from_client:
            if not self._completes(packet):
                return False
            state = self.state = _S.ESTABLISHED
        if flags & FIN:
            self._note_payload(packet, from_client)
            self.state = _ON_FIN.get(state, state)
        else:
            self.state = _ON_ACK.get(state, state)
        return True

    def _synchronise(self, packet: Packet, from_client: bool, flags: int) -> bool:
        if from_client:
            if self.state == _S.SYN_SENT and not flags & ACK:
                self.client_number = packet.sequence
            return not flags & ACK
        if self.state == _S.SYN_SENT and flags & ACK:
            if packet.acknowledgement != self.client_number + 1 & 0xFFFFFFFF:
                return False
            self.state, self.server_number = _S.SYN_RECV, packet.sequence
        return True

    def _completes(self, packet: Packet) -> bool:
        """Only who has seen the SYN-ACK knows the number in it.

        The capture may lack the first ACK: then the numbers are those of what followed.
        """
        beyond = packet.acknowledgement - self.server_number - 1 & 0xFFFFFFFF
        ahead = packet.sequence - self.client_number - 1 & 0xFFFFFFFF
        most = _OVERTAKEN if self.server_packets > 1 else 0
        return bool(packet.flags & ACK) and beyond <= most and ahead <= _OVERTAKEN

    def _note_payload(self, packet: Packet, from_client: bool) -> None:
        """A FIN tells by its numbers whether both ends have sent something."""
        sent, heard = self.client_number, self.server_number
        if not from_client:
            sent, heard = heard, sent
        said = (packet.sequence + packet.payload_length - sent - 1) & 0xFFFFFFFF
        answered = (packet.acknowledgement - heard - 1) & 0xFFFFFFFF
        self.productive = self.productive or bool(sent >= 0 <= heard and said and answered)

    def begins_anew(self, now: int) -> bool:
        """Tell whether a SYN of the client makes it a new connection."""
        return self.hit is not None or self.state in _OVER or self.expired(now)


class Opening(NamedTuple):
    """A SYN that nobody has answered yet: smaller than a connection, as floods are made of them.

    `hit` is why it never arrived, or None.
    """

    packet: Packet
    began: int
    last: int
    packets: int
    bytes: int
    hit: Hit | None


class Table:
    """All connections by name: at most `most`, and as many SYNs that nobody has answered yet.

    `guards` tells whether the policy guards the connection of a SYN; `forgotten` is told of each
    connection that is taken out.
    """

    def __init__(
        self,
        most: int,
        guards: Callable[[Packet], bool],
        forgotten: Callable[[Connection], None],
    ) -> None:
        self.clients: dict[bytes, Connection] = {}
        """By the key of what the client sends."""
        self.servers: dict[bytes, Connection] = {}
        """By the key of what the server sends, once it has sent something."""
        self._most = most
        self._guards, self._forgotten = guards, forgotten
        self._made = 0
        self._opening: dict[bytes, Opening] = {}
        self._opening_before: dict[bytes, Opening] = {}
        self._doubted: dict[bytes, int] = {}
        self._doubts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.clients) + len(self._opening) + len(self._opening_before)

    def open(self, key: bytes, packet: Packet, now: int, size: int, hit: Hit | None = None) -> bool:
        """Note a SYN of `size` bytes of no known connection; tell whether it is not sent again."""
        known = self._opening.get(key) or self._opening_before.get(key)
        if known is not None and now - known.last > TIMEOUTS[_S.SYN_SENT]:
            known = None
        if known is None or known.hit is not hit:
            known = Opening(packet, now, now, 1, size, hit)
        else:
            more = (known.began, now, known.packets + 1, known.bytes + size, hit)
            known = Opening(packet, *more)
        if len(self._opening) >= self._most // 2:
            self._opening_before = self._opening
            self._opening = {}
        self._opening[key] = known
        return known.packets == 1

    def refuse(self, key: bytes, hit: Hit) -> None:
        """The SYN that was noted last never arrives."""
        self._opening[key] = Opening(*self._opening[key][:5], hit)

    def add(self, key: bytes, packet: Packet, now: int) -> Connection:
        """Return a new connection of a client's segment."""
        if len(self.clients) >= self._most:
            self._make_room()
        self._made += 1
        connection = self.clients[key] = Connection(self._made, key, packet, now)
        return connection

    def find(self, key: bytes, now: int) -> tuple[Connection | None, bool]:
        """Return the connection that a segment belongs to, and whether the client has sent it."""
        connection = self.clients.get(key) or self._opened(key)
        from_client = connection is not None
        if connection is None:
            connection = self.servers.get(key)
        if connection is None:
            name = turned(key)
            connection = self.clients.get(name) or self._opened(name)
            if connection is not None:
                self.servers[key] = connection
        if connection is not None and connection.expired(now):
            self.forget(connection)
            return None, from_client
        return connection, from_client

    def _opened(self, key: bytes) -> Connection | None:
        """Make a connection of a SYN when something follows it."""
        known = self._opening.pop(key, None) or self._opening_before.pop(key, None)
        if known is None:
            return None
        connection = self.add(key, known.packet, known.began)
        connection.guarded = self._guards(known.packet)
        connection.last, connection.hit = known.last, known.hit
        connection.client_packets, connection.client_bytes = known.packets, known.bytes
        return connection

    def forget(self, connection: Connection) -> None:
        """Take a connection out."""
        if self.clients.get(connection.key) is connection:
            del self.clients[connection.key]
            self.servers.pop(turned(connection.key), None)
        self._forgotten(connection)

    def _make_room(self) -> None:
        """Forget the oldest of those that are over or half open; else the longest silent."""
        wanted = max(1, self._most // 16)
        idle = (one for one in self.clients.values() if one.hit or one.state not in LIVE)
        going = list(islice(idle, wanted))
        if len(going) < wanted:
            order = sorted(self.clients.values(), key=lambda one: one.last)
            going = order[:wanted]
        for connection in going:
            self.forget(connection)

    def doubtful(self, key: bytes, source: int) -> bool:
        """Tell whether a client's segment of no known connection may belong to an older one."""
        if len(self._doubted) >= _MOST_DOUBTS:
            self._doubted.clear()
            self._doubts.clear()
        seen = self._doubted.get(key, 0)
        if not seen:
            held = self._doubts.get(source, 0)
            if held >= DOUBTS:
                return False
            self._doubts[source] = held + 1
        self._doubted[key] = seen + 1
        return seen < SEGMENTS

    def adopt(self, key: bytes, packet: Packet, now: int) -> Connection:
        """Take in a connection older than the capture; `packet` is a segment of its server."""
        if self._doubted.pop(key, None):
            self._doubts[packet.destination] -= 1
        connection = self.add(key, packet.turned(), now)
        connection.client_number, connection.server_number = (
            packet.acknowledgement - 1 & 0xFFFFFFFF,
            packet.sequence - 1 & 0xFFFFFFFF,
        )
        connection.state = _S.ESTABLISHED
        connection.older = connection.trusted = True
        return connection


def turned(key: bytes) -> bytes:
    """Return the key of the opposite direction."""
    if len(key) == 12:
        return key[4:8] + key[:4] + key[10:] + key[8:10]
    return key[16:32] + key[:16] + key[34:] + key[32:34]


def key_of(packet: Packet) -> bytes:
    """Return addresses and ports as they stand in the headers, one after the other."""
    ports = packet.source_port << 16 | packet.destination_port
    return packed(packet.source) + packed(packet.destination) + ports.to_bytes(4, "big")


def name_of(key: bytes) -> Tuple:
    """Return addresses and ports of a key."""
    size = len(key) - 4 >> 1
    tag = V6 if size == 16 else 0
    return Tuple(
        int.from_bytes(key[:size], "big") | tag,
        int.from_bytes(key[size : 2 * size], "big") | tag,
        int.from_bytes(key[-4:-2], "big"),
        int.from_bytes(key[-2:], "big"),
    )
