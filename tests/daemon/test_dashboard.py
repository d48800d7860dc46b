"""The Grafana dashboard while there is a flood: every query finds what it asks for."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rstguard.lab.waiting import wait_until
from tests.support import dashboard
from tests.support.budget import over_budget, state_of
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import source
from tests.support.traffic import Open, connect
from tests.support.web import ask

pytestmark = pytest.mark.netns

HOST = "127.0.0.1:9788"
WEB, OTHER = 8400, 8401
POLICY = f"""
version: 1
name: watched
sweep_every: 500ms
protect: {{interfaces: [out]}}
syn_budget: {{rate: 200/s, half_open: 128, ports: [{WEB}]}}
rules:
  - {{name: holds, measure: connections, ports: [{OTHER}], over: 2, then: reset}}
  - {{name: fast, measure: connection_rate, ports: [{OTHER}], over: 1/m, burst: 6, then: ban,
     for: 1m}}
"""


def found(lab: ThreeHosts, selector: dashboard.Selector) -> bool:
    """Tell whether what is exposed now has a series that fits."""
    name, labels = selector
    body = ask(lab, "/metrics")[2].decode()
    return any(
        sample.name == name and all(re.fullmatch(labels[key], sample.labels[key]) for key in labels)
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    )


def test_every_query_finds_something(lab: ThreeHosts, serve: Open, tmp_path: Path) -> None:
    web, other = serve(WEB), serve(OTHER)
    with Guard(lab, POLICY, tmp_path, "--http", HOST) as guard:
        web.connect(source(False)).talk()
        wait_until(lambda: state_of(guard, web) is not None)
        with over_budget(lab, guard, web):
            address = source(False)
            for _ in range(2):
                other.connect(address)
            for _ in range(4):
                other.refuse(address)
            wait_until(lambda: guard.events("reset", "holds") > 0)
            with suppress(ConnectionResetError):
                connect(lab, address, other.address, OTHER).close()
            wait_until(lambda: guard.events("ban", "fast") > 0)
            for expression, _ in dashboard.asked():
                for name, labels in dashboard.selectors(expression):
                    labels.pop("instance", None)  # this one is Prometheus's own
                    wait_until(partial(found, lab, (name, labels)))
