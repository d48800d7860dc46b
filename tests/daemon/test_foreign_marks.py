"""Other programs use the guard's bits of marks: nobody is reset, and it is told."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rstguard.kernel import command, foreign
from rstguard.kernel.marks import Marks
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import Open

pytestmark = pytest.mark.netns

PROTECTED, OTHER = 8201, 8202
POLICY = f"""
version: 1
name: shared
sweep_every: 500ms
protect: {{interfaces: [out], ports: [{PROTECTED}]}}
rules:
  - {{name: rate, measure: connection_rate, over: 1000/s, then: ban, for: 60s}}
  - {{name: short, measure: short_connections, shorter_than: 1h, over: 1000/s, then: drop}}
  - {{name: stray, measure: out_of_state, over: 100000/s, then: drop}}
"""
MARKS = Marks()
VALUES = (0x6D6F6C65, 0xCA6C0001, *(1 << bit for bit in range(24, 32)), 0x18000000, 0xFF000000)
_INTO = "-A PREROUTING -i {} -p tcp -j {}"
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("shared"), workers=1) as guard:
        yield guard


class Others:
    """The rules of another program, in front of the guard's, and what it sees behind them."""

    def __init__(self, lab: ThreeHosts, value: int) -> None:
        self.lab = lab
        self._chain = f"others{next(_numbers)}"
        mine = value & ~MARKS.mask
        self._seen = [
            f"-p tcp --dport {port} -m mark --mark {bits:#x}/{mask:#x}"
            for port, bits, mask in (
                (PROTECTED, mine, 0xFFFFFFFF ^ MARKS.mask), (OTHER, value, 0xFFFFFFFF),
            )
        ]  # fmt: skip

    @contextmanager
    def rules(self, *rules: str) -> Iterator[None]:
        watch = [f"-I FORWARD -p tcp --dport {port}" for port in (PROTECTED, OTHER)]
        watch += [f"-I FORWARD {match}" for match in self._seen]
        for tool in ("iptables", "ip6tables"):
            for rule in reversed(rules):
                self._do(tool, rule.replace("-A ", "-I ", 1))
            for rule in watch:
                self._do(tool, rule)
        try:
            yield
        finally:
            for tool in ("iptables", "ip6tables"):
                for rule in (*rules, *watch):
                    self._do(tool, f"-D {rule[3:]}")

    def _do(self, tool: str, rule: str) -> None:
        self.lab.run("gateway", tool, "-w", "-t", "mangle", *rule.split())

    def lost(self, v6: bool) -> int:
        """Return how many packets did not bear the mark any more behind the guard."""
        tool = "ip6tables" if v6 else "iptables"
        printed = self.lab.run("gateway", f"{tool}-save", "-c", "-t", "mangle").splitlines()
        counts = [
            int(line[1:].partition(":")[0])
            for line in printed
            if " -A FORWARD " in line and "--dport" in line
        ]
        *marked, other, protected = counts
        assert protected
        assert other
        return protected + other - sum(marked)


def lives(serve: Open, v6: bool, ports: tuple[int, ...] = (PROTECTED, OTHER)) -> None:
    """A connection to each port, from beginning to end."""
    for port in ports:
        service = serve(port, v6)
        link = service.connect(source(v6))
        for _ in range(3):
            link.talk()
        link.close()
        service.close()


@pytest.mark.parametrize("value", VALUES, ids=[f"{value:#010x}" for value in VALUES])
def test_marks_of_packets(lab: ThreeHosts, guard: Guard, serve: Open, value: int) -> None:
    others = Others(lab, value)
    mark = f"MARK --set-xmark {value:#x}/{value:#x}"
    with others.rules(_INTO.format("out", mark), _INTO.format("in", mark)):
        for v6 in (False, True):
            lives(serve, v6)
            assert others.lost(v6) == 0


@pytest.mark.parametrize("value", VALUES, ids=[f"{value:#010x}" for value in VALUES])
def test_marks_of_connections(lab: ThreeHosts, guard: Guard, serve: Open, value: int) -> None:
    """Written into each connection, as by a `CONNMARK --save-mark` without a mask."""
    mark = f"CONNMARK --set-xmark {value:#x}/{value:#x}"
    before = guard.status()["counts"].get("reset", {})
    with Others(lab, value).rules(_INTO.format("out", mark)):
        for v6 in (False, True):
            lives(serve, v6)
    assert guard.status()["counts"].get("reset", {}) == before


def test_what_is_condemned_dies_all_the_same(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    """Also while others write into its mark, and where the guard does not protect it."""
    mark = "CONNMARK --set-xmark 0x8000000/0x8000000"
    with Others(lab, 0x8000000).rules(_INTO.format("out", mark)):
        for port in (PROTECTED, OTHER):
            link = serve(port).connect(source(v6=False))
            link.talk()
            assert guard.kill(source_port=link.port)["confirmed"] == 1
            link.wait_reset()


@BOTH_FAMILIES
def test_it_is_told(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    tool = "ip6tables" if v6 else "iptables"
    mark = "-p tcp -j MARK --set-xmark 0x8000000/0x8000000"
    lab.run("gateway", tool, "-w", "-t", "mangle", "-I", "PREROUTING", *mark.split())
    lives(serve, v6, (PROTECTED,))
    with lab.inside("gateway"):
        found = foreign.look(command)
    (said,) = foreign.told(found, MARKS.mask)
    assert "MARK --set-xmark 0x8000000/0x8000000" in said
    assert "set `marks: 0x00ff0000` in the policy" in said
    assert found.counts[foreign.CLEARED] > 0
    wait_until(lambda: guard.status()["foreign_marks"]["problems"] == [said], 40)
    assert guard.status()["foreign_marks"]["cleared"] > 0
    shown = guard.cli("status").stdout
    assert f"MARKS: {said}" in shown
    assert f"foreign marks marks ({said}" in guard.cli("events").stdout
    lab.run("gateway", tool, "-w", "-t", "mangle", "-D", "PREROUTING", *mark.split())
