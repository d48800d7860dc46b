"""The commands that read captures, and a policy with one rule of each measure to give them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RULES = {
    "syn": "measure: syn_rate, over: 100/s, burst: 300, then: ban, for: 10m",
    "net": "measure: syn_rate, per: {ipv4: 24, ipv6: 48}, over: 10/m, then: drop",
    "service": "measure: syn_rate, per: service, over: 10/h, then: drop",
    "rate": "measure: connection_rate, over: 7/m, then: drop",
    "half": "measure: half_open, over: 50, then: drop",
    "ports": "measure: distinct_ports, over: 15, within: 10s, then: drop",
    "hosts": "measure: distinct_hosts, over: 15, within: 10s, then: drop",
    "refused": "measure: refused_ports, over: 3, within: 10m, then: drop",
    "flags": "measure: bad_flags, over: 5/s, then: drop",
    "stray": "measure: out_of_state, over: 5/s, then: drop",
    "resets": "measure: reset_rate, over: 5/s, then: drop",
    "short": "measure: short_connections, shorter_than: 10s, over: 5/m, then: ban, for: 1h",
    "many": "measure: connections, over: 99, then: reset",
    "bytes": "measure: byte_rate, over: 1 MB/s, burst: 2 MB, then: reset",
    "packets": "measure: packet_rate, over: 100/s, burst: 300, then: reset",
    "slow": "measure: slow, after: 5s, under: 900 B/s, then: reset",
    "stalled": "measure: stalled, window: 16, over: 60s, then: reset",
    "idle": "measure: idle, over: 10s, then: reset",
    "age": "measure: age, over: 10s, then: reset",
}
LITTLE = ("--least-sources", "0", "--least-time", "1s")
"""Have limits proposed from as little as a test shows."""
BASE = "# what the base says stays\nversion: 1\nprotect: {interfaces: [eth0]}\nrules:\n" + "".join(
    f"  # about {name}\n  - {{name: {name}, {text}}}\n" for name, text in RULES.items()
)


def run(*words: str | Path, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "rstguard", "policy", *map(str, words)]
    return subprocess.run(command, input=data, capture_output=True, check=False, timeout=60)
