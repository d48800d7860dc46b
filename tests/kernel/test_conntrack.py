"""The connection table of a real gateway: read, marked, counted."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.flow import Flow, TcpState
from rstguard.engine.listed import Listed
from rstguard.engine.table import Table
from rstguard.kernel import entry
from rstguard.kernel.conntrack import GONE, Conntrack
from rstguard.kernel.marks import Labels
from rstguard.kernel.netlink import Netlink, Request
from rstguard.lab.waiting import wait_until
from tests.support.network import CLIENT4, CLIENT6, SERVER4, SERVER6, ThreeHosts
from tests.support.traffic import segments

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def lab() -> Iterator[ThreeHosts]:
    with ThreeHosts("rgb") as lab:
        yield lab


@pytest.fixture
def table(lab: ThreeHosts) -> Iterator[Conntrack]:
    with lab.inside("gateway"), Conntrack() as table:
        yield table


@pytest.fixture
def pair(lab: ThreeHosts) -> Iterator[dict[str, socket.socket]]:
    """One IPv4 and one IPv6 connection from client to server."""
    sockets: dict[str, socket.socket] = {}
    for name, address, v6 in (("4", SERVER4, False), ("6", SERVER6, True)):
        sockets[f"listen{name}"] = lab.listen("server", 8000, v6)
        sockets[f"client{name}"] = lab.connect("client", address, 8000)
        sockets[f"server{name}"] = sockets[f"listen{name}"].accept()[0]
    yield sockets
    for one in sockets.values():
        one.close()
    lab.run("gateway", "conntrack", "-F")


def by_family(flows: Iterator[Flow]) -> dict[int, Flow]:
    found = {entry.family_of(flow.original): flow for flow in flows}
    return dict(sorted(found.items()))


def test_a_dump_shows_both_families(table: Conntrack, pair: dict[str, socket.socket]) -> None:
    pair["client4"].sendall(b"x" * 1000)
    pair["server4"].recv(1000, socket.MSG_WAITALL)
    flows = by_family(table.dump())
    for name, flow, client, server in (
        ("4", flows[socket.AF_INET], CLIENT4, SERVER4),
        ("6", flows[socket.AF_INET6], CLIENT6, SERVER6),
    ):
        port = pair[f"client{name}"].getsockname()[1]
        assert flow.original == (parse_address(client), parse_address(server), port, 8000)
        assert flow.reply == (parse_address(server), parse_address(client), 8000, port)
        assert flow.state == TcpState.ESTABLISHED
        assert flow.seen_reply
        assert (flow.mark, flow.zone) == (0, 0)
        assert 0 <= flow.age < 60_000_000_000
        assert 0 < flow.timeout <= 432_000
        assert flow.client_packets >= 2
        assert flow.server_bytes >= 60
    assert flows[socket.AF_INET].client_bytes > 1000


def test_age_is_measured_against_the_clock_that_is_given(
    table: Conntrack, pair: dict[str, socket.socket]
) -> None:
    assert pair
    ages = [flow.age for now in (1, 1 << 62) for flow in table.dump(now_ns=now)]
    assert ages[:2] == [0, 0]
    assert min(ages[2:]) > 1 << 61


def test_the_kernel_filters_by_family_and_mark(
    table: Conntrack, pair: dict[str, socket.socket]
) -> None:
    assert pair
    flows = by_family(table.dump())
    assert list(by_family(table.dump(family=socket.AF_INET6))) == [socket.AF_INET6]
    assert table.set_mark([flows[socket.AF_INET]], 0x08000000, 0x18000000) == [0]
    assert list(by_family(table.dump(0x08000000, 0x18000000))) == [socket.AF_INET]
    assert list(by_family(table.dump(0, 0x18000000))) == [socket.AF_INET6]


@pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "no-numpy"])
def test_a_sweep_is_given_what_a_dump_shows(
    lab: ThreeHosts,
    pair: dict[str, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    numpy: bool,
) -> None:
    assert pair
    if numpy:
        columns: type[Table] = pytest.importorskip("rstguard.engine.columns").Columns
    else:
        monkeypatch.setitem(sys.modules, "rstguard.kernel.columns", None)
        columns = Listed
    with lab.inside("gateway"), Conntrack(columns=True) as table:
        assert table.set_mark(list(table.dump()), 0x08001234, 0x0800FFFF) == [0, 0]
        made = "-I -p tcp -s 10.9.0.1 -d 10.9.0.2 --sport {port} --dport 80 --state {state} -t 99"
        lines = (
            made.format(port=port, state=("ESTABLISHED", "TIME_WAIT")[port & 1]) + f" -m {port}\n"
            for port in range(1, 4001)
        )
        (lab.directory / "entries").write_text("".join(lines))
        lab.run("gateway", "conntrack", "-R", str(lab.directory / "entries"))
        for mark, mask in ((0, 0), (0x08000000, 0x18000000), (1, 1), (1 << 31, 1 << 31)):
            found = table.whole(mark, mask)
            assert isinstance(found, columns)
            shown = list(table.dump(mark, mask))
            assert len(found) == len(shown)
            # Time goes on between the two.
            same = [f._replace(age=0, timeout=0) for f in found.flows()]
            assert same == [f._replace(age=0, timeout=0) for f in shown]
            for one, later in zip(found.flows(), shown, strict=True):
                assert 0 <= one.age <= later.age < one.age + 60_000_000_000
        assert len(table.whole(0, 0)) == 4002


def test_what_never_was_established_can_be_left_out(
    lab: ThreeHosts, table: Conntrack, pair: dict[str, socket.socket]
) -> None:
    with lab.inside("client"):
        lost = socket.socket()
        lost.setblocking(False)
        lost.connect_ex(("10.71.2.99", 8000))  # nobody is there to answer
    wait_until(lambda: len(list(table.dump())) == 3)
    assert {flow.state for flow in table.dump(assured=True)} == {TcpState.ESTABLISHED}
    assert len(list(table.dump(assured=True))) == 2
    lost.close()


def test_other_bits_of_a_mark_stay(
    lab: ThreeHosts, table: Conntrack, pair: dict[str, socket.socket]
) -> None:
    assert pair
    flows = list(table.dump())
    assert table.set_mark(flows, 0x1234, 0xFFFFFFFF) == [0, 0]
    assert table.set_mark(flows, 0x18000000, 0x38000000) == [0, 0]
    assert table.set_mark(flows, 0x20000000, 0x30000000) == [0, 0]
    assert {flow.mark for flow in table.dump()} == {0x28001234}
    assert f"mark={0x28001234}" in lab.run("gateway", "conntrack", "-L", "-p", "tcp")


def test_bits_outside_the_mask_are_a_mistake(
    table: Conntrack, pair: dict[str, socket.socket]
) -> None:
    assert pair
    with pytest.raises(ValueError, match="outside mask"):
        table.set_mark(list(table.dump()), 3, 1)


def test_what_is_gone_is_told_from_what_is_there(
    table: Conntrack, pair: dict[str, socket.socket]
) -> None:
    assert pair
    flows = list(by_family(table.dump()).values())
    stranger = flows[0]._replace(original=flows[0].original._replace(source_port=1))
    asked = [flows[0], stranger, flows[1]]
    assert table.set_mark(asked, 1, 1) == [0, GONE, 0]
    found = table.read(asked)
    assert [flow and flow.ident for flow in found] == [flows[0].ident, None, flows[1].ident]
    assert [flow and flow.mark for flow in found] == [1, None, 1]


def test_many_questions_are_answered_in_order(
    table: Conntrack, pair: dict[str, socket.socket]
) -> None:
    assert pair
    flow = next(table.dump(family=socket.AF_INET))
    stranger = flow._replace(original=flow.original._replace(source_port=1))
    asked = [flow, stranger, stranger] * 500
    assert [found is not None for found in table.read(asked)] == [True, False, False] * 500
    assert table.set_mark(asked, 2, 2) == [0, GONE, GONE] * 500


def test_delete_takes_only_the_connection_that_was_meant(
    table: Conntrack, pair: dict[str, socket.socket]
) -> None:
    assert pair
    flow = next(table.dump(family=socket.AF_INET))
    before = table.count()
    assert table.delete([flow._replace(ident=flow.ident ^ 1)]) == [GONE]
    assert table.delete([flow]) == [0]
    assert table.delete([flow]) == [GONE]
    assert table.count() == before - 1


def test_other_protocols_are_left_out(lab: ThreeHosts, table: Conntrack) -> None:
    with lab.inside("client"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", (SERVER4, 9))
    assert table.count() >= 1
    assert list(table.dump()) == []


def test_connections_in_a_zone_keep_their_name(lab: ThreeHosts, table: Conntrack) -> None:
    rule = ("-p", "tcp", "--dport", "8001", "-j", "CT", "--zone", "5")
    for where in ("PREROUTING", "OUTPUT"):
        lab.run("gateway", "iptables", "-w", "-t", "raw", "-A", where, *rule)
    with lab.listen("gateway", 8001):
        try:
            with lab.connect("client", "10.71.1.1", 8001):
                flow = next(found for found in table.dump() if found.zone)
                assert flow.zone == 5
                assert table.set_mark([flow, flow._replace(zone=0)], 4, 4) == [0, GONE]
                again = table.read([flow])[0]
                assert again is not None
                assert again.mark == 4
        finally:
            lab.run("gateway", "iptables", "-w", "-t", "raw", "-F")


def test_the_quick_reader_agrees_with_the_attribute_walker(
    lab: ThreeHosts, pair: dict[str, socket.socket]
) -> None:
    assert pair

    def age(began: int) -> int:
        return max((1 << 62) - began, 0)

    reader = entry.Reader(age)
    seen = 0
    for family in (socket.AF_INET, socket.AF_INET6):
        with lab.inside("gateway"):
            netlink = Netlink()
        for chunk, spans in netlink.dump(Request(0x101, family, entry.tcp_only())):
            for start, end in spans:
                walked = entry.flow_of(entry.fields(chunk, start, end), age)
                assert reader.flow(chunk, start, end) == walked
                seen += 1
        netlink.close()
    assert seen >= 2


def test_errors_have_their_usual_numbers() -> None:
    assert errno.ENOENT == GONE


def test_a_dump_that_is_broken_off_leaves_room_for_the_next(
    lab: ThreeHosts, table: Conntrack
) -> None:
    """A confined process has no other socket to dump by, and each does one dump at a time."""
    segments(lab, CLIENT4, "10.71.2.99", 9, "S", 2000)  # where nobody answers
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        next(begun := table.dump())
        begun.close()  # type: ignore[attr-defined]
        with contextlib.suppress(ZeroDivisionError):
            for _ in table.dump():
                raise ZeroDivisionError
        assert len(list(table.dump())) >= 2000
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    lab.run("gateway", "conntrack", "-F")


def test_two_dumps_at_once(table: Conntrack, pair: dict[str, socket.socket]) -> None:
    both = list(zip(table.dump(), table.dump(), strict=True))
    assert len(both) >= 2
    assert all(one.original == other.original for one, other in both)


def test_labels_are_set_by_a_rule_and_cleared_by_netlink(lab: ThreeHosts, table: Conntrack) -> None:
    """The older connection has no room for labels: what must work for it can be no label."""
    label = Labels().adopted
    with (
        lab.listen("server", 8001) as listener,
        lab.connect("client", SERVER4, 8001) as older,
        listener.accept()[0],
    ):
        rule = (
            *("-t", "mangle", "PREROUTING", "-p", "tcp", "--dport", "8001"),
            *("-m", "connlabel", "--label", str(label), "--set"),
        )
        place = rule.index("PREROUTING")
        lab.run("gateway", "iptables", "-w", *rule[:place], "-A", *rule[place:])
        try:
            with lab.connect("client", SERVER4, 8001) as newer, listener.accept()[0]:
                older.sendall(b"x")
                found = {flow.original.source_port: flow for flow in table.dump()}
                old, new = (found[one.getsockname()[1]] for one in (older, newer))
                assert (old.labels, new.labels) == (0, 1 << label)
                assert table.set_labels([old, new], 3, 3 | 1 << label) == [errno.ENOSPC, 0]
                again = table.read([old, new])
                assert [flow and flow.labels for flow in again] == [0, 3]
        finally:
            lab.run("gateway", "iptables", "-w", *rule[:place], "-D", *rule[place:])
    lab.run("gateway", "conntrack", "-F")
