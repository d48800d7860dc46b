"""The addresses without which a gateway, or its administrator, would be cut off.

Own addresses, next hops, name servers, and whoever is logged in by SSH.  A policy may slow them
down as anybody, but they are never banned, shunned or reset: see `Scope.protected`.

An SSH connection counts only once its user is logged in: else whoever can reach port 22 could make
himself unbannable.  There are two signs of that, both made after authentication: the session file
of systemd-logind, and SSH_CONNECTION in a process's environment, beside a connection that exists.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rstguard.engine.address import Prefix, is_v6, parse_prefix
from rstguard.kernel.command import run, spawn

_RESOLVERS = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
_SESSIONS = Path("/run/systemd/sessions")
_OWN = re.compile(r"\binet6? ([^\s/]+)")
_VIA = re.compile(r"\bvia (?:inet6? )?(\S+)")
_MOST = 4096
"""Protected addresses that are kept; a router with more next hops has other worries."""
_LARGEST_FILE = 1 << 20


class ProtectedAddress(NamedTuple):
    """One address, as a prefix of full length, and what it is."""

    address: Prefix
    what: str


def find(administrators: Iterable[str] = ()) -> tuple[ProtectedAddress, ...]:
    """Return the protected addresses of this network namespace, each address once, sorted.

    `administrators` are addresses from which somebody has lately given the guard a command.
    What cannot be read is left out: a machine without a resolver has no name servers.
    """
    found: dict[Prefix, str] = {}
    for text, what in _all(administrators):
        address = _host(text)
        if address is not None and len(found) < _MOST:
            found.setdefault(address, what)
    return tuple(ProtectedAddress(address, what) for address, what in sorted(found.items()))


def _all(administrators: Iterable[str]) -> Iterator[tuple[str, str]]:
    for address in administrators:
        yield address, "whoever changed the policy"
    for address in ssh_clients():
        yield address, "an SSH session"
    for path in _RESOLVERS:
        for line in _read(path).splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                yield words[1], "a name server"
    for address in next_hops():
        yield address, "a next hop"
    for address in own_addresses():
        yield address, "this host"


def own_addresses() -> set[str]:
    """Return the addresses of this network namespace."""
    return _listed(_OWN, "address", "show")


def next_hops() -> set[str]:
    """Return the gateways of all routes."""
    return _listed(_VIA, "route", "show", "table", "all")


def _listed(wanted: re.Pattern[str], *words: str) -> set[str]:
    """Return what `ip` lists, line by line: a full table of the Internet's routes is long."""
    found: set[str] = set()
    with contextlib.ExitStack() as both:
        # Both are started before one is read: together they take as long as one.
        for process in [
            both.enter_context(spawn(command, stdout=subprocess.PIPE, text=True))
            for command in (["ip", "-o", family, *words] for family in ("-4", "-6"))
        ]:
            assert process.stdout is not None
            for line in process.stdout:
                found.update(wanted.findall(line))
    return found


def ssh_clients(sessions: Path = _SESSIONS, processes: Path = Path("/proc")) -> set[str]:
    """Return the addresses from which somebody is logged in by SSH."""
    return _of_logind(sessions) | _of_processes(processes)


def _of_logind(sessions: Path) -> set[str]:
    clients = set()
    for path in _files(sessions, "*"):
        fields = dict(line.partition("=")[::2] for line in _read(path).splitlines())
        ssh = fields.get("SERVICE", "").startswith("ssh")
        if ssh and fields.get("REMOTE_HOST") and fields.get("STATE") != "closing":
            clients.add(fields["REMOTE_HOST"])
    return clients


def _of_processes(processes: Path) -> set[str]:
    claimed = set()
    for path in _files(processes, "[0-9]*/environ"):
        connection = ssh_connection(path)
        if connection:
            claimed.add(connection)
    if not claimed:
        return set()
    live = _established()
    return {client for client, *_ in claimed & live}


def ssh_connection(environment: Path) -> tuple[str, str, str, str] | None:
    """Return what SSH_CONNECTION says in a process's environment file, or None.

    Addresses come without a zone ("%eth0").
    """
    for variable in _read(environment).split("\0"):
        name, _, value = variable.partition("=")
        words = value.split()
        if name == "SSH_CONNECTION" and len(words) == 4:
            return _bare(words[0]), words[1], _bare(words[2]), words[3]
    return None


def _established() -> set[tuple[str, str, str, str]]:
    """Return the established TCP connections of this namespace: peer first, as SSH names them."""
    found = set()
    for line in run(["ss", "-Htn", "state", "established"]).splitlines():
        *_, local, peer = line.split()[:4]
        ends = [_end(peer), _end(local)]
        found.add((*ends[0], *ends[1]))
    return found


def _end(text: str) -> tuple[str, str]:
    address, _, port = text.rpartition(":")
    return _bare(address), port


def _bare(text: str) -> str:
    """Return an address without brackets, zone, or the prefix of IPv4 in IPv6 sockets."""
    return text.partition("%")[0].strip("[]").removeprefix("::ffff:")


def _host(text: str) -> Prefix | None:
    try:
        prefix = parse_prefix(_bare(text))
    except ValueError:
        return None
    whole = 128 if is_v6(prefix.network) else 32
    return prefix if prefix.length == whole else Prefix(prefix.network, whole)


def _files(directory: Path, pattern: str) -> list[Path]:
    try:
        return list(directory.glob(pattern))
    except OSError:
        return []


def _read(path: Path) -> str:
    """Return a file's text; "" if there is none, it may not be read, or it is no text."""
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST_FILE).decode(errors="replace")
    except OSError:
        return ""


def is_address(text: str) -> bool:
    """Tell whether a text is an IPv4 or IPv6 address."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
        return True
    return False
