"""The kernel sets that the chains match on: which a policy needs, and how they come and go.

==========================  ==============  ==================================================
set (4 and 6: per family)   type            holds
==========================  ==============  ==================================================
rstguard-ban4, -ban6        hash:net        banned sources, each with its time and its rule
rstguard-gate4, -gate6      hash:net        networks and sources whose new SYNs are dropped, and
                                            whose connections are left alone
rstguard-shun4, -shun6      hash:net        sources whose new SYNs are dropped or challenged
rstguard-challenged4, -challenged6  hash:ip  sources that the kernel lately gave SYN cookies as they
                                            are shunned; filled by the chains
rstguard-proven4, -proven6  hash:ip         sources that a server lately answered with data, or that
                                            returned a SYN cookie; filled by the chains
rstguard-suspect4, -suspect6  hash:ip         sources that lately sent an ACK of no connection;
                                            filled by the chains
rstguard-admitted4, -6      hash:ip,port,ip  sources, and servers behind DNAT that they may reach
                                            (`rstguard.kernel.dnat`); filled by the chains
rstguard-passed4, -passed6  hash:ip         those whom a full one of them may answer by a cookie
rstguard-trusted4, -6       hash:net        the policy's `trusted`
rstguard-protected4, -spared6  hash:net        protected addresses: they are not blocked
rstguard-dst4, -dst6        hash:net        the policy's `protect.destinations`, or everything
rstguard-ports              bitmap:port     the policy's `protect.ports`, unless it means all
rstguard-close-ports        bitmap:port     ports whose FINs and RSTs a rule needs to see,
                                            unless it needs all
rstguard-engaged4, -6       hash:ip,port    services that were lately over the SYN budget; filled
                                            by the chains
rstguard-half4-…, -beside4-…  hash:ip,port    SYNs that are not completed yet, of each service
rstguard-full4, -full6      hash:ip,port    services with too many of them; filled by the chains
rstguard-once4, -again4, …  hash:ip,port,ip  whom a server has sent one SYN-ACK, and one more
rstguard-budget-ports       bitmap:port     ports of the SYN budget, unless it means all
rstguard-named4, -named6    hash:ip,port,ip  connections of which a RST is held, in both directions;
                                            filled by the chains
rstguard-reset-exempt4, -6  hash:net        the policy's `reset_exempt`
rstguard-inside4, -inside6  hash:ip         addresses that answer from inside; filled by the chains
rstguard-translated4, -6    hash:ip,port    services whose target is translated here; likewise
rstguard-doubt4, -doubt6    hash:ip,port,ip  connections for which a RST or FIN has just come in
rstguard-replaced4, -6      hash:ip,port,ip  those whose place a SYN has just taken
rstguard-serving4, -6       hash:ip,port    services that have answered a client; filled by the
                                            chains
rstguard-lost4, -lost6      hash:ip         sources that lately sent a segment of no connection,
rstguard-grace4, -grace6                    those whose first one has just come, and those that a
rstguard-answered4, -6                      server has answered; filled by the chains
rstguard-asked4, …          hash:ip,port    who answers, and who does not (`rstguard.kernel.oneway`)
rstguard-live4-…, -live6-…  hash:ip(,port)  keys of a rule `connections` with a count of their
                                            connections; filled by the chains, corrected by the
                                            sweeper (`rstguard.kernel.admission`)
rstguard-counting4, -6      hash:net        everything while the sweeper hears of connections
rstguard-thin4-0, -thin6-0  hash:net        everything while worker 0 is overrun, else nothing;
(-1, …: other workers)                      filled by the worker (`rstguard.kernel.thinning`)
==========================  ==============  ==================================================
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from rstguard.engine.address import V6, Prefix, is_v6
from rstguard.engine.ruleset import Divert, RuleSet
from rstguard.kernel import (
    InUse,
    KernelError,
    challenge,
    forgotten,
    half_open,
    holding,
    syn_budget,
    thinning,
)
from rstguard.kernel.command import Commands
from rstguard.kernel.elements import Kind, ipset
from rstguard.kernel.filled import FIXED, MOST, SetSpec, learned
from rstguard.kernel.names import BAN_SETS, BLOCK_SETS, GATE_SETS, is_ours, set_name
from rstguard.kernel.proof import SUSPECT_SECONDS
from rstguard.kernel.seam import Kernel
from rstguard.kernel.services import NOBODY, Known

PROOF_SECONDS = 600
"""How long an answered connection proves a source's address, in seconds."""

_GROWING = "hashsize 1024"
_FRESH = "-new"
_VALUED = ("family", "maxelem", "timeout", "netmask", "range")
# iptables' nft back end gives up its references to a set a moment after it has answered.
_RELEASE_SECONDS = 2.0
_RELEASE_LOOK = 0.02


def plan(ruleset: RuleSet, workers: int = 1, known: Known = NOBODY) -> tuple[SetSpec, ...]:
    """Return the sets that a policy, its workers and the known services need.  Pure."""
    scope = ruleset.scope
    everything = (Prefix(0, 0), Prefix(V6, 0))
    times = {"proven": PROOF_SECONDS, "suspect": SUSPECT_SECONDS}
    if challenge.in_force(ruleset):
        times["challenged"] = challenge.CHALLENGED_SECONDS
    specs: list[SetSpec] = []
    for digit, family, width, whole in (
        (4, "inet", ruleset.source_ipv4, 32),
        (6, "inet6", ruleset.source_ipv6, 128),
    ):
        timed = f"family {family} maxelem {MOST} timeout 0 comment"
        netmask = f" netmask {width}" if width < whole else ""
        specs += [
            *(
                SetSpec(set_name(name, digit), "hash:net", timed, _GROWING)
                for name in ("ban", "gate", "shun")
            ),
            # In a set of a million sources a new one replaces an old one (forceadd).  `ipset list`
            # does not show forceadd in all versions, so it is no option to agree in.
            *(
                SetSpec(
                    set_name(name, digit),
                    "hash:ip",
                    f"family {family} maxelem {MOST} timeout {seconds}{netmask}",
                    f"{FIXED} forceadd",
                )
                for name, seconds in times.items()
            ),
            _networks(set_name("trusted", digit), family, scope.trusted),
            _networks(set_name("protected", digit), family, scope.protected),
            _networks(set_name("dst", digit), family, scope.destinations or everything),
        ]
        thin = f"family {family} maxelem 65536 timeout 0"
        specs += [
            SetSpec(thinning.thin_set(digit, index), "hash:net", thin) for index in range(workers)
        ]
        specs += learned(digit, family, ruleset)
        if syn_budget.in_force(ruleset):
            engaged = f"family {family} maxelem 65536 timeout {syn_budget.ENGAGED_SECONDS}"
            specs.append(SetSpec(syn_budget.engaged_set(digit), "hash:ip,port", engaged))
        specs += half_open.sets(ruleset, digit, known)
        if holding.in_force(ruleset):
            named = f"family {family} maxelem 65536 timeout {holding.NAMED_SECONDS}"
            name, kind = holding.named_set(digit), "hash:ip,port,ip"
            specs.append(SetSpec(name, kind, named, "hashsize 16384 forceadd"))
            specs.append(_networks(set_name("reset-exempt", digit), family, ruleset.reset_exempt))
    budget = ruleset.syn_budget if syn_budget.in_force(ruleset) else None
    ports = (
        (set_name("ports"), scope.ports),
        (set_name("close-ports"), ruleset.ports_needing(Divert.CLOSE)),
        (set_name("budget-ports"), budget.ports if budget else None),
    )
    specs += [_ports(name, members) for name, members in ports if members is not None]
    return tuple(specs)


def forget_services(kernel: Commands) -> None:
    """Forget which services have answered: they may not be protected any more.

    Raises:
        KernelError: the kernel refused.
    """
    for family in (4, 6):
        ipset(kernel, "flush", forgotten.serving_set(family))


def apply(kernel: Commands, ruleset: RuleSet, workers: int = 1, known: Known = NOBODY) -> None:
    """Bring the sets of this network namespace in line with a policy, and check the result.

    Each set that the policy fills is built beside the old one and swapped with it, so a packet
    meets the old members or the new ones, never a part.  Bans and shuns stay, and so do proofs
    unless the width of a source changes.  Sets that the policy no longer needs stay too, as rules
    may still match on them: call `prune` once the chains are replaced.

    Raises:
        KernelError: ipset is missing, or the kernel refused something.
    """
    specs = plan(ruleset, workers, known)
    present = _sets(kernel)
    clears = [f"destroy {name}" for name in present if is_ours(name) and name.endswith(_FRESH)]
    builds: list[str] = []
    swaps: list[str] = []
    for spec in specs:
        held = present.get(spec.name)
        if held is not None and held.header.kind != _wanted(spec).kind:
            # Sets of different kinds cannot be swapped; such a one is of another version.
            clears.append(f"destroy {spec.name}")
            held = None
        if held is None:
            builds.append(_creation(spec, spec.name))
        differs = held is not None and held.header != _wanted(spec)
        if spec.members is not None or differs:
            fresh = spec.name + _FRESH
            builds += [_creation(spec, fresh), *_contents(kernel, spec, fresh)]
            swaps += [f"swap {fresh} {spec.name}", f"destroy {fresh}"]
    _restore(kernel, [*clears, *builds, *swaps])
    _verify(kernel, specs)


def complete(kernel: Commands, ruleset: RuleSet, workers: int = 1, known: Known = NOBODY) -> None:
    """Make the sets that are not there; those that are stay as they are.

    Raises:
        KernelError: the kernel refused one.
    """
    present = _sets(kernel)
    absent = [spec for spec in plan(ruleset, workers, known) if spec.name not in present]
    _restore(kernel, [_creation(spec, spec.name) for spec in absent if spec.members is None])


def lost(kernel: Commands, ruleset: RuleSet, workers: int = 1, known: Known = NOBODY) -> list[str]:
    """Return which sets that a policy fills are gone or have lost members, in words; quick."""
    present = _sets(kernel)
    found = []
    for spec in plan(ruleset, workers, known):
        held = present.get(spec.name)
        if held is None:
            found.append(f"the set {spec.name}")
        elif not _holds(spec, held):
            found.append(f"what the set {spec.name} holds")
    return found


def blocked_by_kind(kernel: Commands) -> dict[Kind, int]:
    """Return how many sources are banned, and how many shunned; quick with very many, too."""
    present = _sets(kernel)
    held = {name: present[name].entries for name in BLOCK_SETS if name in present}
    # A ban that leaves connections alone is kept among the gated.
    banned = {
        name: ipset(kernel, "save", name).count(' comment "ban ')
        for name in GATE_SETS
        if held.get(name, 0) > 0
    }
    bans = sum(held.get(name, 0) for name in BAN_SETS) + sum(banned.values())
    return {"ban": bans, "shun": sum(held.values()) - bans}


def prune(kernel: Kernel, ruleset: RuleSet, workers: int = 1, known: Known = NOBODY) -> None:
    """Remove the rstguard sets that a policy does not need.

    Raises:
        KernelError: one of them is still matched on by a rule.
    """
    needed = {spec.name for spec in plan(ruleset, workers, known)}
    _destroy(kernel, needed)


def destroy(kernel: Kernel, keep_bans: bool = False) -> list[str]:
    """Remove all rstguard sets of this network namespace, whoever left them there; name them.

    With `keep_bans` those of the banned and the shunned stay, with their elements.

    Raises:
        KernelError: one is still matched on by a rule, or may not be removed.
    """
    return _destroy(kernel, set(BLOCK_SETS) if keep_bans else set())


@dataclass(frozen=True, slots=True)
class _Header:
    """Type and parameters of a set, less those that the kernel changes by itself."""

    type: str
    options: frozenset[tuple[str, str]]

    @property
    def kind(self) -> tuple[str, str]:
        """What must be equal for two sets to be swapped."""
        return self.type, dict(self.options).get("family", "")


@dataclass(slots=True)
class _Set:
    """A set of this namespace, without what it holds."""

    header: _Header
    entries: int = 0


def _networks(name: str, family: str, prefixes: Iterable[Prefix]) -> SetSpec:
    v6 = family == "inet6"
    halves = {half for prefix in prefixes if is_v6(prefix.network) is v6 for half in _split(prefix)}
    members = tuple(str(half) for half in sorted(halves))
    return SetSpec(name, "hash:net", f"family {family} maxelem 65536", _GROWING, members)


def _split(prefix: Prefix) -> tuple[Prefix, ...]:
    """A set cannot hold a prefix of length 0, only its two halves."""
    if prefix.length > 0:
        return (prefix,)
    return Prefix(prefix.network, 1), Prefix(prefix.network | 1 << (prefix.shift - 1), 1)


def _ports(name: str, ports: Iterable[int]) -> SetSpec:
    members: list[str] = []
    first = last = -2
    for port in (*sorted(ports), -2):
        if port == last + 1:
            last = port
            continue
        if last >= 0:
            members.append(str(first) if first == last else f"{first}-{last}")
        first = last = port
    return SetSpec(name, "bitmap:port", "range 0-65535", members=tuple(members))


def _wanted(spec: SetSpec) -> _Header:
    return _Header(spec.type, _options(spec.options))


def _options(text: str) -> frozenset[tuple[str, str]]:
    """Return the options that say what a set is for; versions of ipset differ in the others."""
    words = text.split()
    found = {word: words[at + 1] for at, word in enumerate(words[:-1]) if word in _VALUED}
    found |= {word: "" for word in ("comment", "counters") if word in words}
    whole = "32" if found.get("family") == "inet" else "128"
    return frozenset(pair for pair in found.items() if pair != ("netmask", whole))


def _sets(kernel: Commands) -> dict[str, _Set]:
    """Return the sets of this namespace by name, without what they hold."""
    found: dict[str, _Set] = {}
    name = kind = ""
    for line in ipset(kernel, "list", "-terse").splitlines():
        field, _, value = line.partition(": ")
        if field == "Name":
            name = value
        elif field == "Type":
            kind = value
        elif field == "Header":
            found[name] = _Set(_Header(kind, _options(value)))
        elif field == "Number of entries":
            found[name].entries = int(value)
    return found


def _holds(spec: SetSpec, held: _Set) -> bool:
    """Tell whether a set holds as much as it should; what exactly is dear to ask."""
    if spec.members is None:
        return True  # the kernel or the guard's decisions fill it
    if spec.type == "hash:net":
        return held.entries == len(spec.members)
    # A bitmap's members are written as ranges, and counted one by one.
    return bool(held.entries) == bool(spec.members)


def _creation(spec: SetSpec, name: str) -> str:
    return f"create {name} {spec.type} {spec.options} {spec.sizing}"


def _contents(kernel: Commands, spec: SetSpec, into: str) -> list[str]:
    if spec.members is not None:
        return [f"add {into} {member}" for member in spec.members]
    if spec.type in ("hash:ip", "hash:ip,port", "hash:ip,port,ip"):
        # Proofs by another width of source mean something else.  They are soon earned again.
        return []
    saved = ipset(kernel, "save", spec.name).splitlines()[1:]
    return [line.replace(spec.name, into, 1) for line in saved]


def _verify(kernel: Commands, specs: tuple[SetSpec, ...]) -> None:
    present = _sets(kernel)
    for spec in specs:
        held = present.get(spec.name)
        if held is None or held.header != _wanted(spec) or not _holds(spec, held):
            raise KernelError(
                f"the set {spec.name} is not as it was made: another program changes rstguard's "
                "sets; stop it and start rstguard again"
            )


def _destroy(kernel: Kernel, kept: Collection[str]) -> list[str]:
    waited = 0.0
    while True:
        ours = [name for name in _sets(kernel) if is_ours(name) and name not in kept]
        try:
            _restore(kernel, [f"destroy {name}" for name in ours])
            return ours
        except InUse:
            if waited >= _RELEASE_SECONDS:
                raise
        kernel.pause(_RELEASE_LOOK)
        waited += _RELEASE_LOOK


def _restore(kernel: Commands, lines: list[str]) -> None:
    if not lines:
        return
    try:
        ipset(kernel, "restore", text="\n".join(lines) + "\n")
    except KernelError as problem:
        raise type(problem)(_sentence(problem, lines)) from problem


def _sentence(problem: KernelError, lines: list[str]) -> str:
    """Say which set it was: ipset itself names the line of its input."""
    said = str(problem)
    _, found, rest = said.partition("rror in line ")
    number, _, what = rest.partition(":")
    if not found or not number.isdigit() or int(number) > len(lines):
        return said
    name = lines[int(number) - 1].split()[1]
    if isinstance(problem, InUse):
        return (
            f"the set {name} is still matched on by an iptables rule that is not rstguard's: "
            f"find it with `iptables-save | grep {name}` (or ip6tables-save), remove it, and run "
            "`rstguard cleanup`"
        )
    return f"the set {name} could not be made or changed: ipset said:{what}"
