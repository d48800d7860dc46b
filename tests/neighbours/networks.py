"""Neighbours that are networks: links, tunnels, addresses, and the ways that packets take."""

from __future__ import annotations

from typing import Final

from tests.neighbours.mixed import Target
from tests.neighbours.trial import PLAIN, PROTECTED, Neighbour, Place
from tests.support.network import INSIDE4, INSIDE6, OUTSIDE4, OUTSIDE6, SERVER4, SERVER6
from tests.support.sources import ROUTER4, ROUTER6

_PORTS: Final = (("protected", PROTECTED), ("plain", PLAIN))


def moved(place: Place, device: str, other: str) -> None:
    """Give the addresses and routes of one of the gateway's devices to another."""
    outside = device == "out"
    mine = (OUTSIDE4, OUTSIDE6) if outside else (INSIDE4, INSIDE6)
    place.ip(
        "gateway",
        f"address flush dev {device}",
        f"address add {mine[0]}/24 dev {other}",
        f"address add {mine[1]}/64 dev {other} nodad",
        f"link set {device} up",
        f"link set {other} up",
    )
    if outside:
        place.interface = other
        routes_to_clients(place)


def routes_to_clients(place: Place) -> None:
    """Lead to the client's many addresses again."""
    for network, router in (("10.128.0.0/9", ROUTER4), ("fd73::/32", ROUTER6)):
        place.ip("gateway", f"route replace {network} via {router}")


def macvlan(place: Place) -> None:
    """The uplink is a macvlan device on top of another interface."""
    place.ip("gateway", "link add link out name wan type macvlan mode bridge")
    moved(place, "out", "wan")


def bridges(place: Place) -> None:
    """Both sides are bridges, whose frames pass the rules of the gateway once more."""
    for device, bridge in (("out", "wan"), ("in", "lan")):
        place.ip("gateway", f"link add {bridge} type bridge", f"link set {device} master {bridge}")
        moved(place, device, bridge)
    calls = (f"net/bridge/bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables", "arptables"))
    place.set("gateway", dict.fromkeys(calls, "1"))


def vxlan(place: Place) -> None:
    """Clients come through a tunnel of less room than their own link, with the MSS clamped."""
    far = ("10.74.0.2", "fd74::2")
    for host, device, last, remote in (
        ("client", "eth0", 2, OUTSIDE4), ("gateway", "out", 1, "10.71.1.2"),
    ):  # fmt: skip
        place.ip(
            host,
            f"link add tunnel type vxlan id 7 dev {device} remote {remote} dstport 4789",
            f"address add 10.74.0.{last}/24 dev tunnel",
            f"address add fd74::{last}/64 dev tunnel nodad",
            "link set tunnel mtu 1400 up",
        )
    for v6, server in ((False, SERVER4), (True, SERVER6)):
        place.ip("client", f"route add {server} via {('10.74.0.1', 'fd74::1')[v6]}")
        network = ("10.128.0.0/9", "fd73::/32")[v6]
        place.ip("gateway", f"route replace {network} via {far[v6]} dev tunnel")
    place.both("gateway", "-t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN "
               "-j TCPMSS --clamp-mss-to-pmtu")  # fmt: skip
    place.interface = "tunnel"


def narrow(place: Place) -> None:
    """Beyond the gateway packets must be shorter, and ends learn it by ICMP from the gateway."""
    for v6 in (False, True):
        near = ("10.71.2.0/24", "fd71:2::/64")[v6]
        far, router = (("10.128.0.0/9", ROUTER4), ("fd73::/32", ROUTER6))[v6]
        place.ip("gateway", f"route replace {near} dev in mtu lock 1350")
        place.ip("gateway", f"route replace {far} via {router} mtu lock 1300")


def second_link(place: Place) -> None:
    """Make a second link between gateway and server."""
    place.join(("gateway", "alt"), ("server", "eth1"))
    for host, device, last in (("gateway", "alt", 1), ("server", "eth1", 2)):
        place.ip(
            host,
            f"address add 10.71.3.{last}/24 dev {device}",
            f"address add fd71:3::{last}/64 dev {device} nodad",
            f"link set {device} up",
        )


def multipath(place: Place) -> None:
    """Two links to the server share the connections, and answers come back by either."""
    second_link(place)
    place.ip("server", "address add 10.79.0.1/32 dev lo", "address add fd79::1/128 dev lo nodad",
             "route del default via 10.71.2.1", "route del default via fd71:2::1",
             "route add default nexthop via 10.71.2.1 nexthop via 10.71.3.1",
             "route add default nexthop via fd71:2::1 nexthop via fd71:3::1")  # fmt: skip
    place.ip("gateway", "route add 10.79.0.1/32 nexthop via 10.71.2.2 nexthop via 10.71.3.2",
             "route add fd79::1/128 nexthop via fd71:2::2 nexthop via fd71:3::2")  # fmt: skip
    place.set("gateway", {"net/ipv4/fib_multipath_hash_policy": "1",
                          "net/ipv6/fib_multipath_hash_policy": "1",
                          "net/ipv4/conf/all/rp_filter": "2"})  # fmt: skip
    place.reach("10.79.0.1", "fd79::1", own=True)


def same_addresses(place: Place) -> None:
    """Two customers who have the same addresses: zones, translation, marked routes."""
    place.join(("other", "eth0"), ("gateway", "out2"))
    place.ip("other", "address add 10.71.1.2/24 dev eth0", "link set lo up", "link set eth0 up",
             "route add default via 10.71.1.1")  # fmt: skip
    place.ip("gateway", "link set out2 up", "address add 10.71.1.1/24 dev out2 noprefixroute")
    rules = "*raw\n*mangle\n*nat\n"
    raw, mangle, nat = "", "", ""
    for zone, device in ((1, "out"), (2, "out2")):
        place.ip("gateway", f"route add 10.71.1.0/24 dev {device} table 10{zone}",
                 f"rule add fwmark {zone} lookup 10{zone}")  # fmt: skip
        raw += f"-A PREROUTING -i {device} -s 10.71.1.2 -j CT --zone-orig {zone}\n"
        mangle += f"-A PREROUTING -i {device} -s 10.71.1.2 -j CONNMARK --set-xmark {zone}/0xff\n"
        nat += (
            f"-A POSTROUTING -o in -m connmark --mark {zone}/0xff -j SNAT --to 10.71.2.10{zone}\n"
        )
        place.ip("gateway", f"address add 10.71.2.10{zone}/24 dev in")
    mangle += "-A PREROUTING -i in -j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff\n"
    rules = f"*raw\n{raw}COMMIT\n*mangle\n{mangle}COMMIT\n*nat\n{nat}COMMIT\n"
    place.run("gateway", "iptables-restore", "-n", stdin=rules)
    place.set("gateway", {f"net/ipv4/conf/{d}/rp_filter": "0" for d in ("all", "out", "out2")})
    place.interface = "out, out2"
    place.targets = [
        Target(f"{name} for {host}", SERVER4, port + shift, "server", port + shift, (), host)
        for name, port in _PORTS
        for shift, host in enumerate(("client", "other"))
    ]


def proxied_neighbours(place: Place) -> None:
    """The server has addresses of the clients' own network: the gateway answers ARP and NDP."""
    place.ip(
        "server", "address add 10.71.1.50/32 dev lo", "address add fd71:1::50/128 dev lo nodad"
    )
    place.ip("gateway", "route add 10.71.1.50/32 via 10.71.2.2",
             "route add fd71:1::50 via fd71:2::2",
             "neigh add proxy fd71:1::50 dev out")  # fmt: skip
    place.set("gateway", {"net/ipv4/conf/out/proxy_arp": "1", "net/ipv6/conf/out/proxy_ndp": "1"})
    place.reach("10.71.1.50", "fd71:1::50", own=True)


def hairpin(place: Place) -> None:
    """The service is forwarded from the gateway's address, and its own network uses that too."""
    for v6, tool, inside, outside in (
        (False, "iptables", SERVER4, OUTSIDE4), (True, "ip6tables", SERVER6, OUTSIDE6),
    ):  # fmt: skip
        network = ("10.71.2.0/24", "fd71:2::/64")[v6]
        place.sh(
            "gateway",
            f"{tool} -w -t nat -A PREROUTING -d {outside} -m addrtype --dst-type LOCAL -p tcp "
            f"-j DNAT --to-destination {inside}",
            f"{tool} -w -t nat -A PREROUTING -d {outside} -p udp --dport 8000:9000 "
            f"-j DNAT --to-destination {inside}",
            f"{tool} -w -t nat -A POSTROUTING -s {network} -d {inside} -j MASQUERADE",
        )
    place.reach(OUTSIDE4, OUTSIDE6)
    place.targets += [
        Target(f"hairpin {port}", OUTSIDE4, port + 1, "server", port + 1, (), "server")
        for _, port in _PORTS
    ]


def shaped(place: Place) -> None:
    """Traffic is shaped: classes chosen by rules, and what comes in by way of an ifb device."""
    place.ip("gateway", "link add shaper type ifb", "link set shaper up")
    place.sh(
        "gateway",
        "tc qdisc add dev out root handle 1: htb default 20",
        "tc class add dev out parent 1: classid 1:10 htb rate 400mbit",
        "tc class add dev out parent 1: classid 1:20 htb rate 200mbit",
        "tc qdisc add dev out handle ffff: ingress",
        "tc filter add dev out parent ffff: protocol all u32 match u32 0 0 "
        "action mirred egress redirect dev shaper",
        "tc qdisc add dev shaper root tbf rate 400mbit burst 500kb latency 50ms",
    )
    place.both("gateway", f"-t mangle -A POSTROUTING -o out -p tcp --sport {PROTECTED} "
               "-j CLASSIFY --set-class 1:10")  # fmt: skip


def old_stacks(place: Place) -> None:
    """Hosts without time stamps, selective acknowledgements and window scaling."""
    names = ("timestamps", "sack", "window_scaling")
    for host in ("client", "server"):
        place.set(host, {f"net/ipv4/tcp_{name}": "0" for name in names})


def new_stacks(place: Place) -> None:
    """Hosts that send data with their first SYN, mark congestion, and probe for the path's MTU."""
    for host in ("client", "server"):
        place.set(host, {"net/ipv4/tcp_fastopen": "1543", "net/ipv4/tcp_ecn": "1",
                         "net/ipv4/tcp_mtu_probing": "2"})  # fmt: skip
    place.targets = [target._replace(fast_open=True) for target in place.targets]


def hardened(place: Place) -> None:
    """Hardening, as guides give it, set again and again by a timer."""
    names = {f"net/ipv4/conf/{d}/{name}": value for d in ("all", "default", "out", "in")
             for name, value in _HARDENED.items()}  # fmt: skip
    place.set("gateway", names | {"net/ipv4/tcp_syncookies": "1", "net/ipv4/tcp_rfc1337": "1"})


_HARDENED: Final = {
    "rp_filter": "1", "accept_source_route": "0", "accept_redirects": "0", "send_redirects": "0",
    "log_martians": "1",
}  # fmt: skip


def address_goes(place: Place) -> None:
    """An address that is moved by VRRP comes and goes, and is announced."""
    place.ip("gateway", "address add 10.71.1.100/24 dev out", "address del 10.71.1.100/24 dev out",
             "address add fd71:1::100/64 dev out nodad",
             "address del fd71:1::100/64 dev out")  # fmt: skip


def containers(place: Place) -> None:
    """A bridge for containers, and a chain of rules for them."""
    place.ip("gateway", "link add pods type bridge", "link set pods up")
    place.both("gateway", "-N PODS", "-A FORWARD -o pods -j PODS")


def devices_come(place: Place) -> None:
    """Containers come and go: pairs of devices in a bridge, and rules of their own."""
    place.ip("gateway", "link add pod0 type veth peer name pod1",
             "link set pod0 master pods up", "link del pod0")  # fmt: skip
    place.both("gateway", "-A PODS -o pods -j ACCEPT", "-D PODS -o pods -j ACCEPT")


def routes_come(place: Place) -> None:
    """A routing daemon learns and forgets thousands of routes."""
    routes = [f"10.{60 + n // 250}.{n % 250}.0/24 via {SERVER4}" for n in range(2000)]
    for verb in ("replace", "del"):
        place.ip("gateway", *(f"route {verb} {route}" for route in routes))


NEIGHBOURS: dict[str, Neighbour] = {
    "macvlan": Neighbour(macvlan),
    "bridges and br_netfilter": Neighbour(bridges),
    "vxlan": Neighbour(vxlan),
    "path MTU": Neighbour(narrow),
    "multipath": Neighbour(multipath),
    "two customers, the same addresses": Neighbour(same_addresses),
    "proxy ARP and NDP": Neighbour(proxied_neighbours),
    "hairpin": Neighbour(hairpin),
    "shaping": Neighbour(shaped),
    "old stacks": Neighbour(old_stacks),
    "new stacks": Neighbour(new_stacks),
    "hardening by a timer": Neighbour(hardened, meanwhile=hardened),
    "VRRP": Neighbour(meanwhile=address_goes),
    "containers come and go": Neighbour(containers, meanwhile=devices_come),
    "routing daemon": Neighbour(meanwhile=routes_come),
}
