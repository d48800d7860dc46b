"""Who reads which NFQUEUE in this network namespace."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rstguard.kernel import KernelError

DEFAULT_NUMBER = 5640
"""The first queue of a guard, unless it is told another."""

_NETLINK_NETFILTER = "12"


class Owner(NamedTuple):
    """The program that reads a queue; `pid` is 0 if it cannot be seen from here."""

    pid: int
    command: str

    @property
    def is_guard(self) -> bool:
        """Whether it is a guard of ours."""
        return "rstguard" in self.command

    def __str__(self) -> str:
        """Return ``suricata (process 812)``."""
        if not self.pid:
            return "a program that cannot be seen from here"
        return f"{self.command or 'a program'} (process {self.pid})"


def owner(queue: int) -> Owner | None:
    """Return the reader of a queue (0-65535), or None if nobody reads it.

    /proc/net/netfilter/nfnetlink_queue names the reader by the address of its netlink socket (its
    port id), which is a process id only by chance; /proc/net/netlink leads from there to the
    socket's inode, and that to the process.

    Raises:
        KernelError: the kernel's list may not be read.
    """
    port = _port_of(queue)
    if port is None:
        return None
    inode = _inode_of(port)
    return (inode and _holder_of(inode)) or Owner(0, "")


def _port_of(queue: int) -> str | None:
    """Columns: queue number, port id, packets waiting, … (seq_show in nfnetlink_queue.c)."""
    for fields in _lines(Path("/proc/net/netfilter/nfnetlink_queue")):
        if len(fields) > 1 and fields[0] == str(queue) and fields[1] != "0":
            return str(int(fields[1]) & 0xFFFFFFFF)
    return None


def _inode_of(port: str) -> str | None:
    """Columns: sk, protocol, port id, groups, …, inode last (netlink_seq_show)."""
    for fields in _lines(Path("/proc/net/netlink")):
        if len(fields) > 4 and fields[1] == _NETLINK_NETFILTER and fields[2] == port:
            return fields[-1]
    return None


def _holder_of(inode: str) -> Owner | None:
    wanted = f"socket:[{inode}]"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(_target(entry) == wanted for entry in (process / "fd").iterdir()):
                words = (process / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                text = " ".join(word.decode(errors="replace") for word in words)
                return Owner(int(process.name), text[:80])
        except OSError:
            continue  # it ended meanwhile, or is not ours to look into
    return None


def _target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _lines(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []  # the module is not loaded: nobody can read a queue
    except OSError as problem:
        raise KernelError(f"{path} cannot be read without root: use sudo") from problem
