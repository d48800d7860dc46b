"""Small policies drawn by chance: each shapes rules and sets in another way, and all are valid."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from rstguard.engine.address import parse_address, parse_prefix
from rstguard.engine.offers import Offer
from rstguard.engine.ruleset import RuleSet
from rstguard.engine.service import Service
from rstguard.policy.compile import compile_policy
from rstguard.policy.model import Policy

_INTERFACES = (["eth0"], ["wan*"], ["eth0", "wan*"])
_DESTINATIONS = (None, ["203.0.113.10", "2001:db8::/48"], ["192.0.2.0/24"], ["0.0.0.0/0", "::/0"])
_TRUSTED: tuple[list[str], ...] = (
    [],
    ["10.0.0.0/8", "fd00::/8"],
    ["198.51.100.7"],
    ["10.0.0.0/8", "10.1.0.0/16"],
)
_PORTS = (None, [80], [22, 80, 443], ["8000-8010", 80], ["1-65535"])
_PROTECTED = ("192.0.2.1", "198.51.100.7", "2001:db8::1")
_SOURCES: tuple[dict[str, int], ...] = ({}, {"ipv4": 24}, {"ipv4": 32, "ipv6": 56}, {"ipv6": 128})
_RATES = ("20/s", "100/s", "90/m", "1000/h")
_RULES: tuple[dict[str, Any], ...] = (
    {"measure": "syn_rate", "burst": 200, "then": "ban", "for": "10m"},
    {"measure": "syn_rate", "per": {"ipv4": 24, "ipv6": 48}, "then": "drop"},
    {"measure": "syn_rate", "per": "service", "then": "drop"},
    {"measure": "syn_rate", "per": "service", "ports": [80, 443], "then": "drop"},
    {"measure": "syn_rate", "per": {"destination_ipv4": 24}, "then": "drop"},
    {
        "measure": "syn_rate",
        "per": "service",
        "then": "drop",
        "except": ["10.0.0.0/8", "fd00::/8"],
        "destinations": ["203.0.113.0/24", "192.0.2.1", "2001:db8::/32"],
    },
    {"measure": "connection_rate", "then": "reset", "except": ["198.51.100.7"]},
    {"measure": "bad_flags", "then": "drop"},
    {"measure": "out_of_state", "then": "ban", "for": "1h"},
    {"measure": "reset_rate", "then": "ban", "for": "1h"},
    {"measure": "reset_rate", "then": "ban", "for": "1h", "ports": [22]},
    {"measure": "connections", "over": 200, "then": "reset"},
    {"measure": "idle", "over": "15m", "then": "reset"},
    {"measure": "packet_rate", "over": "200/s", "per": "connection", "then": "reset"},
    {"measure": "idle", "over": "15m", "when": "pressed", "then": "ban", "for": "1h"},
    {"measure": "unanswered", "over": "30s", "then": "reset"},
    {"measure": "refused_ports", "over": 3, "within": "10m", "then": "ban", "for": "1h"},
    {"measure": "stalled", "over": "10s", "window": 100, "then": "reset"},
)

SERVICES = (
    Service(parse_address("192.0.2.1"), 80),
    Service(parse_address("192.0.2.9"), 443),
    Service(parse_address("2001:db8::1"), 80),
)


def random_ruleset(random: Random) -> RuleSet:
    """Return a compiled policy."""
    protect = {
        "interfaces": random.choice(_INTERFACES),
        "destinations": random.choice(_DESTINATIONS),
        "ports": random.choice(_PORTS),
    }
    policy: dict[str, Any] = {
        "version": 1,
        "mode": random.choice(("enforce", "enforce", "observe")),
        "on_failure": random.choice(("open", "closed")),
        "blocking": random.choice(("drop", "reset", "unreachable")),
        "offload": random.choice(("auto", "never")),
        "protect": {key: value for key, value in protect.items() if value is not None},
        "trusted": random.choice(_TRUSTED),
        "source": random.choice(_SOURCES),
        "rules": [
            {"over": random.choice(_RATES), **rule, "name": f"rule-{number}"}
            for number, rule in enumerate(random.sample(_RULES, random.randint(0, 4)))
        ],
    }
    if random.random() < 0.3:
        policy["least_ttl"] = random.choice((0, 2, 64))
    if random.random() < 0.3:
        policy["drop_spoofed_after"] = random.choice(("0s", "1m", "never"))
    if random.random() < 0.4:
        policy["syn_budget"] = {"rate": random.choice(("300/s", "20000/s")), "ports": [80]}
        if random.random() < 0.3:
            del policy["syn_budget"]["ports"]
        if random.random() < 0.5:
            policy["syn_budget"]["half_open"] = random.choice((16, 4096))
    elif random.random() < 0.3:
        policy["syn_budget"] = "off"
    ruleset = compile_policy(Policy.model_validate(policy))
    protected = tuple(map(parse_prefix, random.sample(_PROTECTED, random.randint(0, 2))))
    return replace(ruleset, scope=replace(ruleset.scope, protected=protected))


def random_offers(random: Random) -> dict[Service, Offer]:
    """Return what some services were seen to offer."""
    return {
        service: Offer(
            random.choice((536, 1460)),
            random.choice((-1, 7)),
            random.random() < 0.5,
            True,
            random.choice(((), (), (service._replace(port=8001),))),
        )
        for service in SERVICES
        if random.random() < 0.5
    }
