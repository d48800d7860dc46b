"""Footprint, sets, chains and sysctls against a kernel that only remembers: no root needed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rstguard.engine.address import parse_address, parse_prefix
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.offers import Offer
from rstguard.engine.ruleset import SECOND, RuleSet
from rstguard.engine.service import Service
from rstguard.kernel import Full, InUse, KernelError, NotPermitted, NotThere, sysctl
from rstguard.kernel.conntrack import GONE
from rstguard.kernel.elements import Element
from rstguard.kernel.footprint import RECORD_NAME, Footprint
from rstguard.kernel.linux import Linux
from rstguard.kernel.marks import Marks
from rstguard.kernel.seam import Kernel
from rstguard.kernel.sysctl import Outcome
from rstguard.policy.compile import compile_policy
from rstguard.policy.model import Policy
from tests.support.fake_kernel import FakeKernel

QUEUES = range(5640, 5642)
ACCT = "net.netfilter.nf_conntrack_acct"
STAMP = "net.netfilter.nf_conntrack_timestamp"
MINUTE = 60
SERVICE = Service(parse_address("203.0.113.10"), 80)
OFFER = Offer(1460, 7, sack=True, timestamps=True)


def ruleset(name: str = "web", **changes: object) -> RuleSet:
    policy = {
        "version": 1,
        "name": name,
        "protect": {"interfaces": ["eth0"], "ports": [80, 443]},
        "trusted": ["10.0.0.0/8", "fd00::/8"],
        "rules": [{"name": "r", "measure": "syn_rate", "over": "9/s", "then": "ban", "for": "1h"}],
        "offload": "never",
        **changes,
    }
    return compile_policy(Policy.model_validate(policy))


WEB = ruleset()
BUDGET = ruleset(syn_budget={"rate": "300/s"})
OTHER = ruleset("other", trusted=["192.0.2.0/24"], blocking="reset")


class Time:
    """A clock that is set by hand, in nanoseconds."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def kernel(clock: Time) -> FakeKernel:
    return FakeKernel(clock)


@pytest.fixture
def footprint(kernel: FakeKernel, tmp_path: Path) -> Footprint:
    return Footprint(kernel, tmp_path, QUEUES)


def everything(kernel: FakeKernel) -> tuple[str, str, str]:
    rules4, rules6 = kernel.run_each([["iptables-save"], ["ip6tables-save"]])
    return rules4, rules6, kernel.run(["ipset", "save"])


def rules(kernel: FakeKernel) -> list[str]:
    return [rule for family in (4, 6) for rule in kernel.iptables[family].rules()]


def ban(source: str, seconds: int | None = MINUTE) -> Element:
    return Element(parse_prefix(source), "ban", "r", seconds)


def test_both_kernels_are_kernels() -> None:
    kernels: list[Kernel] = [Linux(), FakeKernel()]
    assert kernels


# Footprint: made, checked, restored, undone


def test_a_guard_comes_up_and_leaves_nothing_behind(
    footprint: Footprint, kernel: FakeKernel, tmp_path: Path
) -> None:
    before = dict(kernel.sysctls)
    footprint.prepare(WEB)
    footprint.divert(WEB)
    assert footprint.lost(WEB) == []
    assert all(kernel.sysctls[name] == before[name] for name in sysctl.FORMER)
    done = footprint.remove()
    assert rules(kernel) == []
    assert kernel.ipsets.names == []
    assert kernel.sysctls == before
    assert not (tmp_path / RECORD_NAME).exists()
    assert done[0] == "chains and jumps removed"
    assert footprint.remove() == []


def test_a_kernel_without_cookies_drops_what_is_shunned(
    footprint: Footprint, kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    footprint.prepare(WEB)
    footprint.known = {SERVICE: OFFER}
    kernel.faults.fail("run", KernelError("no SYNPROXY"), None, naming="SYNPROXY")
    for _ in range(2):
        footprint.divert(WEB)
    assert footprint.no_cookies.startswith("no SYNPROXY; ")
    warnings = [one.message for one in caplog.records if "not challenged" in one.message]
    assert len(warnings) == 1
    assert any("rstguard-shun4" in rule and rule.endswith("-j DROP") for rule in rules(kernel))
    assert footprint.lost(WEB) == []
    with pytest.raises(KernelError):
        footprint.divert(BUDGET)
    kernel.faults.clear()
    footprint.divert(WEB)
    assert footprint.no_cookies == ""


def test_bans_stay_if_asked(footprint: Footprint, kernel: FakeKernel) -> None:
    footprint.prepare(WEB)
    with kernel.sets() as sets:
        sets.add([ban("192.0.2.1"), ban("2001:db8::/64")])
        footprint.remove(keep_bans=True)
        assert {element.source for element in sets.list()} == {
            parse_prefix("192.0.2.1"),
            parse_prefix("2001:db8::/64"),
        }


def test_what_others_take_away_is_named_and_put_back(
    footprint: Footprint, kernel: FakeKernel
) -> None:
    footprint.prepare(WEB)
    footprint.divert(WEB)
    before = everything(kernel)
    assert kernel.delete_jump(4, "raw", "PREROUTING")
    kernel.insert_rule_before(6, "filter", "INPUT", "-j ACCEPT")
    kernel.run(["ipset", "flush", "rstguard-ports"])
    assert footprint.lost(WEB) == [
        "the jump from raw PREROUTING (IPv4)",
        "the place of the jump from filter INPUT (IPv6), which is to come first",
        "what the set rstguard-ports holds",
    ]
    kernel.flush_all()
    assert rules(kernel) == []
    footprint.restore(WEB)
    assert footprint.lost(WEB) == []
    assert everything(kernel) == before


def test_a_rule_that_another_program_changed_is_found(
    footprint: Footprint, kernel: FakeKernel
) -> None:
    footprint.prepare(WEB)
    footprint.divert(WEB)
    kernel.run(["iptables", "-t", "mangle", "-R", "rstguard-in", "1", "-j", "ACCEPT"])
    assert footprint.lost(WEB) == ["what the chain rstguard-in in mangle says (IPv4)"]
    footprint.restore(WEB)
    assert footprint.lost(WEB) == []


def test_a_set_that_rules_use_cannot_be_destroyed_by_others(
    footprint: Footprint, kernel: FakeKernel
) -> None:
    footprint.prepare(WEB)
    footprint.divert(WEB)
    with pytest.raises(InUse):
        kernel.destroy_set("rstguard-ban4")
    footprint.withdraw()
    kernel.destroy_set("rstguard-ban4")
    assert footprint.lost(WEB)[-1] == "the set rstguard-ban4"


def test_offers_that_were_learned_change_the_rules(
    footprint: Footprint, kernel: FakeKernel
) -> None:
    footprint.prepare(BUDGET)
    footprint.divert(BUDGET)
    assert not any("SYNPROXY" in rule for rule in rules(kernel))
    service = Service(parse_address("192.0.2.1"), 80)
    footprint.known = {service: Offer(1460, 7, sack=True, timestamps=True)}
    footprint.divert(BUDGET)
    proxy, _give = (rule for rule in rules(kernel) if "SYNPROXY" in rule)
    assert proxy.endswith("SYNPROXY --sack-perm --timestamp --wscale 7 --mss 1460")
    assert footprint.lost(BUDGET) == []


def test_sets_of_a_guard_that_was_killed_go_with_the_next_start(
    footprint: Footprint, kernel: FakeKernel
) -> None:
    footprint.prepare(WEB)
    footprint.divert(WEB)
    before = everything(kernel)
    footprint.replace(WEB, BUDGET)
    assert any("engaged" in name for name in kernel.ipsets.names)
    footprint.prepare(WEB)  # the next guard: the policy was never confirmed
    footprint.divert(WEB)
    assert everything(kernel) == before


def test_a_set_that_a_rule_of_others_uses_stops_no_policy(
    footprint: Footprint, kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    footprint.prepare(BUDGET)
    footprint.divert(BUDGET)
    rule = "-A FORWARD -m set --match-set rstguard-engaged4 dst,dst -j RETURN"
    kernel.run(["iptables-restore", "--noflush", "-w"], f"*filter\n{rule}\nCOMMIT\n")
    without = ruleset(syn_budget="off")
    footprint.replace(BUDGET, without)
    assert footprint.lost(without) == []
    assert "could not be removed" in caplog.text


def test_who_takes_the_rules_away_at_the_same_time_is_no_trouble(
    footprint: Footprint, kernel: FakeKernel
) -> None:
    footprint.prepare(WEB)
    footprint.divert(WEB)
    kernel.faults.fail("run", naming="ip6tables-restore", times=1, after=True)
    assert footprint.withdraw()
    assert not footprint.withdraw()


# A change of policy that fails


@pytest.mark.parametrize("naming", ["iptables-restore", "ip6tables-restore", "ipset restore"])
def test_where_a_change_fails_the_old_policy_is_in_force(
    footprint: Footprint, kernel: FakeKernel, naming: str
) -> None:
    footprint.prepare(WEB)
    footprint.divert(WEB)
    before = everything(kernel)
    kernel.faults.fail("run", naming=naming, times=2)  # once more without challenges
    with pytest.raises(KernelError, match="a fault of the test"):
        footprint.replace(WEB, OTHER)
    kernel.faults.clear()
    footprint.restore(WEB)
    assert footprint.lost(WEB) == []
    assert everything(kernel) == before
    footprint.replace(WEB, OTHER)
    assert footprint.lost(OTHER) == []


def test_what_was_done_though_the_answer_was_lost_is_undone(
    footprint: Footprint, kernel: FakeKernel
) -> None:
    footprint.prepare(WEB)
    footprint.divert(WEB)
    before = everything(kernel)[:2]
    kernel.faults.fail("run", naming="iptables-restore", times=2, after=True)
    with pytest.raises(KernelError):
        footprint.replace(WEB, OTHER)
    assert everything(kernel)[:2] == before


def test_every_part_is_undone_even_if_another_fails(
    footprint: Footprint, kernel: FakeKernel
) -> None:
    footprint.prepare(WEB)
    footprint.divert(WEB)
    kernel.faults.fail("run", NotPermitted("no rules today"), None, naming="iptables-restore")
    with pytest.raises(KernelError, match=r"no rules today.*; the set \S+ is still matched on"):
        footprint.remove()
    assert kernel.sysctls[ACCT] == "0"
    kernel.faults.clear()
    footprint.remove()
    assert kernel.ipsets.names == []


def test_a_rule_of_others_on_one_of_our_sets_is_waited_for_but_not_for_ever(
    footprint: Footprint, kernel: FakeKernel
) -> None:
    footprint.prepare(WEB)
    match = "-m set --match-set rstguard-ban4 src -j DROP"
    kernel.insert_rule_before(4, "filter", "INPUT", match)
    began = time.monotonic()
    with pytest.raises(KernelError, match=r"rstguard-ban4 is still matched on.*not rstguard's"):
        footprint.remove()
    assert sum(kernel.pauses) == pytest.approx(2)
    assert time.monotonic() - began < 1  # it is the kernel's time that passes


# Sysctls


def test_a_sysctl_that_the_kernel_no_longer_has_is_told(kernel: FakeKernel, tmp_path: Path) -> None:
    record = tmp_path / RECORD_NAME
    sysctl.apply(kernel, {ACCT: "1", STAMP: "1"}, record)
    del kernel.sysctls[ACCT]
    gone, restored = sysctl.restore(kernel, record)
    assert gone.outcome is Outcome.GONE
    assert restored.outcome is Outcome.RESTORED


def test_a_sysctl_that_does_not_take_its_value_is_named(kernel: FakeKernel, tmp_path: Path) -> None:
    kernel.stubborn[ACCT] = "0"
    with pytest.raises(KernelError, match=f"{ACCT} did not take the value 1"):
        sysctl.apply(kernel, {ACCT: "1"}, tmp_path / RECORD_NAME)


def test_what_was_changed_before_a_refusal_is_in_the_record(
    kernel: FakeKernel, tmp_path: Path
) -> None:
    record = tmp_path / RECORD_NAME
    kernel.faults.fail("write_sysctl", naming=STAMP)
    with pytest.raises(KernelError):
        sysctl.apply(kernel, {ACCT: "1", STAMP: "1"}, record)
    assert kernel.sysctls[ACCT] == "1"
    assert json.loads(record.read_text())["sysctls"].keys() == {ACCT, STAMP}
    sysctl.restore(kernel, record)
    assert kernel.sysctls[ACCT] == "0"


# Sets


def test_elements_end_when_their_time_is_over(
    footprint: Footprint, kernel: FakeKernel, clock: Time
) -> None:
    footprint.prepare(WEB)
    with kernel.sets() as sets:
        sets.add([ban("192.0.2.1", 60), ban("192.0.2.2", None)])
        clock.now = 59 * SECOND
        assert sets.contains(parse_address("192.0.2.1"))
        assert [element.remaining for element in sets.list()] == [1, None]
        clock.now = 60 * SECOND
        assert not sets.contains(parse_address("192.0.2.1"))
        assert kernel.blocked_by_kind() == {"ban": 1, "shun": 0}


def test_a_longer_ban_stays_unless_it_is_to_be_shortened(
    footprint: Footprint, kernel: FakeKernel
) -> None:
    footprint.prepare(WEB)
    with kernel.sets() as sets:
        sets.add([ban("192.0.2.1", 500)])
        sets.add([ban("192.0.2.1", 50)])
        assert sets.list()[0].remaining == 500
        sets.add([ban("192.0.2.1", 50)], shorten=True)
        assert sets.list()[0].remaining == 50


def test_a_full_set_says_so_and_keeps_what_it_got(kernel: FakeKernel) -> None:
    create = "create rstguard-ban4 hash:net timeout 0 comment maxelem 2\n"
    kernel.run(["ipset", "restore"], create)
    with kernel.sets() as sets, pytest.raises(Full, match="is full: shorten the bans"):
        sets.add([ban(f"192.0.2.{number}") for number in range(1, 4)])
    assert kernel.ipsets.get("rstguard-ban4").is_full


def test_bans_survive_a_set_of_another_version(footprint: Footprint, kernel: FakeKernel) -> None:
    kernel.run(
        ["ipset", "restore"],
        "create rstguard-ban4 hash:net timeout 60 comment maxelem 1000\n"
        'add rstguard-ban4 192.0.2.0/24 timeout 500 comment "ban old-rule"\n'
        "create rstguard-shun4 hash:ip\n",
    )
    footprint.prepare(WEB)
    assert kernel.sets().list() == [ban("192.0.2.0/24", 500)._replace(rule="old-rule")]
    assert kernel.ipsets.get("rstguard-ban4").options["maxelem"] == "1048576"
    assert kernel.ipsets.get("rstguard-shun4").type == "hash:net"


def test_sets_that_are_not_there_are_named(kernel: FakeKernel) -> None:
    with kernel.sets() as sets:
        for ask in (sets.list, lambda: sets.add([ban("192.0.2.1")])):
            with pytest.raises(NotThere, match=r"rstguard-ban4|ipset save"):
                ask()
    with pytest.raises(NotThere):
        kernel.seconds_since_over()


def test_services_over_budget_are_read_from_the_sets(
    footprint: Footprint, kernel: FakeKernel, clock: Time
) -> None:
    footprint.prepare(ruleset(syn_budget={"rate": "300/s"}))
    kernel.run(["ipset", "add", "rstguard-engaged4", "192.0.2.1,tcp:80", "timeout", "60"])
    clock.now = 3 * SECOND
    service = Service(parse_address("192.0.2.1"), 80)
    assert kernel.seconds_since_over() == {service: 3}


# What only the fake has: connections, packets, processes


def flow(port: int = 1025, **changes: int) -> Flow:
    client, server = parse_address("192.0.2.1"), parse_address("203.0.113.1")
    original = Tuple(client, server, port, 80)
    reply = Tuple(server, client, 80, port)
    made = Flow(port, original, reply, TcpState.ESTABLISHED, 0, True, 1, 60, 1, 60, 0, 100, 0)
    return made._replace(**changes)  # type: ignore[arg-type]


def test_connections_are_found_marked_and_taken_out(kernel: FakeKernel) -> None:
    for one in (flow(1), flow(2, mark=0x11), flow(3, state=TcpState.SYN_SENT)):
        kernel.connections.put(one)
    with kernel.table() as table:
        assert [f.ident for f in table.dump(0x10, 0x10)] == [2]
        assert [f.ident for f in table.dump(0, 0x10, assured=True)] == [1]
        assert table.set_mark([flow(2), flow(9)], 0x20, 0x30) == [0, GONE]
        assert [f and f.mark for f in table.read([flow(2), flow(9)])] == [0x21, None]
        assert table.delete([flow(1, ident=77), flow(2)]) == [GONE, 0]
        assert table.count() == 2


def test_connections_grow_older(clock: Time) -> None:
    kernel = FakeKernel(wall=clock)
    kernel.connections.put(flow(1, age=5 * SECOND))
    kernel.connections.put(flow(2, age=-1))
    clock.now = 3 * SECOND
    assert [f.age for f in kernel.table().dump()] == [8 * SECOND, -1]


def test_a_queue_has_one_reader_and_owes_verdicts(kernel: FakeKernel) -> None:
    worker = kernel.process("worker")
    kernel.packets.take_queue(5640, "suricata (process 812)")
    with pytest.raises(InUse, match=r"queue 5640 is in use by another program, suricata"):
        worker.queue(5640, fail_open=True, marks=Marks())
    kernel.packets.free_queue(5640)
    queue = worker.queue(5640, fail_open=True, marks=Marks())
    for data in (b"one", b"two", b"three"):
        kernel.packets.queue(5640, data, mark=7)
    assert queue.fileno() in kernel.packets.readable()
    assert queue.receive(2, 0) == [(1, 7, b"one"), (2, 7, b"two")]
    assert kernel.queues()[5640].waiting == 3
    queue.give([(1, False, None), (2, True, 9)])
    worker.died()
    judged = [(one.packet, one.passed, one.mark) for one in kernel.packets.judged]
    assert judged == [(b"one", False, None), (b"two", True, 9), (b"three", False, None)]
    with pytest.raises(OSError, match="given up"):
        queue.receive(1, 0)
    assert kernel.queues() == {}


def test_packets_that_are_sent_can_be_answered(kernel: FakeKernel) -> None:
    log = kernel.packet_log(5640)

    def answer(packet: bytes) -> str:
        kernel.packets.log(5640, packet + b" seen")
        return "ENETUNREACH" if packet == b"lost" else ""

    kernel.packets.hook = answer
    with kernel.injector(Marks()) as injector:
        assert injector.send([b"one", b"lost"]) == 1
        assert injector.failed == {"ENETUNREACH": 1}
    assert kernel.packets.sent == [b"one"]
    assert log.receive() == [b"one seen", b"lost seen"]


def test_faults_meet_only_the_process_and_the_times_they_are_for(kernel: FakeKernel) -> None:
    one, other = kernel.process("one"), kernel.process("other")
    kernel.faults.fail("table.*", NotPermitted("not you"), 2, process="one")
    assert other.table().count() == 0
    for _ in range(2):
        with pytest.raises(NotPermitted, match="not you"):
            one.table().count()
    assert one.table().count() == 0


def test_an_observing_policy_needs_no_budget(footprint: Footprint, kernel: FakeKernel) -> None:
    footprint.prepare(replace(ruleset(syn_budget={"rate": "300/s"}), enforce=False))
    assert "rstguard-engaged4" not in kernel.ipsets.names


def test_after_the_end_nothing_comes_back(footprint: Footprint, kernel: FakeKernel) -> None:
    before = kernel.sysctls.copy()
    footprint.prepare(WEB)
    footprint.divert(WEB)
    footprint.end()
    late: tuple[Callable[[], object], ...] = (
        lambda: footprint.replace(WEB, OTHER),
        lambda: footprint.restore(WEB),
        lambda: footprint.divert(WEB),
        lambda: footprint.prepare(WEB),
    )
    for change in late:
        with pytest.raises(KernelError, match="stopping"):
            change()
    footprint.remove()
    assert not [name for name in kernel.ipsets.names if name.startswith("rstguard")]
    assert not rules(kernel)
    assert kernel.sysctls == before
