"""The two readers of a connection table entry agree, on every shape and on damage."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rstguard.engine.address import V6, packed, parse_address
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.kernel import KernelError, entry
from rstguard.kernel.netlink import (
    HEADER,
    NFGEN,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    Netlink,
    Request,
    attribute,
    messages,
    nest,
)

NOW = 1_700_000_000_000_000_000
SECOND = 1_000_000_000


def age(began: int) -> int:
    return max(NOW - began, 0)


def number(kind: int, value: int, size: int) -> bytes:
    return attribute(kind, value.to_bytes(size, "big"))


def path_attributes(kind: int, path: Tuple, protocol: int) -> bytes:
    v6 = path.source >= V6
    return nest(
        kind,
        nest(1, attribute(3 if v6 else 1, packed(path.source)),
             attribute(4 if v6 else 2, packed(path.destination))),
        nest(2, number(1, protocol, 1), number(2, path.source_port, 2),
             number(3, path.destination_port, 2)),
    )  # fmt: skip


def message(flow: Flow, protocol: int = 6, parts: frozenset[str] = frozenset()) -> bytes:
    """Return an entry as the kernel writes it, with the optional parts that are named."""
    body = path_attributes(1, flow.original, protocol) + path_attributes(2, flow.reply, protocol)
    if flow.zone:
        body += number(18, flow.zone, 2)
    body += number(3, 2 if flow.seen_reply else 0, 4)
    if flow.mark:
        body += number(8, flow.mark, 4)
    body += number(12, flow.ident, 4) + number(11, 1, 4) + number(7, flow.timeout, 4)
    tcp = number(1, flow.state, 1), number(2, 10, 1), number(4, 0x2700, 2)
    body += nest(4, nest(1, *tcp, number(5, 0x2700 if flow.server_first else 0x2300, 2)))
    if "counters" in parts:
        for kind, packets, octets in (
            (9, flow.client_packets, flow.client_bytes),
            (10, flow.server_packets, flow.server_bytes),
        ):
            body += nest(kind, number(1, packets, 8), number(2, octets, 8))
    if flow.age >= 0:
        body += nest(20, number(1, NOW - flow.age, 8))
    if flow.labels:
        body += attribute(22, flow.labels.to_bytes(16, "little"))
    family = entry.family_of(flow.original)
    length = HEADER.size + NFGEN.size + len(body)
    return HEADER.pack(length, 0x100, 2, 1, 0) + NFGEN.pack(family, 0, 0) + body


def a_flow(client: str, server: str) -> Flow:
    original = Tuple(parse_address(client), parse_address(server), 40000, 443)
    reply = Tuple(original.destination, original.source, 443, 40000)
    return Flow(
        7, original, reply, TcpState.ESTABLISHED, 0xC0000001, True, 3, 200, 4, 5000, SECOND, 99, 0
    )


FLOW4 = a_flow("192.0.2.1", "198.51.100.1")
FLOW6 = a_flow("2001:db8::1", "2001:db8:1::1")
COUNTERS = frozenset({"counters"})

ports = st.integers(0, 0xFFFF)
words = st.integers(0, 0xFFFFFFFF)
longs = st.integers(0, (1 << 64) - 1)
addresses = st.one_of(
    st.lists(words, min_size=4, max_size=4),
    st.lists(st.integers(V6, 2 * V6 - 1), min_size=4, max_size=4),
)
flows = st.builds(
    lambda four, ports_, *rest: Flow(
        rest[0], Tuple(four[0], four[1], *ports_[:2]), Tuple(four[2], four[3], *ports_[2:]),
        *rest[1:],
    ),
    addresses, st.tuples(ports, ports, ports, ports), words, st.integers(0, 9), words,
    st.booleans(), longs, longs, longs, longs, st.integers(-1, NOW - 1), words, ports,
    st.integers(0, (1 << 128) - 1), st.booleans(),
)  # fmt: skip
parts = st.frozensets(st.sampled_from(["counters"]))


@given(st.lists(st.tuples(flows, parts, st.sampled_from([6, 17])), min_size=1, max_size=6))
def test_both_readers_read_what_was_written(rows: list[tuple[Flow, frozenset[str], int]]) -> None:
    reader = entry.Reader(age)
    for flow, with_parts, protocol in rows:
        data = b"pad " + message(flow, protocol, with_parts)
        wanted = None
        if protocol == 6:
            wanted = flow
            if "counters" not in with_parts:
                wanted = flow._replace(
                    client_packets=0, client_bytes=0, server_packets=0, server_bytes=0
                )
        assert entry.flow_of(entry.fields(data, 4, len(data)), age) == wanted
        assert reader.flow(data, 4, len(data)) == wanted


def test_messages_of_equal_length_but_another_shape_are_told_apart() -> None:
    reader = entry.Reader(age)
    plain = message(FLOW4, parts=COUNTERS)
    # The mark and the identity change places: same length, other headers.
    mark, ident = number(8, FLOW4.mark, 4), number(12, FLOW4.ident, 4)
    turned = plain.replace(mark + ident, ident + mark)
    assert turned != plain
    assert reader.flow(plain, 0, len(plain)) == FLOW4
    assert reader.flow(turned, 0, len(turned)) == FLOW4


@pytest.mark.parametrize("flow", [FLOW4, FLOW6], ids=["IPv4", "IPv6"])
def test_a_message_cut_off_anywhere_is_refused_or_lacks_only_what_is_missing(flow: Flow) -> None:
    data = message(flow, parts=COUNTERS)
    reader = entry.Reader(age)
    assert reader.flow(data, 0, len(data)) == flow
    for end in range(entry.HEADERS, len(data)):
        cut = data[:end]
        try:
            wanted = entry.flow_of(entry.fields(cut, 0, end), age)
        except ValueError:
            with pytest.raises(ValueError, match="attribute"):
                reader.flow(cut, 0, end)
        else:
            assert reader.flow(cut, 0, end) == wanted


@given(st.integers(entry.HEADERS, len(message(FLOW4)) - 1), st.integers(0, 255))
def test_a_damaged_byte_never_raises_anything_else(at: int, value: int) -> None:
    good = message(FLOW4)
    data = good[:at] + bytes([value]) + good[at + 1 :]
    reader = entry.Reader(age)
    for _ in range(2):
        reader.flow(good, 0, len(good))
        try:
            wanted = entry.flow_of(entry.fields(data, 0, len(data)), age)
        except ValueError:
            with pytest.raises(ValueError):  # noqa: PT011 - which one depends on the byte
                reader.flow(data, 0, len(data))
        else:
            assert reader.flow(data, 0, len(data)) == wanted


@pytest.mark.parametrize("length", [0, 15, 17, 24, 1 << 31])
def test_a_netlink_length_that_leads_nowhere_is_an_error(length: int) -> None:
    chunk = HEADER.pack(16, 0x100, 0, 1, 0) + HEADER.pack(length, 0x100, 0, 1, 0)
    with pytest.raises(KernelError, match="cut off at byte 16"):
        list(messages(chunk))


class Played(Netlink):
    """Plays what a kernel might send in answer to the first request."""

    def __init__(self, *chunks: bytes) -> None:
        super().__init__()
        self.chunks = list(chunks)

    def _send(self, data: bytes) -> None:
        del data

    def _receive(self) -> bytes:
        return self.chunks.pop(0)


DONE = HEADER.pack(20, NLMSG_DONE, 2, 1, 0) + struct.pack("=i", 0)


def test_an_interrupted_dump_yields_what_came_and_then_says_so() -> None:
    data = message(FLOW4)
    flags = struct.pack("=H", 2 | NLM_F_DUMP_INTR)
    netlink = Played(data, data[:6] + flags + data[8:], DONE)
    dump = netlink.dump(Request(0x101, socket.AF_INET, b""))
    assert [len(next(dump)[1]) for _ in range(3)] == [1, 1, 0]
    with pytest.raises(KernelError, match="read it again"):
        next(dump)
    netlink.close()


def test_an_error_in_the_middle_of_a_dump_is_named() -> None:
    failed = HEADER.pack(20, NLMSG_DONE, 2, 1, 0) + struct.pack("=i", -1)
    netlink = Played(message(FLOW4), failed)
    with pytest.raises(KernelError, match="root or with CAP_NET_ADMIN"):
        list(netlink.dump(Request(0x101, socket.AF_INET, b"")))
    netlink.close()


def test_answers_of_a_broken_off_conversation_are_not_taken() -> None:
    stale = HEADER.pack(20, NLMSG_DONE, 2, 99, 0) + struct.pack("=i", 0)
    netlink = Played(stale, message(FLOW4), DONE)
    found = [len(spans) for _, spans in netlink.dump(Request(0x101, socket.AF_INET, b""))]
    assert found == [0, 1, 0]
    netlink.close()
