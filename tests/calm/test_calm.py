"""When all is calm nobody is hurt: an hour of every kind of client at each policy.

The long form is a day: `make calm`.
"""

from __future__ import annotations

import random

import pytest

from rstguard.engine.ruleset import RuleSet
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse
from tests.calm.expected import ANNOUNCED, texts, unannounced
from tests.calm.kinds import KINDS, LONG, MACHINES, SHELLS, Kind, activity
from tests.calm.script import script
from tests.calm.simulated import Calm

TEXTS = texts()
BEGIN = 9.4
"""The hour of the day at which it begins: a restart of the web server is among what follows."""
EVERY = 10.0
"""Seconds between two sweeps."""


def policy(text: str) -> RuleSet:
    return compile_policy(parse(text, "the policy").policy)


def played(
    ruleset: RuleSet, hours: float, kinds: tuple[Kind, ...] = KINDS, every: float = EVERY
) -> Calm:
    calm = Calm(ruleset, BEGIN, hours, every, kinds=kinds)
    calm.run()
    return calm


@pytest.mark.parametrize("name", TEXTS)
def test_nobody_is_hurt(name: str) -> None:
    """What `policy new` writes, or what observes, can hurt less, and gets a quarter of an hour."""
    ruleset = policy(TEXTS[name])
    long = ruleset.enforce and not name.startswith("new")
    calm = played(ruleset, 1 if long else 0.25)
    assert not long or set(calm.visited) == {kind.name for kind in KINDS}
    counts = calm.replay.counts
    assert counts.in_scope > 30
    assert counts.sweeps > 50
    assert not counts.unordered
    lost = [hit for hit in calm.replay.hits if hit.packets or hit.connections]
    if not ruleset.enforce:
        assert not lost, "it observes, and yet packets were lost"
        return
    hurt = [str(found) for found in unannounced(name, calm.findings.values())]
    assert not hurt, "\n".join(["hurt, though no comment of the policy says so:", *hurt])


def test_what_is_announced_stands_in_the_policy() -> None:
    for one in ANNOUNCED:
        assert one.words in " ".join(TEXTS[one.policy].replace("\n#", " ").split())


PRESSED, ALWAYS = ", when: pressed, then", ", then"
HOARDER = "over: 200, unless: {productive: 80%, up_to: 3}"


@pytest.mark.parametrize(
    ("rule", "before", "after", "kinds", "hurt"),
    [
        ("hoarder", HOARDER, "over: 5", MACHINES, {"application pool"}),
        (
            "idle", f"15m{PRESSED}", f"15m{ALWAYS}", (*LONG, *SHELLS),
            {"WebSocket, silent", "SSH at rest"},
        ),
        (
            "slow-request", f"over_last: 1m,\n     when: pressed{ALWAYS}",
            f"over_last: 1m{ALWAYS}", LONG,
            {"WebSocket", "WebSocket, silent", "event stream", "long poll"},
        ),
        ("ssh-brute", "over: 10/m", "over: 1/m", MACHINES, {"monitor"}),
        ("port-scan", "over: 15, within: 10s", "over: 3, within: 10s", MACHINES, {"monitor"}),
        ("syn-rate", "over: 100/s, burst: 200", "over: 1/m", MACHINES, {"crawler", "API client"}),
    ],
)  # fmt: skip
def test_a_policy_that_hurts_somebody_is_found(
    rule: str, before: str, after: str, kinds: tuple[Kind, ...], hurt: set[str]
) -> None:
    text = TEXTS["web-edge"]
    assert before in text
    calm = played(policy(text.replace(before, after)), 0.4, kinds)
    found = [one for one in unannounced("web-edge", calm.findings.values()) if one.rule == rule]
    assert hurt <= {one.who for one in found}
    for one in found:
        assert f"rule {rule} does {one.action}" in str(one)
        assert one.when.startswith("09:")
        assert one.value != "?"


def test_a_value_is_told_beside_its_limit() -> None:
    pool = tuple(kind for kind in KINDS if kind.name in ("application pool", "crawler"))
    calm = played(policy(TEXTS["web-edge"].replace(HOARDER, "over: 5")), 0.2, pool)
    (found,) = calm.findings.values()
    assert (found.value, found.limit) == ("40", "5")
    assert (found.who, found.action, found.times) == ("application pool", "reset", 35)


def test_the_day_has_a_night() -> None:
    assert activity(4) == activity(28) == 0.1
    assert activity(12) == 1
    assert activity(23.9) == pytest.approx(activity(0), abs=0.02)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_real_ends_say_is_over_in_time(kind: Kind) -> None:
    drawn_up = script(kind, random.Random(1), longest=120)
    assert drawn_up.lasts <= 120
    assert len(drawn_up.turns) >= len(kind.opening)
    after = drawn_up.turns[len(kind.opening) :]
    assert not after or sum(turn.pause + turn.wait for turn in drawn_up.turns) < drawn_up.lasts
