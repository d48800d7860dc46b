"""The policy language as pydantic models: which keys there are, and what each may hold.

Values come out in the engine's units (nanoseconds, bytes, prefixes).  Validators raise `ValueError`
with a sentence that says what is wrong and what would be right; `rstguard.policy.load` adds the
place.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, model_validator

from rstguard.engine.address import V6, Prefix
from rstguard.engine.ruleset import (
    DEFAULT_LABELS,
    DEFAULT_LEAST_TTL,
    DEFAULT_MARKS,
    DEFAULT_SPOOFED_AFTER,
    SECOND,
)
from rstguard.policy.base import Model, Name, Network, Networks, Ports, Widths, not_empty
from rstguard.policy.quantities import (
    MINUTE,
    count,
    duration,
    duration_or_never,
    mark_bits,
    network,
    percent,
    port,
    rate_per_second,
    show,
)
from rstguard.policy.rules import AnyRule

MOST_RULES: Final = 500
"""Rules that a policy may have."""
_INTERFACE = re.compile(r"(?!-)[A-Za-z0-9_.@-]{1,15}")
_INTERFACE_GLOB = re.compile(r"(?!-)[A-Za-z0-9_.@-]{0,14}\*")


def _version(value: object) -> Literal[1]:
    if type(value) is int and value == 1:
        return 1
    raise ValueError(f"version {show(value)} is unknown here: this rstguard reads version 1")


def _interface(value: object) -> str:
    text = value if isinstance(value, str) else ""
    if _INTERFACE.fullmatch(text) or _INTERFACE_GLOB.fullmatch(text):
        return text
    raise ValueError(
        f"{show(value)} is not an interface: write a name as eth0, or a glob that ends in *, "
        'as "wan*"'
    )


def _trusted(value: object) -> Prefix:
    prefix = network(value)
    if prefix.length == 0:
        raise ValueError(
            f"{prefix} would switch the guard off: use `mode: observe` to change nothing, or name "
            "the networks you mean"
        )
    return prefix


Capacity = Annotated[int, PlainValidator(count(10, 10_000_000))]
Trusted = Annotated[Prefix, PlainValidator(_trusted)]
Interface = Annotated[str, PlainValidator(_interface)]


class Protect(Model):
    """What is guarded: traffic that comes in on `interfaces` for `destinations` and `ports`."""

    interfaces: Annotated[tuple[Interface, ...], AfterValidator(not_empty)] = Field(
        examples=["[eth0]"], max_length=64
    )
    destinations: Networks = ()
    ports: Ports | None = None


class Inspect(Model):
    """How much of a connection the engine may see."""

    packets: Annotated[int, PlainValidator(count(1, 1000))] = 8


class SynBudget(Model):
    """What a service gets of SYNs before the kernel answers them with SYN cookies."""

    half_open: Annotated[int, PlainValidator(count(16, 4096))] = 128
    rate: Annotated[int, PlainValidator(rate_per_second)] | None = Field(
        default=None, examples=["20000/s"]
    )
    ports: Ports | None = None


def _budget(value: object) -> object:
    """Read `auto`, which is what nothing said means, and `off`, which is None."""
    if value == "auto":
        return SynBudget()
    if value is None or (isinstance(value, str) and value != "off"):
        raise ValueError(
            f"{show(value)} is no SYN budget: write auto, off, or a mapping as {{half_open: 128}}"
        )
    return None if value == "off" else value


class Pressure(Model):
    """What an administrator knows of what services can bear; the rest is learned."""

    capacity: Annotated[
        dict[Annotated[int, PlainValidator(port)], Capacity],
        Field(max_length=1000),
    ] = Field(default={}, examples=["{443: 768}"])


class LargeSources(Model):
    """Sources that carry a large share of all proven connections, as a proxy does."""

    share: Annotated[int, PlainValidator(percent(10, 90))] = 25
    after: Annotated[int, PlainValidator(duration(10 * SECOND, 24 * 60 * MINUTE))] = 10 * MINUTE
    ordinary: Annotated[tuple[Network, ...], Field(max_length=1000)] = ()


class Policy(Model):
    """A whole policy file.

    Raises:
        pydantic.ValidationError: with every mistake at once.  Use `rstguard.policy.load` to have
            them with file, line and column.
    """

    version: Annotated[Literal[1], PlainValidator(_version)] = Field(examples=["1"])
    name: Name = "policy"
    mode: Literal["enforce", "observe"] = "enforce"
    on_failure: Literal["open", "closed"] = "open"
    blocking: Literal["drop", "reset", "unreachable"] = "drop"
    ban_covers: Literal["everything", "protected"] = "everything"
    shun: Literal["challenge", "drop"] = "challenge"
    shun_for: Annotated[int, PlainValidator(duration(SECOND, 10 * MINUTE))] = 10 * SECOND
    forged_resets: Literal["hold", "observe", "off"] = "off"
    forged_fins: Literal["hold", "off"] = "off"
    reset_exempt: tuple[Network, ...] = Field(default=(), max_length=1000)
    offload: Literal["auto", "never"] = "auto"
    sweep_every: Annotated[int, PlainValidator(duration(SECOND // 2, MINUTE))] = 2 * SECOND
    bans_per_minute: Annotated[int, PlainValidator(count(1, 1_000_000))] = 1000
    marks: Annotated[int, PlainValidator(mark_bits)] = DEFAULT_MARKS
    labels: Annotated[int, PlainValidator(count(0, DEFAULT_LABELS))] = DEFAULT_LABELS
    mptcp: Literal["allow", "strip"] = "allow"
    least_ttl: Annotated[int, PlainValidator(count(0, 64))] = DEFAULT_LEAST_TTL
    drop_spoofed_after: Annotated[
        int | None, PlainValidator(duration_or_never(0, 24 * 60 * MINUTE))
    ] = DEFAULT_SPOOFED_AFTER
    protect: Protect = Field(examples=["{interfaces: [eth0]}"])
    trusted: tuple[Trusted, ...] = Field(default=(), max_length=1000)
    source: Widths = Widths()
    inspect: Inspect = Inspect()
    syn_budget: Annotated[SynBudget | None, BeforeValidator(_budget)] = SynBudget()
    pressure: Pressure = Pressure()
    large_sources: LargeSources = LargeSources()
    rules: tuple[Annotated[AnyRule, Field(discriminator="measure")], ...] = Field(
        examples=["[]"], max_length=MOST_RULES
    )

    @model_validator(mode="after")
    def _fins_need_resets(self) -> Policy:
        """Hold the rule that FINs are asked for only where RSTs are."""
        if self.forged_fins == "hold" and self.forged_resets != "hold":
            raise ValueError("`forged_fins: hold` needs `forged_resets: hold`: write both")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Policy:
        """Hold the rule of distinct names for policies that were not read from a file, too."""
        names = [rule.name for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{show(name)} names two rules: each needs its own name")
        return self


def is_wide(prefix: Prefix) -> bool:
    """Tell whether a trusted network is wider than any one organisation has."""
    return prefix.length < (7 if prefix.network >= V6 else 8)
