"""The network of the benchmarks, and the real guard in its gateway.

It is the tests' network, with a client network and a server address that the policies guard:

    client 198.51.100.0/24 (every address of it)  --  gateway  --  server 203.0.113.10
"""

from __future__ import annotations

import itertools
import re
import resource
import socket
import subprocess
import time
from pathlib import Path

from rstguard.kernel.nfqueue import QueueState, states
from rstguard.kernel.queues import DEFAULT_NUMBER
from rstguard.lab.guard import GuardProcess
from tests.support.network import CLIENT4, OUTSIDE4, SERVER4, ThreeHosts

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
EXAMPLE = ROOT / "tests/policy/golden/example.yaml"
"""The policy that the goals speak of."""

CLIENT = "198.51.100.1"
SERVER = "203.0.113.10"
PORT = 8080
"""A port of the example policy that has no SYN budget: the queue itself is to be measured."""

_SERVICES = "protect: {interfaces: [out], destinations: [203.0.113.10]}"


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


class Site(ThreeHosts):
    """The network, and the programs compiled for it."""

    def __init__(self) -> None:
        super().__init__("rgg")
        self._ports = itertools.cycle(range(2000, 65000))

    def build(self) -> None:
        """Make the hosts and links, and add the addresses that the policies speak of."""
        super().build()
        # What a gateway has before anybody guards it.
        names = {"acct": "0", "timestamp": "0", "tcp_loose": "1"}
        self.set("gateway", {f"net/netfilter/nf_conntrack_{n}": v for n, v in names.items()})
        self.ip(
            "client",
            "route add local 198.51.100.0/24 dev lo",
            f"route replace default via {OUTSIDE4} src {CLIENT}",
        )
        self.ip(
            "gateway",
            f"route add 198.51.100.0/24 via {CLIENT4}",
            f"route add {SERVER} via {SERVER4}",
        )
        self.ip("server", f"addr add {SERVER}/32 dev eth0")
        for place in ("client", "server"):
            self.set(place, {"net/ipv4/ip_local_port_range": "1024 65535"})

    def compiled(self, source: str) -> str:
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

    def guard(self, policy: str, workers: int = 1) -> GuardProcess:
        """Start the guard in the gateway and wait until it filters.

        One worker unless asked for more: what is measured is what one core can do.
        """
        made = GuardProcess(self, policy, self.directory / "runtime", workers=workers)
        made.start(whole=True)
        return made


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


def allow_files(count: int) -> None:
    """Let this process have so many open files, if not more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, hard)))
