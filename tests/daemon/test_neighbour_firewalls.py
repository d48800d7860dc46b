"""Other firewalls on the same host, by their rule sets: started before and after, and reloaded.

Each is what the program loads, cut down to the rules that can come in the guard's way.  What came
of it is the table in docs/operation.md ("Other tools on the same host").
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import source
from tests.support.traffic import Open, answer

pytestmark = pytest.mark.netns

PORT = 8040
POLICY = """\
version: 1
name: two-firewalls
protect: {interfaces: [out]}
shun: drop
syn_budget: off
rules:
  - {name: many, measure: connections, over: 50, then: reset}
  - {name: rate, measure: connection_rate, over: 100/s, then: ban, for: 10m}
"""


class Firewall(NamedTuple):
    """A neighbour: what it runs to start, to load its rules again, and to stop.

    A step is a command, or "TOOL < text" for one that reads rules.  `breaks` tells whether a start
    or reload takes rules of the guard away, or comes before them, so that they are put back.
    """

    start: tuple[str, ...]
    reload: tuple[str, ...]
    stop: tuple[str, ...]
    breaks: bool = False


NFT = """\
{flush}
table inet filter {{
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname "out" tcp dport 8000-9000 accept
  }}
}}
"""
FIREWALLD = """\
table inet firewalld
delete table inet firewalld
table inet firewalld {
  chain filter_PREROUTING { type filter hook prerouting priority filter + 10; policy accept; }
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "out" tcp dport 8000-9000 accept
    ct state invalid drop
    reject with icmpx admin-prohibited
  }
}
"""
UFW = """\
*filter
:ufw-before-forward - [0:0]
:ufw-user-forward - [0:0]
-F ufw-before-forward
-F ufw-user-forward
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -j ufw-user-forward
-A ufw-user-forward -i out -p tcp --dport 8000:9000 -j ACCEPT
COMMIT
"""
DOCKER = """\
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
COMMIT
*filter
:DOCKER-USER - [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
-A DOCKER-USER -j RETURN
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-I FORWARD 1 -j DOCKER-USER
-I FORWARD 2 -j DOCKER-ISOLATION-STAGE-1
-I FORWARD 3 -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-I FORWARD 4 -o docker0 -j DOCKER
-I FORWARD 5 -i docker0 ! -o docker0 -j ACCEPT
COMMIT
"""
KUBE = """\
*filter
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE
COMMIT
"""
TAILSCALE = """\
*filter
:ts-forward - [0:0]
-A ts-forward -i tailscale0 -j MARK --set-xmark 0x40000/0xff0000
-A ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT
-A ts-forward -s 100.64.0.0/10 -o tailscale0 -j DROP
-A ts-forward -o tailscale0 -j ACCEPT
COMMIT
*nat
:ts-postrouting - [0:0]
-A ts-postrouting -m mark --mark 0x40000/0xff0000 -j MASQUERADE
COMMIT
"""
MWAN3 = """\
*mangle
:mwan3_hook - [0:0]
:mwan3_ifaces_in - [0:0]
-F mwan3_hook
-F mwan3_ifaces_in
-A mwan3_hook -j CONNMARK --restore-mark --nfmask 0x3f00 --ctmask 0x3f00
-A mwan3_hook -m mark --mark 0x0/0x3f00 -j mwan3_ifaces_in
-A mwan3_hook -j CONNMARK --save-mark --nfmask 0x3f00 --ctmask 0x3f00
-A mwan3_ifaces_in -i out -m mark --mark 0x0/0x3f00 -j MARK --set-xmark 0x100/0x3f00
COMMIT
"""
FAIL2BAN = """\
*filter
:f2b-web - [0:0]
-A f2b-web -s 192.0.2.66/32 -j REJECT --reject-with icmp-port-unreachable
-A f2b-web -j RETURN
-I FORWARD -p tcp -m multiport --dports 8000:9000 -j f2b-web
COMMIT
"""
RESTORE = "iptables-restore -n < "
FLUSH = tuple(
    f"iptables -w -t {table} {what}" for table in ("filter", "nat") for what in ("-F", "-X")
)
FLUSH_ALL = tuple(
    f"{tool} -w -t {table} {what}"
    for tool in ("iptables", "ip6tables")
    for table in ("raw", "mangle", "nat", "filter")
    for what in ("-F", "-X")
)
LEGACY = """\
*filter
:FORWARD ACCEPT [0:0]
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -i out -p tcp --dport 8000:9000 -j ACCEPT
COMMIT
"""


def drop(table: str, *chains: str, jumps: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return what takes chains and the jumps to them away again."""
    tool = f"iptables -w -t {table}"
    away = [f"{tool} -D {jump}" for jump in jumps]
    return (*away, *(f"{tool} -F {c}" for c in chains), *(f"{tool} -X {c}" for c in chains))


FIREWALLS = {
    "nftables.service": Firewall(
        (f"nft -f - < {NFT.format(flush='')}",),
        (f"nft -f - < {NFT.format(flush='flush ruleset')}",),
        ("nft delete table inet filter",),
        breaks=True,
    ),
    "firewalld": Firewall(
        # Whatever its back end, it empties the tables of iptables when it starts and reloads.
        (*FLUSH_ALL, f"nft -f - < {FIREWALLD}"),
        (*FLUSH_ALL, f"nft -f - < {FIREWALLD}"),
        ("nft delete table inet firewalld",),
        breaks=True,
    ),
    "ufw": Firewall(
        (RESTORE + UFW, "iptables -w -A FORWARD -j ufw-before-forward"),
        (RESTORE + UFW,),
        drop("filter", "ufw-before-forward", "ufw-user-forward",
             jumps=("FORWARD -j ufw-before-forward",)),
    ),
    "docker": Firewall(
        (RESTORE + DOCKER,),
        (*FLUSH, RESTORE + DOCKER),  # restarted beside a script that flushes for it
        FLUSH,
        breaks=True,
    ),
    "kube-proxy": Firewall(
        (RESTORE + KUBE, "iptables -w -I FORWARD -j KUBE-FORWARD"),
        (RESTORE + KUBE,),
        drop("filter", "KUBE-FORWARD", "KUBE-SERVICES", jumps=("FORWARD -j KUBE-FORWARD",)),
        breaks=True,
    ),
    "tailscale": Firewall(
        (RESTORE + TAILSCALE, "iptables -w -I FORWARD -j ts-forward"),
        ("iptables -w -D FORWARD -j ts-forward", "iptables -w -I FORWARD -j ts-forward"),
        drop("filter", "ts-forward", jumps=("FORWARD -j ts-forward",)),
        breaks=True,
    ),
    "mwan3": Firewall(
        (RESTORE + MWAN3, "iptables -w -t mangle -I PREROUTING -j mwan3_hook"),
        (RESTORE + MWAN3,),
        drop("mangle", "mwan3_hook", "mwan3_ifaces_in", jumps=("PREROUTING -j mwan3_hook",)),
    ),
    "fail2ban": Firewall(
        (RESTORE + FAIL2BAN,),
        ("iptables -w -A f2b-web -s 192.0.2.67/32 -j REJECT",),
        drop("filter", "f2b-web",
             jumps=("FORWARD -p tcp -m multiport --dports 8000:9000 -j f2b-web",)),
        breaks=True,
    ),
    "iptables-legacy": Firewall(
        (f"iptables-legacy-restore < {LEGACY}",),
        (f"iptables-legacy-restore < {LEGACY}",),
        ("iptables-legacy -F",),
    ),
}  # fmt: skip


def do(lab: ThreeHosts, steps: tuple[str, ...]) -> None:
    for step in steps:
        command, _, text = step.partition(" < ")
        lab.run("gateway", *command.split(), stdin=text)


def holds(lab: ThreeHosts, guard: Guard, serve: Open, banned: str) -> None:
    """See that the guard filters within some seconds, bans, and lets honest clients pass."""
    wait_until(guard.filtering, 12)
    service = serve(PORT)
    assert answer(lab, banned, service.address, PORT) == "silence"
    for _ in range(5):
        service.connect(source(False)).talk()
    service.close()


@pytest.mark.parametrize("name", FIREWALLS)
def test_a_neighbour(lab: ThreeHosts, serve: Open, tmp_path: Path, name: str) -> None:
    firewall, tool = FIREWALLS[name], FIREWALLS[name].start[0].split()[0]
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    do(lab, firewall.start)
    with Guard(lab, POLICY, tmp_path / "guard", workers=1) as guard:
        service = serve(PORT + 1)
        lasting = service.connect(source(False))
        guard.cli("ban", "add", (banned := source(False)))
        holds(lab, guard, serve, banned)  # the neighbour was first
        before = guard.events("restored", "restored")
        do(lab, firewall.reload)
        do(lab, firewall.stop)
        do(lab, firewall.start)  # now it is later

        def put_back() -> bool:
            return guard.events("restored", "restored") > before

        if firewall.breaks:
            wait_until(put_back, 12)
        holds(lab, guard, serve, banned)
        lasting.talk()
        assert put_back() is firewall.breaks
        assert guard.events("conflict", "conflict") == 0
        assert guard.kill(source=lasting.source)
        lasting.wait_reset()
    do(lab, firewall.stop)
