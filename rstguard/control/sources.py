"""What `status` tells of sources that rules go further for."""

from __future__ import annotations

from rstguard.engine.large import TIMES
from rstguard.engine.ruleset import SECOND
from rstguard.supervisor.guard import Guard


def productive(guard: Guard) -> int:
    """Return how many sources are productive enough for some rule to be lenient."""
    rules = guard.ruleset.rules
    least = min((rule.unless.productive for rule in rules if rule.unless), default=0)
    return sum(percent >= least for percent in guard.productive.percents.values())


def large_sources(guard: Guard, now: float) -> list[dict[str, object]]:
    """Return the sources that carry a large share of all proven connections.

    `may_hold` is how many of them rules leave it at least while no service is in distress (then it
    is what it `bore`), 0 if it has no more than others; `quiet_s` for how long it has not carried
    such a share.  `now` is the time of the loop.
    """
    return [
        {
            "source": str(one.source),
            "percent": one.share,
            "connections": one.connections,
            "bore": one.bore,
            "may_hold": one.bore * TIMES,
            "since_s": one.age // SECOND,
            "quiet_s": one.quiet // SECOND,
        }
        for one in guard.large_now(now).sources
    ]
