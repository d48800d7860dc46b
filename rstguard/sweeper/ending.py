"""The sweeper's deadly side: connections that are to end are found, condemned and confirmed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Final

from rstguard.engine.address import Prefix
from rstguard.engine.flow import Flow, as_held
from rstguard.engine.ruleset import SECOND, RuleSet
from rstguard.engine.verdict import Ends, Reason
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.messages import Blocked, Kill, NotKilled, Reset
from rstguard.kernel.condemning import is_condemned
from rstguard.kernel.elements import Element
from rstguard.kernel.marks import Labels, Marks
from rstguard.kernel.seam import Connections, ElementSets
from rstguard.sweeper import targets
from rstguard.sweeper.condemner import MOST_PENDING, Condemner, Target
from rstguard.sweeper.condemner import select as chosen
from rstguard.sweeper.kills import MOST_TOLD, Kills

_HALF_OPEN_EVERY: Final = SECOND


class Ending:
    """Ends connections for whoever asks; `work` does it, those of many requests together.

    What the kernel refuses is tried again with the next `work`; of each kind of request the last
    65,536 wait for that.  Times are monotonic nanoseconds.
    """

    def __init__(
        self,
        channel: ChildEnd,
        table: Connections,
        sets: ElementSets,
        condemner: Condemner,
        counts: Counter[str],
        clock: Callable[[], int],
        marks: Marks,
        labels: Labels,
    ) -> None:
        """Tell of kills by `channel`, and count in `counts`."""
        self._marks, self._labels = marks, labels
        self._channel, self._table, self._sets = channel, table, sets
        self._condemner, self._counts, self._clock = condemner, counts, clock
        self._kills = Kills()
        self._asked: deque[Kill] = deque(maxlen=MOST_PENDING)
        self._banned: deque[Element] = deque(maxlen=MOST_PENDING)
        self._resets: deque[Reset] = deque(maxlen=MOST_PENDING)
        self._recheck = False
        self._half_open_of: dict[Prefix, targets.Block] = {}
        self._half_open_at = 0

    def follow(self, ruleset: RuleSet) -> None:
        """Take up what a policy says of which addresses are protected, and whether it enforces."""
        self._ruleset = ruleset

    def of_blocked(self, message: Blocked) -> None:
        """End the connections of a source that was banned; of a shunned one what is half-open."""
        element = message.element
        if len(self._half_open_of) < MOST_PENDING:
            self._half_open_of[element.source] = targets.Block(element, message.reason)
        self._banned.append(element)

    def of_banned(self, element: Element) -> None:
        """End the connections of a source that a sweep banned."""
        self._banned.append(element)

    def of_verdict(self, message: Reset) -> None:
        """End a connection that a worker condemned, at its other end too."""
        self._resets.append(message)

    def of_flows(self, found: Iterable[Target], now: int) -> None:
        """End connections that a sweep found."""
        self._condemner.start(found, now)

    def asked(self, kill: Kill) -> None:
        """End what an administrator names, and tell of it."""
        self._asked.append(kill)

    def recheck(self) -> None:
        """End what sources hold that are banned by now."""
        self._recheck = True  # once for all: an import of a long list asks again and again

    def take_over(self, now: int) -> None:
        """Finish what came before: of a sweeper that died, and of bans while there was none.

        What it had condemned, and no end of which was told, is provoked.

        Raises:
            KernelError: the connection table or the sets cannot be read.
        """
        unfinished = self._table.dump(*self._marks.unfinished)
        marks, labels = self._marks, self._labels
        self._kill_all((f for f in unfinished if is_condemned(f, marks, labels)), now)
        self._end_connections_of_banned(now)

    @property
    def pending(self) -> int:
        """How many connections are condemned and not seen dead yet."""
        return self._condemner.pending

    @property
    def next_at(self) -> int | None:
        """When there is more to do, or None."""
        if self._asked or self._banned or self._resets or self._recheck:
            return 0
        times = [self._condemner.next_step_at, self._half_open_at if self._half_open_of else None]
        return min((time for time in times if time is not None), default=None)

    def work(self, now: int) -> None:
        """Do what was asked for, and what is due.

        Raises:
            KernelError: the kernel refused; nothing is forgotten.
            Closed: the supervisor is gone.
        """
        while self._asked:
            self._kill(self._asked[0], now)
            self._asked.popleft()
        if self._recheck:
            self._end_connections_of_banned(now)
            self._recheck = False
        self._end_sources(self._banned, now)
        self._banned.clear()
        self._condemner.start(targets.of_verdicts(self._table, self._resets), now)
        self._resets.clear()
        if self._half_open_of and now >= self._half_open_at:
            self._end_half_open(now)
        if self._condemner.next_step_at is not None:
            self._step()

    def _end_connections_of_banned(self, now: int) -> None:
        """Whoever is banned by now, by whomever, holds no connection any more."""
        if self._ruleset.enforce:
            self._end_sources(self._sets.list(), now)

    def _end_sources(self, elements: Iterable[Element], now: int) -> None:
        """A source that is banned is gone with all its connections."""
        found = targets.of_banned(self._table, elements, self._ruleset.scope, self._marks)
        self._counts["ended_by_ban"] += len(found)
        self._condemner.start(found, now)

    def _end_half_open(self, now: int) -> None:
        """Free the server of the handshakes that a blocked source can no longer finish."""
        blocks = self._half_open_of.values()
        found = targets.half_open(self._table, blocks, self._ruleset.scope, self._marks)
        self._half_open_of.clear()
        self._counts["half_open_ended"] += len(found)
        self._condemner.start(found, now)
        # A table full of forged SYNs makes this dear; it may take a tenth of a core.
        took = self._clock() - now
        self._half_open_at = now + max(_HALF_OPEN_EVERY, 10 * took)

    def _kill(self, kill: Kill, now: int) -> None:
        flows = chosen(
            (as_held(flow, self._marks.closing.mask) for flow in self._table.dump()),
            kill.source,
            kill.source_port,
            kill.destination,
            kill.port,
        )
        answers = self._kills.ask(kill, flows)
        self._kill_all(flows, now)
        for answer in answers:
            self._channel.send(answer)

    def _kill_all(self, flows: Iterable[Flow], now: int) -> None:
        self._condemner.start([Target(flow, Ends.BOTH, "", Reason.KILLED) for flow in flows], now)

    def _step(self) -> None:
        results = self._condemner.step(self._clock()).results
        for result in results:
            self._counts["confirmed" if result.confirmed else "unconfirmed"] += 1
        answers, unconfirmed = self._kills.note(results)
        if unconfirmed:
            self._channel.send(NotKilled(len(unconfirmed), tuple(unconfirmed[:MOST_TOLD])))
        for answer in answers:
            self._channel.send(answer)
