"""The web page and the metrics, asked over the network as a browser and Prometheus ask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rstguard.control.web import LARGEST, MOST_CONNECTIONS, listen
from rstguard.kernel import KernelError
from rstguard.observe.metrics import TABLE
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.web import HOST, PORT, ask, connected, said

POLICY = """
version: 1
name: watched
protect: {interfaces: [out]}
rules:
  - {name: crowd, measure: syn_rate, over: 1000/s, then: drop}
"""


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    directory = tmp_path_factory.mktemp("web")
    with Guard(lab, POLICY, directory, "--http", HOST) as guard:
        guard.ask("ban-add", source="203.0.113.9", seconds=600)
        yield guard


@pytest.mark.netns
def test_metrics(lab: ThreeHosts, guard: Guard) -> None:
    status, _, body = ask(lab, "/metrics")
    assert status == 200
    families = list(text_string_to_metric_families(body.decode()))
    values = {s.name: s.value for family in families for s in family.samples}
    assert values["rstguard_filtering"] == 1
    rest = {
        "capped_rules",
        "half_open_handshakes",
        "half_open_limit",
        "large_source_connections",
        "pressed_connections",
        "syn_budget_engaged",
        "syn_cookies_total",
        "resets_total",
        "verdicts_total",
    }
    missing = {row.name for row in TABLE} - values.keys() - {f"rstguard_{name}" for name in rest}
    assert missing <= {"rstguard_rule_hits_total"}


@pytest.mark.netns
def test_the_page_is_whole_and_safe(lab: ThreeHosts, guard: Guard) -> None:
    status, head, body = ask(lab, "/")
    assert status == 200
    assert b"default-src 'none'" in head
    assert b"http://" not in body
    assert b"https://" not in body
    assert b"innerHTML" not in body
    bare, same, nothing = ask(lab, "/", "HEAD")
    assert (bare, same, nothing) == (200, head, b"")


@pytest.mark.netns
@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        ("POST", "/", HOST, 405),
        ("DELETE", "/status.json", HOST, 405),
        ("GET", "/../etc/passwd", HOST, 404),
        ("GET", "/", "rebound.example", 421),
        ("GET", "/status.json", f"rebound.example:{PORT}", 421),
        ("GET", "/status.json", f"localhost:{PORT}", 200),
    ],
)
def test_what_is_answered(
    lab: ThreeHosts, guard: Guard, method: str, path: str, host: str, status: int
) -> None:
    assert ask(lab, path, method, host)[0] == status


@pytest.mark.netns
def test_junk_and_too_much(lab: ThreeHosts, guard: Guard) -> None:
    assert said(lab, b"\0\xff\r\n\r\n")[0] == 400
    assert said(lab, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * LARGEST)[0] in (400, 431)
    assert "Traceback" not in guard.log.read_text()


@pytest.mark.netns
def test_those_who_say_nothing_are_bounded_and_time_out(lab: ThreeHosts, guard: Guard) -> None:
    crowd = [connected(lab) for _ in range(MOST_CONNECTIONS + 50)]
    try:
        assert ask(lab, "/metrics")[0] == 200
        for one in crowd:
            one.settimeout(15)
            with contextlib.suppress(ConnectionError):
                assert one.recv(1) == b""
    finally:
        for one in crowd:
            one.close()
    assert ask(lab, "/status.json")[0] == 200


@pytest.mark.parametrize("where", ["9788", "localhost:1", "127.0.0.1:x", "127.0.0.1:99999", ""])
def test_no_address(where: str) -> None:
    with pytest.raises(KernelError, match=r"say for example 127\.0\.0\.1:9788"):
        listen(where)


def test_only_loopback_unless_meant() -> None:
    with pytest.raises(KernelError, match="--http-anywhere"):
        listen("0.0.0.0:0")
    listen("0.0.0.0:0", anywhere=True).close()


def test_a_port_in_use_is_one_sentence() -> None:
    with listen("127.0.0.1:0") as taken, pytest.raises(KernelError, match="in use"):
        listen(f"127.0.0.1:{taken.getsockname()[1]}")
