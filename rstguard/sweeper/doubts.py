"""What became of a connection after a RST or FIN that the tracker believed.

The tracker stands between the ends and may believe a segment that the server never gets or never
takes: one whose hops run out behind the gateway, whose signature is wrong, whose number was exact
for the gateway alone.  A hoarder could so hide each connection from the tracker while the server
holds it; and a RST inside the window, but not exact, moves the tracker's idea of it (td_end in
nf_conntrack_proto_tcp.c) so far that no real segment of that end is taken any more.

Each RST or FIN that comes in from outside in the client's name, for a guarded connection whose
handshake is over, leaves a bit on it; a FIN of the server takes it away.  Here the connections with
this bit are looked at, those that each sweep has read anyway; where sweeps are too far apart the
table is walked through for them, which lets packets wait: the kernel handles none on the processor
that walks until it has found enough for one answer.

- Closed, for two looks, or soon to be forgotten: the server's end is condemned and provoked.  (A
  client may use its port again at once: its SYN takes the place of the entry, unless the server has
  answered a probe meanwhile, and then its SYN-ACK would be taken for the old connection's.)  A
  server that is through with the connection answers a probe with a RST, or not at all.  One that
  holds it answers with an ACK, which draws the RST that it must accept.  So the connection ends
  where it counts, whatever trick was used.
- Half-closed: the client sent a FIN, the server did not.  Until it does the server holds the
  connection, and it counts (`rstguard.sweeper.sweeping`).  But a silent one would be forgotten
  after one or two minutes.  Shortly before that it is given the time of an open one: nobody is
  harmed who asks, shuts down, and waits for a long answer.
- Half-closed, and over for the tracker (TIME_WAIT): the client's FIN came twice.  One of them may
  have been late, behind the server's own, so it cannot be told from a trick by sight; shortly
  before it is forgotten it is treated as a closed one.
- Replaced: what the tracker takes for over it forgets as soon as a SYN of the same ends comes.  A
  SYN that a server answers began a new connection; one that is not answered within a second may
  stand for an old one, which is treated as a closed one.  They are looked for if the kernel's set
  of them is not empty (`rstguard.kernel.ingress`).
- The server closed first: nothing is in doubt, and the bit goes.
- Still open: the RST was not exact, and may have moved the window.  From now on the tracker takes
  segments of any number of this connection, as the ends judge them by themselves (RFC 9293,
  3.10.7.4), and a RST still only with the exact one.

A closed entry stays in the table for 10 s (nf_conntrack_tcp_timeout_close): all are found by
looking at intervals, and no flood of RSTs costs more than that.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from rstguard.engine.flow import HALF_CLOSED, Flow, Name, TcpState, Tuple, name_of
from rstguard.engine.ruleset import SECOND, RuleSet
from rstguard.engine.segment import probe
from rstguard.engine.verdict import Ends, Reason
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.messages import Reset
from rstguard.kernel.condemning import condemn
from rstguard.kernel.ingress import replaced_set
from rstguard.kernel.inject import send_each, way_of
from rstguard.kernel.marks import Labels, Marks
from rstguard.kernel.seam import Connections, ElementSets, PacketSender
from rstguard.sweeper.cases import probe_paths

OUTLIVED: Final = "outlived"
"""Stands for the rule in what is told of a connection that was ended here."""

_LOOK_EVERY: Final = SECOND
_SHARE: Final = 10
"""A look at a large table takes long; it may take this part of a core."""
_SWEPT_EVERY: Final = 4 * SECOND
"""Sweeps no further apart find closed connections in time, twice."""
_PROBES: Final = 2
"""One, or its answer, may get lost."""
_MOST: Final = 2_000
"""Connections taken in one look.  The rest keep their bit, and their turn comes with the next.

A closed one is known for three looks: so many times three are known at most."""
_MOST_SETTLED: Final = 20_000
"""Connections whose bit is taken away in one look, which costs little."""
_MOST_TOLD: Final = 20
_SOON: Final = 20
"""Seconds before it is forgotten that a half-closed connection is looked after."""

_Key = tuple[Tuple, int]


class Doubts:
    """Looks after connections for which a RST came in: `take` those found, `work` at intervals.

    Times are monotonic nanoseconds.
    """

    def __init__(
        self,
        channel: ChildEnd,
        table: Connections,
        sets: ElementSets,
        sender: PacketSender,
        marks: Marks,
        counts: Counter[str],
        clock: Callable[[], int],
        draw: Callable[[], int] | None = None,
        patience: int = 432_000,
        labels: Labels | None = None,
    ) -> None:
        """Tell by `channel`, count in `counts`; `draw` draws the numbers of probes, 32 bits.

        `patience` is how long the tracker keeps a silent open connection, in seconds.
        """
        self._channel, self._table, self._sets, self._sender = channel, table, sets, sender
        self._marks, self._counts, self._clock = marks, counts, clock
        self._labels = labels or Labels()
        self._draw = draw or partial(random.getrandbits, 32)
        self._patience = patience
        self._closed: set[tuple[Name, int]] = set()
        """Closed connections, by name and number, that were there at the last look."""
        self._half_closed: dict[_Key, Flow] = {}
        """Half-closed connections that were there at the last look."""
        self._asked: dict[_Key, tuple[Flow, int]] = {}
        """Connections whose server was provoked, and how many probes are still due."""
        self._active = False
        self._look_at = 0
        self._walk_at = self._swept_until = 0
        """When the table may be walked through again, and until when sweeps make that needless."""
        self._every = _LOOK_EVERY
        self._any_replaced = False
        """Whether a SYN has taken the place of a connection since the last walk."""

    def follow(self, ruleset: RuleSet) -> None:
        """Take up whether the policy enforces: one that observes changes nothing."""
        self._active = ruleset.enforce

    @property
    def next_at(self) -> int:
        """When to look again."""
        return self._look_at

    def work(self, now: int) -> None:
        """Look, if it is time to.

        Raises:
            KernelError: the connection table cannot be read; nothing is forgotten.
            Closed: the supervisor is gone.
        """
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_EVERY
        if not self._active:
            return
        self._review()
        self._any_replaced |= any(self._sets.entries(replaced_set(family)) for family in (4, 6))
        swept = now < self._swept_until
        if now >= self._walk_at and (self._any_replaced or not swept):
            self._walk(swept)
            self._every = max(_LOOK_EVERY, _SHARE * (self._clock() - now))
            self._walk_at = now + self._every

    def swept(self, doubted: Iterable[Flow], now: int, every: int) -> None:
        """Take up those that a sweep has found; the next sweep comes in `every` nanoseconds.

        Raises:
            KernelError: the kernel could not be asked.
        """
        if self._active:
            self._take(doubted, every)
            if every <= _SWEPT_EVERY:
                self._swept_until = now + every + _SWEPT_EVERY

    def _walk(self, swept: bool) -> None:
        """Walk through the table for them, or only for those that took the place of others."""
        if swept:
            replacing = self._table.dump(*self._marks.replacing)
            self._end([flow for flow in replacing if _in_its_place(flow)][:_MOST])
        else:
            self._take(self._table.dump(*self._marks.doubted), self._every)
        self._any_replaced = False  # one that is too young is still in the set

    def _take(self, doubted: Iterable[Flow], every: int) -> None:
        """Take up connections for which a RST or FIN came in; the next come in `every` ns."""
        closed, moved, settled, lasting = self._sort(doubted, every)
        marks = self._marks
        if moved:
            self._table.set_liberal(moved)
        if lasting:
            self._table.set_timeout(lasting, self._patience)
        if settled:
            self._table.set_mark(settled, 0, marks.closing.mask)
        self._end(closed)

    def _end(self, closed: list[Flow]) -> None:
        """Condemn the servers' ends of connections that are over for the tracker, and ask them."""
        if closed:
            self._table.set_liberal(closed)
            bits = self._marks.condemned_destination.value
            # The bit that tells that their client ended them stays: see `rstguard.kernel.chains`.
            codes = condemn(self._table, closed, self._labels, bits, bits)
            there = [flow for flow, code in zip(closed, codes, strict=True) if code == 0]
            self._asked |= {(flow.original, flow.zone): (flow, _PROBES) for flow in there}
            self._probe()

    def _sort(
        self, doubted: Iterable[Flow], every: int
    ) -> tuple[list[Flow], list[Flow], list[Flow], list[Flow]]:
        """Return which are closed, have their window moved, need no look, or are to last longer.

        Each list is bounded; what is left out still has its bit the next time.
        """
        closed, moved, settled, lasting = list[Flow](), list[Flow](), list[Flow](), list[Flow]()
        seen, self._half_closed = self._half_closed, {}
        before, self._closed = self._closed, set()
        for flow in doubted:
            if not flow.mark & self._marks.stage_mask:
                continue  # another program's mark
            soon = flow.timeout < _SOON
            if self._stays_closed(flow, before, every) or _in_its_place(flow):
                closed.append(flow)
            elif flow.state in (TcpState.CLOSE, TcpState.SYN_SENT):
                continue
            elif flow.state not in HALF_CLOSED:
                if len(moved) < _MOST:
                    self._counts["window_cured"] += 1
                    moved.append(flow)
                    settled.append(flow)
            elif flow.server_first:
                settled.append(flow)
            elif flow.state == TcpState.TIME_WAIT and soon:
                closed.append(flow)
            else:
                if soon:
                    lasting.append(flow)
                key = flow.original, flow.zone
                # Its FIN may have come with a RST that moved the window: nobody can tell.
                if key in seen or len(moved) < _MOST:
                    self._half_closed[key] = flow
                    moved += [] if key in seen else [flow]
        closed += self._replaced(seen)
        return closed[:_MOST], moved, settled[:_MOST_SETTLED], lasting[:_MOST]

    def _stays_closed(self, flow: Flow, before: set[tuple[Name, int]], every: int) -> bool:
        """Tell whether it was closed at the last look, or may be forgotten before the next."""
        if flow.state != TcpState.CLOSE:
            return False
        entry = name_of(flow), flow.ident
        self._closed.add(entry)
        return entry in before or flow.timeout * SECOND <= 2 * every

    def _replaced(self, before: dict[_Key, Flow]) -> list[Flow]:
        """Return what has taken the place of half-closed connections, and was not answered."""
        gone = [flow for key, flow in before.items() if key not in self._half_closed]
        found = []
        for flow, now in zip(gone, self._table.read(gone) if gone else [], strict=True):
            if now is not None and now.ident != flow.ident and now.state == TcpState.SYN_SENT:
                found.append(now)
        return found

    def _review(self) -> None:
        """See which servers have answered, and ask the others again."""
        asked = [flow for flow, _ in self._asked.values()]
        outlived = []
        for flow, seen in zip(asked, self._table.read(asked) if asked else [], strict=True):
            key = flow.original, flow.zone
            there = seen is not None and seen.ident == flow.ident
            if seen is not None and there and self._held_on(seen):
                outlived.append(flow)
            elif there and self._asked[key][1]:
                continue
            del self._asked[key]
        self._tell(outlived)
        self._probe()

    def _held_on(self, seen: Flow) -> bool:
        """Tell whether the server was sent a RST of ours.

        A RST of the client's that comes once more sets the bits of both ends.
        """
        sent = self._marks.rst_sent
        return seen.mark & sent.mask == self._marks.rst_sent_destination.value

    def _probe(self) -> None:
        destination = self._marks.rst_sent_destination.value
        packets: list[tuple[bytes, int]] = []
        for key, (flow, due) in self._asked.items():
            if due:
                self._asked[key] = flow, due - 1
                for path in probe_paths(flow, destination, self._marks):
                    way = way_of(path, flow, self._marks, 1 + _PROBES - due)
                    packets.append((probe(path, self._draw(), self._draw()), way))
        send_each(self._sender, packets)

    def _tell(self, outlived: list[Flow]) -> None:
        self._counts["outlived"] += len(outlived)
        for flow in outlived[:_MOST_TOLD]:
            ends, reason = Ends.DESTINATION, Reason.OUTLIVED
            self._channel.send(Reset(flow.original, ends, OUTLIVED, reason, by_worker=False))


def _in_its_place(flow: Flow) -> bool:
    """Tell whether a SYN took the place of another connection, and was not answered."""
    return flow.state == TcpState.SYN_SENT and not 0 <= flow.age < SECOND
