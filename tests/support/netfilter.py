"""A model of Netfilter's chains: what a list of rules does to one packet.  Pure.

It knows the matches and targets that the guard's rules use, and refuses others: a rule that it
cannot judge is a failure of the test that asks.  What only the kernel can tell (limits, statistics)
is asked of `chance`.  tests/kernel/test_scope_netns.py holds it against the kernel.
"""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from rstguard.engine.address import Prefix, is_v6, parse_prefix
from rstguard.engine.wire import ACK, FIN, PSH, RST, SYN, URG

_FLAGS: Final = {"FIN": FIN, "SYN": SYN, "RST": RST, "PSH": PSH, "ACK": ACK, "URG": URG}
HOOKS: Final = {
    "forward": ("PREROUTING", "FORWARD", "POSTROUTING"),
    "input": ("PREROUTING", "INPUT"),
    "output": ("OUTPUT", "POSTROUTING"),
}
TABLES: Final = ("raw", "mangle", "filter", "security")

Element = tuple[Prefix | int, ...]
"""What a set holds: addresses as prefixes, ports as numbers."""


@dataclass(slots=True)
class Seen:
    """A packet, what the tracker knows of its connection, and what the host knows of its way."""

    way: str
    came_in: str
    goes_out: str
    tcp: bool
    source: int
    destination: int
    source_port: int = 0
    destination_port: int = 0
    flags: int = 0
    options: frozenset[int] = frozenset()
    length: int = 40
    payload: bool = False
    hops: int = 64
    states: frozenset[str] = frozenset({"NEW"})
    reply: bool = False
    assured: bool = False
    packets: int = 1
    connmark: int = 0
    labels: frozenset[int] = frozenset()
    mark: int = 0
    has_socket: bool = True
    local_destination: bool = False
    reverse_path: bool = True
    asked: int = 0
    """The address that its client asked for, if it was translated; 0: as `destination`."""
    asked_port: int = 0
    small_window: bool = False

    @property
    def tracked(self) -> bool:
        """Whether the packet belongs to an entry of the tracker."""
        return not self.states & {"INVALID", "UNTRACKED"}


class Effect(NamedTuple):
    """Something that a rule did to a packet, and the rule."""

    what: str
    rule: str


@dataclass(slots=True)
class World:
    """What packets meet besides rules: the sets, and chance."""

    sets: dict[str, set[Element]] = field(default_factory=lambda: defaultdict(set))
    chance: Callable[[str], bool] = lambda _: False
    """Whether a limit is exceeded, or a sample taken: asked with the match in words."""


Test = Callable[[Seen, World], bool]


@dataclass(slots=True)
class Rule:
    """One rule: its text, the tests that all must hold, and what is done then."""

    text: str
    tests: list[Test]
    asked: list[str]
    """Each of the tests in words."""
    target: str
    goes: bool
    arguments: list[str]


Chains = dict[str, list[Rule]]


class Netfilter:
    """The tables of one address family, as iptables-save prints them."""

    def __init__(self, text: str, clears: int = 0) -> None:
        """Read the rules; `clears` are the bits of marks that are gone before packets are routed.

        Raises:
            ValueError: a match or target is unknown here.
        """
        self.tables: dict[str, Chains] = {}
        self.clears = clears
        self.hits: Counter[tuple[str, str]] = Counter()
        """How often a rule was met, by table and its text."""
        for line in text.splitlines():
            if line.startswith("*"):
                table = self.tables.setdefault(line[1:], {})
            elif line.startswith("-A "):
                _, chain, *words = shlex.split(line)
                table.setdefault(chain, []).append(_rule(line, words))

    def pass_through(self, seen: Seen, world: World) -> Iterator[Effect]:
        """Send a packet all its way and tell what was done to it; what ends it comes last."""
        for hook in HOOKS[seen.way]:
            for table in TABLES:
                chain = self.tables.get(table, {}).get(hook)
                if chain is None:
                    continue
                effects: list[Effect] = []
                verdict = self._chain(table, hook, seen, world, effects)
                yield from effects
                if verdict == "drop":
                    return
            if hook == "PREROUTING":
                seen.mark &= ~self.clears

    def _chain(
        self, table: str, name: str, seen: Seen, world: World, effects: list[Effect]
    ) -> str | None:
        """Return a verdict, or None at the end of the chain."""
        chains = self.tables[table]
        for rule in chains.get(name, ()):
            if not all(test(seen, world) for test in rule.tests):
                continue
            self.hits[table, rule.text] += 1
            if rule.target == "RETURN":
                break
            if rule.target in chains:
                verdict = self._chain(table, rule.target, seen, world, effects)
                if verdict is not None or rule.goes:
                    return verdict
            elif verdict := _do(rule, seen, world, effects):
                return verdict
        return None


def _do(rule: Rule, seen: Seen, world: World, effects: list[Effect]) -> str:
    """Carry out a target; return a verdict, or "" if the packet goes on to the next rule."""
    words = rule.arguments
    effect = Effect(rule.target, rule.text)
    match rule.target:
        case "DROP" | "REJECT":
            effects.append(effect)
            return "drop"
        case "NFQUEUE":
            effects.append(effect)
            return "queue past" if "--queue-bypass" in words else "drop"
        case "SYNPROXY":
            if seen.flags & (FIN | SYN | RST | ACK) in (SYN, ACK):  # synproxy_tg4
                effects.append(effect)
                return "drop"
        case "MARK" | "CONNMARK":
            name = rule.target.lower()
            mark = _changed(before := getattr(seen, name), words)
            if mark != before:
                setattr(seen, name, mark)
                effects.append(effect)
        case "SET":
            world.sets[words[1]].add(_element(seen, words[2]))
            effects.append(effect)
        case "CT":
            seen.states, seen.connmark = frozenset({"UNTRACKED"}), 0
            effects.append(effect)
        case "NFLOG" | "TCPOPTSTRIP":
            effects.append(effect)
        case other if other:
            raise ValueError(f"the model has no target {other}: {rule.text}")
    return ""


def _changed(mark: int, words: list[str]) -> int:
    value, mask = _bits(words[words.index("--set-xmark") + 1])
    return (mark & ~mask) ^ value


def _bits(text: str) -> tuple[int, int]:
    value, _, mask = text.partition("/")
    return int(value, 0), int(mask or "0xffffffff", 0)


def _element(seen: Seen, directions: str) -> Element:
    found: list[Prefix | int] = []
    for place, direction in enumerate(directions.split(",")):
        address = seen.source if direction == "src" else seen.destination
        port = seen.source_port if direction == "src" else seen.destination_port
        found.append(port if place == 1 else Prefix(address, 128 if is_v6(address) else 32))
    return tuple(found)


def _in_set(seen: Seen, elements: set[Element], directions: list[str]) -> bool:
    return any(_fits(seen, element, directions) for element in elements)


def _fits(seen: Seen, element: Element, directions: list[str]) -> bool:
    for part, direction in zip(element, directions, strict=True):
        source = direction == "src"
        if isinstance(part, Prefix):
            if not part.covers(seen.source if source else seen.destination):
                return False
        elif not seen.tcp or part != (seen.source_port if source else seen.destination_port):
            return False
    return True


def _rule(line: str, words: list[str]) -> Rule:
    rule = Rule(line, [], [], "", False, [])
    module, negated = "", False
    rest = iter(words)
    for word in rest:
        if word == "!":
            negated = True
            continue
        if word == "-m":
            module = next(rest)
            if module == "rpfilter":
                rule.tests.append(lambda seen, _: not seen.reverse_path)
                rule.asked.append("rpfilter --invert")
            continue
        if word in ("-j", "-g"):
            rule.target, rule.goes, rule.arguments = next(rest), word == "-g", list(rest)
            break
        taken: list[str] = []
        test = _test(module, word, _keeping(rest, taken))
        if test is not None:
            test = _negation(test) if negated else test
            rule.tests.append(_of_entry(module, word, words, test))
            rule.asked.append(" ".join((module, "!" * negated, word, *taken)))
        negated = False
    if "--set" in words and "--label" in words:  # a match that does something
        rule.tests[-1] = _labelling(int(words[words.index("--label") + 1]))
    return rule


def _of_entry(module: str, option: str, words: list[str], test: Test) -> Test:
    """Return what a question about an entry comes to, also where there is none.

    Then connmark matches nothing, negated or not (connmark_mt in xt_connmark.c), and of a conntrack
    match only the state is asked, if at all (conntrack_mt in xt_conntrack.c).
    """
    if module == "connmark":
        return lambda seen, world: seen.tracked and test(seen, world)
    if module == "conntrack" and option != "--ctstate":
        otherwise = "--ctstate" in words
        return lambda seen, world: test(seen, world) if seen.tracked else otherwise
    return test


def _keeping(words: Iterator[str], taken: list[str]) -> Iterator[str]:
    for word in words:
        taken.append(word)
        yield word


def _negation(test: Test) -> Test:
    return lambda seen, world: not test(seen, world)


def _labelling(label: int) -> Test:
    def add(seen: Seen, _: World) -> bool:
        seen.labels |= {label}
        return True

    return add


_WITHOUT_MEANING: Final = (
    *("--invert", "--set", "--hashlimit-rate-match", "--update-counters"),
    *("--every", "--packet", "--connbytes-mode", "--connbytes-dir"),
    *(f"--hashlimit-{what}" for what in ("burst", "mode", "name", "srcmask", "dstmask")),
    *(f"--hashlimit-{what}" for what in ("htable-size", "htable-max", "htable-expire")),
    *(f"--hashlimit-{what}" for what in ("rate-interval", "htable-gcinterval")),
)
_FLAGS_ALONE: Final = ("--invert", "--set", "--hashlimit-rate-match", "--update-counters")


def _test(module: str, option: str, rest: Iterator[str]) -> Test | None:
    """Return what an option asks, or None if it only belongs to another one.

    Raises:
        ValueError: it is unknown here.
    """
    if option == "--socket-exists":
        return lambda seen, _: seen.has_socket
    if option in _WITHOUT_MEANING:
        if option not in _FLAGS_ALONE:
            next(rest)
        return None
    value = next(rest)
    if option == "--tcp-flags":
        return _flags(value, next(rest))
    if option == "--match-set":
        directions = next(rest).split(",")
        return lambda seen, world: _in_set(seen, world.sets[value], directions)
    if option == "--mark":
        wanted, mask = _bits(value)
        if module == "mark":
            return lambda seen, _: seen.mark & mask == wanted
        return lambda seen, _: seen.connmark & mask == wanted
    if option in _SIMPLE:
        return _SIMPLE[option](value)
    if option in _BY_CHANCE:
        asked = f"{option} {value}"
        return lambda _, world: world.chance(asked)
    raise ValueError(f"the model has no match {module} {option} {value}")


_BY_CHANCE: Final = (
    "--hashlimit-upto",
    "--hashlimit-above",
    "--mode",
    "--limit",
    "--packets-gt",
    "--mss",
)


def _flags(mask: str, wanted: str) -> Test:
    of, are = (sum(_FLAGS.get(name, 0) for name in names.split(",")) for names in (mask, wanted))
    return lambda seen, _: seen.flags & of == are


def _device(get: Callable[[Seen], str]) -> Callable[[str], Test]:
    def test(name: str) -> Test:
        if name.endswith("+"):
            return lambda seen, _: get(seen).startswith(name[:-1])
        return lambda seen, _: get(seen) == name

    return test


def _states(value: str) -> Test:
    wanted = frozenset(value.split(","))
    return lambda seen, _: bool(seen.states & wanted)


def _address(value: str, get: Callable[[Seen], int]) -> Test:
    prefix = parse_prefix(value)
    return lambda seen, _: prefix.covers(get(seen))


def _u32(value: str) -> Test:
    """Return what asks for a small window, or for a worker's share of all sources."""
    if "=0x0:" in value:
        return lambda seen, _: seen.small_window
    return lambda _, world: world.chance(value)


def _length(value: str) -> Test:
    least, _, most = value.partition(":")
    return lambda seen, _: int(least) <= seen.length <= int(most or least)


def _status(value: str) -> Test:
    if value == "ASSURED":
        return lambda seen, _: seen.assured
    return lambda seen, _: "ESTABLISHED" in seen.states or seen.packets > 1  # CONFIRMED


def _ports(value: str) -> Test:
    runs = [part.partition(":") for part in value.split(",")]
    named = {p for first, _, last in runs for p in range(int(first), int(last or first) + 1)}
    return lambda seen, _: seen.destination_port in named


_SIMPLE: Final[Mapping[str, Callable[[str], Test]]] = {
    "-p": lambda _: lambda seen, _: seen.tcp,
    "-i": _device(lambda seen: seen.came_in),
    "-o": _device(lambda seen: seen.goes_out),
    "-s": lambda value: _address(value, lambda seen: seen.source),
    "-d": lambda value: _address(value, lambda seen: seen.destination),
    "--sport": lambda value: lambda seen, _: seen.source_port == int(value),
    "--dport": lambda value: lambda seen, _: seen.destination_port == int(value),
    "--dports": _ports,
    "--tcp-option": lambda value: lambda seen, _: int(value) in seen.options,
    "--ttl-lt": lambda value: lambda seen, _: seen.hops < int(value),
    "--hl-lt": lambda value: lambda seen, _: seen.hops < int(value),
    "--dst-type": lambda _: lambda seen, _: seen.local_destination,
    "--ctstate": _states,
    "--ctorigdst": lambda value: _address(value, lambda seen: seen.asked or seen.destination),
    "--ctorigdstport": lambda value: (
        lambda seen, _: (seen.asked_port or seen.destination_port) == int(value)
    ),
    "--ctdir": lambda value: lambda seen, _: seen.reply is (value == "REPLY"),
    "--ctstatus": _status,
    "--length": _length,
    "--bytecode": lambda _: lambda seen, _: seen.payload,
    "--u32": _u32,
    "--connbytes": lambda value: lambda seen, _: seen.packets >= int(value.partition(":")[0]),
    "--label": lambda value: lambda seen, _: int(value) in seen.labels,
}
