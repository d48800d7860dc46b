"""The network of the benchmarks, and the real guard in its gateway.

It is the tests' network, with a client network and a server address that the policies guard:

    client 198.51.100.0/24 (every address of it)  --  gateway  --  server 203.0.113.10
"""

from __future__ import annotations

import itertools
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from rstguard.control.protocol import ask
from rstguard.ipc.requests import ControlError
from rstguard.kernel.nfqueue import QueueState, states
from rstguard.kernel.queues import DEFAULT_NUMBER
from tests.netns import Lab, wait_until

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
EXAMPLE = ROOT / "tests/policy/golden/example.yaml"
"""The policy that the goals speak of."""

CLIENT = "198.51.100.1"
SERVER = "203.0.113.10"
PORT = 8080
"""A port of the example policy that has no SYN budget: the queue itself is to be measured."""

_SERVICES = "protect: {interfaces: [out], destinations: [203.0.113.10]}"
_READY_SECONDS = 30.0


def policy_of(*rules: str) -> str:
    """Return a policy for this network with some rules, each in YAML's flow style."""
    head = f"version: 1\nname: bench\nmode: enforce\non_failure: open\n{_SERVICES}\nrules:\n"
    return head + "".join(f"  - {{{rule}}}\n" for rule in rules)


def example_policy(raised: bool = False) -> str:
    """Return the example policy for this network; `raised`: no limit on SYNs is ever crossed.

    Without the SYN budget: above it SYNs spare the queue, and the queue is what is measured here.
    """
    text, count = re.subn(
        r"(?m)^syn_budget:.*\n", "", EXAMPLE.read_text().replace("[eth0]", "[out]")
    )
    assert count == 1
    if raised:
        for low in ("100/s, burst: 200", "1000/s"):
            assert f"over: {low}" in text
            text = text.replace(f"over: {low}", "over: 10000000/s, burst: 10000000")
    return text


class Site(Lab):
    """The network, programs compiled for it, and all that was started in it."""

    def __init__(self) -> None:
        super().__init__("rgg")
        self._scratch = tempfile.TemporaryDirectory(prefix="rstguard-bench-")
        self.directory = Path(self._scratch.name)
        self._started: list[subprocess.Popen[str]] = []
        self._ports = itertools.cycle(range(2000, 65000))

    def __enter__(self) -> Site:
        super().__enter__()
        return self

    def _build(self) -> None:
        super()._build()
        # What a gateway has before anybody guards it.
        names = {"acct": "0", "timestamp": "0", "tcp_loose": "1"}
        self.set("gateway", {f"net/netfilter/nf_conntrack_{n}": v for n, v in names.items()})
        for place, command in (
            ("client", "route add local 198.51.100.0/24 dev lo"),
            ("client", f"route replace default via 10.71.1.1 src {CLIENT}"),
            ("gateway", "route add 198.51.100.0/24 via 10.71.1.2"),
            ("gateway", f"route add {SERVER} via 10.71.2.2"),
            ("server", f"addr add {SERVER}/32 dev eth0"),
        ):
            self.run(place, "ip", *command.split())
        for place in ("client", "server"):
            self.set(place, {"net/ipv4/ip_local_port_range": "1024 65535"})

    def remove(self) -> None:
        """End what was started, and remove the namespaces."""
        for program in reversed(self._started):
            end(program)
        super().remove()
        self._scratch.cleanup()

    def start(
        self,
        place: str,
        *command: str,
        stdout: int | IO[str] = subprocess.DEVNULL,
        stderr: IO[str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program in a namespace; it ends with the network at the latest."""
        program = subprocess.Popen(
            ["ip", "netns", "exec", self.names[place], *command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
        self._started.append(program)
        return program

    def build(self, source: str) -> str:
        """Compile a C program that lies beside this file and return its path."""
        program = self.directory / Path(source).stem
        command = ["cc", "-O2", "-Wall", "-o", str(program), str(HERE / source)]
        subprocess.run(command, check=True)
        return str(program)

    def gateway_mac(self) -> str:
        """Return the hardware address of the gateway's outer interface."""
        return self.run("gateway", "cat", "/sys/class/net/out/address").strip()

    def queue(self, number: int = DEFAULT_NUMBER) -> QueueState:
        """Return the state of a queue of the gateway."""
        with self.inside("gateway"):
            return states()[number]

    def client_socket(self, address: str = CLIENT) -> socket.socket:
        """Return a TCP socket of the client, bound to one of its addresses and a fresh port.

        The kernel would choose one that a condemned connection had moments ago.
        """
        with self.inside("client"):
            made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.bind((address, next(self._ports)))
        made.settimeout(10)
        return made


class Guard:
    """The guard, running in a site's gateway with a policy."""

    def __init__(self, site: Site, policy: str, workers: int = 1) -> None:
        self.directory = site.directory / "runtime"
        self.directory.mkdir(exist_ok=True)
        file = site.directory / "policy.yaml"
        file.write_text(policy)
        self._log = site.directory / "guard.log"
        with self._log.open("w") as log:
            # One worker unless asked for more: what is measured is what one core can do.
            state = ("--state-dir", str(self.directory / "state"))
            command = self.command("run", "--policy", str(file), "--workers", str(workers), *state)
            self._program = site.start("gateway", *command, stderr=log)
        wait_until(self._filters, _READY_SECONDS)

    def command(self, *words: str) -> list[str]:
        """Return a command line of rstguard for this guard."""
        where = ["--runtime-dir", str(self.directory)]
        return [sys.executable, "-m", "rstguard", *words, *where]

    def ask(self, command: str, **request: object) -> Any:
        """Send a request to the guard's control socket."""
        return ask(self.directory, {"command": command, **request})

    def status(self) -> dict[str, Any]:
        """Return what `rstguard status --json` prints."""
        found = self.ask("status")
        assert isinstance(found, dict)
        return found

    @property
    def workers(self) -> list[int]:
        """The workers' process ids."""
        return [int(worker["pid"]) for worker in self.status()["workers"]]

    @property
    def worker(self) -> int:
        """The first worker's process id."""
        return self.workers[0]

    def stop(self) -> None:
        """Stop the guard and wait for it."""
        end(self._program)

    def _filters(self) -> bool:
        if self._program.poll() is not None:
            raise RuntimeError(f"the guard did not start: {self._log.read_text()}")
        try:
            return bool(self.status()["filtering"])
        except ControlError:
            return False


def end(program: subprocess.Popen[str]) -> None:
    """End a program that was started here, and collect it."""
    if program.poll() is None:
        program.send_signal(signal.SIGTERM)
        try:
            program.wait(15)
        except subprocess.TimeoutExpired:
            program.kill()
    program.wait()
    if program.stdout is not None:
        program.stdout.close()


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process's threads have used (/proc/pid/task/*/schedstat).

    To the nanosecond: /proc/pid/stat counts in hundredths of a second.
    """
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def memory_mb(pid: int, field: str = "VmHWM") -> float:
    """Return a memory field of a process in MB: VmRSS now, VmHWM the most ever."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"process {pid} has no {field}")


def milliseconds_since(began: int) -> float:
    """Return the time since a reading of `time.monotonic_ns`, in milliseconds."""
    return (time.monotonic_ns() - began) / 1e6
