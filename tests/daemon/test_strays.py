"""Floods of segments that fit no connection: what rules do not let pass never reaches the server.

Not even while the worker is stuck, dead or overrun, whatever the policy says of that.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from rstguard.engine.wire import ACK, FIN, PSH, RST, SYN, URG
from rstguard.kernel import limiting
from rstguard.kernel.forgotten import most_a_second
from rstguard.kernel.tracker import USUAL
from rstguard.lab.waiting import wait_until
from tests.daemon.conftest import set_tracker
from tests.support.crowd import Crowd
from tests.support.forgetting import flush, kept, strays, streams
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts
from tests.support.sources import source
from tests.support.traffic import Open, segments

pytestmark = pytest.mark.netns

PORT: Final = 8201
POLICY: Final = f"""
version: 1
name: strays
protect: {{interfaces: [out], ports: [{PORT}]}}
shun_for: 60s
rules:
  - {{name: strays, measure: out_of_state, over: 20/s, burst: 20, then: drop}}
  - {{name: flags, measure: bad_flags, over: 5/s, then: ban, for: 60s}}
"""
CLOSED: Final = POLICY.replace("shun_for", "on_failure: closed\nshun_for")
OF_ALL_KINDS: Final = (ACK, FIN | ACK, RST, SYN | ACK, 0, FIN | PSH | URG)
SIGNALS: Final = {"stuck": signal.SIGSTOP, "killed": signal.SIGKILL}
SOURCES: Final = {"one": "33,1,1,7", "random": "33,drnd(3)"}
MANY: Final = 100_000
VALVES: Final = sum(limiting.OTHERS.values()) + most_a_second(USUAL)
"""Segments a second that may pass, whoever sends them."""


@contextmanager
def counting(lab: ThreeHosts, place: str) -> Iterator[None]:
    """Have a host count what comes of the floods' sources."""
    rule = ("PREROUTING", "-s", "33.0.0.0/8", "-p", "tcp")
    lab.run(place, "iptables", "-w", "-t", "raw", "-I", *rule)
    try:
        yield
    finally:
        lab.run(place, "iptables", "-w", "-t", "raw", "-D", *rule)


def came(lab: ThreeHosts, place: str) -> int:
    printed = lab.run(place, "iptables-save", "-c", "-t", "raw")
    (line,) = (line for line in printed.splitlines() if "-s 33.0.0.0/8" in line)
    return int(line[1:].partition(":")[0])


TROUBLE: Final = [
    pytest.param(worker, policy, id=f"{worker}-{name}")
    for worker, several in {
        "at work": {"open": POLICY},
        "stuck": {"open": POLICY, "closed": CLOSED},
        "overrun": {"open": POLICY, "closed": CLOSED},
        "killed": {"open": POLICY, "closed": CLOSED},
    }.items()
    for name, policy in several.items()
]


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize(("worker", "policy"), TROUBLE)
def test_hardly_any_reach_the_server(
    lab: ThreeHosts, tmp_path: Path, serve: Open, sources: str, worker: str, policy: str
) -> None:
    service = serve(PORT)
    with ExitStack() as stack:
        guard = stack.enter_context(Guard(lab, policy, tmp_path / "run", workers=1))
        stack.enter_context(counting(lab, "gateway"))
        stack.enter_context(counting(lab, "server"))
        crowd = stack.enter_context(Crowd(lab, service).at_work())
        pid = guard.status()["workers"][0]["pid"]
        if worker == "overrun":
            os.sched_setaffinity(pid, {min(os.sched_getaffinity(0))})
            os.setpriority(os.PRIO_PROCESS, pid, 19)
        stack.enter_context(strays(lab, tmp_path, PORT, SOURCES[sources], OF_ALL_KINDS))
        wait_until(lambda: came(lab, "gateway") > 1000, 20)
        if worker in SIGNALS:
            os.kill(pid, SIGNALS[worker])
        sent, reached, began = came(lab, "gateway"), came(lab, "server"), time.monotonic()
        wait_until(lambda: came(lab, "gateway") > sent + MANY, 60)
        crowd.more(20)
        reached = came(lab, "server") - reached
        sent, seconds = came(lab, "gateway") - sent, time.monotonic() - began
        # Where the sender is slow the valves let a greater part of it pass.
        assert reached <= max(sent / 100, VALVES * (seconds + 1)), f"{reached} of {sent}"
    assert crowd.failures == []


def test_without_such_rules_they_all_pass(lab: ThreeHosts, tmp_path: Path, serve: Open) -> None:
    """The test above can fail: a policy that only observes is a control."""
    serve(PORT)
    observing = POLICY.replace("version: 1", "version: 1\nmode: observe")
    with (
        Guard(lab, observing, tmp_path / "run", workers=1) as guard,
        counting(lab, "gateway"),
        counting(lab, "server"),
    ):
        with strays(lab, tmp_path, PORT, SOURCES["one"], OF_ALL_KINDS):
            wait_until(lambda: came(lab, "gateway") > 20_000, 60)
            sent = came(lab, "gateway")
        wait_until(lambda: came(lab, "server") > sent / 2, 20)
        assert set(guard.status()["limited"].values()) == {0}


def test_what_was_dropped_is_told(lab: ThreeHosts, tmp_path: Path, serve: Open) -> None:
    serve(PORT)
    with Guard(lab, POLICY, tmp_path / "run", workers=1) as guard:
        told, address = guard.status()["limited"], source(False)
        assert told == {"out_of_state": 0, "bad_flags": 0, "reset_rate": 0}
        segments(lab, address, SERVER4, PORT, "", 15)
        segments(lab, address, SERVER4, PORT, "FPU", 15)
        wait_until(lambda: guard.block_of(address) is not None)
        block = guard.block_of(address)
        assert (block["kind"], block["rule"]) == ("shun", "flags")
        wait_until(lambda: guard.status()["limited"]["bad_flags"] > 0)

        ports = iter(range(21_000, 60_000, 60))

        def limited() -> bool:
            segments(lab, address, SERVER4, PORT, "R", 45, next(ports))
            return bool(guard.status()["limited"]["out_of_state"] > 0)

        wait_until(limited, 20)
        used = {r["name"]: r["used_percent"] for r in guard.ask("explain", source=address)["rules"]}
        assert used["strays"] > 50
        kinds = {(event["kind"], event["reason"]) for event in guard.status()["recent"]}
        assert {("limited", "out_of_state"), ("limited", "bad_flags")} <= kinds
        assert "beyond a rule, dropped in front of the queue" in guard.cli("status").stdout


@pytest.mark.parametrize("loose", ["1", "0"])
def test_what_the_tracker_forgot_goes_on_amid_a_flood(
    lab: ThreeHosts, tmp_path: Path, serve: Open, loose: str
) -> None:
    set_tracker(lab, {"tcp_loose": loose})
    try:
        with Guard(lab, POLICY, tmp_path / "run", workers=1) as guard:
            service = serve(PORT)
            links = {str(number): service.connect(source(False)) for number in range(5)}
            for link in links.values():
                link.talk()
            with (
                strays(lab, tmp_path, PORT, SOURCES["random"], OF_ALL_KINDS),
                streams(links) as running,
            ):
                wait_until(lambda: guard.status()["forgotten"]["dropped"] > 20_000, 30)
                for _ in range(2):
                    flush(lab)
                    assert kept(running) == {}
            assert not {"shun", "ban"} & set(guard.status()["counts"])
    finally:
        set_tracker(lab, {"tcp_loose": "1"})


def test_resets_beyond_a_rule_are_dropped(lab: ThreeHosts, tmp_path: Path, serve: Open) -> None:
    rules = "  - {name: resets, measure: reset_rate, over: 5/m, burst: 5, then: drop}\n"
    with Guard(lab, POLICY + rules, tmp_path / "run", workers=1) as guard:
        service, address = serve(PORT), source(False)
        for _ in range(20):
            link = service.connect(address)
            link.talk()
            link.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            link.client.close()
        wait_until(lambda: guard.status()["limited"]["reset_rate"] >= 13)
