"""The table of nf_tables: made, compared, taken away; and what it does to marks."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.kernel import KernelError, clearing, ipset, nftables
from rstguard.kernel.clearing import Place
from rstguard.kernel.command import run
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.footprint import Footprint
from rstguard.kernel.linux import Linux
from rstguard.kernel.marks import Labels, Marks
from rstguard.kernel.names import PREFIX
from rstguard.kernel.seam import Kernel
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse

pytestmark = pytest.mark.netns

PORT = 8000
MARKS = Marks(0x0FF00000)
OTHER = Place(Marks(), ("lo",))
PLACE = Place(MARKS, ("lo",), Labels())

LINUX = Linux()


@pytest.fixture
def table(own_namespace: None) -> Iterator[None]:
    run(["ip", "link", "set", "lo", "up"])
    clearing.apply(LINUX, PLACE)
    yield
    clearing.remove(LINUX)


def test_it_comes_and_goes(own_namespace: None) -> None:
    assert len(clearing.missing(LINUX, PLACE)) == 2
    clearing.trial()
    assert len(clearing.missing(LINUX, PLACE)) == 2
    clearing.apply(LINUX, PLACE)
    assert clearing.missing(LINUX, PLACE) == []
    assert len(clearing.missing(LINUX, OTHER)) == 2  # other bits are another table
    clearing.apply(LINUX, OTHER)
    assert clearing.missing(LINUX, OTHER) == []
    assert clearing.remove(LINUX)
    assert not clearing.remove(LINUX)


def test_one_that_is_as_it_should_be_is_left_alone(
    table: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nftables, "replace", None)
    clearing.apply(LINUX, PLACE)


def test_what_the_kernel_lacks_is_told(own_namespace: None) -> None:
    unknown = nftables.Rule("unknown", nftables.has_any(nftables.Field("nothing", 1), 1))
    chain = nftables.Chain("prerouting", 0, -149, "filter", (unknown,))
    with pytest.raises(KernelError, match="the kernel has no nf_tables, or lacks a part of it"):
        nftables.replace(PREFIX, [chain])
    assert nftables.comments(PREFIX) == {}


def marked(on_packet: int, on_connection: int) -> tuple[int, int]:
    """Send a segment with a mark on it and on its connection; return what became of both."""
    mangle = ["iptables", "-w", "-t", "mangle"]
    for chain in ("PREROUTING", "INPUT"):
        run([*mangle, "-F", chain])
    before = ("PREROUTING", "-p", "tcp", "--dport", str(PORT), "-j")
    run([*mangle, "-A", *before, "CONNMARK", "--set-xmark", f"{on_connection:#x}"])
    run([*mangle, "-A", *before, "MARK", "--set-xmark", f"{on_packet:#x}"])
    for bit in range(32):
        match = (
            "-p",
            "tcp",
            "--dport",
            str(PORT),
            "-m",
            "mark",
            "--mark",
            f"{1 << bit}/{1 << bit}",
        )
        run([*mangle, "-A", "INPUT", *match])
    with (
        socket.create_server(("127.0.0.1", PORT)) as listener,
        socket.create_connection(("127.0.0.1", PORT)),
        listener.accept()[0],
        Conntrack() as connections,
    ):
        (flow,) = connections.dump()
    seen = run(["iptables-save", "-c", "-t", "mangle"]).splitlines()
    counts = [line for line in seen if " -A INPUT " in line]
    packet = sum(1 << bit for bit, line in enumerate(counts) if not line.startswith("[0:"))
    run(["conntrack", "-F"])
    return packet, flow.mark


GUARDED, PROVEN, TRUSTED = (bits.value for bits in (MARKS.guarded, MARKS.proven, MARKS.trusted))


@pytest.mark.parametrize(
    ("packet", "connection", "packet_after", "connection_after"),
    [
        pytest.param(0x5, 0x6, 0x5, 0x6, id="marks of others"),
        pytest.param(MARKS.mask | 5, 6, MARKS.mask | 5, 6, id="our bits, a stranger's connection"),
        pytest.param(MARKS.trust.value | 5, PROVEN | 6, 5, TRUSTED | 6, id="trust"),
        pytest.param(MARKS.trust.value, GUARDED, 0, GUARDED, id="no trust without proof"),
        pytest.param(
            MARKS.condemned_source.value | 5, GUARDED, 5, GUARDED | MARKS.condemned_source.value,
            id="condemned",
        ),
        pytest.param(MARKS.to_queue_known.value | 5, PROVEN, 5, PROVEN, id="known, and not read"),
        pytest.param(
            MARKS.condemned.value | MARKS.held.value, GUARDED, 0, GUARDED, id="no verdict of ours",
        ),
        pytest.param(PROVEN | 5, PROVEN | 5, 5, PROVEN | 5, id="copied from the connection"),
        pytest.param(MARKS.to_queue_stray.value | 5, 6, 5, 6, id="a stray, and not read"),
    ],
)  # fmt: skip
def test_marks(
    table: None, packet: int, connection: int, packet_after: int, connection_after: int
) -> None:
    found_packet, found_connection = marked(packet, connection)
    # Later segments of the same connection bear the mark as well, in the state ESTABLISHED.
    if packet & MARKS.mask == MARKS.to_queue_stray.value:
        assert found_packet & ~MARKS.mask == packet_after
    else:
        assert found_packet == packet_after
    assert found_connection == connection_after


def test_a_kernel_without_it_is_guarded_all_the_same_and_told_once(
    own_namespace: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused(_: Kernel, __: Place) -> None:
        raise KernelError("the kernel has no nf_tables")

    text = "version: 1\nprotect: {interfaces: [lo]}\nrules: []\n"
    ruleset = compile_policy(parse(text, "policy.yaml").policy)
    footprint = Footprint(LINUX, tmp_path, range(7, 8))
    ipset.apply(LINUX, ruleset)
    with monkeypatch.context() as without:
        without.setattr(clearing, "apply", refused)
        for _ in range(2):
            footprint.divert(ruleset)
            assert footprint.lost(ruleset) == []
        (said,) = caplog.messages
    assert "every `ip rule` with a fwmark needs a mask without 0xff000000" in said
    footprint.divert(ruleset)
    assert footprint.lost(ruleset) == []
    assert clearing.remove(LINUX)
    assert len(footprint.lost(ruleset)) == 2
    footprint.restore(ruleset)
    assert footprint.lost(ruleset) == []
    assert footprint.withdraw()
    assert not clearing.remove(LINUX)
