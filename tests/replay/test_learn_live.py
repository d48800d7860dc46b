"""The running guard learns limits: the same as from a capture of the same traffic."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rstguard.ipc.requests import ControlError
from rstguard.kernel.forgotten import GRACE_SECONDS
from rstguard.lab.waiting import wait_until
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import load
from rstguard.replay.learn import learn, lesson_data
from tests.replay.commands import LITTLE
from tests.replay.tap import captured
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, give_sources, network_of, source
from tests.support.traffic import Link, Open, Service, segments

pytestmark = pytest.mark.netns

PORT = 8300
POLICY = f"""
version: 1
name: taught
mode: observe
sweep_every: 500ms
protect: {{interfaces: [out]}}
rules:
  - {{name: syns, measure: syn_rate, over: 100/m, burst: 300, then: ban, for: 10m}}
  - {{name: net, measure: syn_rate, per: {{ipv4: 24, ipv6: 48}}, over: 100/m, then: drop}}
  - {{name: opened, measure: connection_rate, ports: [{PORT}], over: 100/m, then: drop}}
  - {{name: pending, measure: half_open, over: 99, then: drop}}
  - {{name: ports, measure: distinct_ports, over: 99, within: 60s, then: drop}}
  - {{name: brief, measure: short_connections, ports: [{PORT}], shorter_than: 30s, over: 99/m,
     then: ban, for: 10m}}
  - {{name: strays, measure: out_of_state, over: 99/m, then: drop}}
  - {{name: holds, measure: connections, over: 99, then: reset}}
  - {{name: idle, measure: idle, over: 15m, then: reset}}
"""
CROWD = 6
"""Productive sources; each makes one visit more than the one before it."""
HELD = 4
"""Connections that the last of them holds at once."""


@pytest.fixture
def lab() -> Iterator[ThreeHosts]:
    """A network of its own: the table keeps who was productive in the test before."""
    with ThreeHosts("rgl") as lab:
        give_sources(lab)
        yield lab


@pytest.fixture
def serve(lab: ThreeHosts) -> Iterator[Open]:
    opened: list[Service] = []

    def open_service(port: int, v6: bool = False, place: str = "server") -> Service:
        opened.append(Service(lab, port, place, v6))
        return opened[-1]

    yield open_service
    for service in opened:
        service.close()


def crowd(lab: ThreeHosts, service: Service) -> tuple[list[str], str]:
    """Let productive sources come and go, beside an attacker; return who they are."""
    honest = [source(service.v6) for _ in range(CROWD)]
    for number, address in enumerate(honest, 1):
        for _ in range(number):
            link = service.connect(address)
            link.talk()
            link.close()
    for _ in range(HELD):
        service.connect(honest[-1]).talk()
    attacker = source(service.v6)
    # Nobody refuses these: how many are pending at once would be a matter of luck.
    silent = ("-p", "tcp", "--sport", "9000:9059", "--tcp-flags", "RST", "RST", "-j", "DROP")
    tool = "ip6tables" if service.v6 else "iptables"
    lab.run("server", tool, "-w", "-I", "OUTPUT", *silent)
    for port in range(9000, 9060):
        segments(lab, attacker, service.address, port, "S", 1)
    segments(lab, attacker, service.address, PORT, "A", 1, first_port=29999)
    counted = time.monotonic() + GRACE_SECONDS + 0.5
    wait_until(lambda: time.monotonic() > counted)
    segments(lab, attacker, service.address, PORT, "A", 40, first_port=30000)
    return honest, attacker


def swept(guard: Guard, times: int = 2) -> None:
    """Wait until the connection table was read so many times more."""
    before = guard.status()["counts"]["sweeps"]
    wait_until(lambda: guard.status()["counts"]["sweeps"] >= before + times)


def rules_of(data: Any) -> dict[str, Any]:
    return {row["rule"]: row for row in data["rules"]}


@BOTH_FAMILIES
def test_limits_are_what_the_crowd_showed_and_what_a_capture_shows(
    lab: ThreeHosts, tmp_path: Path, serve: Open, v6: bool
) -> None:
    out, file = tmp_path / "proposed.yaml", tmp_path / "capture.pcap"
    service = serve(PORT, v6)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        assert guard.status()["learning"] is None
        with captured(lab, file):
            begun = guard.json("policy", "learn", "--live", "--start", "--for", "10m")
            assert begun["measuring"]
            honest, attacker = crowd(lab, service)
            wait_until(lambda: guard.status()["learning"]["productive"] == CROWD)
            swept(guard)
            service.connect(source(v6)).close()  # a replay sweeps up to the last packet
            told = guard.json("policy", "learn", "--live", *LITTLE, "--out", str(out))
        assert told["productive_sources"] == CROWD
        assert told["notes"] == []
        assert told["capture"] is None
        rules = rules_of(told)
        most = CROWD + HELD
        assert rules["syns"]["limit"] == f"{2 * most}/m"
        assert rules["opened"]["limit"] == f"{2 * most}/m"
        assert rules["net"]["limit"] == f"{2 * most}/m"
        assert rules["holds"]["limit"] == str(2 * HELD)
        assert rules["brief"]["limit"] == f"{CROWD * 2}/m".replace("12/", "15/")
        assert rules["strays"]["limit"] is None
        assert "too short" in rules["idle"]["kept_because"] or not rules["idle"]["candidates"]
        assert rules["ports"]["highest"][0] == {"source": network_of(attacker), "shown": "60"}
        assert rules["syns"]["candidates"][0]["would_hit"] == 1
        assert {row["source"] for row in rules["holds"]["highest"]} == {network_of(honest[-1])}

        # The proposal is a policy that can be applied as it is, and still observes.
        assert guard.cli("policy", "apply", str(out)).returncode == 0
        assert guard.status()["policy"]["mode"] == "observe"
        assert "what the running guard saw" in out.read_text()

    replayed = lesson_data(learn(compile_policy(load(guard.file).policy), file, 2.0))
    assert replayed["productive_sources"] == CROWD
    for name, row in rules_of(replayed).items():
        if name == "strays":  # of which eight could belong to connections older than the capture
            row["highest"][0]["shown"] = "40/m"
        if name != "idle":  # each sees it at sweeps of its own
            assert rules[name] == row, name


def test_a_command_that_waits_is_as_good_as_one_that_comes_back(
    lab: ThreeHosts, tmp_path: Path, serve: Open
) -> None:
    out, service = tmp_path / "proposed.yaml", serve(PORT + 1)
    words = ("policy", "learn", "--live", *LITTLE, "--out", str(out))
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        done = guard.cli(*words)
        assert done.returncode == 1
        assert "the guard is not learning: begin with --live --start" in done.stderr
        done = guard.cli(*words, "--for", "1s")
        assert done.returncode == 0, done.stderr
        assert "syns: kept: no productive source shows any of it" in done.stdout
        assert guard.status()["learning"] is None
        assert "exists: name another file" in guard.cli(*words, "--for", "1s").stderr

        # Interrupted, it proposes from what there is.
        waiting = subprocess.Popen(
            guard.command(*words, "--for", "1h", "--force"), stdout=subprocess.PIPE, text=True
        )
        wait_until(lambda: guard.status()["learning"] is not None)
        service.connect(source(False)).talk()
        wait_until(lambda: guard.status()["learning"]["productive"] == 1)
        assert "learning limits: 1 productive sources" in guard.cli("status").stdout
        done = guard.cli(*words, "--for", "1h", "--force")
        assert "the guard learns already" in done.stderr
        waiting.send_signal(signal.SIGINT)
        said, _ = waiting.communicate(timeout=30)
        assert waiting.returncode == 0
        assert "limits from 1 productive source in" in said
        assert guard.status()["learning"] is None

        # What was learned when the time was over is kept, until it is told to be forgotten.
        guard.cli("policy", "learn", "--live", "--start", "--for", "1s")
        wait_until(lambda: not guard.status()["learning"]["measuring"])
        service.connect(source(False)).talk()
        swept(guard)
        assert guard.json(*words, "--force")["productive_sources"] == 1  # who holds a connection
        assert guard.cli("policy", "learn", "--live", "--stop").returncode == 0
        assert guard.status()["learning"] is None
        with pytest.raises(ControlError, match="not learning"):
            guard.ask("learned")


def test_what_came_in_between_is_said(lab: ThreeHosts, tmp_path: Path, serve: Open) -> None:
    out, service = tmp_path / "proposed.yaml", serve(PORT)
    enforcing = POLICY.replace("mode: observe", "mode: enforce")
    with Guard(lab, enforcing, tmp_path / "guard") as guard:
        done = guard.cli("policy", "learn", "--live", "--start")
        assert done.returncode == 1
        assert "policy taught enforces" in done.stderr
        assert "mode: observe" in done.stderr
        guard.apply(POLICY)
        guard.ask("learn-start", seconds=3600)
        guard.ask("learned")  # by its answer every process has begun
        early, late = source(False), source(False)
        visit(service, early, 3)
        wait_until(lambda: guard.status()["learning"]["productive"] == 1)
        # While a policy enforces nothing is measured; what was, is kept.
        guard.apply(enforcing)
        assert not guard.status()["learning"]["measuring"]
        seconds = guard.status()["learning"]["seconds"]
        visit(service, late, 30)
        swept(guard)
        assert guard.status()["learning"]["seconds"] == seconds
        changed = POLICY.replace("{name: ports, measure: distinct_ports, over: 99", "{name: ports, "
                                 "measure: distinct_ports, over: 98")  # fmt: skip
        guard.apply(changed)
        assert guard.status()["learning"]["measuring"]
        visit(service, late, 2)
        wait_until(lambda: guard.status()["learning"]["productive"] == 2)
        told = guard.json("policy", "learn", "--live", *LITTLE, "--out", str(out))
        assert [row["shown"] for row in rules_of(told)["syns"]["highest"]] == ["3/m", "2/m"]
        assert [row["shown"] for row in rules_of(told)["ports"]["highest"]] == ["1"]
        assert len(told["notes"]) == 2
        assert "the policy enforced for a while" in out.read_text()

        # Half of what was measured dies with each of two workers.
        for worker in guard.status()["workers"]:
            os.kill(worker["pid"], signal.SIGKILL)
        wait_until(lambda: sum(w["restarts"] for w in guard.status()["workers"]) == 2)
        wait_until(guard.filtering)
        visit(service, late, 4)
        swept(guard)
        done = guard.cli("policy", "learn", "--live", *LITTLE, "--out", str(out), "--force")
        assert "a process of the guard died 2 times" in done.stderr
        data = guard.json("policy", "learn", "--live", *LITTLE, "--out", str(out), "--force")
        assert [row["shown"] for row in rules_of(data)["syns"]["highest"]] == ["4/m"]
        assert data["productive_sources"] == 2


def visit(service: Service, address: str, times: int) -> None:
    links: list[Link] = []
    for _ in range(times):
        links.append(service.connect(address))
        links[-1].talk()
    for link in links:
        link.close()
