"""Operations drawn by chance, of the guard and of other programs, for any kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from rstguard.engine.address import parse_address, parse_prefix
from rstguard.engine.ruleset import RuleSet
from rstguard.kernel import KernelError
from rstguard.kernel.elements import Element, Kind
from rstguard.kernel.footprint import Footprint
from rstguard.kernel.seam import Kernel
from tests.support.random_policies import random_offers, random_ruleset

_QUEUES = range(5640, 5642)
_SOURCES = ("192.0.2.1", "192.0.2.2", "198.51.100.0/24", "2001:db8::1", "2001:db8:1::/64")
_EVERYBODY = "0.0.0.0/0"
_SECONDS = (100, 300, 900, None)
"""Far enough apart that the time which passes meanwhile makes none longer than another."""
_CHAINS = ("rstguard-raw", "rstguard-in", "rstguard-queue", "rstguard-condemned", "other")
_BUILTIN = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD"),
}
_PLAIN_RULES = (
    "-j ACCEPT",
    "-j LOG",
    "-p udp -j DROP",
    "-p tcp -m tcp --dport 80 -j ACCEPT",
    "-p tcp --dport 443 -j RETURN",
    "-m connbytes --connbytes 10 --connbytes-mode packets --connbytes-dir original -j RETURN",
    "-m set --match-set rstguard-ban{family} src -j DROP",
    "-m set --match-set other src -j DROP",
)
_RULES = (*_PLAIN_RULES, "-j other", "-j rstguard-raw", "-g rstguard-queue")
_SETS = (
    "rstguard-ban4",
    "rstguard-shun6",
    "rstguard-ports",
    "rstguard-dst4",
    "rstguard-thin4-0",
    "rstguard-ban4-new",
    "other",
)
_KINDS = (
    "hash:net timeout 0 comment",
    "hash:net family inet maxelem 1048576 timeout 0 comment",
    "hash:net maxelem 2 timeout 50",
    "hash:net",
    "hash:ip timeout 600",
    "hash:ip family inet6",
    "bitmap:port range 0-65535",
)
_SYSCTLS = ("acct", "timestamp", "tcp_be_liberal", "tcp_loose")
SYSCTLS = tuple(f"net.netfilter.nf_conntrack_{name}" for name in _SYSCTLS)


@dataclass(frozen=True, slots=True)
class Side:
    """One of the kernels that are compared, and what a guard has changed in it."""

    kernel: Kernel
    footprint: Footprint

    @classmethod
    def of(cls, kernel: Kernel, directory: Path) -> Side:
        """Return a kernel that no guard has touched yet."""
        directory.mkdir()
        return cls(kernel, Footprint(kernel, directory, _QUEUES))


@dataclass(frozen=True, slots=True)
class Operation:
    """Something to do; its words say what."""

    words: str
    do: Callable[[Side], object] = field(repr=False)
    why_counts: bool = True
    """Whether it matters for which reason it is refused."""

    def on(self, side: Side) -> str:
        """Do it; return what came of it, without what depends on time."""
        try:
            return f"done: {self.do(side)}"
        except KernelError as error:
            return f"refused: {type(error).__name__}" if self.why_counts else "refused"


def random_operations(random: Random) -> list[Operation]:
    """Return a list of operations; most begin like a guard."""
    rulesets = [random_ruleset(random) for _ in range(2)]
    found = _beginning(random, rulesets[0])
    draws = (
        *(_of_guard, _of_guard, _of_guard, _of_elements, _of_elements, _of_sysctl),
        *(_of_iptables, _of_restore, _of_ipset),
    )
    for _ in range(random.randint(3, 7)):
        draw = random.choice(draws)
        found.append(draw(random, rulesets))
    return found


def _beginning(random: Random, ruleset: RuleSet) -> list[Operation]:
    if random.random() < 0.2:
        return []
    return [
        Operation("prepare", lambda side: side.footprint.prepare(ruleset)),
        Operation("divert", lambda side: side.footprint.divert(ruleset)),
    ][: random.choice((1, 2, 2, 2))]


def _of_guard(random: Random, rulesets: Sequence[RuleSet]) -> Operation:
    old, new = random.sample(rulesets, 2)
    diverts, offers = random.random() < 0.8, random_offers(random)
    keep = random.random() < 0.3

    def learn(side: Side) -> None:
        side.footprint.known = offers
        side.footprint.divert(new)

    choices: dict[str, Callable[[Side], object]] = {
        "prepare": lambda side: side.footprint.prepare(new),
        "divert": lambda side: side.footprint.divert(new),
        "learn": learn,
        "replace": lambda side: side.footprint.replace(old, new, diverts),
        "withdraw": lambda side: side.footprint.withdraw(),
        "restore": lambda side: side.footprint.restore(old),
        "lost": lambda side: side.footprint.lost(old),
        "blocked": lambda side: side.kernel.blocked_by_kind(),
        "remove": lambda side: side.footprint.remove(keep),
    }
    name = random.choice(list(choices))
    return Operation(name, choices[name])


def _of_elements(random: Random, _rulesets: Sequence[RuleSet]) -> Operation:
    sources = random.sample(_SOURCES, random.randint(1, 3))
    if random.random() < 0.05:
        sources.append(_EVERYBODY)
    elements = [_element(random, source) for source in sources]
    shorten = random.random() < 0.3
    prefix, address = elements[0].source, parse_address(sources[0].partition("/")[0])
    set_name = random.choice(_SETS)

    def add(side: Side) -> None:
        with side.kernel.sets() as sets:
            sets.add(elements, shorten)

    def put(side: Side) -> None:
        with side.kernel.sets() as sets:
            sets.put(set_name, [element.source for element in elements], 700)

    def take(side: Side) -> None:
        with side.kernel.sets() as sets:
            sets.take(set_name, [prefix])

    def look(side: Side) -> object:
        with side.kernel.sets() as sets:
            listed = sorted(element[:3] for element in sets.list())
            counted = sets.entries(set_name)
            return sets.contains(address), sets.proven(address), listed, counted

    def remove(side: Side) -> bool:
        with side.kernel.sets() as sets:
            return sets.remove(prefix)

    name, do = random.choice((("add", add), ("add", add), ("put", put), ("take", take),
                              ("look", look), ("remove", remove)))  # fmt: skip
    return Operation(f"{name} {' '.join(sources)} ({set_name}, {shorten})", do)


def _element(random: Random, source: str) -> Element:
    kind: Kind = random.choice(("ban", "ban", "shun"))
    keeps = kind == "ban" and random.random() < 0.5
    seconds = random.choice(_SECONDS)
    if seconds and keeps:
        seconds += 50
    # Whether an equal one is renewed depends on whether a moment has passed: nobody is to see it.
    rule = f"for-{seconds}"
    return Element(parse_prefix(source), kind, rule, seconds, keeps)


def _of_iptables(random: Random, _rulesets: Sequence[RuleSet]) -> Operation:
    family, table = random.choice((4, 6)), random.choice(list(_BUILTIN))
    command = _iptables_command(random, family, table)
    return _run([f"ip{'6' * (family == 6)}tables", "-w", "-t", table, *command])


def _of_restore(random: Random, _rulesets: Sequence[RuleSet]) -> Operation:
    """Several changes at once: of each table all are made, or none."""
    family = random.choice((4, 6))
    lines = []
    for table in random.sample(list(_BUILTIN), random.randint(1, 2)):
        lines.append(f"*{table}")
        if random.random() < 0.7:
            lines.append(f":{random.choice(('other', 'other', 'rstguard-queue'))} - [0:0]")
        if random.random() < 0.3:  # a chain that is used cannot go, and nothing else is done
            lines += [f"-A {random.choice(_BUILTIN[table])} -j other", "-X other"]
        else:
            count = random.randint(1, 4)
            lines += [" ".join(_iptables_command(random, family, table)) for _ in range(count)]
        lines.append("COMMIT")
    restore = f"ip{'6' * (family == 6)}tables-restore"
    return _run([restore, "--noflush", "-w", "10"], "\n".join([*lines, ""]))


def _iptables_command(random: Random, family: int, table: str) -> list[str]:
    chain = random.choice((*_BUILTIN[table], *_BUILTIN[table], *_CHAINS))
    # Jumps start from built-in chains only: circles are what the fake does not know.
    rules = _RULES if chain in _BUILTIN[table] else _PLAIN_RULES
    rule = random.choice(rules).format(family=family).split()
    commands = (
        ["-A", chain, *rule],
        ["-A", random.choice(_BUILTIN[table]), "-j", "other"],
        ["-I", chain, *rule],
        ["-I", chain, str(random.randint(1, 3)), *rule],
        ["-D", chain, str(random.randint(1, 2))],
        ["-D", chain, *rule],
        ["-R", chain, "1", *rule],
        ["-F", chain],
        ["-F"],
        ["-X", random.choice(_CHAINS)],
        ["-X", "other"],
        ["-X"],
        ["-N", random.choice(("other", "rstguard-raw"))],
    )
    return random.choice(commands)


def _of_ipset(random: Random, _rulesets: Sequence[RuleSet]) -> Operation:
    name, second = random.sample(_SETS, 2)
    element = random.choice((*_SOURCES, "80", "443"))
    commands = (
        ["create", name, *random.choice(_KINDS).split()],
        ["create", name, *random.choice(_KINDS).split()],
        ["add", name, element],
        ["add", name, element, "-exist"],
        ["del", name, element],
        ["flush", name],
        ["destroy", name],
        ["destroy", name],
        ["swap", name, second],
        ["destroy"],
        ["flush"],
    )
    return _run(["ipset", *random.choice(commands)])


def _of_sysctl(random: Random, _rulesets: Sequence[RuleSet]) -> Operation:
    name, value = random.choice(SYSCTLS), random.choice("01")
    return Operation(f"{name}={value}", lambda side: side.kernel.write_sysctl(name, value))


def _run(arguments: list[str], text: str = "") -> Operation:
    words = " ".join([*arguments, *text.splitlines()])
    # Which of several mistakes of an iptables command is found first is nobody's concern.
    why_counts = arguments[0] == "ipset"
    return Operation(words, lambda side: side.kernel.run(arguments, text), why_counts)
