"""The parts of the fake kernel joined into one `rstguard.kernel.seam.Kernel`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from rstguard.engine.address import Prefix, address_text, is_v6, parse_address
from rstguard.engine.nearest import Near
from rstguard.engine.ruleset import RuleSet
from rstguard.engine.service import Service
from rstguard.kernel import NotThere, ipset, synproxy
from rstguard.kernel.elements import Kind
from rstguard.kernel.links import Link
from rstguard.kernel.marks import Marks
from rstguard.kernel.nfqueue import QueueState
from rstguard.kernel.nftables import Chain
from rstguard.kernel.protected import ProtectedAddress
from rstguard.kernel.seam import CookieCounts
from tests.support.fake_kernel.connections import ConnectionTable, FakeConnections
from tests.support.fake_kernel.elements import FakeSets
from tests.support.fake_kernel.faults import Faults
from tests.support.fake_kernel.ipsets import IpSets
from tests.support.fake_kernel.netfilter import Netfilter
from tests.support.fake_kernel.packets import FakeInjector, FakeLog, FakeQueue, Packets

_TRACKER = "net.netfilter.nf_conntrack_"
_DEFAULTS = {
    "tcp_timeout_established": "432000",
    "acct": "0",
    "timestamp": "0",
    "tcp_be_liberal": "0",
    "tcp_loose": "1",
    "max": "262144",
}
_BASE_NAMES = {"iptables": 4, "ip6tables": 6}


class _Open(Protocol):
    def close(self) -> None: ...


@dataclass(slots=True)
class Host:
    """What the test says of the machine, to be changed at will."""

    routes: dict[int, str] = field(default_factory=dict)
    """Tagged address -> interface; all others go by `default_way`."""
    default_way: str = "eth0"
    interfaces: list[str] = field(default_factory=lambda: ["lo", "eth0", "eth1"])
    links: dict[str, Link] = field(default_factory=dict)
    """By name, those that are not just up."""
    protected: list[ProtectedAddress] = field(default_factory=list)
    """Besides the administrators."""
    cookie_counts: CookieCounts = field(default_factory=lambda: CookieCounts(0, 0, 0))
    near: list[Near] = field(default_factory=list)
    shares: dict[int, dict[str, float]] = field(default_factory=dict)
    """Tagged address -> rule -> share of its limit, for `explain`."""


class FakeKernel:
    """A kernel in memory.

    Its state is in `iptables` (4 and 6), `ipsets`, `sysctls`, `connections`, `packets` and `host`,
    to be asked and changed by the test; `faults` lets operations fail.  `pauses` are the seconds
    that the guard wanted to wait.

    Args:
        clock: monotonic nanoseconds; elements of sets end by it.
        wall: nanoseconds of the clock on the wall; connections grow older by it.
    """

    def __init__(
        self, clock: Callable[[], int] = lambda: 0, wall: Callable[[], int] = lambda: 0
    ) -> None:
        self.iptables = {
            family: Netfilter(family, self._family_of, self._account) for family in (4, 6)
        }
        self.ipsets = IpSets(clock, self._references)
        self.sysctls = {f"{_TRACKER}{name}": value for name, value in _DEFAULTS.items()}
        self.nftables: dict[str, tuple[Chain, ...]] = {}
        """Tables of nf_tables, by name."""
        self.stubborn: dict[str, str] = {}
        """Sysctls that take a value and have another one then."""
        self.connections = ConnectionTable(wall)
        self.packets = Packets()
        self.host = Host()
        self.faults = Faults()
        self.pauses: list[float] = []
        self.name = ""
        self._open: list[_Open] = []

    # For tests: processes, and other programs

    def process(self, name: str) -> FakeKernel:
        """Return the same kernel as one process sees it, to be given back when it dies."""
        seen = copy.copy(self)
        seen.name, seen._open = name, []
        return seen

    def died(self) -> None:
        """Close all that this process still holds, as the kernel does when a process ends."""
        for held in self._open:
            held.close()
        self._open.clear()

    def flush_all(self, family: int | None = None) -> None:
        """Let another program flush every table: iptables -F and -X, table by table."""
        for one, netfilter in self.iptables.items():
            if family in (None, one):
                for table in list(netfilter.tables):
                    netfilter.change("-t", table, "-F")
                    netfilter.change("-t", table, "-X")

    def delete_jump(self, family: int, table: str, chain: str) -> bool:
        """Let another program delete the first jump from a built-in chain into one of ours."""
        rules = self.iptables[family].tables.get(table, {}).get(chain, [])
        for number, rule in enumerate(rules, 1):
            if " -j rstguard-" in f" {rule}":
                self.iptables[family].change("-t", table, "-D", chain, str(number))
                return True
        return False

    def insert_rule_before(self, family: int, table: str, chain: str, rule: str) -> None:
        """Let another program put a rule in front of all others of a chain."""
        self.iptables[family].change("-t", table, "-I", chain, *rule.split())

    def destroy_set(self, name: str) -> None:
        """Let another program destroy a set.

        Raises:
            KernelError: it is not there, or a rule uses it.
        """
        self.ipsets.command(["ipset", "destroy", name])

    # The seam

    def run(self, arguments: Sequence[str], text: str = "") -> str:
        """Run iptables, ipset or one of their kin."""
        with self._around("run", f"{' '.join(arguments)}\n{text}"):
            base, _, how = arguments[0].partition("-")
            if base == "ipset":
                return self.ipsets.command(arguments, text)
            if base not in _BASE_NAMES:
                raise NotThere(f"the fake kernel has no command {arguments[0]}")
            netfilter = self.iptables[_BASE_NAMES[base]]
            if how == "save":
                return netfilter.save(arguments)
            if how == "restore":
                netfilter.restore(arguments, text)
            else:
                netfilter.command(arguments)
            return ""

    def run_each(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """Run several commands, one after the other."""
        return [self.run(command) for command in commands]

    def pause(self, seconds: float) -> None:
        """Note that somebody would wait."""
        self.pauses.append(seconds)

    def read_sysctl(self, name: str) -> str:
        """Return the value of a sysctl."""
        with self._around("read_sysctl", name):
            if name == f"{_TRACKER}count":
                return str(len(self.connections))
            if name not in self.sysctls:
                raise NotThere(f"there is no sysctl {name}: this kernel does not have it")
            return self.sysctls[name]

    def write_sysctl(self, name: str, value: str) -> None:
        """Give a sysctl a value."""
        with self._around("write_sysctl", name):
            if name not in self.sysctls:
                raise NotThere(f"there is no sysctl {name}: this kernel does not have it")
            self.sysctls[name] = self.stubborn.get(name, value)

    def sets(self) -> FakeSets:
        """Return the elements of sets."""
        with self._around("sets"):
            return FakeSets(self.ipsets, self._around)

    def table(self, columns: bool = False) -> FakeConnections:
        """Return the connection table; it is read in columns wherever numpy is installed."""
        with self._around("table"):
            return FakeConnections(self.connections, self._around)

    def injector(self, marks: Marks) -> FakeInjector:
        """Return what sends packets."""
        with self._around("injector"):
            return FakeInjector(self.packets, self._around)

    def queue(self, number: int, fail_open: bool, marks: Marks) -> FakeQueue:
        """Bind a queue."""
        with self._around("queue", str(number)):
            bound = FakeQueue(self.packets, number, fail_open, self.name, self._around)
            self._open.append(bound)
            return bound

    def replace_table(self, table: str, chains: Sequence[Chain]) -> None:
        """Put a table of nf_tables in place."""
        with self._around("replace_table", table):
            self.nftables[table] = tuple(chains)

    def table_comments(self, table: str) -> dict[str, list[str]]:
        """Return the comments of its rules."""
        with self._around("table_comments", table):
            chains = self.nftables.get(table, ())
            return {chain.name: [rule.comment for rule in chain.rules] for chain in chains}

    def remove_table(self, table: str) -> bool:
        """Take it away."""
        with self._around("remove_table", table):
            return self.nftables.pop(table, None) is not None

    def queues(self) -> dict[int, QueueState]:
        """Return all bound queues."""
        with self._around("queues"):
            return self.packets.states()

    def packet_log(self, group: int) -> FakeLog:
        """Bind an NFLOG group."""
        with self._around("packet_log", str(group)):
            log = FakeLog(self.packets, group)
            self._open.append(log)
            return log

    def interfaces(self) -> list[str]:
        """Return the names of the interfaces."""
        with self._around("interfaces"):
            return list(self.host.interfaces)

    def links(self) -> list[Link]:
        """Return the interfaces, all of them up unless the test says otherwise."""
        with self._around("links"):
            return [self.host.links.get(name, Link(name, True)) for name in self.host.interfaces]

    def ways(self, addresses: Sequence[int]) -> list[str]:
        """Return the interface by which packets to each address leave."""
        with self._around("ways"):
            return [self.host.routes.get(one, self.host.default_way) for one in addresses]

    def protected(self, administrators: Iterable[str]) -> tuple[ProtectedAddress, ...]:
        """Return those that the host has, and the administrators."""
        with self._around("protected"):
            found = {line.address: line.what for line in self.host.protected}
            for text in administrators:
                address = parse_address(text)
                whole = Prefix(address, 128 if is_v6(address) else 32)
                found[whole] = "whoever changed the policy"
            return tuple(ProtectedAddress(address, what) for address, what in sorted(found.items()))

    def cookie_counts(self) -> CookieCounts:
        """Return what the test says."""
        with self._around("cookie_counts"):
            return self.host.cookie_counts

    def seconds_since_over(self) -> dict[Service, int]:
        """Return the services in the sets of the budget."""
        return synproxy.seconds_since_over(self)

    def nearest(self, ruleset: RuleSet, most: int) -> list[Near]:
        """Return what the test says, if the kernel counts for a rule."""
        with self._around("nearest"):
            return self.host.near[:most] if ruleset.kernel_rule else []

    def explain(self, ruleset: RuleSet, source: int) -> dict[str, float]:
        """Return what the test says, if the kernel counts for a rule."""
        with self._around("explain", address_text(source)):
            return dict(self.host.shares.get(source, {})) if ruleset.kernel_rule else {}

    def blocked_by_kind(self) -> dict[Kind, int]:
        """Return how many sources are banned, and how many shunned."""
        return ipset.blocked_by_kind(self)

    def _around(self, operation: str, subject: str = "") -> AbstractContextManager[None]:
        return self.faults.around(operation, subject, self.name)

    def _account(self) -> None:
        self.sysctls[f"{_TRACKER}acct"] = "1"

    def _family_of(self, name: str) -> int | None:
        if name not in self.ipsets.names:
            return None
        return {"inet": 4, "inet6": 6}.get(self.ipsets.get(name).options.get("family", ""), 0)

    def _references(self, name: str) -> int:
        return sum(netfilter.references(name) for netfilter in self.iptables.values())
