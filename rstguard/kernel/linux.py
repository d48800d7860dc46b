"""The real kernel behind the seam: everything `rstguard.kernel.seam.Kernel` asks for, done."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from rstguard.engine.nearest import Near
from rstguard.engine.ruleset import RuleSet
from rstguard.engine.service import Service
from rstguard.kernel import (
    KernelError,
    NotPermitted,
    NotThere,
    command,
    counted,
    ipset,
    links,
    nftables,
    synproxy,
)
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.elements import Kind
from rstguard.kernel.inject import Injector
from rstguard.kernel.links import Link
from rstguard.kernel.marks import Marks
from rstguard.kernel.nflog import PacketLog
from rstguard.kernel.nfqueue import Queue, QueueState, states
from rstguard.kernel.nftables import Chain
from rstguard.kernel.protected import ProtectedAddress, find
from rstguard.kernel.routes import ways
from rstguard.kernel.seam import CookieCounts
from rstguard.kernel.sets import Sets

_SYSCTLS = Path("/proc/sys")

P = ParamSpec("P")
T = TypeVar("T")


def _at_hand(method: Callable[P, T]) -> Callable[P, T]:
    """Turn what happens where no descriptor or memory is left into an error with a sentence."""

    @wraps(method)
    def asked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except OSError as problem:
            said = problem.strerror or problem
            raise KernelError(
                f"the kernel cannot be asked now ({said}); it is tried again"
            ) from problem

    return asked


class Linux:
    """The kernel of the network namespace of whichever thread calls; keeps nothing itself."""

    def run(self, arguments: Sequence[str], text: str = "") -> str:
        """Run one of the kernel's tools."""
        return command.run(arguments, text)

    def run_each(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """Run several at once."""
        return command.run_each(commands)

    def pause(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def read_sysctl(self, name: str) -> str:
        """Return the value of a sysctl, its words separated by single spaces."""
        try:
            return " ".join(_path(name).read_text().split())
        except OSError as problem:
            raise _refused(name, problem) from problem

    def write_sysctl(self, name: str, value: str) -> None:
        """Give a sysctl a value."""
        try:
            _path(name).write_text(value)
        except OSError as problem:
            raise _refused(name, problem) from problem

    @_at_hand
    def sets(self) -> Sets:
        """Return the elements of the kernel's sets."""
        return Sets()

    @_at_hand
    def table(self, columns: bool = False) -> Conntrack:
        """Return the connection table."""
        return Conntrack(columns=columns)

    @_at_hand
    def injector(self, marks: Marks) -> Injector:
        """Return raw sockets."""
        return Injector(marks)

    @_at_hand
    def queue(self, number: int, fail_open: bool, marks: Marks) -> Queue:
        """Bind a queue."""
        return Queue(number, fail_open, marks)

    @_at_hand
    def replace_table(self, table: str, chains: Sequence[Chain]) -> None:
        """Put a table of nf_tables in place."""
        nftables.replace(table, chains)

    @_at_hand
    def table_comments(self, table: str) -> dict[str, list[str]]:
        """Return the comments of its rules."""
        return nftables.comments(table)

    @_at_hand
    def remove_table(self, table: str) -> bool:
        """Take it away."""
        return nftables.remove(table)

    @_at_hand
    def queues(self) -> dict[int, QueueState]:
        """Return all bound queues."""
        return states()

    @_at_hand
    def packet_log(self, group: int) -> PacketLog:
        """Bind an NFLOG group."""
        return PacketLog(group)

    @_at_hand
    def interfaces(self) -> list[str]:
        """Return the names of the interfaces."""
        return [name for _, name in socket.if_nameindex()]

    @_at_hand
    def links(self) -> list[Link]:
        """Return the interfaces."""
        return links.links()

    @_at_hand
    def ways(self, addresses: Sequence[int]) -> list[str]:
        """Return what the routing table says."""
        return ways(addresses)

    @_at_hand
    def protected(self, administrators: Iterable[str]) -> tuple[ProtectedAddress, ...]:
        """Return the addresses without which the host would be cut off."""
        return find(administrators)

    @_at_hand
    def cookie_counts(self) -> CookieCounts:
        """Return SYNPROXY's counts."""
        return synproxy.counts()

    @_at_hand
    def seconds_since_over(self) -> dict[Service, int]:
        """Return the services that were lately over budget."""
        return synproxy.seconds_since_over(self)

    @_at_hand
    def nearest(self, ruleset: RuleSet, most: int) -> list[Near]:
        """Return who has used most of the limit that the kernel itself counts for."""
        return counted.nearest(ruleset, most)

    @_at_hand
    def explain(self, ruleset: RuleSet, source: int) -> dict[str, float]:
        """Return how much of it one source has used."""
        return counted.explain(ruleset, source)

    @_at_hand
    def blocked_by_kind(self) -> dict[Kind, int]:
        """Return how many sources are banned, and how many shunned."""
        return ipset.blocked_by_kind(self)


def _path(name: str) -> Path:
    return _SYSCTLS.joinpath(*name.split("."))


def _refused(name: str, problem: OSError) -> KernelError:
    if isinstance(problem, FileNotFoundError):
        fix = "the connection tracker is not loaded: run `modprobe nf_conntrack`"
        if "nf_conntrack" not in name:
            fix = "this kernel does not have it"
        return NotThere(f"there is no sysctl {name}: {fix}")
    if isinstance(problem, PermissionError):
        return NotPermitted(f"changing the sysctl {name} needs root: run the command with sudo")
    return KernelError(
        f"the sysctl {name} cannot be used here ({problem.strerror}): in a container, start it "
        "with a writable /proc/sys, or set the value on the host"
    )
