"""The first policy names who holds a large share of the connections: by the table, or a guard."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.lab.waiting import wait_until
from rstguard.policy.load import parse
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, network_of, source
from tests.support.traffic import Open, Service

pytestmark = [pytest.mark.netns, BOTH_FAMILIES]

PORT, MANY, FEW = 8470, 60, 20
POLICY = """
version: 1
mode: observe
sweep_every: 500ms
protect: {interfaces: [out]}
large_sources: {after: 10s}
rules:
  - {name: hoarder, measure: connections, over: 600, then: reset}
"""
NEW = ("policy", "new", "--interface", "out")


@pytest.fixture
def tracked(lab: ThreeHosts) -> Iterator[ThreeHosts]:
    """A gateway that tracks connections, as one with any firewall does."""
    rule = ("FORWARD", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
    for tool in ("iptables", "ip6tables"):
        lab.run("gateway", tool, "-w", "-A", *rule)
    yield lab
    for tool in ("iptables", "ip6tables"):
        lab.run("gateway", tool, "-w", "-D", *rule)


def served(service: Service, count: int, address: str = "") -> None:
    """Open connections that are answered, of one source or of one each."""
    for _ in range(count):
        service.connect(address or source(service.v6)).talk()


def unwrapped(text: str) -> str:
    """Return a policy with the lines of its comments joined."""
    return text.replace("\n# ", " ")


def test_a_table_shows_who_holds_most(tracked: ThreeHosts, serve: Open, v6: bool) -> None:
    service, cdn = serve(PORT, v6), source(v6)
    served(service, MANY, cdn)
    served(service, FEW)
    command = tracked.command("gateway", sys.executable, "-m", "rstguard", *NEW)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    said = unwrapped(done.stdout)
    named = network_of(cdn)
    assert f"{named} holds {MANY} connections, 75% of those that come by out now. If it" in said
    quoted = f'"{named}"' if v6 else named
    assert f"say `large_sources: {{ordinary: [{quoted}]}}`." in said
    assert len(re.findall(r"holds \d+ connections", said)) == 1
    assert parse(done.stdout, "new").policy.mode == "observe"


def test_a_guard_is_asked(lab: ThreeHosts, serve: Open, v6: bool, tmp_path: Path) -> None:
    service, cdn = serve(PORT + 1, v6), source(v6)
    named = network_of(cdn)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        served(service, MANY, cdn)
        served(service, FEW)
        wait_until(lambda: [r["source"] for r in guard.status()["large_sources"]] == [named], 30)
        (row,) = guard.status()["large_sources"]
        said = unwrapped(guard.cli(*NEW).stdout)
    found = f"{named} holds {MANY} connections, {row['percent']}% of all proven ones, as the "
    assert f"{found}running guard has found. If it is a proxy" in said
    assert len(re.findall(r"holds \d+ connections", said)) == 1
