"""The seam between the guard and Linux: all that a running guard asks of the kernel.

Supervisor, sweeper and workers get a `Kernel` when they are made and touch Linux through nothing
else.  `rstguard.kernel.linux.Linux` is the real one; the tests have one that only remembers.  What
a kernel hands out belongs to the network namespace of the thread that asked for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, Self

from rstguard.engine.address import Prefix
from rstguard.engine.flow import Flow, Tuple
from rstguard.engine.nearest import Near
from rstguard.engine.ruleset import RuleSet
from rstguard.engine.service import Service
from rstguard.engine.table import Table
from rstguard.kernel.command import Commands
from rstguard.kernel.elements import Element, Kind
from rstguard.kernel.links import Link
from rstguard.kernel.marks import Marks
from rstguard.kernel.nfqueue import Queued, QueueState, Verdict
from rstguard.kernel.nftables import Chain
from rstguard.kernel.protected import ProtectedAddress


class CookieCounts(NamedTuple):
    """Counts of this network namespace since SYNPROXY was first used in it.

    `sent` SYN-ACKs with a cookie, `accepted` and `refused` ACKs that should bring one back.
    """

    sent: int
    accepted: int
    refused: int


class Lost(NamedTuple):
    """What the connection table of this namespace could not take in, as `conntrack -S` names it.

    `insert_failed` and `drop` count other things as well, such as two packets of one connection
    that both are its first; `early_drop` are connections given up for others.
    """

    insert_failed: int = 0
    drop: int = 0
    early_drop: int = 0
    chain_too_long: int = 0


class Pollable(Protocol):
    """What can be waited on until there is something to read."""

    def fileno(self) -> int:
        """The descriptor to wait on."""


class Closing(Protocol):
    """What is given back at the end of a `with` block, or by `close`."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None:
        """Give it back; what was changed through it stays."""


class Counted(NamedTuple):
    """An element of a set with counters: a tagged address and a port, or -1, and its count."""

    address: int
    port: int
    packets: int


class ElementSets(Closing, Protocol):
    """The elements of the kernel's sets: see `rstguard.kernel.sets.Sets`.

    Every method raises `NotThere` if the set is not there, and `Full` if it can hold no more; what
    was added before that stays.
    """

    def add(self, elements: Iterable[Element], shorten: bool = False) -> None:
        """Put elements into their sets; those that last longer stay, unless `shorten`."""

    def remove(self, source: Prefix) -> bool:
        """Take exactly this prefix out of the banned and shunned; tell whether it was there."""

    def put(self, name: str, prefixes: Iterable[Prefix], seconds: int) -> None:
        """Put prefixes into a set that has times but no comments, or renew them there."""

    def count(self, name: str, elements: Iterable[Counted], seconds: int) -> None:
        """Put elements into a set with times and counters, or change what they count there."""

    def take(self, name: str, prefixes: Iterable[Prefix]) -> None:
        """Take prefixes out of a set; those that are not there do not matter."""

    def list(self) -> list[Element]:
        """Return who is banned or shunned, bans first."""

    def entries(self, name: str) -> int:
        """Return how many elements a set holds, of any type."""

    def contains(self, address: int) -> bool:
        """Tell whether a tagged address is banned or shunned, itself or in a wider prefix."""

    def proven(self, address: int) -> bool:
        """Tell whether the source of a tagged address has lately proved itself."""

    def one_sided(self, address: int, port: int) -> bool:
        """Tell whether only one side is seen of a service, by its tagged address and port."""


class Connections(Closing, Protocol):
    """The connection table: see `rstguard.kernel.conntrack.Conntrack`."""

    def dump(
        self,
        mark: int = 0,
        mask: int = 0,
        family: int = 0,
        now_ns: int | None = None,
        assured: bool = False,
    ) -> Iterator[Flow]:
        """Yield the TCP connections whose mark, under `mask`, equals `mark`."""

    def whole(self, mark: int, mask: int) -> Table:
        """Return those connections for a sweep: columns, if they were asked for and can be had."""

    def read(self, flows: Sequence[Flow], now_ns: int | None = None) -> list[Flow | None]:
        """Return each connection as it is now, or None; found by tuple and zone, not by `ident`."""

    def find(self, path: Tuple) -> Flow | None:
        """Return the connection of which a packet of these ends is, in zone 0; or None."""

    def set_mark(self, flows: Sequence[Flow], bits: int, mask: int) -> list[int]:
        """Mark connections (old & ~mask) | bits; return an errno for each, 0 for success."""

    def set_labels(self, flows: Sequence[Flow], bits: int, mask: int) -> list[int]:
        """Label connections (old & ~mask) | bits; return an errno for each, 0 for success."""

    def set_liberal(self, flows: Sequence[Flow]) -> list[int]:
        """Have segments of any number taken of connections; an errno for each, 0 for success."""

    def reopen(self, flows: Sequence[Flow], seconds: int, bits: int, mask: int) -> list[int]:
        """Call closed connections established again, for `seconds` without a segment.

        They are marked (old & ~mask) | bits.  Returns an errno for each, 0 for success.
        """

    def can_reopen(self) -> bool:
        """Try, without touching any connection, whether `reopen` does what it should."""

    def set_timeout(self, flows: Sequence[Flow], seconds: int) -> list[int]:
        """Have connections forgotten so much later; an errno for each, 0 for success."""

    def delete(self, flows: Sequence[Flow]) -> list[int]:
        """Take connections out, if `ident` is theirs; return an errno for each, 0 for success."""

    def count(self) -> int:
        """Return how many entries the table holds, of all protocols."""

    def lost(self) -> Lost:
        """Return what it could not take in, since the machine began."""


class PacketSender(Closing, Protocol):
    """Sends ready-made packets: see `rstguard.kernel.inject.Injector`."""

    sent: int
    """Packets that the kernel took."""
    failed: dict[str, int]
    """Those that it did not take, by reason (``ENETUNREACH``, …)."""

    def send(self, packets: Iterable[bytes], mark: int = 0) -> int:
        """Send IPv4 and IPv6 packets; return how many the kernel took.  Never raises for one."""


class PacketQueue(Pollable, Protocol):
    """One bound queue, whose packets are owed a verdict: see `rstguard.kernel.nfqueue.Queue`."""

    number: int
    reader: str
    """What reads it, for the status."""

    def receive(self, most: int, whole: int, /) -> list[Queued]:
        """Return up to `most` (1-64) packets that wait, in the order of their numbers.

        Segments with any of the flags in `whole` come as bytes.
        """

    def give(self, verdicts: Sequence[Verdict]) -> None:
        """Give verdicts, each for all packets up to its number that have none yet."""

    def settle(self, number: int, passes: bool, mark: int, to: int | None = None) -> None:
        """Give one packet its verdict, and no other; `to` names a queue that it goes on to."""

    def state(self) -> QueueState:
        """Return how long it is, and what it lost."""

    def set_fail_open(self, fail_open: bool) -> None:
        """Choose what happens to a packet that finds the queue full: pass (True) or drop."""

    def close(self) -> None:
        """Give the queue up; packets still in it are dropped."""


class Copy(NamedTuple):
    """A packet from its IP header on, and the prefix that its NFLOG rule gives, or ""."""

    prefix: str
    packet: bytes


class Copies(NamedTuple):
    """What has arrived; `lost`: some found the socket full."""

    copies: list[Copy]
    lost: bool


class PacketCopies(Closing, Pollable, Protocol):
    """What NFLOG rules send to one group: see `rstguard.kernel.nflog.PacketLog`."""

    def read(self) -> Copies:
        """Return the packets that have arrived, with the prefixes of the rules."""

    def receive(self) -> list[bytes]:
        """Return the packets that have arrived, each from its IP header on."""


class Kernel(Commands, Protocol):
    """Linux, as far as a running guard uses it.

    Every method may raise `KernelError`, whose text says what to do; its subclasses are named where
    somebody decides by them.
    """

    def run(self, arguments: Sequence[str], text: str = "") -> str:
        """Run one of the kernel's tools with `text` as its input and return what it prints.

        The guard runs iptables-save and iptables-restore, those of IPv6, ipset, `nft list` and
        `ip` to look at addresses and routes; commands of its own also `ss`.

        Raises:
            NotThere: the tool, or what it was to work on, does not exist.
            NotPermitted: this process may not do that.
            InUse: a set or chain that was to be removed is still used.
            KernelError: it failed otherwise, or took longer than 30 s.
        """

    def run_each(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """Run several commands at once and return what each prints.

        Raises:
            KernelError: one of them failed, as for `run`.
        """

    def pause(self, seconds: float) -> None:
        """Wait until the kernel has finished what it does a moment after it has answered."""

    def read_sysctl(self, name: str) -> str:
        """Return the value of a sysctl, ``net.netfilter.nf_conntrack_acct``.

        Raises:
            NotThere: the kernel has none of that name.
            NotPermitted: it may not be read.
        """

    def write_sysctl(self, name: str, value: str) -> None:
        """Give a sysctl a value, which the kernel need not take as it is: read it again.

        Raises:
            NotThere: the kernel has none of that name.
            NotPermitted: it may not be written.
        """

    def sets(self) -> ElementSets:
        """Return what adds, removes and looks up elements of sets."""

    def table(self, columns: bool = False) -> Connections:
        """Return the connection table; `columns`: it is to be read for sweeps."""

    def injector(self, marks: Marks) -> PacketSender:
        """Return what sends ready-made packets, which bear the mark of a probe.

        Raises:
            KernelError: no raw socket can be had.
        """

    def queue(self, number: int, fail_open: bool, marks: Marks) -> PacketQueue:
        """Bind queue `number` (0-65535); `fail_open`: packets pass where it is full.

        `marks` says where the bits on its packets are.

        Raises:
            InUse: another program reads it.
        """

    def replace_table(self, table: str, chains: Sequence[Chain]) -> None:
        """Put a table of nf_tables in place, whole.

        Raises:
            KernelError: the kernel has no nf_tables, or refused.
        """

    def table_comments(self, table: str) -> dict[str, list[str]]:
        """Return the comments of a table's rules, in their order, by the names of its chains.

        Raises:
            KernelError: the kernel has no nf_tables, or could not be asked.
        """

    def remove_table(self, table: str) -> bool:
        """Take a table of nf_tables away; tell whether it was there.

        Raises:
            KernelError: the kernel refused.
        """

    def queues(self) -> dict[int, QueueState]:
        """Return all bound queues by number, whoever reads them."""

    def packet_log(self, group: int) -> PacketCopies:
        """Bind NFLOG group `group` (0-65535).

        Raises:
            InUse: another program has it.
        """

    def interfaces(self) -> list[str]:
        """Return the names of the interfaces of this network namespace."""

    def links(self) -> list[Link]:
        """Return the interfaces of this network namespace, and what is known of each."""

    def ways(self, addresses: Sequence[int]) -> list[str]:
        """Return the interface by which packets to each tagged address leave, or ""."""

    def protected(self, administrators: Iterable[str]) -> tuple[ProtectedAddress, ...]:
        """Return the addresses without which the host would be cut off.

        `administrators` are addresses from which somebody has lately given the guard a command.
        """

    def cookie_counts(self) -> CookieCounts:
        """Return how many SYN cookies were given out and came back; zeros if none ever was."""

    def seconds_since_over(self) -> dict[Service, int]:
        """Return the services lately over budget, and how many seconds ago they last were.

        Raises:
            NotThere: the policy in force has no budget.
        """

    def nearest(self, ruleset: RuleSet, most: int) -> list[Near]:
        """Return who has used most of the limit that the kernel itself counts for."""

    def explain(self, ruleset: RuleSet, source: int) -> dict[str, float]:
        """Return how much of it a tagged address has used, by the rule's name."""

    def blocked_by_kind(self) -> dict[Kind, int]:
        """Return how many sources are banned, and how many shunned."""
