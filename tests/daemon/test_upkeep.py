"""Nobody is locked out, and what others take away comes back: with the real rules and commands."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.lab.waiting import wait_until
from rstguard.supervisor.contention import contention
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts
from tests.support.sources import ROUTER4, ROUTER6, source
from tests.support.traffic import Service, connect, services


def policy(name: str = "kept", rules: str = "", more: str = "") -> str:
    return f"""\
version: 1
name: {name}
{more}
protect: {{interfaces: [out]}}
rules:
  - {{name: rate, measure: connection_rate, over: 3/m, burst: 3, then: ban, for: 10m}}
  - {{name: many, measure: connections, over: 20, then: reset}}
{rules}"""


@pytest.fixture
def guard(lab: ThreeHosts, tmp_path: Path) -> Iterator[Guard]:
    with Guard(lab, policy(), tmp_path / "guard", workers=1) as guard:
        yield guard


# Pure parts


def test_the_first_losses_are_restored_at_once_and_then_less_and_less_often() -> None:
    backoff = contention()
    first = [(backoff.failed(float(now)), backoff.persists) for now in (0, 2, 4)]
    assert first == 3 * [(0, False)]
    waits = []
    now = 6.0
    for _ in range(10):
        waits.append(backoff.failed(now))
        assert backoff.persists
        now += waits[-1]
    assert waits == [4, 8, 16, 32, 64, 128, 256, 300, 300, 300]
    assert backoff.failed(now + 1000) == 0


# Protected addresses


@pytest.mark.netns
def test_own_addresses_and_next_hops_are_found_and_told(guard: Guard) -> None:
    found = {row["address"]: row["what"] for row in guard.status()["protected"]}
    assert found[ROUTER4] == found[ROUTER6] == "a next hop"
    assert "this host" in found.values()
    done = guard.cli("policy", "apply", str(guard.file))
    assert f"{ROUTER4} (a next hop)" in done.stdout
    refused = guard.cli("ban", "add", ROUTER4)
    assert refused.returncode == 1
    assert "is a next hop, which is never banned" in refused.stderr


@pytest.mark.netns
def test_a_lifeline_is_neither_banned_nor_reset_and_others_are(
    guard: Guard, lab: ThreeHosts
) -> None:
    with services(service := Service(lab, 8080)):
        links = [service.connect(ROUTER4) for _ in range(6)]
        done = guard.cli("ban", "add", f"{ROUTER4.rpartition('.')[0]}.0/24")
        assert f"but {ROUTER4} is a next hop, which is never banned" in done.stdout
        for link in links:
            link.talk()
        service.connect(ROUTER4).talk()
        stranger = source(False)
        for _ in range(4):
            with contextlib.suppress(OSError):
                service.connect(stranger, timeout=0.3)
        wait_until(lambda: guard.block_of(stranger) is not None)
        assert guard.block_of(ROUTER4) is None


@pytest.mark.netns
def test_who_applies_a_policy_over_ssh_is_protected(guard: Guard, lab: ThreeHosts) -> None:
    mine = source(False)
    environment = {**os.environ, "SSH_CONNECTION": f"{mine} 50000 {SERVER4} 22"}
    environment["RSTGUARD_RUNTIME_DIR"] = str(guard.runtime)
    command = lab.command("gateway", *guard_words())
    said = subprocess.run(
        [*command, "policy", "apply", str(guard.file)],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f"{mine} (whoever changed the policy)" in said
    history = guard.json("policy", "history")
    assert f"from {mine}" in history[0]["who"]
    with services(service := Service(lab, 8080)):
        for link in [service.connect(mine) for _ in range(6)]:
            link.talk()
    assert guard.block_of(mine) is None


def guard_words() -> list[str]:
    """Return the command, less what it is to do."""
    return [sys.executable, "-m", "rstguard"]


@pytest.mark.netns
def test_a_new_address_is_spared_within_seconds(guard: Guard, lab: ThreeHosts) -> None:
    lab.run("gateway", "ip", "address", "add", "203.0.113.77/32", "dev", "lo")
    wait_until(lambda: "203.0.113.77" in str(guard.status()["protected"]), 15)
    assert "203.0.113.77" in lab.run("gateway", "ipset", "list", "rstguard-protected4")


# The cap


@pytest.mark.netns
def test_a_rule_that_bans_too_many_shuns_instead(lab: ThreeHosts, tmp_path: Path) -> None:
    text = policy(more="bans_per_minute: 3")
    with (
        Guard(lab, text, tmp_path / "guard", workers=1) as guard,
        services(service := Service(lab, 8080)),
    ):
        victims = [source(False) for _ in range(6)]
        for victim in victims:
            for _ in range(4):
                with contextlib.suppress(OSError):
                    connect(lab, victim, service.address, service.port, 0.3).close()
            wait_until(lambda victim=victim: guard.block_of(victim) is not None)  # type: ignore[misc]
            if victim == victims[3]:
                wait_until(lambda: guard.status()["capped"] == ["rate"])
        assert [guard.block_of(victim)["kind"] for victim in victims] == ["ban"] * 4 + ["shun"] * 2
        assert guard.status()["policy"]["mode"] == "enforce"
        assert "CAPPED: rule rate" in guard.log.read_text()
        assert (shown := guard.cli("status")).returncode == 1
        assert shown.stdout.startswith("DEGRADED")
        guard.apply(text)
        assert guard.status()["capped"] == []


# The panic switch


@pytest.mark.netns
def test_panic_lets_all_traffic_pass_until_it_ends(guard: Guard, lab: ThreeHosts) -> None:
    guard.cli("ban", "add", (banned := source(False)))
    with services(service := Service(lab, 8080)):
        with pytest.raises(TimeoutError):
            service.connect(banned, timeout=0.4)
        done = guard.cli("panic")
        assert done.returncode == 0
        assert "all traffic passes" in done.stdout
        service.connect(banned).talk()
        wait_until(lambda: guard.status()["panic"])
        guard.apply(policy("other"))  # does not bring the rules back
        service.connect(banned).talk()
        assert "PANIC" in (shown := guard.cli("status").stdout)
        assert "missing" not in shown
        assert guard.cli("panic", "--end").returncode == 0
        wait_until(guard.filtering)
        with pytest.raises(TimeoutError):
            service.connect(banned, timeout=0.4)
    assert guard.cli("panic", "--end").stdout == "there was no panic\n"


@pytest.mark.netns
def test_panic_works_when_the_guard_hangs(guard: Guard, lab: ThreeHosts) -> None:
    guard.cli("ban", "add", (banned := source(False)))
    os.kill(guard.pid, 19)
    try:
        assert guard.cli("panic").returncode == 0
        with services(service := Service(lab, 8080)):
            service.connect(banned).talk()
    finally:
        os.kill(guard.pid, 18)


@pytest.mark.netns
def test_panic_works_on_a_full_disk_and_says_what_it_cannot(
    guard: Guard, lab: ThreeHosts, tmp_path: Path
) -> None:
    """The rules go first; a guard that will put them back is named."""
    elsewhere = tmp_path / "elsewhere"
    no_place = tmp_path / "file"
    no_place.write_text("")
    for directory, sentence in (
        (no_place / "run", "cannot be made"),
        (elsewhere, "it has another runtime directory"),
    ):
        wait_until(guard.filtering)
        restored = guard.events("restored", "restored")
        command = [*guard_words(), "panic", "--runtime-dir", str(directory)]
        inside = lab.command("gateway", *command)
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        wait_until(lambda before=restored: guard.events("restored", "restored") > before)  # type: ignore[misc]
        assert "all traffic passes now, but" in done.stderr
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1


# Reconciliation


@pytest.mark.netns
@pytest.mark.parametrize(
    "commands",
    [
        ["iptables -t mangle -F"],
        ["ip6tables -t raw -D PREROUTING -j rstguard-raw"],
        [f"{t} -t {table} {what}" for t in ("iptables", "ip6tables") for table in
         ("raw", "mangle", "filter", "security") for what in ("-F", "-X")],
        ["ipset flush rstguard-dst4"],
        ["iptables -t raw -R rstguard-blocked 3 -j RETURN"],
        [f"{t} -t {table} {what}" for t in ("iptables", "ip6tables") for table in
         ("raw", "mangle", "filter", "security") for what in ("-F", "-X")] + ["ipset destroy"],
    ],
    ids=["a table flushed", "a jump", "all rules", "a set emptied", "a rule", "rules and sets"],
)  # fmt: skip
def test_what_another_tool_removed_comes_back(
    guard: Guard, lab: ThreeHosts, commands: list[str]
) -> None:
    guard.cli("ban", "add", (banned := source(False)), "--for", "1h")
    for command in commands:
        lab.run("gateway", *command.split())
    wait_until(lambda: guard.events("restored", "restored") == 1, 6)
    wait_until(guard.filtering)
    assert guard.block_of(banned) is not None
    with services(service := Service(lab, 8080)), pytest.raises(TimeoutError):
        service.connect(banned, timeout=0.4)


@pytest.mark.netns
def test_a_sysctl_that_another_tool_set_comes_back(guard: Guard, lab: ThreeHosts) -> None:
    name = "net.netfilter.nf_conntrack_acct"
    lab.run("gateway", "sysctl", "-qw", f"{name}=0")
    wait_until(lambda: guard.events("restored", "restored") == 1, 6)
    assert lab.run("gateway", "sysctl", "-n", name).strip() == "1"
    assert f"{name} = 0 by another program was put back" in guard.log.read_text()
    assert guard.status()["sysctls"][name]
    assert guard.filtering()


@pytest.mark.netns
def test_rules_that_pass_it_over_are_overtaken(guard: Guard, lab: ThreeHosts) -> None:
    """What comes first and accepts, as Docker does, keeps packets from the guard."""
    accept = "-m conntrack --ctstate ESTABLISHED -j ACCEPT"
    for rule in (
        "-t raw -I PREROUTING -i out -j ACCEPT",
        f"-t filter -I FORWARD {accept}",
        "-t mangle -A PREROUTING -j MARK --set-mark 0x1/0x1",
    ):
        lab.run("gateway", "iptables", "-w", *rule.split())
    # It may have been put right before anybody asks.
    wait_until(
        lambda: (
            "which is to come first" in str(guard.status()["missing"])
            or guard.events("restored", "restored") > 0
        )
    )
    wait_until(lambda: guard.events("restored", "restored") > 0, 6)
    wait_until(guard.filtering)
    rules = {
        (table, chain): lab.run("gateway", "iptables", "-w", "-t", table, "-S", chain).splitlines()
        for table, chain in (("raw", "PREROUTING"), ("filter", "FORWARD"), ("mangle", "PREROUTING"))
    }
    assert rules["raw", "PREROUTING"][1].endswith("-j rstguard-raw")
    first = rules["filter", "FORWARD"][: rules["filter", "FORWARD"].index(f"-A FORWARD {accept}")]
    assert any(rule.endswith("-j rstguard-condemned") for rule in first)
    assert rules["mangle", "PREROUTING"][-1].endswith("-j rstguard-in")
    banned = source(False)
    guard.cli("ban", "add", banned)
    with services(service := Service(lab, 8080)), pytest.raises(TimeoutError):
        service.connect(banned, timeout=0.4)


@pytest.mark.netns
def test_rules_that_only_look_on_may_come_first(guard: Guard, lab: ThreeHosts) -> None:
    for rule in ("-t raw -I PREROUTING -j LOG", "-t filter -I FORWARD -p tcp"):
        lab.run("gateway", "iptables", "-w", *rule.split())
    assert guard.status()["missing"] == []


@pytest.mark.netns
def test_it_does_not_fight(guard: Guard, lab: ThreeHosts) -> None:
    def flush() -> bool:
        lab.run("gateway", "iptables", "-w", "-t", "mangle", "-F")
        return guard.events("conflict", "conflict") > before

    before = guard.events("conflict", "conflict")
    wait_until(flush, 60)
    assert "again and again" in guard.log.read_text()
    # The first wait may be nearly over by now; after it comes one of twice the time.
    restored = guard.events("restored", "restored")
    flush()
    wait_until(lambda: guard.events("restored", "restored") > restored, 60)
    restored = guard.events("restored", "restored")
    lab.run("gateway", "iptables", "-w", "-t", "mangle", "-F")
    with pytest.raises(TimeoutError):
        wait_until(lambda: guard.events("restored", "restored") > restored, 3)
