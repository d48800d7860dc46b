"""What the attackers in their own name send: the gateway believes each trick, the server none."""

from __future__ import annotations

from collections import Counter

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.flow import TcpState
from rstguard.kernel.command import own_program
from rstguard.kernel.conntrack import Conntrack
from rstguard.lab.attacks import OPEN, Plan, scan_fast, scan_services, scan_slow
from rstguard.lab.server import start_server
from rstguard.lab.topology import ATTACKER, Lab
from rstguard.lab.waiting import wait_until

HIDE = own_program("rstguard.lab.strike", "hide", "--rate", "50", "--count", "5", "--seconds", "20")


@pytest.mark.netns
def test_each_way_to_hide_deceives_the_gateway_and_not_the_server() -> None:
    with Lab() as lab:
        rule = ("FORWARD", "-m", "conntrack", "--ctstate", "NEW")
        lab.run("gateway", "iptables", "-w", "-A", *rule)
        start_server(lab)
        wait_until(lambda: ":80 " in lab.run("server", "ss", "-ltnH"))
        lab.start("attacker", *HIDE, log="strike.log")

        def believed() -> Counter[int]:
            with lab.inside("gateway"), Conntrack() as table:
                flows = [f for f in table.dump() if f.original.source == parse_address(ATTACKER)]
            return Counter(flow.state for flow in flows)

        wait_until(
            lambda: believed() == {TcpState.CLOSE: 3, TcpState.FIN_WAIT: 1, TcpState.CLOSE_WAIT: 1}
        )
        held = lab.run("server", "ss", "-tnH", "state", "established")
        assert held.count(ATTACKER) == 5, held


@pytest.mark.netns
@pytest.mark.parametrize("plan", [scan_fast, scan_slow, scan_services])
def test_a_scan_finds_ten_open_ports_where_nothing_guards_them(plan: Plan) -> None:
    scan = plan(30)
    with Lab() as lab:
        start_server(lab, listens=scan.listens)
        wait_until(lambda: ":80 " in lab.run("server", "ss", "-ltnH"))
        found = lab.run("attacker", *scan.commands[0], "--rate", "300").splitlines()
    assert len(set(found)) == len(found) == OPEN, found
