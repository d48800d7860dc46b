"""By which policies a calm gateway is tried, and what their comments announce."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from rstguard.cli.fresh import PURPOSES, Wanted, policy_text
from rstguard.engine.address import parse_address
from rstguard.kernel.links import Link
from rstguard.kernel.place import Address, Listener, Place
from tests.calm.kinds import APP, CDN, ONE_CDN, SSH, TLS, WEB
from tests.calm.simulated import Finding

_SAMPLES: Final = Path(__file__).parent.parent.parent / "policies"
_HOST: Final = Place(
    (Link("lo", True), Link("eth0", True)),
    (Address("eth0", parse_address("203.0.113.10"), 24),),
    defaults=("eth0",),
    listeners=tuple(
        Listener(None, port, program)
        for port, program in ((SSH, "sshd"), (WEB, "nginx"), (TLS, "nginx"), (APP, ""),
                              (25, "master"), (993, "dovecot"))
    ),
)  # fmt: skip


def texts() -> dict[str, str]:
    """Return all of them: the samples, and what `policy new` writes, which is to enforce."""
    found = {path.stem: path.read_text() for path in sorted(_SAMPLES.glob("*.yaml"))}
    wanted = {"new": (), **{f"new --for {purpose}": (purpose,) for purpose in sorted(PURPOSES)}}
    for name, purposes in wanted.items():
        text = policy_text(_HOST, Wanted(purposes=purposes))
        found[name] = text.replace("mode: observe", "mode: enforce")
    return found


class Announced(NamedTuple):
    """What happens to some clients by a rule, and the words of the policy that say so."""

    policy: str
    who: frozenset[str]
    rules: frozenset[str]
    words: str


_ALL_THROUGH_CDN: Final = frozenset({CDN, *(kind.name for kind in ONE_CDN)})
"""Expected to be spared once a source that carries so many is named instead of being hit."""
_ONE_SOURCE: Final = "through which all clients come: it is one source, whatever it carries"

ANNOUNCED: Final = (
    Announced("web-edge", _ALL_THROUGH_CDN, frozenset({"hoarder", "syn-rate"}), _ONE_SOURCE),
    Announced(
        "strict-gateway",
        _ALL_THROUGH_CDN,
        frozenset({"hoarder", "syn-rate", "handshake-rate"}),
        _ONE_SOURCE,
    ),
    Announced(
        "strict-gateway",
        frozenset({"browser, paused video"}),
        frozenset({"slow-read"}),
        "not reading, or endless, at any time",
    ),
    Announced(
        "strict-gateway",
        frozenset({"SSH at rest", "database pool, at rest", "application pool"}),
        frozenset({"endless"}),
        "not reading, or endless, at any time",
    ),
)
"""What may happen to whom; nothing else may."""


def unannounced(policy: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yield what no comment of a policy announces."""
    announced = [one for one in ANNOUNCED if one.policy == policy]
    for found in findings:
        if not any(found.who in one.who and found.rule in one.rules for one in announced):
            yield found
