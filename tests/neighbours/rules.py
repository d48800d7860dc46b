"""Neighbours that are rules and sets of other programs, as an administrator loads them."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Final

from tests.neighbours.mixed import Target
from tests.neighbours.trial import PLAIN, PROTECTED, Neighbour, Place
from tests.support.network import OUTSIDE4, OUTSIDE6, SERVER4, SERVER6
from tests.support.sources import source

_BOTH: Final = f"-m multiport --ports {PROTECTED},{PLAIN}"


def stateful(place: Place) -> None:
    """A strict firewall: only what begins properly, goes on, or belongs to it passes."""
    place.both(
        "gateway",
        "-P FORWARD DROP",
        "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
        "-A FORWARD -p tcp ! --syn -m conntrack --ctstate NEW -j REJECT --reject-with tcp-reset",
        "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
        "-A FORWARD -i out -p tcp --syn -m multiport --dports 8000:9000 -j ACCEPT",
        "-A FORWARD -i out -p udp -m multiport --dports 8000:9000 -j ACCEPT",
    )


def limits(place: Place) -> None:
    """Limits of other kinds, generous ones, on the same services."""
    place.both(
        "gateway",
        f"-A FORWARD -p tcp --syn --dport {PROTECTED} -m connlimit --connlimit-above 500 -j REJECT",
        f"-A FORWARD -p tcp --syn --dport {PROTECTED} -m hashlimit --hashlimit-name others "
        "--hashlimit-mode srcip --hashlimit-above 500/s -j DROP",
        f"-A FORWARD -p tcp --syn --dport {PROTECTED} -m recent --name others --update "
        "--seconds 60 --hitcount 20 --rttl -m recent --name never --rcheck -j DROP",
        f"-A FORWARD -p tcp --syn {_BOTH} -m recent --name others --set",
        f"-A FORWARD -p tcp {_BOTH} -m connbytes --connbytes 0:1000000000 --connbytes-mode bytes "
        "--connbytes-dir both -m quota --quota 100000000000",
    )


def rewritten(place: Place) -> None:
    """Headers are changed on their way: hop limits, DSCP, options taken out."""
    place.sh("gateway", "iptables -w -t mangle -A PREROUTING -i out -j TTL --ttl-inc 1",
             "iptables -w -t mangle -A POSTROUTING -j TTL --ttl-set 64",
             "ip6tables -w -t mangle -A PREROUTING -i out -p tcp -j HL --hl-inc 1",
             "ip6tables -w -t mangle -A POSTROUTING -p tcp -j HL --hl-set 64")  # fmt: skip
    place.both("gateway", "-t mangle -A PREROUTING -j DSCP --set-dscp 10",
               "-t mangle -A PREROUTING -p tcp --syn -j TCPOPTSTRIP "
               "--strip-options timestamp,sack-permitted")  # fmt: skip


def untracked(place: Place) -> None:
    """Another service's packets are kept from the tracker."""
    for way in ("--dport", "--sport"):
        place.both("gateway", f"-t raw -A PREROUTING -p tcp {way} {PLAIN} -j CT --notrack",
                   f"-t raw -A PREROUTING -p udp {way} {PLAIN} -j CT --notrack")  # fmt: skip


def synproxy(place: Place) -> None:
    """Another service is behind cookies that the administrator has set up."""
    place.set("gateway", {"net/netfilter/nf_conntrack_tcp_loose": "0"})
    place.both(
        "gateway",
        f"-t raw -A PREROUTING -i out -p tcp --syn --dport {PLAIN} -j CT --notrack",
        f"-A FORWARD -i out -p tcp --dport {PLAIN} -m conntrack --ctstate INVALID,UNTRACKED "
        "-j SYNPROXY --sack-perm --wscale 7 --mss 1440",
        "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
    )


def mirrored(place: Place) -> None:
    """All packets are copied to a host that looks for intruders, and logged."""
    place.join(("gateway", "ids"), ("other", "eth0"))
    for host, device, last in (("gateway", "ids", 1), ("other", "eth0", 2)):
        place.ip(host, f"address add 10.75.0.{last}/24 dev {device}", f"link set {device} up",
                 f"address add fd75::{last}/64 dev {device} nodad")  # fmt: skip
    place.set("other", {"net/ipv4/ip_forward": "0"})
    place.sh("gateway", "iptables -w -t mangle -A PREROUTING -p tcp -j TEE --gateway 10.75.0.2",
             "ip6tables -w -t mangle -A PREROUTING -p tcp -j TEE --gateway fd75::2",
             "iptables -w -t mangle -A POSTROUTING -p tcp -j TEE --gateway 10.75.0.2")  # fmt: skip
    place.both("gateway", "-A FORWARD -p tcp -j NFLOG --nflog-group 77 --nflog-range 64")


def balanced(place: Place) -> None:
    """Connections are spread over addresses of servers by a rule's chance, as kube-proxy does."""
    for tool, address, more, net in (
        ("iptables", SERVER4, "10.71.2.3", OUTSIDE4), ("ip6tables", SERVER6, "fd71:2::3", OUTSIDE6),
    ):  # fmt: skip
        width = "24" if tool == "iptables" else "64"
        # Not preferred: the server's datagrams are to bear the address that they were sent to.
        place.ip("server", f"address add {more}/{width} dev eth0 preferred_lft 0")
        place.sh(
            "gateway",
            f"{tool} -w -t nat -N SVC",
            f"{tool} -w -t nat -A PREROUTING -d {net} -p tcp --dport 8200:8399 -j SVC",
            f"{tool} -w -t nat -A PREROUTING -d {net} -p udp --dport 8200:8399 "
            f"-j DNAT --to-destination {address}",
            f"{tool} -w -t nat -A SVC -m statistic --mode random --probability 0.5 "
            f"-j DNAT --to-destination {address}",
            f"{tool} -w -t nat -A SVC -j DNAT --to-destination {more}",
            f"{tool} -w -t nat -A POSTROUTING -o in -j MASQUERADE --random-fully",
        )
    place.reach(OUTSIDE4, OUTSIDE6)


NFT: Final = f"""
table inet lb {{
  map services {{ type inet_service : inet_service;
                  elements = {{ 18201 : {PROTECTED}, 18301 : {PLAIN} }} }}
  chain before {{
    type nat hook prerouting priority dstnat;
    meta nfproto ipv4 iifname "out" tcp dport 18000-19000 \
      dnat ip to {SERVER4} : tcp dport map @services
    meta nfproto ipv4 iifname "out" udp dport 18000-19000 \
      dnat ip to {SERVER4} : udp dport map @services
  }}
  chain after {{
    type nat hook postrouting priority srcnat;
    oifname "in" ct status dnat masquerade
  }}
  chain accounting {{
    type filter hook prerouting priority mangle - 5;
    ct mark set ct mark | 0x11
    meta mark set ct mark & 0xff
  }}
}}
"""


def nft_maps(place: Place) -> None:
    """Ports are translated by maps of nft, beside marks that it keeps."""
    place.run("gateway", "nft", "-f", "-", stdin=NFT)
    place.targets = [
        Target(f"{name} by nft", OUTSIDE4, 10_000 + port, "server", port, (source(False),))
        for name, port in (("protected", PROTECTED), ("plain", PLAIN))
    ]


_READER: Final = """
import netfilterqueue
queue = netfilterqueue.NetfilterQueue()
queue.bind(99, lambda packet: packet.accept(), 4096)
print("ready", flush=True)
queue.run()
"""


def queues(place: Place) -> None:
    """An intrusion prevention reads the same packets from its queue; of another nobody reads."""
    for table in ("mangle", "filter"):
        place.both("gateway", f"-t {table} -A FORWARD -p tcp {_BOTH} "
                   "-j NFQUEUE --queue-num 98 --queue-bypass")  # fmt: skip
    place.both("gateway", f"-t mangle -A POSTROUTING -p tcp {_BOTH} "
               "-j NFQUEUE --queue-num 99 --queue-bypass")  # fmt: skip
    place.start("gateway", ".venv/bin/python", "-c", _READER, log="ips")
    place.wait_for("ips", "ready")


def helpers(place: Place) -> None:
    """A helper of the tracker reads the service's stream, behind a strict firewall."""
    stateful(place)
    place.both("gateway", f"-t raw -A PREROUTING -p tcp --dport {PROTECTED} -j CT --helper ftp",
               f"-t raw -A PREROUTING -p tcp --dport {PLAIN} -j CT --helper ftp")  # fmt: skip
    place.also = active_ftp


def active_ftp(place: Place, count: int = 5) -> int:
    """Return of how many FTP sessions the server's connection to the client came through."""
    came = 0
    for _ in range(count):
        with suppress(OSError):
            came += _active(place)
    return came


def _active(place: Place) -> int:
    with place.inside("server"):
        control = socket.create_server(("", PROTECTED + 20))
        data = socket.socket()
    with place.inside("client"):
        waits, one = socket.create_server(("", 0)), socket.socket()
    with control, data, waits, one:
        for each in (control, data, waits, one):
            each.settimeout(3)
        one.connect((SERVER4, PROTECTED + 20))
        served, _ = control.accept()
        with served:
            own = one.getsockname()[0].replace(".", ",")
            port = waits.getsockname()[1]
            served.sendall(b"220 ready\r\n")
            one.recv(100)
            one.sendall(f"PORT {own},{port >> 8},{port & 255}\r\n".encode())
            served.settimeout(3)
            served.recv(100)
            data.connect((one.getsockname()[0], port))
            with waits.accept()[0] as came:
                data.sendall(os.urandom(5000))
                data.close()
                count = 0
                while more := came.recv(5000):
                    count += len(more)
    return int(count == 5000)


def short_memory(place: Place) -> None:
    """The tracker's times are cut short: what is silent for a second is forgotten."""
    place.set("gateway", {f"net/netfilter/nf_conntrack_{name}": "1" for name in (
        "tcp_timeout_established", "tcp_timeout_close_wait", "tcp_timeout_fin_wait",
        "tcp_timeout_time_wait", "udp_timeout_stream",
    )})  # fmt: skip


NEIGHBOURS: dict[str, Neighbour] = {
    "strict firewall": Neighbour(stateful),
    "other limits": Neighbour(limits),
    "headers rewritten": Neighbour(rewritten),
    "another service untracked": Neighbour(untracked),
    "another service's cookies": Neighbour(synproxy),
    "mirrored and logged": Neighbour(mirrored),
    "balanced by chance": Neighbour(balanced),
    "maps of nft": Neighbour(nft_maps),
    "other queues": Neighbour(queues),
    "tracker's helpers": Neighbour(helpers),
    "tracker's short memory": Neighbour(short_memory),
}
