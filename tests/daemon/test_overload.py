"""A queue that fills up: what the worker leaves undone, and that it takes it up again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rstguard.kernel.readers import BINDING, BUILT_IN, CHOICE
from tests.daemon.conftest import Open
from tests.guard import BOTH_FAMILIES, Guard, network_of, segments, source
from tests.netns import Lab, wait_until

pytestmark = pytest.mark.netns

PORT = 8001
POLICY = """
version: 1
name: overload
shun_for: 60s
protect: {interfaces: [out]}
rules:
  - {name: rate, measure: syn_rate, over: 10000/s, then: ban, for: 60s}
"""


def overloads(guard: Guard) -> list[str]:
    return [e["detail"] for e in guard.status()["recent"] if e["kind"] == "overload"]


@BOTH_FAMILIES
@pytest.mark.parametrize("reader", [BUILT_IN, BINDING])
def test_a_backlog_is_worked_off_and_its_sender_shunned(
    lab: Lab, tmp_path: Path, serve: Open, v6: bool, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHOICE, reader)
    service, attacker = serve(PORT, v6), source(v6)
    with Guard(lab, POLICY, tmp_path / "run", workers=1) as guard:
        link = service.connect(source(v6))
        link.talk()
        worker = guard.status()["workers"][0]["pid"]
        os.kill(worker, signal.SIGSTOP)
        try:
            segments(lab, attacker, service.address, PORT, "S", 4200)
        finally:
            os.kill(worker, signal.SIGCONT)
        wait_until(lambda: guard.block_of(attacker) is not None)
        wait_until(lambda: overloads(guard)[-1:] == ["everything is judged again"], 10)
        assert overloads(guard)[0].startswith("only SYNs of sources that have proven")
        assert len(overloads(guard)) == 4, "one level after the other"
        status = guard.status()
        assert status["counts"]["left_undone"] > 0
        assert status["workers"][0]["overload"] == 0
        shuns = [e for e in status["recent"] if e["kind"] == "shun"]
        assert [(e["subject"], e["rule"], e["reason"]) for e in shuns] == [
            (network_of(attacker), "overload", "overload")
        ]
        link.talk()
        service.connect(source(v6)).talk()
