"""The connection tracker forgets: what goes on, and what the guard makes of it.

Each trial is made with the guard and, as a control, without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.flow import Flow
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.marks import Labels, Marks
from rstguard.lab.waiting import wait_until
from tests.support.budget import engaged, over_budget, state_of
from tests.support.forgetting import (
    FORGETTING,
    Outward,
    flush,
    invalid_dropped,
    kept,
    masquerading,
    strays,
    streams,
    turned,
)
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts
from tests.support.sources import source
from tests.support.traffic import Link, Open, Service, segments

pytestmark = pytest.mark.netns

PORT, OTHER, QUIET, BUDGET, BEHIND, PLAIN, MASKED = range(8101, 8108)
"""Services: protected, not protected, protected but for one test alone, with a SYN budget, two
outside, of which the first is reached by masquerading, and a protected one that sees all its
clients masqueraded."""
POLICY = f"""\
version: 1
name: forgetful
protect: {{interfaces: [out], ports: [{PORT}, {QUIET}, {BUDGET}, {MASKED}]}}
sweep_every: 500ms
syn_budget: {{rate: 200/s, half_open: 4096, ports: [{BUDGET}]}}
rules:
  - {{name: strays, measure: out_of_state, over: 20/s, burst: 20, then: ban, for: 10m}}
  - {{name: rate, measure: connection_rate, over: 50/s, burst: 50, then: ban, for: 10m}}
  - {{name: short, measure: short_connections, shorter_than: 1s, over: 60/m, then: ban, for: 10m}}
  - {{name: hoard, measure: connections, over: 40, then: reset}}
  - {{name: slow, measure: slow, ports: [{QUIET}], after: 2s, under: 10 B/s, of: client,
     then: reset}}
"""

Flows = dict[str, Link]


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("forgetful")) as guard:
        yield guard


@pytest.fixture(params=["guarded", "control"])
def way(request: pytest.FixtureRequest, guard: Guard) -> Iterator[Guard | None]:
    """Let the guard work, or withdraw all its rules."""
    if request.param == "guarded":
        yield guard
        return
    assert guard.cli("panic").returncode == 0
    yield None
    assert guard.cli("panic", "--end").returncode == 0
    wait_until(lambda: not guard.status()["panic"])


def entry(lab: ThreeHosts, link: Link) -> Flow | None:
    """Return what the gateway knows of a connection that its client has begun."""
    client = parse_address(link.source), link.port
    with lab.inside("gateway"), Conntrack() as table:
        flows = (f for f in table.dump() if (f.original.source, f.original.source_port) == client)
        return next(flows, None)


def is_adopted(lab: ThreeHosts, link: Link) -> bool:
    flow = entry(lab, link)
    if flow is None or not flow.labels & 1 << Labels().adopted:
        return False
    return flow.mark & Marks().stage_mask == Marks().trusted.value


def harmed(guard: Guard) -> dict[str, int]:
    """Return how many were banned, shunned or reset so far, by kind."""
    counts = guard.status()["counts"]
    return {kind: sum(counts.get(kind, {}).values()) for kind in ("ban", "shun", "reset")}


@contextlib.contextmanager
def masks(lab: ThreeHosts) -> Iterator[None]:
    """Masquerade both ways."""
    with masquerading(lab, BEHIND), masquerading(lab, MASKED, "in"):
        yield


@contextlib.contextmanager
def mixed(lab: ThreeHosts, serve: Open) -> Iterator[tuple[Flows, Flows]]:
    """Yield connections that are busy, and some that are idle.

    No masqueraded download is among them: without a guard it dies as well, of the gateway's own RST
    to a segment from outside that it has no translation for any more.  So does a masqueraded upload
    now and then, if an acknowledgement comes before the next segment; hence those rest meanwhile.
    """
    inside, other, masked = serve(PORT), serve(OTHER), serve(MASKED)
    masked.masked = True
    outside = [Outward(lab, port) for port in (BEHIND, PLAIN)]
    address = source(False)
    busy = {
        "upload": inside.connect(address),
        "download": turned(inside.connect(address)),
        "unprotected upload": other.connect(address),
        "unprotected download": turned(other.connect(address)),
        "outward upload": outside[1].reach(),
        "outward download": turned(outside[1].reach()),
    }
    idle = {
        "idle": inside.connect(address),
        "its server goes on": turned(inside.connect(address)),
        "unprotected": other.connect(address),
        "masqueraded inward": masked.connect(address),
        "masqueraded": outside[0].reach(),
    }
    for link in (*busy.values(), *idle.values()):
        link.talk()
    try:
        yield busy, idle
    finally:
        for one in outside:
            one.close()


@pytest.mark.parametrize("drops", [False, True], ids=["", "INVALID-dropped"])
@pytest.mark.parametrize("forgets", FORGETTING)
def test_mixed_traffic_goes_on(
    lab: ThreeHosts, serve: Open, way: Guard | None, forgets: str, drops: bool
) -> None:
    firewall = invalid_dropped(lab) if drops else contextlib.nullcontext()
    before = harmed(way) if way else {}
    with masks(lab), firewall, mixed(lab, serve) as (busy, idle):
        fresh = serve(QUIET)
        with streams(busy) as running:
            assert kept(running) == {}
            for _ in range(2):
                FORGETTING[forgets](lab)
                assert kept(running) == {}
                fresh.connect(source(False)).talk()
            if way and forgets == "flush":
                wait_until(lambda: is_adopted(lab, busy["upload"]))
        for link in idle.values():
            link.talk()
    if way:
        assert harmed(way) == before


@pytest.mark.parametrize("loose", ["0", "1"])
@pytest.mark.parametrize("liberal", ["0", "1"])
def test_the_trackers_settings_are_the_administrators(
    lab: ThreeHosts, guard: Guard, serve: Open, loose: str, liberal: str
) -> None:
    names = {"tcp_loose": loose, "tcp_be_liberal": liberal}
    files = {f"net/netfilter/nf_conntrack_{name}": value for name, value in names.items()}
    lab.set("gateway", files)
    try:
        address, before = source(False), harmed(guard)
        upload = serve(PORT).connect(address)
        upload.talk()
        with streams({"upload": upload}) as running:
            flush(lab)
            assert kept(running) == {}
        wait_until(lambda: not guard.status()["missing"])
        with lab.inside("gateway"):
            for file, value in files.items():
                assert Path("/proc/sys", file).read_text().strip() == value
        assert harmed(guard) == before
    finally:
        for file, value in zip(files, "10", strict=True):
            lab.set("gateway", {file: value})


def test_many_connections_of_one_source_at_once_are_no_offence(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    service, address, before = serve(PORT), source(False), harmed(guard)
    links = [service.connect(address) for _ in range(35)]
    flush(lab)
    for link in links:
        link.talk()
    wait_until(lambda: all(is_adopted(lab, link) for link in links))
    service.connect(address).talk()
    assert harmed(guard) == before
    told = guard.ask("explain", source=address)
    assert told["adopted"] == 35
    assert "35 of them were forgotten" in guard.cli("policy", "explain", address).stdout
    wait_until(lambda: guard.status()["forgotten"]["adopted"] >= 35)


def test_an_adopted_connection_is_under_the_rules(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    link = serve(QUIET).connect(source(False))
    flush(lab)
    link.server.sendall(b".")  # it speaks first: the entry is the wrong way round, and left alone
    link.client.settimeout(5)
    assert link.client.recv(1) == b"."
    link.client.sendall(b"?")
    assert link.server.recv(1) == b"?"
    assert entry(lab, link) is None
    flush(lab)
    link.client.sendall(b"!")
    wait_until(lambda: is_adopted(lab, link))
    link.wait_reset()


def test_strays_that_nobody_answers_count(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    service, address = serve(PORT), source(False)
    service.connect(source(False)).talk()  # it is known as a server, and live
    segments(lab, address, SERVER4, PORT, "A", 40)
    assert guard.block_of(address) is None
    ports = iter(range(21_000, 60_000, 30))

    def blocked() -> bool:
        segments(lab, address, SERVER4, PORT, "A", 30, next(ports))
        return guard.block_of(address) is not None

    wait_until(blocked, 20)


def test_an_upload_is_kept_during_a_flood_of_strays(
    lab: ThreeHosts, serve: Open, way: Guard | None, tmp_path: Path
) -> None:
    upload = serve(PORT).connect(source(False))
    upload.talk()
    with (
        strays(lab, tmp_path, PORT, "33,drnd(3)"),
        streams({"upload": upload}) as running,
    ):
        if way:
            dropped = way.status()["forgotten"]["dropped"]
            wait_until(lambda: way.status()["forgotten"]["dropped"] > dropped + 20_000, 20)
        for forget in FORGETTING.values():
            forget(lab)
            assert kept(running) == {}
        if way:
            with lab.inside("gateway"), Conntrack() as table:
                assert table.count() < 262_144 / 1200 * 20


@pytest.mark.parametrize("drops", [False, True], ids=["", "INVALID-dropped"])
def test_what_goes_on_is_kept_while_its_service_is_over_budget(
    lab: ThreeHosts, guard: Guard, serve: Open, drops: bool
) -> None:
    firewall = invalid_dropped(lab) if drops else contextlib.nullcontext()
    service: Service = serve(BUDGET)
    wait_until(lambda: not engaged(guard, service), 30)  # what a cookie begins, no entry outlives
    address, before = source(False), harmed(guard)
    upload, download, idle = (service.connect(address) for _ in range(3))
    for link in (upload, download, idle):
        link.talk()
    wait_until(lambda: state_of(guard, service) is not None)
    busy = {"upload": upload, "download": turned(download)}
    with firewall, over_budget(lab, guard, service), streams(busy) as running:
        for forget in FORGETTING.values():
            forget(lab)
            assert kept(running) == {}
            idle.talk()
            service.connect(address).talk()
    assert harmed(guard)["reset"] == before["reset"]
