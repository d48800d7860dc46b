"""RSTs, and FINs, that are held back until the end that they claim to come from was asked.  Pure.

A RST with the exact number ends a connection, whoever sent it (RFC 9293, 3.10.7.4; RFC 5961, 3.2
only asks for the exact number).  So it waits here, while the end that it names is asked by probes:

=====  =============================================  ==========================================
ms     asked                                          why
=====  =============================================  ==========================================
0      the named sender: one byte                     its number is old for a living end, which
                                                      then reports a duplicate: by the RST's own
                                                      acknowledgement, or by chance.  It acknow-
                                                      ledges more than the end has sent: some
                                                      stacks only answer that
then   the same, by the numbers of a bare ACK of it   the number was not old, and now it is
100    the other end: two bytes, both numbers of      one of the two is old for it.  It tells
       them half a space apart, if nothing came       both numbers, which are needed for a
                                                      sender behind a firewall that drops what
                                                      does not fit
200    the other end: a SYN, or, if it has opened     if it is behind such a firewall as well
       the connection, a SYN+ACK
then   the named sender: one byte within its window   every firewall lets it pass
1,020  the named sender: one byte, as at first, if    a stack that answers odd segments once a
       it has kept silent                             second, and whose answer the forger has used
                                                      up right before his RST
=====  =============================================  ==========================================

So one RST draws at most three packets to either end: a bare ACK says that the sender lives, and
spares the last question.  The answers (`rstguard.engine.evidence`) decide:

==============================  =========================================================
the sender holds the            forged: the RST is dropped, the tracker's entry is repaired
connection
the sender does not know it     honest: the RST goes on
the other end does not know it  honest: nothing is left to protect
only bare ACKs of the sender,   forged: a stack without DSACK; a dead one would have said so
until the end
nothing until the end           unconfirmed: the RST goes on
==============================  =========================================================

The end comes after 1.15 seconds, or three times what an answer took.  A RST that was lost on its
way here, in a full queue, beyond a limit or with a process that died, leaves its connection marked:
it is asked for as an *orphan*, without a RST to be released.

A FIN likewise, only that an end which has sent it is alive as well: it goes on with the number
behind it.

Places are bounded and shared out by the network of the connection's client, as an attacker has no
other connections than those of his own addresses.  The oldest of the heaviest goes first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from rstguard.engine.address import is_v6
from rstguard.engine.evidence import Asked, Evidence
from rstguard.engine.flow import Flow, Tuple
from rstguard.engine.questions import Probe, Questions
from rstguard.engine.ruleset import SECOND
from rstguard.engine.wire import ACK, FIN, RST, SYN, Packet

PLACES: Final = 2048
"""RSTs that are held at once."""
MOST_OF_ONE: Final = 8
"""RSTs of one connection and direction that are kept; the rest are dropped."""
AGAIN: Final = SECOND // 10
"""When the other end is asked, if the named sender has not answered."""
LAST: Final = SECOND * 51 // 50
"""When the named sender is asked once more, if it has kept silent."""
PATIENCE: Final = SECOND * 23 // 20
"""How long is waited for answers; longer where an answer is known to take longer."""
_ROUNDS: Final = 3
_KIND: Final = FIN | SYN | RST | ACK
_LATE: Final = 2 * SECOND
"""How long an answer may still come after the decision."""
_MOST_LATE: Final = 8192

_HALF: Final = 1 << 31
_MODULUS: Final = 1 << 32


class Outcome(Enum):
    """What became of a RST; the value is how it is counted."""

    FORGED = "forged_resets"
    HONEST = "honest_resets"
    UNCONFIRMED = "unconfirmed_resets"
    CROWDED = "crowded_resets"


class Decided(NamedTuple):
    """What is to be done about a connection, and what was found."""

    outcome: Outcome
    flow: Flow
    """The connection as it was when its first RST came."""
    by_client: bool
    """Whether the RST claims to come from the client."""
    numbers: tuple[int, ...]
    """The packets that waited; none of an orphan's."""
    inside: bool
    """Whether the first RST came in on an interface that is not protected."""
    fin: bool
    """Whether it was a FIN."""
    hops: int
    """What was left of the first RST's TTL or hop limit; -1 of an orphan's."""
    true_hops: int
    """Likewise of the segment by which the named sender answered; -1 if there was none."""
    waited: int
    """Nanoseconds."""

    @property
    def passes(self) -> bool:
        """Whether the packets go on."""
        return self.outcome is not Outcome.FORGED


@dataclass(slots=True, eq=False)
class _Case:
    """One connection of which a RST waits."""

    flow: Flow
    sender: Tuple
    """Segments of the named sender, as they come in here."""
    other: Tuple
    """Those of the other end."""
    sequence: int | None
    """The number that the sender goes on with if it has sent nothing; None of an orphan's."""
    closes: int | None
    """The one behind the FIN; None of a RST."""
    began: int
    inside: bool
    hops: int
    numbers: list[int] = field(default_factory=list)
    of_sender: Asked = field(default_factory=Asked)
    of_other: Asked = field(default_factory=Asked)
    bare_hops: int = -1
    """The hops of a bare ACK of the sender that came after it was asked."""
    ends: int = 0
    echoes: int = 0
    """Bare ACKs of the other end since it was asked."""
    opened: bool = False
    """Whether the other end was sent a SYN."""
    anew: bool = False
    """Whether the sender was asked by the numbers of its own bare ACK."""
    exactly: bool = False
    """Whether the sender was asked by those that the other end has told."""
    insisted: bool = False
    """Whether the sender was asked once more, in the end."""

    @property
    def by_client(self) -> bool:
        return self.sender == self.flow.original


class Holding:
    """All RSTs that wait.  Times are monotonic nanoseconds; `draw` draws 32 random bits.

    `take_probes` are to be sent and `decided` to be carried out by whoever calls, who clears these.
    """

    def __init__(self, draw: Callable[[], int], places: int = PLACES) -> None:
        self._questions, self._places = Questions(draw), places
        self._cases: OrderedDict[Tuple, _Case] = OrderedDict()
        """By the sender's segments, in the order of their times."""
        self._others: dict[Tuple, _Case] = {}
        self._weights: Counter[int] = Counter()
        self._late: OrderedDict[tuple[Tuple, int], int] = OrderedDict()
        self.decided: list[Decided] = []

    def __len__(self) -> int:
        return len(self._cases)

    def take_probes(self) -> list[Probe]:
        """Return what is to be sent; it is not returned again."""
        return self._questions.take()

    def waits_for(self, flow: Flow) -> bool:
        """Tell whether a RST of this connection waits, in either end's name."""
        return flow.original in self._cases or flow.reply in self._cases

    def join(self, number: int, packet: Packet) -> bool | None:
        """Take a further RST of a connection that waits, if it is no answer (`heard`).

        Returns:
            True if it waits now, too, False if it is to be dropped, None if nothing is known of it:
            then `hold` it.
        """
        case = self._cases.get(Tuple(*packet[:4]))
        if case is None:
            return None
        if len(case.numbers) >= MOST_OF_ONE:
            return False
        if not case.numbers:  # an orphan, whose RST has come once more
            case.sequence = packet.sequence
        case.numbers.append(number)
        return True

    def hold(
        self, number: int, packet: Packet, hops: int, inside: bool, flow: Flow, now: int
    ) -> None:
        """Have the first RST of a connection wait, and ask its sender."""
        path = Tuple(*packet[:4])
        by_client = path == flow.original
        self._make_room()
        other = flow.reply if by_client else flow.original
        sequence, closes = packet.sequence, None
        if not packet.flags & RST:
            sequence = (sequence + packet.payload_length) % _MODULUS
            closes = (sequence + 1) % _MODULUS
        case = _Case(flow, path, other, sequence, closes, now, inside, hops, [number])
        # What the tracker lets pass is near to what the other end has sent; 0 says nothing.
        received = packet.acknowledgement if packet.flags & ACK else 0
        self._begin(case, received or None)

    def orphan(self, flow: Flow, now: int) -> bool:
        """Ask the client of a connection whose RST was lost; tell whether there was room."""
        if self.waits_for(flow) or len(self._cases) >= self._places:
            return self.waits_for(flow)
        self._begin(_Case(flow, flow.original, flow.reply, None, None, now, False, -1), None)
        return True

    def _begin(self, case: _Case, received: int | None) -> None:
        case.ends = case.began + PATIENCE
        self._cases[case.sender] = case
        self._others[case.other] = case
        self._weights[_network(case.flow)] += 1
        self._questions.ask_by(case.of_sender, case.sender, received, case.sequence)

    def _make_room(self) -> None:
        if len(self._cases) < self._places:
            return
        heaviest = max(self._weights, key=self._weights.__getitem__)
        case = next(case for case in self._cases.values() if _network(case.flow) == heaviest)
        self._end(case, Outcome.CROWDED, case.began, -1)

    def heard(self, packet: Packet, block: tuple[int, int] | None, hops: int, now: int) -> bool:
        """Weigh a segment of a connection that waits; tell whether it may go on.

        `block` is its first SACK block, `hops` what is left of its TTL or hop limit.  An answer to
        a probe goes no further: the other end has never sent what it answers.
        """
        path = Tuple(*packet[:4])
        if (path, packet.sequence) in self._late:
            return False
        case = self._cases.get(path)
        if case is not None:
            return self._of_sender(case, packet, block, hops, now)
        case = self._others.get(path)
        if case is not None:
            return self._of_other(case, packet, block, now)
        return True

    def _of_sender(
        self, case: _Case, packet: Packet, block: tuple[int, int] | None, hops: int, now: int
    ) -> bool:
        sent_fin = case.closes is not None and (packet.sequence - case.closes) % _MODULUS < _HALF
        following = packet.sequence if sent_fin else case.sequence
        match case.of_sender.weigh(packet, block, following):
            case Evidence.ALIVE:
                outcome = Outcome.HONEST if sent_fin else Outcome.FORGED
                self._end(case, outcome, now, hops)
                return False
            case Evidence.DEAD:
                self._end(case, Outcome.HONEST, now, -1)
                return False
            case Evidence.BARE if not sent_fin:
                case.bare_hops = hops
                if not (case.anew or case.insisted):
                    case.anew = True
                    told = packet.acknowledgement, packet.sequence
                    self._questions.ask_by(case.of_sender, case.sender, *told)
        return True

    def _of_other(
        self, case: _Case, packet: Packet, block: tuple[int, int] | None, now: int
    ) -> bool:
        found = case.of_other.weigh(packet, block, None)
        if found is Evidence.DEAD:
            self._end(case, Outcome.HONEST, now, -1)
            return False
        # It goes on with its own number, and expects the one that the RST bears: these are true,
        # or the sender will not understand the last question.
        bare = block is None and not packet.payload_length and packet.flags & _KIND == ACK
        fits = bare and case.sequence in (None, packet.acknowledgement)
        if found is Evidence.ALIVE or (fits and case.opened):
            case.ends = max(case.ends, case.began + _ROUNDS * (now - case.began))
            if not case.exactly:
                case.exactly = True
                told = packet.sequence, packet.acknowledgement
                self._questions.ask_within(case.of_sender, case.sender, *told)
        if found is Evidence.ALIVE:
            return False
        # To each question that does not fit comes such an answer.  Should it be another, the sender
        # repeats what it acknowledges.
        case.echoes += fits and bool(case.of_other.probes)
        return not fits or case.echoes > len(case.of_other.probes)

    def _insist(self, case: _Case) -> None:
        """Ask the sender once more: by known numbers, or by the other half of all."""
        case.insisted = True
        asked, questions = case.of_sender, self._questions
        sequence = asked.probes[-1] if case.exactly else asked.probes[0] ^ _HALF
        known = case.sequence is not None
        nonce = questions.unsent(case.sequence) if known else asked.nonces[0] ^ _HALF
        questions.ask(asked, case.sender, sequence, nonce)

    def work(self, now: int) -> None:
        """Ask again where nothing came, and end what has waited long enough."""
        for case in list(self._cases.values()):
            if now < case.began + AGAIN:
                break
            if not case.of_other.probes:
                self._questions.ask_unknown(case.of_other, case.other)
            elif now >= case.began + 2 * AGAIN and not (case.opened or case.exactly):
                case.opened = True
                accepts = case.other == case.flow.original
                self._questions.open(case.other, acknowledges=accepts)
            if now >= case.began + LAST and not case.insisted and case.bare_hops < 0:
                self._insist(case)
            if now >= case.ends:
                alive = case.bare_hops >= 0
                outcome = Outcome.FORGED if alive else Outcome.UNCONFIRMED
                self._end(case, outcome, now, case.bare_hops)
        while self._late:
            key, until = next(iter(self._late.items()))
            if until > now and len(self._late) <= _MOST_LATE:
                break
            del self._late[key]

    def release_all(self, now: int) -> None:
        """End all without a decision: what waits goes on."""
        for case in list(self._cases.values()):
            self._end(case, Outcome.UNCONFIRMED, now, -1)

    def _end(self, case: _Case, outcome: Outcome, now: int, true_hops: int) -> None:
        del self._cases[case.sender], self._others[case.other]
        network = _network(case.flow)
        self._weights[network] -= 1
        if not self._weights[network]:
            del self._weights[network]
        for key in _nonces(case):
            self._late[key] = now + _LATE
        self.decided.append(
            Decided(
                outcome,
                case.flow,
                case.by_client,
                tuple(case.numbers),
                case.inside,
                case.closes is not None,
                case.hops,
                true_hops,
                now - case.began,
            )
        )


def _nonces(case: _Case) -> Iterator[tuple[Tuple, int]]:
    for sends, asked in ((case.sender, case.of_sender), (case.other, case.of_other)):
        yield from ((sends, nonce) for nonce in asked.nonces)


def _network(flow: Flow) -> int:
    """The /24 or /48 of the client, tagged as an address."""
    source = flow.original.source
    shift = 80 if is_v6(source) else 8
    return source >> shift << shift
