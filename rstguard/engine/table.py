"""The connection table as a sweep finds it, and what is known of its live connections.

There are two of each: objects (`rstguard.engine.listed`), and columns of numbers where numpy is
there (`rstguard.engine.columns`), which take a tenth of the time.  They give the same answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from rstguard.engine.admission import Paths
from rstguard.engine.flow import Flow, Name
from rstguard.engine.grades import Grades
from rstguard.engine.limits import Lenience
from rstguard.engine.pressure import Load
from rstguard.engine.reused import Reused
from rstguard.engine.ruleset import Rule


class Moment(NamedTuple):
    """When a sweep is, and when the last one was (monotonic nanoseconds)."""

    now: int
    swept: int


class Held(NamedTuple):
    """A live connection: when it began, and when a packet of it was last seen (monotonic ns)."""

    flow: Flow
    began: int
    changed: int


class Known(ABC):
    """The live connections of a table, and what is known of each since earlier sweeps.

    Every list of connections is in the order of the table.  A rule looks at what concerns it alone.
    """

    @abstractmethod
    def present(self, names: Collection[Name]) -> set[Name]:
        """Return which of these connections are there."""

    @abstractmethod
    def beyond(self, rule: Rule, lenience: Lenience) -> list[Flow]:
        """Return the newest connections of each source beyond the limit that a rule sets it.

        What may have been forged goes first.  The sources follow each other as the first connection
        of each does in the table.  `lenience` says whose limit is wider.
        """

    @abstractmethod
    def counted(self, rule: Rule) -> dict[int, int]:
        """Return how many connections each source holds, after `beyond` was asked."""

    @abstractmethod
    def paths(self, rule: Rule, keys: Collection[int], but: Collection[Name]) -> dict[int, Paths]:
        """Return the names of the connections of each of some keys of a rule that has any.

        `but` these, and those that anybody may have made (`Grades.is_doubtful`).
        """

    @abstractmethod
    def moved(self, rule: Rule) -> dict[int, int]:
        """Return how much each source has moved since the sweep before.

        For PACKET_RATE that is small packets (`rstguard.engine.pace`), for BYTE_RATE bytes.
        """

    @abstractmethod
    def movers(self, rule: Rule, sources: Collection[int]) -> list[Flow]:
        """Return the connections on which these sources have moved them."""

    @abstractmethod
    def hasty(self, rule: Rule, most: int) -> list[Flow]:
        """Return connections that have moved more than `most`, counted likewise."""

    @abstractmethod
    def slow(self, rule: Rule, now: int) -> list[Flow]:
        """Return connections old enough that have moved less than a rule asks for."""

    @abstractmethod
    def silent(self, rule: Rule, now: int) -> list[Flow]:
        """Return connections on which nothing was said for as long as a rule allows."""

    @abstractmethod
    def old(self, rule: Rule, now: int) -> list[Flow]:
        """Return connections as old as a rule allows."""

    @abstractmethod
    def held(
        self, rule: Rule, widths: tuple[int, int], sources: Collection[int]
    ) -> dict[int, list[Flow]]:
        """Return what each of these sources holds, by keys of these widths of an address."""

    @abstractmethod
    def loads(self, least: int) -> dict[int, Load]:
        """Return what services carry that have `least` live connections, or that fail some."""

    @abstractmethod
    def of_services(self, services: Collection[int]) -> list[Held]:
        """Return the live connections of some services."""

    @abstractmethod
    def served(self, sources: Collection[int], widths: tuple[int, int]) -> dict[int, int]:
        """Return how many connections of each of these sources were served (`Grades.is_served`).

        Closed ones count, as long as the table has them; a source without any is left out.
        """

    @abstractmethod
    def answered(self, widths: tuple[int, int], least: int) -> tuple[int, dict[int, int]]:
        """Return how many live connections servers have answered with data, and how many of whom.

        That is by source, by keys of these widths; those who hold less than `least` are left out.
        """

    @abstractmethod
    def rest(self) -> None:
        """Let go of the table: what is asked from now on is `counted`, and the next sweep."""


class Table(ABC):
    """The guarded connections, closed ones too."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def flows(self) -> Sequence[Flow]:
        """Return all of them as objects."""

    @abstractmethod
    def marked(self, mark: int, mask: int) -> list[Flow]:
        """Return those whose mark, under `mask`, equals `mark`, as objects."""

    @abstractmethod
    def as_held(self, closing: int) -> None:
        """Show each as its server holds it; by a bit of `closing` its client alone has ended it."""

    @abstractmethod
    def begun(self, reused: Reused) -> list[Flow]:
        """Return those that have begun on another's entry since they were last looked at."""

    @abstractmethod
    def as_own(self, reused: Reused) -> None:
        """Show each with no bytes, labels or age but its own."""

    @abstractmethod
    def tally(self, ipv4: int, ipv6: int, adopted: int = 0) -> Iterable[tuple[int, int, int]]:
        """Return each source's key, how many counted connections it has, how many productive ones.

        Those with a label of `adopted` count only if they are productive: what they carried before
        nobody knows.
        Sources with few may be left out (`rstguard.engine.lenient.LEAST`).  They follow each other
        as the first connection of each does in the table.
        """

    @abstractmethod
    def known(
        self,
        before: Known | None,
        moment: Moment,
        grades: Grades,
        windows: Collection[int] = (),
    ) -> Known:
        """Return the live ones, and what is known of them after what was known `before`.

        `windows` are the times over which some rules average (`Rule.over_last`).
        """
