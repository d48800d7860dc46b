"""The addresses that tests' clients have: as many as one likes, each used once."""

from __future__ import annotations

import itertools

import pytest

from tests.support.network import SERVER4, SERVER6, ThreeHosts

ROUTER4, ROUTER6 = "10.71.1.3", "fd71:1::3"
"""The client's addresses that are the gateway's next hops."""

BOTH_FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])
_numbers = itertools.count(1)


def give_sources(lab: ThreeHosts) -> None:
    """Make the client's host the owner of 10.128.0.0/9 and fd73::/32."""
    lab.set("client", {"net/ipv6/ip_nonlocal_bind": "1"})
    # The way to them leads over addresses of their own: a next hop is protected by the guard.
    routers = (f"{ROUTER4}/24 dev eth0", f"{ROUTER6}/64 dev eth0 preferred_lft 0")
    lab.ip("client", *(f"address add {router}" for router in routers))
    for network, router in (("10.128.0.0/9", ROUTER4), ("fd73::/32", ROUTER6)):
        lab.ip("client", f"route add local {network} dev lo")
        lab.ip("gateway", f"route add {network} via {router}")


def source(v6: bool) -> str:
    """Return an address that no test has used yet, alone in its /24 or /48."""
    return host(next(_numbers), 1, v6)


def neighbours(v6: bool, count: int) -> list[str]:
    """Return fresh addresses that share a /24, or /64 networks that share a /48."""
    number = next(_numbers)
    return [host(number, last, v6) for last in range(1, count + 1)]


def host(number: int, last: int, v6: bool) -> str:
    """Return one address of the client's networks."""
    if v6:
        return f"fd73:0:{number:x}:{last:x}::1"
    return f"10.{128 + number // 250}.{number % 250}.{last}"


def network_of(address: str) -> str:
    """Return the source that the guard counts an address as, as it prints it."""
    return f"{address.removesuffix('1')}/64" if ":" in address else address


def server_address(v6: bool) -> str:
    """Return the address of the server."""
    return SERVER6 if v6 else SERVER4
