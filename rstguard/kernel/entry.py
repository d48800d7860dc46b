"""One entry of the connection table: netlink message to `Flow`, and the other way round.  Pure.

Two readers give the same answer.  `fields` walks the attributes (linux/netfilter/
nfnetlink_conntrack.h) and is the reference.  `Reader` remembers, for each length of message, where
`fields` found everything, checks that the attribute headers of the next message are the same
bytes, and then reads all values with one unpack: more than ten times as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from struct import Struct, pack
from typing import Final, NamedTuple

from rstguard.engine.address import V6, is_v6, packed
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.kernel.netlink import ATTRIBUTE, NLA_F_NESTED, NLA_TYPE_MASK, attribute, nest

TCP: Final = 6
AF_INET: Final = 2
AF_INET6: Final = 10

TUPLE_ORIG, TUPLE_REPLY, STATUS, PROTOINFO, TIMEOUT, MARK = 1, 2, 3, 4, 7, 8
COUNTERS_ORIG, COUNTERS_REPLY, ID, ZONE, TIMESTAMP, MARK_MASK, FILTER = 9, 10, 12, 18, 20, 21, 25
STATUS_MASK, LABELS, LABELS_MASK = 26, 22, 23
TUPLE_IP, TUPLE_PROTO = 1, 2
IP_V4_SRC, IP_V4_DST, IP_V6_SRC, IP_V6_DST = 1, 2, 3, 4
PROTO_NUM, PROTO_SRC_PORT, PROTO_DST_PORT = 1, 2, 3
PROTOINFO_TCP, TCP_STATE, TCP_FLAGS_ORIGINAL, TCP_FLAGS_REPLY = 1, 1, 4, 5
CLOSE_INIT, BE_LIBERAL = 4, 8
COUNTER_PACKETS, COUNTER_BYTES = 1, 2
TIMESTAMP_START = 1
FILTER_ORIG_FLAGS, FILTER_PROTO_NUM = 1, 1 << 3

IPS_SEEN_REPLY: Final = 2
IPS_ASSURED: Final = 4
HEADERS: Final = 20
"""Bytes of netlink and netfilter header before the first attribute."""
FAMILY_AT: Final = 16

Path = tuple[int, ...]


class Fields(NamedTuple):
    """The raw values of an entry; what the kernel left out has its default."""

    source: int = 0
    destination: int = 0
    source_port: int = 0
    destination_port: int = 0
    reply_source: int = 0
    reply_destination: int = 0
    reply_source_port: int = 0
    reply_destination_port: int = 0
    protocol: int = 0
    status: int = 0
    state: int = 0
    mark: int = 0
    ident: int = 0
    timeout: int = 0
    client_packets: int = 0
    client_bytes: int = 0
    server_packets: int = 0
    server_bytes: int = 0
    start: int = 0
    zone: int = 0
    labels: int = 0
    reply_flags: int = 0


def _tuple_paths(outer: int, first: int) -> dict[Path, int]:
    inner = (
        (TUPLE_IP, IP_V4_SRC, 0),
        (TUPLE_IP, IP_V6_SRC, 0),
        (TUPLE_IP, IP_V4_DST, 1),
        (TUPLE_IP, IP_V6_DST, 1),
        (TUPLE_PROTO, PROTO_SRC_PORT, 2),
        (TUPLE_PROTO, PROTO_DST_PORT, 3),
    )
    return {(outer, group, leaf): first + slot for group, leaf, slot in inner}


WHERE: Final[dict[Path, int]] = {
    **_tuple_paths(TUPLE_ORIG, 0),
    **_tuple_paths(TUPLE_REPLY, 4),
    (TUPLE_ORIG, TUPLE_PROTO, PROTO_NUM): 8,
    (STATUS,): 9,
    (PROTOINFO, PROTOINFO_TCP, TCP_STATE): 10,
    (MARK,): 11,
    (ID,): 12,
    (TIMEOUT,): 13,
    (COUNTERS_ORIG, COUNTER_PACKETS): 14,
    (COUNTERS_ORIG, COUNTER_BYTES): 15,
    (COUNTERS_REPLY, COUNTER_PACKETS): 16,
    (COUNTERS_REPLY, COUNTER_BYTES): 17,
    (TIMESTAMP, TIMESTAMP_START): 18,
    (ZONE,): 19,
    (LABELS,): 20,
    (PROTOINFO, PROTOINFO_TCP, TCP_FLAGS_REPLY): 21,
}
"""Which attribute gives which of `Fields`."""

_ADDRESS_SLOTS: Final = frozenset({0, 1, 4, 5})
_LAST_NAMING_SLOT: Final = 8
"""Up to here no value may be missing."""
_LABELS_SLOT: Final = 20
_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q", 16: "16s"}


def walk(data: bytes, start: int, end: int, above: Path = ()) -> Iterator[tuple[Path, int, int]]:
    """Yield (path, start, end) of every attribute's value, each nest before what it holds.

    Raises:
        ValueError: a length leads out of the message or of its nest.
    """
    while start + 4 <= end:
        length, kind = ATTRIBUTE.unpack_from(data, start)
        if length < 4 or start + length > end:
            raise ValueError(f"attribute of {length} bytes at byte {start} of {end}")
        path = (*above, kind & NLA_TYPE_MASK)
        yield path, start + 4, start + length
        if kind & NLA_F_NESTED:
            yield from walk(data, start + 4, start + length, path)
        start += length + 3 & ~3


def fields(data: bytes, start: int, end: int) -> Fields:
    """Read the entry in the message at data[start:end], attribute by attribute.

    Raises:
        ValueError: the message is damaged, or does not say who talks to whom.
    """
    values = list(Fields())
    for slot, (value, value_end) in places(data, start, end).items():
        raw = data[value:value_end]
        if slot == _LABELS_SLOT:
            values[slot] = _labels(raw)
        else:
            values[slot] = int.from_bytes(raw, "big") | (V6 if len(raw) == 16 else 0)
    return Fields._make(values)


def places(data: bytes, start: int, end: int) -> dict[int, tuple[int, int]]:
    """Return where the value of each slot of `Fields` stands, if the message can be believed.

    Raises:
        ValueError: the message is damaged, or does not say who talks to whom.
    """
    found = {
        WHERE[path]: (value, value_end)
        for path, value, value_end in walk(data, start + HEADERS, end)
        if path in WHERE
    }
    address_size = 16 if data[start + FAMILY_AT] == AF_INET6 else 4
    for slot, name in enumerate(Fields._fields):
        size = found[slot][1] - found[slot][0] if slot in found else 0
        allowed: tuple[int, ...] = (1, 2, 4, 8)
        if slot in _ADDRESS_SLOTS:
            allowed = (address_size,)
        elif slot == _LABELS_SLOT:
            allowed = (0, 16)
        elif slot > _LAST_NAMING_SLOT:
            allowed = (0, 1, 2, 4, 8)
        if size not in allowed or (slot in found and not size):
            raise ValueError(f"an attribute {name} of {size} bytes")
    return found


class _Layout:
    """Where the values stand in messages of one shape."""

    __slots__ = ("_pick", "_unpack", "mask", "signature")

    def __init__(self, data: bytes, start: int, end: int) -> None:
        mask = bytearray(end - start)
        mask[FAMILY_AT] = 0xFF
        for _, value, _ in walk(data, start + HEADERS, end):
            mask[value - start - 4 : value - start] = b"\xff\xff\xff\xff"
        self.mask = int.from_bytes(mask, "little")
        self.signature = int.from_bytes(data[start:end], "little") & self.mask
        code, at = ">", start
        order = sorted((place, slot) for slot, place in places(data, start, end).items())
        for (value, value_end), _ in order:
            code += f"{value - at}x{_CODES[value_end - value]}"
            at = value_end
        self._unpack = Struct(code).unpack_from
        # Slots the message lacks are taken from the defaults, appended behind what was unpacked.
        positions = {slot: position for position, (_, slot) in enumerate(order)}
        picks = [positions.get(slot, len(order) + slot) for slot in range(len(_DEFAULTS))]
        self._pick = itemgetter(*picks)

    def values(self, data: bytes, start: int) -> tuple[int, ...]:
        """Return the values in the order of `Fields`; IPv6 addresses still as bytes."""
        picked: tuple[int, ...] = self._pick(self._unpack(data, start) + _DEFAULTS)
        return picked


_DEFAULTS: Final[tuple[int, ...]] = tuple(Fields())
_new = tuple.__new__


class Reader:
    """Reads messages into flows.

    One reader per dump: `age` tells how old at a fixed time what began then is (wall clock, ns).
    """

    def __init__(self, age: Callable[[int], int]) -> None:
        self._age = age
        self._layouts: dict[int, _Layout] = {}

    def flow(self, data: bytes, start: int, end: int) -> Flow | None:
        """Return the entry in the message at data[start:end], or None if it is not TCP.

        Raises:
            ValueError: the message is damaged.
        """
        layout = self._layouts.get(end - start)
        if layout is None:
            layout = self._layouts[end - start] = _Layout(data, start, end)
        message = int.from_bytes(data[start:end], "little")
        if message & layout.mask != layout.signature:
            return flow_of(fields(data, start, end), self._age)
        (
            source, destination, source_port, destination_port,
            reply_source, reply_destination, reply_source_port, reply_destination_port,
            protocol, status, state, mark, ident, timeout,
            client_packets, client_bytes, server_packets, server_bytes, began, zone, labels, flags,
        ) = layout.values(data, start)  # fmt: skip
        if protocol != TCP:
            return None
        if data[start + FAMILY_AT] == AF_INET6:
            source, destination = _v6(source), _v6(destination)
            reply_source, reply_destination = _v6(reply_source), _v6(reply_destination)
        original = (source, destination, source_port, destination_port)
        reply = (reply_source, reply_destination, reply_source_port, reply_destination_port)
        values = (
            ident, _new(Tuple, original), _new(Tuple, reply), state, mark,
            bool(status & IPS_SEEN_REPLY),
            client_packets, client_bytes, server_packets, server_bytes,
            self._age(began) if began else -1, timeout, zone,
            _labels(labels) if labels else 0, _server_first(flags),
        )  # fmt: skip
        return _new(Flow, values)


def _server_first(flags: int) -> bool:
    """Read struct nf_ct_tcp_flags, whose first byte has the flags of the server's direction."""
    return bool(flags >> 8 & CLOSE_INIT)


def _labels(bits: int | bytes) -> int:
    """Number n is bit n of an array of longs in the host's order (nf_conntrack_labels.h)."""
    return int.from_bytes(bits, "little")  # type: ignore[arg-type]


def _v6(address: int | bytes) -> int:
    return int.from_bytes(address, "big") | V6  # type: ignore[arg-type]


def flow_of(found: Fields, age: Callable[[int], int]) -> Flow | None:
    """Return the flow of an entry's raw values, or None if it is not TCP."""
    if found.protocol != TCP:
        return None
    return Flow(
        ident=found.ident,
        original=Tuple(*found[0:4]),
        reply=Tuple(*found[4:8]),
        state=found.state,
        mark=found.mark,
        seen_reply=bool(found.status & IPS_SEEN_REPLY),
        client_packets=found.client_packets,
        client_bytes=found.client_bytes,
        server_packets=found.server_packets,
        server_bytes=found.server_bytes,
        age=age(found.start) if found.start else -1,
        timeout=found.timeout,
        zone=found.zone,
        labels=found.labels,
        server_first=_server_first(found.reply_flags),
    )


def family_of(path: Tuple) -> int:
    """Return AF_INET or AF_INET6."""
    return AF_INET6 if is_v6(path.source) else AF_INET


def name_attributes(flow: Flow) -> bytes:
    """Return the attributes that name a connection: its original tuple and its zone."""
    zone = attribute(ZONE, flow.zone.to_bytes(2, "big")) if flow.zone else b""
    return _tuple_attributes(TUPLE_ORIG, flow.original) + zone


def _tuple_attributes(which: int, path: Tuple) -> bytes:
    v6 = is_v6(path.source)
    addresses = nest(
        TUPLE_IP,
        attribute(IP_V6_SRC if v6 else IP_V4_SRC, packed(path.source)),
        attribute(IP_V6_DST if v6 else IP_V4_DST, packed(path.destination)),
    )
    ports = nest(
        TUPLE_PROTO,
        attribute(PROTO_NUM, bytes((TCP,))),
        attribute(PROTO_SRC_PORT, path.source_port.to_bytes(2, "big")),
        attribute(PROTO_DST_PORT, path.destination_port.to_bytes(2, "big")),
    )
    return nest(which, addresses, ports)


def mark_attributes(mark: int, mask: int) -> bytes:
    """Return the attributes that carry a mark and which of its bits count."""
    return attribute(MARK, mark.to_bytes(4, "big")) + attribute(MARK_MASK, mask.to_bytes(4, "big"))


def liberal_attributes() -> bytes:
    """Return the attributes by which the tracker takes segments of any number, of both directions.

    IP_CT_TCP_FLAG_BE_LIBERAL of one entry (nlattr_to_tcp in nf_conntrack_proto_tcp.c); a RST still
    ends the entry only with the very number that is expected (tcp_packet, TCP_CONNTRACK_CLOSE).
    """
    flags = bytes((BE_LIBERAL, BE_LIBERAL))  # value and mask: struct nf_ct_tcp_flags
    both = attribute(TCP_FLAGS_ORIGINAL, flags) + attribute(TCP_FLAGS_REPLY, flags)
    return nest(PROTOINFO, nest(PROTOINFO_TCP, both))


def closed_attributes(flow: Flow) -> bytes:
    """Return the attributes that make an entry for a connection that is closed."""
    state = attribute(TCP_STATE, bytes((TcpState.CLOSE,)))
    timeout = attribute(TIMEOUT, flow.timeout.to_bytes(4, "big"))
    both = name_attributes(flow) + _tuple_attributes(TUPLE_REPLY, flow.reply)
    return both + nest(PROTOINFO, nest(PROTOINFO_TCP, state)) + timeout


def reopened_attributes(seconds: int) -> bytes:
    """Return the attributes that call a closed connection established, for `seconds` of silence.

    A RST that the tracker took, and its ends did not, is so undone; NAT and labels stay.  The state
    and both flags may be written (nlattr_to_tcp in nf_conntrack_proto_tcp.c); the numbers may not,
    hence BE_LIBERAL.
    """
    flags = bytes((BE_LIBERAL, BE_LIBERAL))
    inner = attribute(TCP_STATE, bytes((TcpState.ESTABLISHED,)))
    inner += attribute(TCP_FLAGS_ORIGINAL, flags) + attribute(TCP_FLAGS_REPLY, flags)
    timeout = attribute(TIMEOUT, seconds.to_bytes(4, "big"))
    return nest(PROTOINFO, nest(PROTOINFO_TCP, inner)) + timeout


def timeout_attributes(seconds: int) -> bytes:
    """Return the attribute that says how long an entry lives without a packet."""
    return attribute(TIMEOUT, seconds.to_bytes(4, "big"))


def labels_attributes(bits: int, mask: int) -> bytes:
    """Return the attributes that set or clear those of the 128 labels that `mask` has."""
    return attribute(LABELS, bits.to_bytes(16, "little")) + attribute(
        LABELS_MASK, mask.to_bytes(16, "little")
    )


def assured_only() -> bytes:
    """Return the attributes that leave out connections that never were established (5.15 on)."""
    bits = IPS_ASSURED.to_bytes(4, "big")
    return attribute(STATUS, bits) + attribute(STATUS_MASK, bits)


def tcp_only() -> bytes:
    """Return the attributes that make the kernel leave out of a dump what is not TCP (5.8 on)."""
    flags = pack("=I", FILTER_PROTO_NUM)  # the one value here that is in host order
    protocol = nest(TUPLE_PROTO, attribute(PROTO_NUM, bytes((TCP,))))
    return nest(FILTER, attribute(FILTER_ORIG_FLAGS, flags)) + nest(TUPLE_ORIG, protocol)
