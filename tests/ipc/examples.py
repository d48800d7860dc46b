"""One example, or more, of each message that a child of the guard can send."""

from __future__ import annotations

import random

from rstguard.engine.address import V6, Prefix, parse_address, parse_prefix
from rstguard.engine.flow import Tuple
from rstguard.engine.holding import Outcome
from rstguard.engine.large import LargeSource
from rstguard.engine.nearest import Near
from rstguard.engine.shedding import Level
from rstguard.engine.verdict import Ends, Reason
from rstguard.ipc.messages import (
    AllMeasured,
    Blocked,
    Counts,
    Explained,
    Failed,
    FoundProductive,
    FromChild,
    Killed,
    LookProductive,
    Measured,
    NearestAre,
    NotKilled,
    Observed,
    Overloaded,
    Productive,
    Ready,
    Reset,
    Unconfirmed,
)
from rstguard.ipc.said import Large, PressedService, UnderPressure, Weighed
from rstguard.kernel.elements import Element

FLOW = Tuple(parse_address("198.51.100.7"), parse_address("203.0.113.10"), 40000, 443)
FLOW6 = Tuple(parse_address("2001:db8:1::7"), parse_address("2001:db8:2::10"), 40000, 443)
SILENT = Unconfirmed(FLOW6, f"{FLOW6}: the client stayed silent to 11 probes.")
BAN = Element(parse_prefix("198.51.100.7"), "ban", "syn-rate", 600)
BAN6 = Element(parse_prefix("2001:db8:1::/64"), "ban", "a.b_c-d", 2_147_483, keep_existing=True)
KEY6 = V6 | 0x20010DB8 << 96

EXAMPLES: tuple[FromChild, ...] = (
    Ready(0, "rstguard"),
    Ready(7),
    Failed("the queue 5640 is in use by another program"),
    Blocked(BAN, Reason.SYN_RATE, offence=3),
    Blocked(BAN6, Reason.CONNECTIONS, enforced=False, by_worker=False),
    Blocked(BAN._replace(kind="shun", remaining=None), Reason.OVERLOAD),
    Reset(FLOW, Ends.BOTH, "slow", Reason.SLOW),
    Reset(FLOW6, Ends.SOURCE, "idle", Reason.IDLE, enforced=False, known=False, by_worker=False),
    Observed(FLOW6, "age", Reason.AGE),
    Weighed(FLOW, Outcome.FORGED, True, False, False, 1, 64, 512, True),
    Weighed(FLOW6, Outcome.HONEST, False, True, True, -1, -1, 0, False),
    Overloaded(4711, Level.THINNED),
    UnderPressure(()),
    UnderPressure((PressedService(FLOW6.destination, 443, 700, 384, 729),)),
    Large(()),
    Large(
        (
            LargeSource(BAN.source, 61, 1234, 0, 0, 0),
            LargeSource(BAN6.source, 30, 600, 500, 9, 7),
        )
    ),
    Counts({"packets": 1 << 62, "rule.syn-rate": 3, "verdict.drop": 3}),
    Productive({}),
    Productive({KEY6 >> 64: 100, 0xC6336407: 0}),
    Explained(1, {"syn-rate": 0.5, "idle": 1.0, "held": 3.25}),
    NearestAre(2, (Near("syn-rate", "198.51.100.7", 0.99), Near("all", "[2001:db8::1]:80", 0.0))),
    NearestAre(2, ()),
    Killed(3, 2, 1, (SILENT,)),
    NotKilled(1, (SILENT,)),
    Measured(4, "syn-rate", ((KEY6 << 16 | 443, 17), (0xC6336407, 0))),
    LookProductive(4, (KEY6 >> 64, 0xC6336407)),
    AllMeasured(4, 0),
    FoundProductive(12),
)


def batch(chance: random.Random, count: int = 1000) -> list[FromChild]:
    """Return a batch as a busy guard's: blocks, resets, observations, counts and long answers."""
    made = [_one(chance, number % 20) for number in range(count)]
    percents = {_address(chance): chance.randrange(101) for _ in range(1000)}
    made[-2:] = [Productive(percents), Productive({key >> 64: 50 for key in percents})]
    return made


def _one(chance: random.Random, kind: int) -> FromChild:
    source = _address(chance)
    flow = Tuple(source, FLOW.destination, chance.randrange(1024, 65536), 443)
    if kind < 5:
        prefix = Prefix(source, 128 if source >= V6 else 32)
        return Blocked(Element(prefix, "ban", "syn-rate", 600), Reason.SYN_RATE, offence=1)
    if kind < 12:
        return Reset(flow, Ends.BOTH, "slow-request", Reason.SLOW)
    if kind < 17:
        return Observed(flow, "idle", Reason.IDLE)
    if kind < 19:
        return Counts({f"rule.rule-{rule}": chance.getrandbits(30) for rule in range(30)})
    silent = Unconfirmed(flow, f"{flow}: client and server stayed silent to 11 probes.")
    return Killed(kind, 100, 95, (silent,) * 5)


def _address(chance: random.Random) -> int:
    return chance.getrandbits(32) if chance.random() < 0.7 else V6 | chance.getrandbits(128)
