"""The reference of the policy language in Markdown: keys from the models, meanings from a table."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from pydantic import BaseModel

from rstguard.policy.base import Widths
from rstguard.policy.model import Inspect, LargeSources, Policy, Pressure, Protect, SynBudget
from rstguard.policy.rules import MEASURES, Escalate, RuleBase, Unless

MEANINGS = MappingProxyType(
    {
        "version": "of the language: 1",
        "name": "shown in status, events and history",
        "mode": "`enforce` (the default), or `observe`: decide, count and report, change nothing",
        "on_failure": "`open` (the default) or `closed`: what passes while the engine is down",
        "blocking": "what a blocked source sees: `drop` (silence, the default), `reset`, "
        "`unreachable`, at most 100 a second to one address",
        "ban_covers": "what is kept out of a blocked source's packets that come in on a protected "
        "interface: `everything` (the default; of a banned one also what is not TCP), or "
        "`protected`: TCP to protected targets alone",
        "forged_resets": "`off` (the default), `hold`: a RST passes once its sender was asked if "
        "it is true; or `observe`: it passes at once, and what was forged is told",
        "forged_fins": "`off` (the default), or `hold`: FINs are asked for as RSTs are, and each "
        "close takes a round trip longer",
        "reset_exempt": "networks whose RSTs are not asked for, such as those of a middlebox that "
        "resets in others' names",
        "shun": "`challenge` (the default): a shunned source's SYNs are answered with SYN cookies "
        "where they can be had; or `drop`",
        "shun_for": "how long a shun lasts, `1s` to `10m`, by default `10s`",
        "offload": "`auto` (the default): the kernel counts what it counts as the engine does; "
        "or `never`",
        "sweep_every": "how often the connection table is read, `500ms` to `1m`, by default `2s`; "
        "more seldom where it is so large that this would take more than a fifth of a core",
        "bans_per_minute": "a rule that bans in more networks (an IPv4 /24, an IPv6 /48) a minute "
        "shuns instead until that is over, by default 1000",
        "marks": "the eight adjacent bits of marks that are the guard's, by default `0xff000000`; "
        "changed only by a restart",
        "labels": "the first of the eight connection labels that are the guard's, by default 120; "
        "changed only by a restart",
        "mptcp": "`allow` (the default), or `strip`: SYNs to protected targets lose the option "
        "MPTCP, so that their connections are plain TCP, which a kill ends for certain",
        "least_ttl": "hops (TTL, hop limit) that a segment to a server behind this gateway must "
        "have left, or it is dropped: 0 to 64, by default 4; 0: none is",
        "drop_spoofed_after": "what comes from outside in the name of an address that answers "
        "from inside is counted for so long, and then dropped: `0s` to `24h`, by default `10m`, or "
        "`never`",
        "protect": "what is guarded",
        "trusted": "networks that are never counted, reset, shunned or banned",
        "source": "how wide one source is: by default `{ipv4: 32, ipv6: 64}`",
        "inspect": "how much of a connection the engine sees",
        "syn_budget": "above it the kernel answers a service's SYNs with SYN cookies: `auto` (the "
        "default: 128 open handshakes of each service), `off`, or the keys below",
        "half_open": "handshakes of one service that wait for the client's ACK, 16 to 4096, by "
        "default 128: no more than the server's backlog holds",
        "pressure": "what is known of how much services can bear",
        "capacity": "by port, how many connections the server of each can hold, 10 to 10000000; "
        "without it what a service bore before tells when it is pressed",
        "large_sources": "sources that carry a large share of all proven connections: named, and "
        "spared by rules for numbers up to what they bore, until it is said what they are",
        "share": "percent of all proven connections from which on a source is large, `10%` to "
        "`90%`, by default `25%`",
        "ordinary": "networks of sources that are like any other, whatever they carry",
        "rules": "every rule sees every packet it applies to; the most severe action wins",
        "interfaces": 'where untrusted traffic comes in; globs end in `*`, as `"wan*"`',
        "destinations": "addresses and networks; omitted: any (in a rule: all that are protected)",
        "except": "networks of sources that the rule does not concern, those of a load balancer, "
        "say",
        "destination_ipv4": "bits of an IPv4 address, 8 to 32, by default 24",
        "destination_ipv6": "bits of an IPv6 address, 32 to 128, by default 48",
        "ports": "numbers and ranges; omitted: any (in a rule: all that are protected)",
        "packets": "inbound packets of a connection before it is trusted, by default 8",
        "rate": "SYNs a second to one service, by default any number; what is above it is "
        "answered in front of all other rules",
        "when": "`always` (the default), or `pressed`: only at services in distress, and no more "
        "than relieves them; for `connections`, `slow`, `idle`, `age`; of `unanswered` always so",
        "then": "what is done: `observe`, `drop`, `reset` or `ban`",
        "for": "how long a ban lasts, `1s` to `24d`; only with `then: ban`",
        "escalate": "each new ban lasts longer; only with `then: ban`",
        "keep_existing": "`true`: a ban leaves the source's connections alone",
        "ends": "who is told of a reset: `both` (the default), `source` or `destination`",
        "factor": "how many times longer each ban is, 2 to 100",
        "up_to": "the longest ban; under `unless` how many times the limit, 2 to 1000 (10)",
        "memory": "how long an offence is remembered, `1m` to `90d`",
        "productive": "share of the source's completed connections that carried data both ways, "
        "`50%` to `100%`",
        "per": "`{ipv4: N, ipv6: M}` counts by prefix, `service` by destination and port, "
        "`{destination_ipv4: N, destination_ipv6: M}` all that goes to one of such networks; with "
        "`packet_rate` instead of the last two `connection`, each by itself",
        "over": "the limit; beyond it the rule is hit",
        "burst": "how much at once, by default what the limit allows in its own time",
        "unless": "a productive source may go further",
        "within": "how long a target, or an unfinished handshake, counts",
        "shorter_than": "how old a connection may be and still count as short, `100ms` to `1h`",
        "after": "how old a connection must be to be judged; of a large source, for how long it "
        "has carried its share, `10s` to `24h`, by default `10m`",
        "under": "bytes a second that it must move",
        "of": "whose bytes count: `client` (the default), `server` or `both`",
        "over_last": "the time over which `slow` averages, `10s` to `24h`, up to twice as long; "
        "omitted: the whole life of the connection",
        "window": "bytes of advertised window, 0 to 65535",
        "ipv4": "bits of an IPv4 address, 8 to 32",
        "ipv6": "bits of an IPv6 address, 32 to 128",
    }
)
"""What each key means, with its default."""

_PARTS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("protect", Protect),
    ("inspect", Inspect),
    ("syn_budget", SynBudget),
    ("pressure", Pressure),
    ("large_sources", LargeSources),
    ("source", Widths),
)
_OF_RULES: tuple[tuple[str, type[BaseModel]], ...] = (("escalate", Escalate), ("unless", Unless))


def reference() -> str:
    """Return every key of a policy file, and of each kind of rule."""
    parts = ["## Keys of the file", "", *_table(Policy), *_sections(_PARTS)]
    parts += ["", "## Keys that every rule has", "", *_table(RuleBase), *_sections(_OF_RULES)]
    parts += ["", "## Measures, and the keys that go with each"]
    kinds: dict[type[RuleBase], list[str]] = {}
    for measure, kind in MEASURES.items():
        kinds.setdefault(kind, []).append(f"`{measure}`")
    for kind, measures in kinds.items():
        actions = ", ".join(f"`{action}`" for action in kind.actions)
        parts += [
            "",
            f"### {', '.join(measures)}",
            "",
            f"{_sentence(kind)} Actions: {actions}.",
            "",
        ]
        parts += _table(kind, without=RuleBase)
    return "\n".join([*parts, ""])


def _sections(models: tuple[tuple[str, type[BaseModel]], ...]) -> Iterator[str]:
    for key, model in models:
        yield from ("", f"### `{key}`", "", _sentence(model), "", *_table(model))


def _sentence(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().partition("\n\n")[0].replace("\n", " ")


def _table(model: type[BaseModel], without: type[BaseModel] | None = None) -> Iterator[str]:
    yield "| key | meaning | required | example |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        if name == "measure" or (without and name in without.model_fields):
            continue
        key = field.alias or name
        needed = "yes" if field.is_required() else ""
        example = f"`{field.examples[0]}`" if field.examples else ""
        yield f"| `{key}` | {MEANINGS[key]} | {needed} | {example} |"
