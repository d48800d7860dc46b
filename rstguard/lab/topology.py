"""A small network in namespaces of its own: attacker and clients, gateway, server.

Attacker and clients share one segment (a bridge in a fifth namespace) with the gateway's ``eth0``,
the interface where untrusted traffic comes in; the server is behind the gateway's ``eth1``.
Interfaces are made inside the namespaces, so nothing of the host's own network is touched.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

from rstguard.lab import LabError

ATTACKER = "192.0.2.66"
SERVER = "203.0.113.10"
SERVER6 = "2001:db8:5::10"
CLIENTS = ("198.51.100.11", "198.51.100.12", "198.51.100.13", "198.51.100.14")
NEW_CLIENTS = "100.64.0.0/16"
"""Where clients come from that nobody has seen before; they live in the clients' namespace."""
CLIENTS6 = ("2001:db8:c1::11", "2001:db8:c2::11")

_ROLES = ("wire", "attacker", "client", "gateway", "server")
_NAME = re.compile(r"rgl-(\d+)-\w+")
_TIED = ("setpriv", "--pdeathsig", "TERM")
_STOP_SECONDS = 10.0
_NETNS = Path("/run/netns")


class Lab:
    """The namespaces, a temporary directory, and every process started in them.

    Use as a context manager: leaving it ends the processes (each by its id) and removes all.

    Raises:
        LabError: not root, or the kernel or ``ip`` refused something.
    """

    def __init__(self) -> None:
        self.directory = Path()
        self._prefix = f"rgl-{os.getpid()}"
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        require_root()
        remove_stale()
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self._prefix}-"))
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def namespace(self, role: str) -> str:
        """Return the full name of the namespace of wire, attacker, client, gateway or server."""
        return f"{self._prefix}-{role}"

    def run(self, role: str, command: list[str]) -> str:
        """Run a command to its end in a namespace and return its standard output.

        Raises:
            LabError: the command failed.
        """
        return _run(["ip", "netns", "exec", self.namespace(role), *command])

    def start(
        self, role: str, command: list[str], *, stdin: bool = False, log: str
    ) -> subprocess.Popen[str]:
        """Start a process in a namespace; its standard error goes to the file `log`.

        The process gets SIGTERM from the kernel if the lab itself is killed, and is in a session
        of its own, so that Ctrl-C reaches only the lab, which then ends things in order.
        """
        with (self.directory / log).open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [*_TIED, "ip", "netns", "exec", self.namespace(role), *command],
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE if stdin else errors,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def log_tail(self, log: str, *, lines: int = 3) -> str:
        """Return the last lines that a process wrote to its log, on one line."""
        text = (self.directory / log).read_text(encoding="utf-8", errors="replace")
        said = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(said[-lines:])

    def _build(self) -> None:
        for role in _ROLES:
            _run(["ip", "netns", "add", self.namespace(role)])
            # Nobody else can have these addresses: looking for duplicates only takes seconds.
            self._set(role, "net/ipv6/conf/default/accept_dad", "0")
        for role in _ROLES:
            _run(["ip", "-n", self.namespace(role), "-batch", "-"], stdin=self._links(role))
        for role in _ROLES:
            _run(["ip", "-n", self.namespace(role), "-batch", "-"], stdin=_addresses(role))
            for name, value in _settings(role):
                self._set(role, name, value)

    def _links(self, role: str) -> str:
        wire, server = self.namespace("wire"), self.namespace("server")
        if role == "wire":
            return "link add br0 type bridge\nlink set br0 up\nlink set lo up\n"
        lines = ["link set lo up"]
        if role != "server":
            lines.append(f"link add eth0 type veth peer name {role} netns {wire}")
        if role == "gateway":
            lines.append(f"link add eth1 type veth peer name eth0 netns {server}")
        return "\n".join(lines) + "\n"

    def _set(self, role: str, name: str, value: str) -> None:
        path = f"/proc/sys/{name}"
        # Settings of modules that are not there are settings that nobody needs.
        if Path(path).exists():
            self.run(role, ["sysctl", "-q", "-w", f"{name.replace('/', '.')}={value}"])

    def _remove(self) -> None:
        for process in reversed(self._started):
            stop(process)
        for role in _ROLES:
            _remove_namespace(self.namespace(role))
        shutil.rmtree(self.directory, ignore_errors=True)


def require_root() -> None:
    """Refuse to go on without the right to make namespaces.

    Raises:
        LabError: the effective user is not root.
    """
    if os.geteuid() != 0:
        raise LabError("The lab makes network namespaces, which only root may: use sudo.")


def remove_stale() -> None:
    """Remove what labs left behind that were killed before they could clean up."""
    for path in [*_NETNS.glob("rgl-*"), *Path(tempfile.gettempdir()).glob("rgl-*")]:
        match = _NAME.fullmatch(path.name)
        if not match or Path(f"/proc/{match.group(1)}").exists():
            continue
        if path.parent == _NETNS:
            _remove_namespace(path.name)
        elif path.lstat().st_uid == os.geteuid():
            shutil.rmtree(path, ignore_errors=True)


def stop(process: subprocess.Popen[str], *, patience: float = _STOP_SECONDS) -> None:
    """End a process with SIGTERM, after `patience` seconds with SIGKILL, and collect it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _close(process.stdin)
    _close(process.stdout)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit while inside, so that labs clean up."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def _close(pipe: IO[str] | None) -> None:
    if pipe is not None:
        with suppress(BrokenPipeError):
            pipe.close()


def _remove_namespace(name: str) -> None:
    if not (_NETNS / name).exists():
        return
    left = subprocess.run(
        ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
    )
    for pid in left.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(command: list[str], *, stdin: str = "") -> str:
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, timeout=30
        )
    except FileNotFoundError as error:
        raise LabError(f"{command[0]} is missing: apt-get install iproute2.") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"'{' '.join(command)}' did not end within 30 s.") from error
    if done.returncode != 0:
        raise LabError(f"'{' '.join(command)}' failed: {done.stderr.strip() or 'no reason given'}")
    return done.stdout


def _addresses(role: str) -> str:
    if role == "wire":
        ports = ("attacker", "client", "gateway")
        return "".join(f"link set {port} master br0 up\n" for port in ports)
    networks = {
        "attacker": [(f"{ATTACKER}/24", "eth0")],
        "client": [
            *((f"{address}/24", "eth0") for address in CLIENTS),
            *((f"{address}/64", "eth0") for address in CLIENTS6),
        ],
        "gateway": [
            ("192.0.2.1/24", "eth0"),
            ("198.51.100.1/24", "eth0"),
            ("2001:db8:c1::1/64", "eth0"),
            ("2001:db8:c2::1/64", "eth0"),
            ("203.0.113.1/24", "eth1"),
            ("2001:db8:5::1/64", "eth1"),
        ],
        "server": [(f"{SERVER}/24", "eth0"), (f"{SERVER6}/64", "eth0")],
    }[role]
    lines = [
        f"address add {address} dev {device}" + (" nodad" if ":" in address else "")
        for address, device in networks
    ]
    lines += [f"link set {device} up" for device in sorted({device for _, device in networks})]
    gateways = {
        "attacker": ["192.0.2.1"],
        "client": ["198.51.100.1", "2001:db8:c1::1"],
        "gateway": [],
        "server": ["203.0.113.1", "2001:db8:5::1"],
    }[role]
    lines += [f"route add default via {address}" for address in gateways]
    return "\n".join(lines) + "\n"


def _settings(role: str) -> tuple[tuple[str, str], ...]:
    if role == "wire":
        return (
            ("net/bridge/bridge-nf-call-iptables", "0"),
            ("net/bridge/bridge-nf-call-ip6tables", "0"),
        )
    if role == "gateway":
        return (("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1"))
    if role == "server":
        # A server that leans on its gateway: without cookies a full backlog refuses everybody,
        # and without remembered metrics each client is as unknown to it as a new visitor.
        return (
            ("net/ipv4/tcp_syncookies", "0"),
            ("net/ipv4/tcp_max_syn_backlog", "512"),
            ("net/ipv4/tcp_no_metrics_save", "1"),
        )
    return ()
