"""What can match where a machine stands: what the tools print, and the judgement on it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from rstguard.engine.address import parse_address, parse_prefix
from rstguard.engine.ruleset import Scope
from rstguard.kernel import KernelError, NotThere
from rstguard.kernel.links import Link
from rstguard.kernel.place import Address, Listener, Place, look, look_around
from rstguard.kernel.standing import amiss
from rstguard.kernel.translations import Translation, of_iptables, of_nft
from tests.support.fake_kernel import FakeKernel


def translation(
    interface: str,
    destination: str,
    ports: tuple[int, int] | None,
    to: str,
    to_port: int | None = None,
) -> Translation:
    return Translation(
        interface,
        parse_prefix(destination) if destination else None,
        ports,
        parse_address(to) if to else None,
        to_port,
    )


IPTABLES = [
    ("-A PREROUTING -i wan -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.5",
     [translation("wan", "", (80, 80), "10.0.0.5")]),
    (("-A PREROUTING -d 203.0.113.9/32 -p tcp -m multiport --dports 80,8000:8010 -j DNAT "
     "--to-destination 10.0.0.5-10.0.0.9:8080-8090"),
     [translation("", "203.0.113.9", (80, 80), "10.0.0.5", 8080),
      translation("", "203.0.113.9", (8000, 8010), "10.0.0.5", 8080)]),
    ("-A PREROUTING -d 203.0.113.9/32 -p udp -m udp --dport 53 -j DNAT --to-destination 10.0.0.5",
     []),
    ("-A PREROUTING -d 2001:db8::9/128 -j DNAT --to-destination [fd00::5]:80",
     [translation("", "2001:db8::9", None, "fd00::5", 80)]),
    ("-A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 3128",
     [translation("", "", (80, 80), "", 3128)]),
    # Docker
    (("-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n"
     "-A DOCKER -i docker0 -j RETURN\n"
     "-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80"),
     [translation("", "", (8080, 8080), "172.17.0.2", 80)]),
    # kube-proxy
    (('-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES\n'
     '-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "it\'s dns" -m tcp --dport 53 '
     "-j KUBE-SVC-A\n"
     "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n"
     "-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-SVC-A\n"
     "-A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-A\n"
     "-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.244.0.3:53"),
     [translation("", "10.96.0.10", (53, 53), "10.244.0.3", 53),
      translation("", "", (30080, 30080), "10.244.0.3", 53)]),
    # A circle, a chain that is not there, and a target that is none
    ("-A PREROUTING -j A\n-A A -j A\n-A A -j GONE\n-A A -p tcp -j DNAT --to-destination nonsense",
     []),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "expected"), IPTABLES)
def test_rules_of_iptables(rules: str, expected: list[Translation]) -> None:
    assert sorted(of_iptables(f"*nat\n{rules}\nCOMMIT\n"), key=str) == sorted(expected, key=str)


def of_rules(*rules: tuple[str, list[object]], name: str = "pre") -> str:
    entries: list[dict[str, object]] = [
        {"metainfo": {"version": "1.0.6"}},
        {"chain": {"family": "ip", "table": "t", "name": name, "type": "nat",
                   "hook": "prerouting", "prio": -100}},
    ]  # fmt: skip
    entries += [
        {"rule": {"family": "ip", "table": "t", "chain": chain, "expr": expressions}}
        for chain, expressions in rules
    ]
    return json.dumps({"nftables": entries})


def match(left: object, right: object) -> dict[str, object]:
    return {"match": {"op": "==", "left": left, "right": right}}


TCP_PORT = {"payload": {"protocol": "tcp", "field": "dport"}}
TARGET = {"payload": {"protocol": "ip", "field": "daddr"}}
INTERFACE = {"meta": {"key": "iifname"}}
DNAT = {"dnat": {"addr": "10.0.0.5", "port": 8080}}
NFT: list[tuple[str, list[Translation]]] = [
    (of_rules(("pre", [match(INTERFACE, "wan"), match(TCP_PORT, 80), DNAT])),
     [translation("wan", "", (80, 80), "10.0.0.5", 8080)]),
    (of_rules(("pre", [match(TARGET, "203.0.113.9"),
                       match(TCP_PORT, {"set": [80, {"range": [90, 99]}]}), DNAT])),
     [translation("", "203.0.113.9", (80, 80), "10.0.0.5", 8080),
      translation("", "203.0.113.9", (90, 99), "10.0.0.5", 8080)]),
    (of_rules(("pre", [match(TARGET, {"prefix": {"addr": "203.0.113.0", "len": 24}}), DNAT])),
     [translation("", "203.0.113.0/24", None, "10.0.0.5", 8080)]),
    # firewalld
    (of_rules(("pre", [match(INTERFACE, "wan"), {"goto": {"target": "zone"}}]),
              ("zone", [match(TCP_PORT, 443), {"redirect": {"port": 3128}}])),
     [translation("wan", "", (443, 443), "", 3128)]),
    (of_rules(("pre", [{"vmap": {"key": INTERFACE, "data": {"set": [
        ["wan", {"goto": {"target": "zone"}}], ["lan", {"accept": None}]]}}}]),
        ("zone", [match(TCP_PORT, 443), DNAT])),
     [translation("", "", (443, 443), "10.0.0.5", 8080)]),
    (of_rules(("pre", [match({"payload": {"protocol": "udp", "field": "dport"}}, 53), DNAT])), []),
    (of_rules(("pre", [match({"meta": {"key": "l4proto"}}, "udp"), DNAT])), []),
    (of_rules(("pre", [{"xt": None}, {"dnat": {"addr": {"map": {}}}}])), []),
    (of_rules(("post", [match(TCP_PORT, 80), DNAT])), []),
    ("", []),
    ("[]", []),
    ("no json", []),
]  # fmt: skip


@pytest.mark.parametrize(("printed", "expected"), NFT)
def test_rules_of_nftables(printed: str, expected: list[Translation]) -> None:
    assert of_nft(printed) == expected


class Machine(FakeKernel):
    """A kernel whose tools print what a test says; others are not there."""

    def __init__(self, **printed: str) -> None:
        super().__init__()
        self.printed = {name.replace("_", " "): text for name, text in printed.items()}

    def run(self, arguments: Sequence[str], text: str = "") -> str:
        words = [word for word in arguments if word != "-j"]
        for beginning, printed in self.printed.items():
            if " ".join(words).startswith(beginning):
                if printed.startswith("error:"):
                    raise KernelError(printed)
                return printed
        raise NotThere(f"there is no {arguments[0]}")


ADDRESSES = json.dumps([
    {"ifname": "eth0", "link_type": "ether", "addr_info": [
        {"family": "inet", "local": "203.0.113.10", "prefixlen": 24, "scope": "global"},
        {"family": "inet6", "local": "2001:db8::1", "prefixlen": 64, "scope": "global",
         "dynamic": True},
        {"family": "inet6", "local": "fe80::1", "prefixlen": 64, "scope": "link"}]},
    {"ifname": "ppp0", "link_type": "ppp", "addr_info": [
        {"family": "inet", "local": "198.51.100.3", "prefixlen": 32, "scope": "global"}]},
])  # fmt: skip
LISTENERS = """\
LISTEN 0 511 0.0.0.0:80 0.0.0.0:* users:(("nginx",pid=7,fd=6),("nginx",pid=8,fd=6))
LISTEN 0 511 *:443 *:*
LISTEN 0 128 [::1]:25 [::]:* users:(("master",pid=9,fd=1))
LISTEN 0 128 127.0.0.53%lo:53 0.0.0.0:*
"""


def test_what_is_around() -> None:
    kernel = Machine(
        ip_address=ADDRESSES,
        **{
            "ip -4 route show table all default": json.dumps(
                [{"dst": "default", "dev": "eth0"},
                 {"dst": "default", "nexthops": [{"dev": "eth0"}, {"dev": "ppp0"}]}]
            ),
            "ip -4 route show table main": json.dumps(
                [{"dst": "default", "dev": "eth0"}, {"dst": "10.0.0.0/8", "dev": "eth1"},
                 {"type": "blackhole", "dst": "192.0.2.0/24"}]
            ),
            "ip -6 route show": "",
            "ss": LISTENERS,
            "iptables-save": "*nat\n-A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 81\n",
        },
    )  # fmt: skip
    kernel.sysctls["net.ipv4.ip_forward"] = "1"
    place = look_around(kernel)
    assert place.defaults == ("eth0", "ppp0")
    assert [str(network.prefix) for network in place.networks] == ["10.0.0.0/8"]
    assert place.addresses == (
        Address("eth0", parse_address("203.0.113.10"), 24),
        Address("eth0", parse_address("2001:db8::1"), 64, changes=True),
        Address("ppp0", parse_address("198.51.100.3"), 32, changes=True),
    )
    assert place.listeners == (
        Listener(None, 80, "nginx"),
        Listener(None, 443),
        Listener(parse_address("::1"), 25, "master"),
        Listener(parse_address("127.0.0.53"), 53),
    )
    assert place.translations == (Translation("", None, (80, 80), None, 81),)
    assert place.forwards == {4}
    assert place.unknown == ("what is translated (needs root)",)  # ip6tables-save is not there


ROUTES = [
    ("203.0.113.10", '[{"type": "local", "dst": "203.0.113.10"}]', "[]", True),
    ("203.0.113.10", '[{"dst": "203.0.113.0/24", "dev": "eth1"}]', "[]", True),
    ("203.0.113.10", '[{"dst": "default", "dev": "eth0"}]', "[]", False),
    ("203.0.113.10", "error: Network is unreachable", "[]", False),
    ("203.0.113.0/24", '[{"dst": "default", "dev": "eth0"}]', "[]", False),
    ("203.0.113.0/24", '[{"dst": "default", "dev": "eth0"}]', '[{"dst": "203.0.113.64/26"}]', True),
    ("192.0.2.0/24", "error: Network is unreachable", "[]", True),  # an address of ours is in it
]


@pytest.mark.parametrize(("destination", "way", "inside", "reached"), ROUTES)
def test_which_destinations_can_be_reached(
    destination: str, way: str, inside: str, reached: bool
) -> None:
    address = {"local": "192.0.2.77", "prefixlen": 24, "scope": "global"}
    own = json.dumps([{"ifname": "eth0", "addr_info": [address]}])
    kernel = Machine(
        **{"ip address": own, "ip -o route get": way, "ip -4 route show table all root": inside}
    )
    prefix = parse_prefix(destination)
    assert (prefix in look(kernel, [prefix]).reached) is reached


def test_what_cannot_be_asked_is_believed() -> None:
    prefix = parse_prefix("203.0.113.10")
    assert look(FakeKernel(), [prefix]).reached == {prefix}


LINKS = (Link("lo", True), Link("wan", True), Link("lan", True))
OWN = (
    Address("wan", parse_address("203.0.113.2"), 24),
    Address("lan", parse_address("10.0.0.1"), 24),
)
HIDDEN = translation("", "203.0.113.2", (80, 80), "10.0.0.5", 8080)


def told(
    place: Place,
    *destinations: str,
    interfaces: tuple[str, ...] = ("wan",),
    ports: frozenset[int] | None = None,
) -> list[tuple[str, str]]:
    prefixes = tuple(map(parse_prefix, destinations))
    scope = Scope(interfaces, prefixes, ports, ())
    found = amiss(scope, place._replace(links=place.links or LINKS, addresses=OWN))
    return [(".".join(map(str, one.path)), one.sentence) for one in found]


def reaching(*destinations: str, **more: object) -> Place:
    return Place(reached=frozenset(map(parse_prefix, destinations)))._replace(**more)  # type: ignore[arg-type]


def test_interfaces() -> None:
    assert told(Place()) == []
    assert told(Place(), interfaces=("*",)) == []
    ((path, said),) = told(Place(), interfaces=("eth0",))
    assert path == "protect.interfaces"
    assert said.startswith("nothing can match: no interface here is called eth0 (there are lo, wan")
    ((path, said),) = told(Place(), interfaces=("wan", "wan7"))
    assert path == "protect.interfaces.1"
    assert "wan7 now" in said
    links = (Link("wan", True), Link("leg", True, "br0", "bridge"), Link("br0", True))
    ((path, said),) = told(Place(links), interfaces=("wan", "leg"))
    assert said.endswith("name br0")


def test_destinations_that_nothing_comes_for() -> None:
    assert told(reaching("203.0.113.2"), "203.0.113.2") == []
    ((path, said),) = told(Place(), "198.51.100.9")
    assert path == "protect.destinations"
    assert said.startswith("nothing can match: nothing comes for 198.51.100.9: it is no address of")
    assert "(this host is 203.0.113.2 there)" in said
    ((path, said),) = told(reaching("203.0.113.2"), "203.0.113.2", "198.51.100.9")
    assert path == "protect.destinations.1"
    assert said.startswith("nothing comes for 198.51.100.9")
    both = told(Place(), "198.51.100.9", "2001:db8::/48")
    assert len(both) == 1
    assert both[0][1].endswith("(and 1 more)")
    translated = translation("", "198.51.100.9", None, "10.0.0.5")
    assert told(reaching(translations=(translated,)), "198.51.100.9") == []
    bridge = (Link("wan", True), Link("leg", True, "wan", "bridge"))
    assert told(Place(bridge), "198.51.100.9") == []


def test_an_inside_address_that_is_known_by_another() -> None:
    place = reaching("10.0.0.5", "203.0.113.2", translations=(HIDDEN,))
    ((_, said),) = told(place, "10.0.0.5")
    assert said.startswith(
        "nothing can match: 10.0.0.5 is protected, but clients reach 10.0.0.5 as 203.0.113.2, which"
    )
    assert told(place, "10.0.0.5", "203.0.113.2") == []
    assert told(place, "203.0.113.2") == []
    any_address = place._replace(translations=(HIDDEN._replace(destination=None),))
    assert "as 203.0.113.2" in told(any_address, "10.0.0.5")[0][1]
    elsewhere = place._replace(translations=(HIDDEN._replace(interface="lan"),))
    assert told(elsewhere, "10.0.0.5") == []
    for port in (80, 8080):
        assert "as 203.0.113.2" in told(place, "10.0.0.5", ports=frozenset({port}))[0][1]
    assert told(place, "10.0.0.5", ports=frozenset({443})) == []
    cluster = HIDDEN._replace(destination=parse_prefix("10.96.0.10"))
    assert told(place._replace(translations=(cluster,)), "10.0.0.5") == []


def test_ports_that_are_known_by_another_number() -> None:
    place = reaching(translations=(HIDDEN,))
    ((path, said),) = told(place, ports=frozenset({8080}))
    assert path == "protect.ports"
    assert said.startswith("port 8080 is protected, but clients reach it as port 80, which is")
    assert told(place, ports=frozenset({80})) == []
    assert told(place, ports=frozenset({80, 8080})) == []
    assert told(place, ports=frozenset({443})) == []
