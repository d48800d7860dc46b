"""Chains that are already as planned are left alone."""

from __future__ import annotations

import socket

import pytest

from rstguard.kernel import chains, ipset, iptables
from rstguard.kernel.command import run
from rstguard.kernel.linux import Linux
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse

pytestmark = pytest.mark.netns

LINUX = Linux()
RULESET = compile_policy(
    parse(
        """\
version: 1
name: loopback
protect: {interfaces: [lo], ports: [80, 443]}
rules:
  - {name: rate, measure: syn_rate, over: 100/s, then: ban, for: 1h}
  - {name: all, measure: syn_rate, over: 90/m, per: service, ports: [80, 443], then: drop}
  - {name: closed, measure: stalled, over: 10s, window: 100, then: reset}
inspect: {packets: 8}
""",
        "policy.yaml",
    ).policy
)


def counted(table: str) -> int:
    """Return how many packets the rules of our chains have counted since they were made."""
    lines = run(["iptables-save", "-c", "-t", table]).splitlines()
    ours = (line for line in lines if " -A rstguard-" in line)
    return sum(int(line[1:].partition(":")[0]) for line in ours)


def test_only_tables_that_change_are_replaced(own_namespace: None) -> None:
    run(["ip", "link", "set", "lo", "up"])
    ipset.apply(LINUX, RULESET, workers=4)

    def apply(queues: range) -> None:
        iptables.apply(LINUX, {family: chains.plan(RULESET, family, queues) for family in (4, 6)})

    apply(range(7, 9))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 80))
    raw, mangle = counted("raw"), counted("mangle")
    assert raw > 0
    assert mangle > 0
    apply(range(7, 9))  # a table that is replaced begins to count anew
    assert (counted("raw"), counted("mangle")) == (raw, mangle)
    apply(range(7, 11))
    assert (counted("raw"), counted("mangle")) == (raw, 0)


def test_a_rule_that_another_program_changed_is_put_right(own_namespace: None) -> None:
    ipset.apply(LINUX, RULESET, workers=4)
    plans = {family: chains.plan(RULESET, family, range(7, 9)) for family in (4, 6)}
    iptables.apply(LINUX, plans)
    before = iptables.read(LINUX, 4)
    run(["iptables", "-t", "mangle", "-R", "rstguard-queue", "1", "-j", "ACCEPT"])
    assert iptables.read(LINUX, 4) != before
    iptables.apply(LINUX, plans)
    assert iptables.read(LINUX, 4) == before
