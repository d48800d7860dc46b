"""The web page in a real browser, while the guard has something to show."""

from __future__ import annotations

from pathlib import Path

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.browser import Browser
from tests.support.budget import learned, name_of
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts
from tests.support.sources import source
from tests.support.traffic import Open, Service, segments

pytestmark = pytest.mark.netns

HOST = "127.0.0.1:9788"
LONGEST = "n" * 48
POLICY = f"""
version: 1
name: watched
syn_budget: off
protect: {{interfaces: [out]}}
rules:
  - {{name: {LONGEST}, measure: syn_rate, over: 20/m, burst: 20, then: ban, for: 10m}}
  - {{name: holds, measure: connections, over: 10, then: reset}}
  - {{name: ports, measure: distinct_ports, over: 1000, within: 10s, then: drop}}
"""
HOLDER, FLOODER = source(False), source(False)
NOWHERE = "198.18.0.7"
LOW_CONTRAST = """
(() => {  // WCAG 2.1, 1.4.3: the texts that are too faint on what is behind them
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => parts(colour).slice(0, 3).map((value) => value / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (one) => {
    const colour = getComputedStyle(one).backgroundColor;
    return parts(colour)[3] === 0 ? behind(one.parentElement) : colour;
  };
  const faint = (one) => {
    const [a, b] = [light(getComputedStyle(one).color), light(behind(one))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5;
  };
  return [...document.querySelectorAll("body *")]
    .filter((one) => one.innerText && !one.children.length && faint(one))
    .map((one) => one.outerHTML);
})()
"""


def attack(lab: ThreeHosts, service: Service) -> None:
    """Hold too many connections, and send too many SYNs, once."""
    for _ in range(10):
        service.connect(HOLDER)
    for _ in range(2):
        service.refuse(HOLDER)
    segments(lab, FLOODER, SERVER4, service.port, "S", 300)


def test_a_flood_is_seen(lab: ThreeHosts, serve: Open, tmp_path: Path) -> None:
    service = serve(8300)
    with (
        Guard(lab, POLICY, tmp_path, "--http", HOST) as guard,
        Browser(lab, "gateway", f"http://{HOST}/", tmp_path) as browser,
    ):
        for number in range(250):
            guard.ask("ban-add", source=f"203.0.113.{number}", seconds=600)
        wait_until(lambda: browser.text("state") == "filtering", 20)
        attack(lab, service)
        wait_until(lambda: f"shun {FLOODER}" in browser.text("events"), 20)
        wait_until(lambda: f"reset {HOLDER}:" in browser.text("events"), 20)
        assert "policy watched (enforce), up " in browser.text("policy")
        assert browser.text("blocked").split() == ["250", "banned", "1", "shunned"]
        wait_until(lambda: [FLOODER, "100%", LONGEST] in browser.rows("nearest"), 20)
        rules = {row[2] for row in browser.rows("nearest") if row[0] == HOLDER}
        assert rules == {LONGEST, "holds"}
        assert [HOLDER, "2", "holds"] in browser.rows("sources")
        assert "The policy has none." in browser.text("budget")
        # Each chart has a curve that is not flat, and says its scale.
        peaks = "[...document.querySelectorAll('#charts polyline:first-of-type')].map("
        peaks += "(one) => Math.min(100, ...[...one.points].map((point) => point.y)))"
        assert len(browser.value(peaks)) == 4
        wait_until(lambda: max(browser.value(peaks)) < 90, 20)
        assert "4 min ago" in browser.text("charts")
        for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (320, "dark")):
            browser.look(width, 900, scheme)
            assert browser.value("document.documentElement.scrollWidth") == width
            assert browser.value(LOW_CONTRAST) == []
            shot = tmp_path / f"page-{width}-{scheme}.png"
            browser.screenshot(shot)
            assert shot.stat().st_size > 10_000
        assert browser.errors == []


def test_open_handshakes_are_seen(lab: ThreeHosts, serve: Open, tmp_path: Path) -> None:
    service = serve(8301)
    policy = POLICY.replace("syn_budget: off", "syn_budget: {half_open: 32}")
    with (
        Guard(lab, policy, tmp_path, "--http", HOST) as guard,
        Browser(lab, "gateway", f"http://{HOST}/", tmp_path) as browser,
    ):
        learned(guard, service)
        segments(lab, NOWHERE, SERVER4, service.port, "S", 8)
        row = [name_of(service), "8 of 32", "within 32 half-open"]
        wait_until(lambda: row in browser.rows("budget"), 20)
        for width in (1280, 320):
            browser.look(width, 900, "light")
            assert browser.value("document.documentElement.scrollWidth") == width
        assert browser.errors == []


def test_a_guard_that_is_gone_is_told(lab: ThreeHosts, tmp_path: Path) -> None:
    with (
        Guard(lab, POLICY, tmp_path, "--http", HOST) as guard,
        Browser(lab, "gateway", f"http://{HOST}/", tmp_path) as browser,
    ):
        wait_until(lambda: browser.text("state") == "filtering", 20)
        assert browser.text("nearest") == "Nobody has used any of them now."
        guard.stop()
        wait_until(lambda: browser.text("state") == "the guard does not answer", 20)
        assert browser.text("notes").startswith("No answer since ")
        assert browser.value("document.title") == "! rstguard: the guard does not answer"
        guard.start()
        wait_until(lambda: browser.text("state") == "filtering", 20)
        assert browser.text("notes") == ""
