"""Clients, honest and not, as the gateway's rules would let them meet the guard.

The fake kernel runs no packets through its rules.  What the rules would do with a SYN is done here:
drop it if its source is blocked, queue it if the jumps are there, or let it pass.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Final

from rstguard.engine.address import address_text, parse_address
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.wire import ACK, FIN, SYN, Packet, parse
from rstguard.kernel import KernelError
from rstguard.kernel.marks import Marks
from rstguard.kernel.names import BAN_SETS, BLOCK_SETS
from tests.simulation.ledger import Ledger
from tests.simulation.loop import Dead
from tests.simulation.processes import Process
from tests.simulation.world import QUEUE, World

SERVER: Final = parse_address("203.0.113.10")
HONEST: Final = parse_address("192.0.2.0")
ATTACKERS: Final = parse_address("198.51.0.0")
_MARKS: Final = Marks()
_STATES: Final = _MARKS.states
_PROVEN: Final = _MARKS.to_queue_proven.value
_KNOWN: Final = _MARKS.to_queue_known.value
_ESTABLISHED: Final = _MARKS.proven.value


@dataclass(slots=True)
class Sent:
    """A packet that came in, and what is known of its way."""

    honest: bool
    queued: bool = False
    passed: bool | None = None
    """What became of it without a reader, or None."""
    verdicts: int = 0
    lost: bool = False
    """Its reader died, or gave the queue up, while it waited."""
    closed: bool = False
    """The rule that would have queued it said that it does not pass unread."""
    observed: bool = field(default=False)


class Traffic:
    """All that comes in on the protected interface."""

    def __init__(self, world: World, ledger: Ledger) -> None:
        self._world, self._kernel, self._ledger = world, world.kernel, ledger
        self.rng = random.Random(world.rng.random())
        self.sent: dict[int, Sent] = {}
        self._number = 0
        self._ident = 0
        self.mute: set[int] = set()
        """Clients that answer no probe."""
        self._seen = 0
        world.kernel.packets.hook = self._probed
        world.processes.on_spawn = self._spawned

    def _spawned(self, one: Process) -> None:
        one.on_death = self._died

    def _died(self, one: Process) -> None:
        """What waits in the queue of a process that dies is dropped by the kernel."""
        self._ledger.note_untold()
        bound = self._kernel.packets.queues.get(one.queue) if one.queue is not None else None
        if bound is not None and bound.owner == one.owner.name:
            self.lose(bound.waiting)

    def lose(self, waiting: list[tuple[int, int, Packet | bytes]]) -> None:
        """Note that these packets are lost with their queue."""
        for _, _, packet in waiting:
            assert isinstance(packet, Packet)
            self.sent[packet.sequence].lost = True

    def blocked(self, source: int, syn: bool) -> bool:
        """Tell whether the rules drop what a source sends."""
        if not self.diverts("raw") and not self.diverts("mangle"):
            return False
        sets = self._kernel.ipsets
        names = BLOCK_SETS[::2] if syn else BAN_SETS[:1]
        return any(name in sets.names and sets.get(name).covers(source) for name in names)

    def diverts(self, table: str = "mangle") -> bool:
        """Tell whether the rules of a table are in place."""
        rules = self._kernel.iptables[4].tables.get(table, {}).get("PREROUTING", [])
        return any(" rstguard-" in rule for rule in rules)

    def packet(
        self, source: int, port: int, flags: int, mark: int, honest: bool, to: int = 80
    ) -> Sent:
        """Let one packet come in."""
        self._number += 1
        sent = self.sent[self._number] = Sent(honest)
        if self.blocked(source, syn=flags == SYN):
            sent.passed = False
            return sent
        number = QUEUE + (source & (self._world.workers - 1))
        rule = self._rule(number)
        if not self.diverts() or rule is None:
            sent.passed = True
            return sent
        bypass = "--queue-bypass" in rule
        packets = self._kernel.packets
        if number not in packets.queues:
            sent.passed, sent.closed = bypass, not bypass
            return sent
        state = _STATES[mark >> _MARKS.base & 255]
        packet = Packet(source, SERVER, port, to, self._number, 0, flags, 64240, 0, state)
        sent.queued = bool(packets.queue(number, packet, mark))
        sent.closed = not bypass
        if reader := self._world.processes.reading(number):
            reader.wake()
        return sent

    def _rule(self, number: int) -> str | None:
        chains = self._kernel.iptables[4].tables.get("mangle", {})
        wanted = f"--queue-num {number}"
        return next(
            (rule for chain in chains.values() for rule in chain if wanted in f"{rule} "), None
        )

    def syn(self, source: int, proven: bool, honest: bool = False, to: int = 80) -> Sent:
        """A new connection's first packet; a `proven` source has returned a SYN cookie."""
        mark = _KNOWN if proven else 0
        return self.packet(source, self.rng.randrange(1024, 65536), SYN, mark, honest, to)

    def handshake(self, source: int, honest: bool) -> Sent:
        """A whole handshake: a SYN, and the ACK that follows."""
        port = self.rng.randrange(1024, 65536)
        sent = self.packet(source, port, SYN, _PROVEN, honest)
        known = _KNOWN
        if sent.passed is not False:
            self.packet(source, port, ACK, known, honest)
        return sent

    def short(self, source: int, port: int) -> None:
        """A connection that ends as soon as it began."""
        known = _KNOWN
        self.packet(source, port, SYN, _PROVEN, honest=False, to=22)
        self.packet(source, port, FIN | ACK, known, honest=False, to=22)

    def connect(self, source: int, state: int = TcpState.ESTABLISHED, mark: int = -1) -> Flow:
        """Put a connection into the table."""
        self._ident += 1
        there = Tuple(source, SERVER, self.rng.randrange(1024, 65536), 80)
        while self._kernel.connections.get(there) is not None:  # a client takes a free port
            there = there._replace(source_port=self.rng.randrange(1024, 65536))
        back = Tuple(SERVER, source, 80, there.source_port)
        mark = _ESTABLISHED if mark < 0 else mark
        flow = Flow(
            self._ident, there, back, state, mark, state == TcpState.ESTABLISHED,
            4, 400, 4, 4000, 0, 3600, 0,
        )  # fmt: skip
        self._kernel.connections.put(flow)
        return flow

    def _probed(self, data: bytes) -> str:
        """An end that is probed speaks, and is reset if it is condemned."""
        packet = parse(data)
        if not isinstance(packet, Packet):
            return ""
        if packet.destination in self.mute or self.rng.random() < 0.1:
            return ""
        table = self._kernel.connections
        end = Tuple(packet.destination, packet.source, packet.destination_port, packet.source_port)
        condemned, sent = _MARKS.condemned_source.value, _MARKS.rst_sent_source.value
        flow = table.get(end)
        if flow is None:
            back = Tuple(end.destination, end.source, end.destination_port, end.source_port)
            condemned = _MARKS.condemned_destination.value
            sent = _MARKS.rst_sent_destination.value
            flow = table.get(back)
        if flow is not None and flow.mark & condemned and self.diverts_filter():
            table.change(flow.original, mark=flow.mark | sent, state=TcpState.CLOSE)
            self._world.loop.outside(10.0, self._forget, flow)
        return ""

    def _forget(self, flow: Flow) -> None:
        """A connection in CLOSE leaves the table after ten seconds."""
        held = self._kernel.connections.get(flow.original)
        if held is not None and held.ident == flow.ident and held.state == TcpState.CLOSE:
            self._kernel.connections.drop(flow.original)

    def diverts_filter(self) -> bool:
        """Tell whether condemned ends are reset: the rules of the filter table are in place."""
        chains = self._kernel.iptables[4].tables.get("filter", {})
        return any(" rstguard-" in rule for rule in chains.get("FORWARD", []))

    def verdicts(self) -> None:
        """Note what was judged since the last time."""
        judged = self._kernel.packets.judged
        for one in judged[self._seen :]:
            assert isinstance(one.packet, Packet)
            sent = self.sent[one.packet.sequence]
            sent.verdicts += 1
            sent.passed = one.passed
        self._seen = len(judged)

    def is_blocked(self, source: int) -> bool:
        """Tell whether a source is banned or shunned by now."""
        try:
            with self._kernel.sets() as sets:
                return sets.contains(source)
        except (KernelError, Dead):
            return False


def text(source: int) -> str:
    """Return an address as people write it."""
    return address_text(source)
