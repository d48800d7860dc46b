"""Neighbours that are tools, run again and again while the guard works, some by a timer."""

from __future__ import annotations

from tests.neighbours.trial import Neighbour, Place


def zeroed(place: Place) -> None:
    """Counters of all rules are read and set to 0."""
    place.both("gateway", "-t raw -Z", "-t mangle -Z", "-Z")


def restored(place: Place) -> None:
    """All rules are saved and loaded again, those of the guard with them."""
    for tool in ("iptables", "ip6tables"):
        place.run("gateway", f"{tool}-restore", "-w", stdin=place.run("gateway", f"{tool}-save"))


def forgotten(place: Place) -> None:
    """Single connections are deleted from the tracker."""
    for target in place.targets:
        for address in target.sources[:1]:
            place.try_sh("gateway", f"conntrack -D -s {address}")


def watched(place: Place) -> None:
    """Everything is watched: packets, rules and connections."""
    for words in (
        ("tcpdump", "-nn", "-i", "out", "-w", "/dev/null"),
        ("tcpdump", "-nn", "-i", "any", "-w", "/dev/null", "tcp"),
        ("nft", "monitor"),
        ("conntrack", "-E", "-o", "timestamp"),
        ("ip", "-ts", "monitor", "all"),
    ):
        place.start("gateway", *words, log="watching")


def listed(place: Place) -> None:
    """Lists are made of what there is."""
    place.sh("gateway", "conntrack -L", "conntrack -C", "conntrack -S", "ipset list",
             "iptables-save -c", "nft -j list ruleset", "ss -tan", "ip -s link")  # fmt: skip


def own_sets(place: Place) -> None:
    """Another program's sets are made, filled, swapped, emptied and destroyed."""
    place.run("gateway", "ipset", "restore", "-exist", stdin=SETS)


_ADDRESSES = "".join(f"add fresh 198.18.{n // 250}.{n % 250}\n" for n in range(5000))
SETS = f"""\
create listed hash:net family inet maxelem 131072
create fresh hash:net family inet maxelem 131072
{_ADDRESSES}swap fresh listed
flush fresh
destroy fresh
"""


def with_sets(place: Place) -> None:
    """Rules that look at another program's sets."""
    own_sets(place)
    for table, chain in (("raw", "PREROUTING"), ("filter", "FORWARD")):
        place.sh(
            "gateway", f"iptables -w -t {table} -A {chain} -m set --match-set listed src -j DROP"
        )


def locked(place: Place) -> None:
    """Chains of another program are replaced all the time, with the lock of iptables."""
    text = "*filter\n:BUSY - [0:0]\n-F BUSY\n" + "".join(
        f"-A BUSY -s 198.18.{n // 250}.{n % 250} -j DROP\n" for n in range(500)
    )
    for _ in range(3):
        place.run("gateway", "iptables-restore", "-n", "-w", stdin=text + "COMMIT\n")
    place.try_sh("gateway", "iptables -w -A FORWARD -j BUSY", "iptables -w -D FORWARD -j BUSY")


def used(place: Place) -> None:
    """Some rules in every table."""
    place.both("gateway", "-t raw -A PREROUTING -i none", "-t mangle -A PREROUTING -i none")


NEIGHBOURS: dict[str, Neighbour] = {
    "counters set to 0": Neighbour(used, meanwhile=zeroed),
    "rules saved and restored": Neighbour(meanwhile=restored),
    "single connections deleted": Neighbour(meanwhile=forgotten),
    "watchers": Neighbour(watched, meanwhile=listed, needs=("tcpdump",)),
    "sets of others": Neighbour(with_sets, meanwhile=own_sets),
    "rules of others loaded all the time": Neighbour(meanwhile=locked),
}
