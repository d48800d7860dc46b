"""RSTs, and FINs, that are held back until the end that they claim to come from was asked.  Pure.

A RST with the exact number ends a connection, whoever sent it (RFC 9293, 3.10.7.4; RFC 5961, 3.2
only asks for the exact number).  So it waits here, while the end that it names is asked by probes,
each of one byte, which gets into no stream as its number is old:

=====  =============================================  ==========================================
ms     asked                                          why
=====  =============================================  ==========================================
0      the named sender: twice within its window, by  every firewall and translator on its way
       the RST's own numbers                          lets these pass
0      the same, if it tells only one number: once,   half of the numbers are old; if this was
       with any other                                 not, its bare ACK tells one that is
0      the other end: by any old number               it tells both numbers, by which it can be
                                                      seen whether the RST's were true
100    the other end: a SYN, or, if it has opened     if it is behind a firewall that drops what
       the connection, a SYN+ACK                      does not fit, or a translator that answers
then   the named sender: within its window, by the    if it was not asked so yet, and has said
       numbers that the other end has told            nothing, or that it is dead
1,020  the named sender once more, if it has kept     a stack that answers odd segments once a
       silent                                         second, and whose answer the forger has used
                                                      up right before his RST
=====  =============================================  ==========================================

No end is asked more than three times.  A router or firewall answers what does not fit by a RST, as
if the end behind it were dead.  So a sender is dead if it says so twice, once of them to true
numbers.  The answers (`rstguard.engine.evidence`) decide:

==============================  =========================================================
the sender holds the            forged: the RST is dropped, the tracker's entry is repaired
connection
the sender does not know it     honest: the RST goes on
neither end knows it            honest: nothing is left to protect
only bare ACKs of the sender,   forged: a stack without DSACK; a dead one would have said so
until the end
nothing until the end           unconfirmed: the RST goes on
==============================  =========================================================

The end comes after 1.25 seconds, or three times what an answer took.  A RST that was lost on its
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
from enum import Enum
from typing import Final, NamedTuple

from rstguard.engine.address import is_v6
from rstguard.engine.case import AGAIN, ENOUGH, MOST_ASKED, Case
from rstguard.engine.evidence import Evidence
from rstguard.engine.flow import Flow, Tuple
from rstguard.engine.questions import Probe, Questions
from rstguard.engine.ruleset import SECOND
from rstguard.engine.wire import ACK, FIN, RST, SYN, Packet

PLACES: Final = 2048
"""RSTs that are held at once."""
MOST_OF_ONE: Final = 8
"""RSTs of one connection and direction that are kept; the rest are dropped."""
LAST: Final = SECOND * 51 // 50
"""When the named sender is asked once more, if it has kept silent."""
PATIENCE: Final = SECOND * 5 // 4
"""How long is waited for answers; longer where an answer is known to take longer."""
_ROUNDS: Final = 3
_KIND: Final = FIN | SYN | RST | ACK
_MORE: Final = 1 << 24
"""Bytes that a sender may have sent since its RST, if that was forged."""
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


class Holding:
    """All RSTs that wait.  Times are monotonic nanoseconds; `draw` draws 32 random bits.

    `take_probes` are to be sent and `decided` to be carried out by whoever calls, who clears these.
    """

    def __init__(self, draw: Callable[[], int], places: int = PLACES) -> None:
        self._questions, self._places = Questions(draw), places
        self._cases: OrderedDict[Tuple, Case] = OrderedDict()
        """By the sender's segments, in the order of their times."""
        self._others: dict[Tuple, Case] = {}
        self._weights: Counter[int] = Counter()
        self._late: OrderedDict[tuple[Tuple, int], int] = OrderedDict()
        self.decided: list[Decided] = []

    def __len__(self) -> int:
        return len(self._cases)

    @property
    def orphans(self) -> int:
        """How many connections are asked for whose RST was lost."""
        return sum(not case.numbers for case in self._cases.values())

    def take_probes(self) -> list[Probe]:
        """Return what is to be sent; it is not returned again."""
        return self._questions.take()

    def asked_about(self, probe: Probe) -> Flow | None:
        """Return the connection that a probe is about, if a RST of it still waits."""
        sends = probe.path.turned
        case = self._cases.get(sends) or self._others.get(sends)
        return case.flow if case else None

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
        case = Case(flow, path, other, sequence, closes, now, inside, hops, [number])
        if packet.flags & ACK:
            case.received = packet.acknowledgement or None  # 0 says nothing
        self._begin(case)

    def orphan(self, flow: Flow, now: int) -> bool:
        """Ask the client of a connection whose RST was lost; tell whether there was room."""
        if self.waits_for(flow) or len(self._cases) >= self._places:
            return self.waits_for(flow)
        self._begin(Case(flow, flow.original, flow.reply, None, None, now, False, -1))
        return True

    def _begin(self, case: Case) -> None:
        case.ends = case.began + PATIENCE
        self._cases[case.sender] = case
        self._others[case.other] = case
        self._weights[_network(case.flow)] += 1
        if case.received is None or case.sequence is None:
            self._questions.ask_by(case.of_sender, case.sender, None, case.sequence)
        else:
            for _ in range(ENOUGH):
                numbers = case.received, case.sequence
                self._questions.ask_within(case.of_sender, case.sender, *numbers)
        self._questions.ask_other(case.of_other, case.other, case.sequence)

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
        goes_on = True
        # RSTs may wait in both ends' names: an answer tells of both.
        if (case := self._cases.get(path)) is not None:
            goes_on = self._of_sender(case, packet, block, hops, now)
        if (case := self._others.get(path)) is not None:
            goes_on = self._of_other(case, packet, block, now) and goes_on
        return goes_on

    def _of_sender(
        self, case: Case, packet: Packet, block: tuple[int, int] | None, hops: int, now: int
    ) -> bool:
        sent_fin = case.closes is not None and (packet.sequence - case.closes) % _MODULUS < _HALF
        following = packet.sequence if sent_fin else case.sequence
        match case.of_sender.weigh(packet, block, following):
            case Evidence.ALIVE:
                outcome = Outcome.HONEST if sent_fin else Outcome.FORGED
                self._end(case, outcome, now, hops)
                return False
            case Evidence.DEAD:
                case.dead.add(packet.sequence)
                self._weigh_death(case, now)
                return False
            case Evidence.BARE if not sent_fin:
                case.bare_hops = hops
                old = packet.acknowledgement == case.received
                if not (case.anew or old) and case.may_ask:
                    case.anew = True
                    numbers = packet.acknowledgement, packet.sequence
                    self._questions.ask_by(case.of_sender, case.sender, *numbers)
        return True

    def _of_other(
        self, case: Case, packet: Packet, block: tuple[int, int] | None, now: int
    ) -> bool:
        found = case.of_other.weigh(packet, block, None)
        if found is Evidence.DEAD:
            case.other_dead = True
            self._weigh_death(case, now)
            return False
        # It goes on with its own number, and expects the one that the RST bears, or the sender has
        # sent more: these are true, or the sender will not understand the last question.
        bare = block is None and not packet.payload_length and packet.flags & _KIND == ACK
        sent = None if case.sequence is None else packet.acknowledgement - case.sequence
        fits = bare and (sent is None or sent % _MODULUS < _MORE)
        if (found is Evidence.ALIVE or (fits and case.opened)) and case.told is None:
            case.ends = max(case.ends, case.began + _ROUNDS * (now - case.began))
            case.told = packet.sequence, packet.acknowledgement
            case.exactly = packet.sequence == case.received
            if now >= case.began + AGAIN:
                self._ask_exactly(case)
            self._weigh_death(case, now)
        if found is Evidence.ALIVE:
            return False
        # To each question that does not fit comes such an answer.  Should it be another, the sender
        # repeats what it acknowledges.
        case.echoes += fits and bool(case.of_other.probes)
        self._weigh_death(case, now)
        return not fits or case.echoes > MOST_ASKED

    def _weigh_death(self, case: Case, now: int) -> None:
        """End a case whose sender is dead, or ask it by true numbers if it only may be."""
        if not case.dead or case.sender not in self._cases:
            return
        if case.is_over:
            self._end(case, Outcome.HONEST, now, -1)
        else:
            self._ask_exactly(case)

    def unsure(self, now: int) -> list[Flow]:
        """Return the connections whose sender may be dead, or whose other end is to be opened."""
        cases = (case for case in self._cases.values() if case.told is None)
        return [case.flow for case in cases if case.dead or case.opens_at <= now]

    def replaced(self, flow: Flow, now: int) -> None:
        """Take it that a new connection of the same ends is in the place of one that waits.

        No answer of the other end comes here any more, and a SYN would meet the new one.
        """
        for path in (flow.original, flow.reply):
            case = self._cases.get(path)
            if case is not None and case.dead:
                self._end(case, Outcome.HONEST, now, -1)
            elif case is not None:
                case.opened = True

    def _ask_exactly(self, case: Case) -> None:
        """Ask the sender by the numbers that the other end has told, if it was not yet."""
        if case.told is None or case.exactly or not case.may_ask:
            return
        if not case.dead and len(case.of_sender.probes) == MOST_ASKED - 1:
            return  # the last question is by these numbers, too
        case.exactly = True
        self._questions.ask_within(case.of_sender, case.sender, *case.told)

    def _open(self, case: Case) -> None:
        if not case.opened:
            case.opened = True
            accepts = case.other == case.flow.original
            self._questions.open(case.other, acknowledges=accepts)

    def _insist(self, case: Case) -> None:
        """Ask the sender once more: by true numbers, or by the other half of all."""
        case.insisted = True
        asked, sends = case.of_sender, case.sender
        if not case.may_ask:
            return
        if case.told is not None:
            self._questions.ask_living(asked, sends, *case.told)
        elif case.received is not None:
            self._questions.ask_by(asked, sends, case.received, case.sequence)
        else:
            self._questions.ask(asked, sends, asked.probes[0] ^ _HALF, asked.nonces[0] ^ _HALF)

    def work(self, now: int) -> None:
        """Ask again where nothing came, and end what has waited long enough."""
        for case in list(self._cases.values()):
            if case.told is None and case.opens_at <= now:
                self._open(case)
            if now < case.began + AGAIN:
                continue
            self._ask_exactly(case)
            silent = case.bare_hops < 0 and not case.dead
            if now >= case.began + LAST and not case.insisted and silent:
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

    def _end(self, case: Case, outcome: Outcome, now: int, true_hops: int) -> None:
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


def _nonces(case: Case) -> Iterator[tuple[Tuple, int]]:
    for sends, asked in ((case.sender, case.of_sender), (case.other, case.of_other)):
        yield from ((sends, nonce) for nonce in asked.nonces)


def _network(flow: Flow) -> int:
    """The /24 or /48 of the client, tagged as an address."""
    source = flow.original.source
    shift = 80 if is_v6(source) else 8
    return source >> shift << shift
