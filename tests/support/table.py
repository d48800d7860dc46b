"""A connection table for those who end connections, with what stands at their ends."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from rstguard.engine.address import parse_address
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.wire import ACK, SYN, Packet, parse
from rstguard.kernel.marks import Bits, Marks

MARKS = Marks()


class Table:
    """A connection table with two ends to each connection, each of which may be deaf for a while.

    `deaf` says how many probes an end (by its own address and port) swallows.
    """

    def __init__(self, *flows: Flow) -> None:
        self.flows = {(flow.original, flow.zone): flow for flow in flows}
        self.deaf: dict[tuple[int, int], int] = {}
        self.refuses = 0
        self.reads = 0
        self.probes: list[Packet] = []
        self.openings: list[Packet] = []
        self.strict: set[tuple[int, int]] = set()
        """Ends behind firewalls that drop what does not fit."""
        self.liberal: list[Flow] = []

    def read(self, flows: Sequence[Flow], now_ns: int | None = None) -> list[Flow | None]:
        assert now_ns is None
        self.reads += 1
        return [self.flows.get((flow.original, flow.zone)) for flow in flows]

    def set_mark(self, flows: Sequence[Flow], bits: int, mask: int) -> list[int]:
        codes = []
        for flow in flows:
            key = (flow.original, flow.zone)
            if self.refuses:
                codes.append(self.refuses)
            elif key not in self.flows:
                codes.append(errno.ENOENT)
            else:
                old = self.flows[key]
                self.flows[key] = old._replace(mark=old.mark & ~mask | bits)
                codes.append(0)
        return codes

    def set_labels(self, flows: Sequence[Flow], bits: int, mask: int) -> list[int]:
        return [0] * len(flows)

    def set_liberal(self, flows: Sequence[Flow]) -> list[int]:
        self.liberal += flows
        return [0] * len(flows)

    def set_timeout(self, flows: Sequence[Flow], seconds: int) -> list[int]:
        for flow in flows:
            key = (flow.original, flow.zone)
            self.flows[key] = self.flows[key]._replace(timeout=seconds)
        return [0] * len(flows)

    def delete(self, flows: Sequence[Flow]) -> list[int]:
        gone = [self.flows.pop((flow.original, flow.zone), None) for flow in flows]
        return [0 if flow else errno.ENOENT for flow in gone]

    def send(self, packets: Iterable[bytes], mark: int = 0) -> int:
        count = 0
        for data in packets:
            packet = parse(data)
            assert isinstance(packet, Packet)
            count += 1
            end = (packet.destination, packet.destination_port)
            if packet.flags & SYN:
                self.openings.append(packet)
            else:
                assert packet.flags == ACK
                self.probes.append(packet)
            # Who is strict hears openings alone; others would answer those, too, but not the deaf.
            if bool(packet.flags & SYN) == (end in self.strict):
                self.hear(packet)
        return count

    def hear(self, packet: Packet) -> None:
        """Let the end that a probe is addressed to answer, if it is an end as that end sees it."""
        end = (packet.destination, packet.destination_port)
        if self.deaf.get(end, 0):
            self.deaf[end] -= 1
            return
        path = (
            packet.destination,
            packet.source,
            packet.destination_port,
            packet.source_port,
        )
        for flow in list(self.flows.values()):
            if path == flow.original:
                self.speak(flow, MARKS.condemned_source, MARKS.rst_sent_source)
            elif path == flow.reply:
                self.speak(flow, MARKS.condemned_destination, MARKS.rst_sent_destination)

    def speak(self, flow: Flow, condemned: Bits, sent: Bits) -> None:
        if flow.mark & condemned.mask:
            new = flow._replace(mark=flow.mark | sent.value, state=TcpState.CLOSE)
            self.flows[(flow.original, flow.zone)] = new

    def change(
        self,
        flow: Flow,
        mark: int | None = None,
        state: int | None = None,
        ident: int | None = None,
    ) -> None:
        key = (flow.original, flow.zone)
        old = self.flows[key]
        self.flows[key] = old._replace(
            mark=old.mark if mark is None else mark,
            state=old.state if state is None else state,
            ident=old.ident if ident is None else ident,
        )


def a_flow(number: int = 1, mark: int = 0, state: int = TcpState.ESTABLISHED) -> Flow:
    original = Tuple(parse_address("192.0.2.1"), parse_address("198.51.100.1"), number, 80)
    return Flow(number, original, original.turned, state, mark, True, 1, 1, 1, 1, 0, 100, 0)


def client_of(flow: Flow) -> tuple[int, int]:
    return (flow.original.source, flow.original.source_port)


def server_of(flow: Flow) -> tuple[int, int]:
    return (flow.reply.source, flow.reply.source_port)
