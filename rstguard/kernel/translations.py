"""Which addresses and ports this machine translates (DNAT), as rules of iptables and nftables say.

Pure: what the tools print comes in.  Rules are followed from the hook through the chains that they
jump to, as Docker, kube-proxy and firewalld have many.  What a rule asks besides interface, target
address and port is left out of account, so a translation may be told that is rarer than it looks.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from rstguard.engine.address import Prefix, parse_address, parse_prefix

_MOST: Final = 4096
"""Translations that are kept, and a tenth of the rules that are looked at."""
_DEEPEST: Final = 16
"""Jumps from the hook on; iptables itself allows more, and nobody writes them."""


class Translation(NamedTuple):
    """TCP that comes in for a target here is given another one.

    `interface` is "" and `destination` and `ports` (first and last) None where the rule asks for
    none.  `to` is None where it leads to this host itself; `to_port` None where the port stays.
    """

    interface: str = ""
    destination: Prefix | None = None
    ports: tuple[int, int] | None = None
    to: int | None = None
    to_port: int | None = None

    def comes_by(self, names: Collection[str]) -> bool:
        """Tell whether it may be about what comes in by one of these interfaces."""
        return not self.interface or self.interface in names or self.interface[-1] in "+*"


class _Asked(NamedTuple):
    """What a packet must be like to come to a rule."""

    interface: str = ""
    destination: Prefix | None = None
    ports: tuple[tuple[int, int], ...] = ()
    tcp: bool = True

    def and_(self, more: _Asked) -> _Asked:
        return _Asked(
            more.interface or self.interface,
            more.destination or self.destination,
            more.ports or self.ports,
            self.tcp and more.tcp,
        )


class _Rule(NamedTuple):
    asked: _Asked
    jumps: tuple[str, ...] = ()
    to: tuple[int | None, int | None] | None = None
    """New address (None: this host) and port (None: the same), of a rule that translates."""


_Chains = dict[str, list[_Rule]]


def of_iptables(printed: str) -> list[Translation]:
    """Read what ``iptables-save -t nat`` has printed, or that of IPv6."""
    chains: _Chains = {}
    for line in printed.splitlines():
        words = _words(line)
        if words[:1] == ["-A"] and len(words) > 2:
            chains.setdefault(words[1], []).append(_iptables_rule(words[2:]))
    return _followed(chains, ["PREROUTING"])


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # a comment with an odd quote
        return line.split()


def _iptables_rule(words: Sequence[str]) -> _Rule:
    found: dict[str, str] = {}
    for index, word in enumerate(words[:-1]):
        if word.startswith("-") and (index == 0 or words[index - 1] != "!"):
            found.setdefault(word, words[index + 1])
    asked = _Asked(
        found.get("-i", ""),
        _prefix(found.get("-d", "")),
        tuple(_ports(found.get("--dports") or found.get("--dport") or "", ":")),
        found.get("-p", "tcp") == "tcp",
    )
    target = found.get("-j") or found.get("-g") or ""
    if target == "DNAT":
        return _Rule(asked, to=_new_target(found.get("--to-destination", "")))
    if target == "REDIRECT":
        return _Rule(asked, to=(None, _number(found.get("--to-ports", ""))))
    return _Rule(asked, (target,))


def _new_target(text: str) -> tuple[int | None, int | None] | None:
    """Read ``10.0.0.5``, ``10.0.0.5-10.0.0.9:80-90`` or ``[fd00::5]:80``: the first of each."""
    address, port = text, ""
    if text.startswith("["):
        address, _, port = text[1:].partition("]")
    elif text.count(":") == 1:
        address, _, port = text.partition(":")
    try:
        return parse_address(address.partition("-")[0]), _number(port.lstrip(":"))
    except ValueError:
        return None


def of_nft(printed: str) -> list[Translation]:
    """Read what ``nft -j list ruleset`` has printed; rules of iptables are opaque to it."""
    try:
        entries = json.loads(printed)["nftables"] if printed else []
    except (ValueError, KeyError, TypeError):
        return []
    chains: _Chains = {}
    hooks = []
    for entry in entries:
        chain, rule = entry.get("chain", {}), entry.get("rule", {})
        if chain.get("type") == "nat" and chain.get("hook") == "prerouting":
            hooks.append(_chain_name(chain, chain.get("name")))
        if rule:
            name = _chain_name(rule, rule.get("chain"))
            chains.setdefault(name, []).append(_nft_rule(rule, rule.get("expr") or []))
    return _followed(chains, hooks)


def _chain_name(of: dict[str, Any], name: object) -> str:
    return f"{of.get('family')} {of.get('table')} {name}"


def _nft_rule(rule: dict[str, Any], expressions: Sequence[Any]) -> _Rule:
    asked, jumps = _Asked(), []
    to: tuple[int | None, int | None] | None = None
    for expression in filter(lambda one: isinstance(one, dict), expressions):
        for what, value in expression.items():
            if what == "match" and value.get("op") in ("==", "in"):
                asked = asked.and_(_nft_match(value["left"], value["right"]))
            elif what in ("jump", "goto"):
                jumps.append(_chain_name(rule, value.get("target")))
            elif what == "vmap":
                jumps += [_chain_name(rule, name) for name in _nft_targets(value.get("data"))]
            elif what == "dnat" and isinstance(value, dict) and isinstance(value.get("addr"), str):
                address = value["addr"]
                to = parse_address(address), _number(value.get("port", ""))
            elif what == "redirect":
                to = None, _number((value or {}).get("port", ""))
    return _Rule(asked, tuple(jumps), to)


def _nft_match(left: Any, right: Any) -> _Asked:
    payload = left.get("payload", {}) if isinstance(left, dict) else {}
    meta = left.get("meta", {}) if isinstance(left, dict) else {}
    field = payload.get("field")
    if meta.get("key") == "iifname" and isinstance(right, str):
        return _Asked(interface=right)
    if meta.get("key") == "l4proto" or field in ("protocol", "nexthdr"):
        return _Asked(tcp="tcp" in json.dumps(right) or right == 6)
    if payload.get("protocol") in ("ip", "ip6") and field == "daddr":
        return _Asked(destination=_nft_prefix(right))
    if field == "dport":
        tcp = payload.get("protocol") in ("tcp", "th")
        return _Asked(ports=tuple(_nft_ports(right)), tcp=tcp)
    return _Asked()


def _nft_prefix(right: Any) -> Prefix | None:
    if isinstance(right, dict) and "prefix" in right:
        return _prefix(f"{right['prefix'].get('addr')}/{right['prefix'].get('len')}")
    return _prefix(right) if isinstance(right, str) else None


def _nft_ports(right: Any) -> Iterator[tuple[int, int]]:
    if isinstance(right, dict) and "set" in right:
        for one in right["set"]:
            yield from _nft_ports(one)
    elif isinstance(right, dict) and "range" in right:
        first, last = right["range"]
        yield from _ports(f"{first}-{last}", "-")
    else:
        yield from _ports(str(right), "-")


def _nft_targets(data: Any) -> Iterator[str]:
    """Yield the chains that a map of verdicts leads to."""
    for pair in data.get("set", ()) if isinstance(data, dict) else ():
        verdict = pair[1] if isinstance(pair, list) and len(pair) == 2 else {}
        for what in ("jump", "goto"):
            if isinstance(verdict, dict) and what in verdict:
                yield verdict[what].get("target", "")


def _followed(chains: _Chains, hooks: Iterable[str]) -> list[Translation]:
    """Return the translations that rules lead to, from the hooks on, each once."""
    found: dict[Translation, None] = {}
    left = 10 * _MOST
    waiting = [(hook, _Asked(), 0) for hook in hooks]
    while waiting and left > 0 and len(found) < _MOST:
        name, asked, depth = waiting.pop()
        for rule in chains.get(name, ()):
            left -= 1
            both = asked.and_(rule.asked)
            if not both.tcp:
                continue
            if rule.to is not None:
                for ports in both.ports or (None,):
                    found[Translation(both.interface, both.destination, ports, *rule.to)] = None
            elif depth < _DEEPEST:
                waiting += [(jump, both, depth + 1) for jump in rule.jumps if jump in chains]
    return list(found)


def _ports(text: str, dash: str) -> Iterator[tuple[int, int]]:
    for part in filter(None, text.split(",")):
        first, _, last = part.partition(dash)
        if first.isdecimal() and (not last or last.isdecimal()):
            yield int(first), int(last or first)


def _number(value: object) -> int | None:
    first = str(value).partition("-")[0]
    return int(first) if first.isdecimal() else None


def _prefix(text: str) -> Prefix | None:
    try:
        return parse_prefix(text) if text else None
    except ValueError:
        return None
