"""The rules of the policy language: one model for each kind of measure.

Every measure has its own keys, so a key that does not go with a measure is refused, and the message
can say which ones do.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    PlainValidator,
    StrictBool,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from rstguard.engine.ruleset import SECOND
from rstguard.policy.base import DestinationWidths, Model, Name, Networks, Ports, Widths
from rstguard.policy.quantities import (
    DAY,
    HOUR,
    MILLISECOND,
    MINUTE,
    Rate,
    byte_rate,
    count,
    duration,
    duration_text,
    percent,
    rate,
    show,
    size,
)

LONGEST_BAN = 24 * DAY
"""An ipset element can live for 2,147,483 s, a little less than 25 days
(IPSET_MAX_TIMEOUT, linux/netfilter/ipset/ip_set_timeout.h)."""

_TOO_LONG = ", and let `escalate` or a new offence renew it (the kernel keeps no ban for longer)"

BanTime = Annotated[int, PlainValidator(duration(SECOND, LONGEST_BAN, _TOO_LONG))]
ConnectionTime = Annotated[int, PlainValidator(duration(SECOND, 30 * DAY))]
RateValue = Annotated[Rate, PlainValidator(rate)]
Burst = Annotated[int, PlainValidator(count(1, 10_000_000))]

ActionName = Literal["observe", "drop", "reset", "ban"]


def _per_tag(value: object) -> str | None:
    """Say by which keys a value of `per` counts; those of sources and destinations do not mix."""
    if value in ("service", "connection"):
        return str(value)
    if isinstance(value, DestinationWidths):
        return "destinations"
    if isinstance(value, dict) and value.keys() & DestinationWidths.model_fields.keys():
        return None if value.keys() & Widths.model_fields.keys() else "destinations"
    return "widths" if isinstance(value, dict | Widths) else None


Counted = Widths | DestinationWidths | Literal["service", "connection"] | None
"""What a rule may count by: by default a source."""


def _is_target(per: Counted) -> bool:
    return per == "service" or isinstance(per, DestinationWidths)


class Escalate(Model):
    """Each new ban within `memory` lasts `factor` times the last, at most `up_to`."""

    factor: Annotated[int, PlainValidator(count(2, 100))] = Field(examples=["4"])
    up_to: BanTime = Field(examples=["24h"])
    memory: Annotated[int, PlainValidator(duration(MINUTE, 90 * DAY))] = Field(examples=["7d"])


class RuleBase(Model):
    """The keys that every rule has.  The order of fields is the order of validation."""

    actions: ClassVar[tuple[str, ...]] = get_args(ActionName)
    instead: ClassVar[str] = ""
    by_sweep: ClassVar[bool] = False
    """Whether it is judged from the connection table, so that it can wait for pressure."""

    name: Name = Field(examples=["syn-rate"])
    ports: Ports | None = None
    destinations: Networks = ()
    excepted: Networks = Field(default=(), alias="except")
    when: Literal["always", "pressed"] = "always"
    then: ActionName = Field(examples=["drop"])
    ban_for: int | None = Field(default=None, alias="for", validate_default=True)
    escalate: Escalate | None = None
    keep_existing: StrictBool = False
    ends: Literal["both", "source", "destination"] = "both"

    @field_validator("name")
    @classmethod
    def _unique(cls, name: str, info: ValidationInfo) -> str:
        """Refuse a name that an earlier rule of the same reading has (the context's set)."""
        if isinstance(info.context, set):
            if name in info.context:
                raise ValueError(f"{show(name)} names an earlier rule too: each needs its own name")
            info.context.add(name)
        return name

    @field_validator("when")
    @classmethod
    def _of_connections(cls, when: str) -> str:
        if when == "pressed" and not cls.by_sweep:
            raise ValueError(
                "pressed goes only with connections, slow, idle, age and unanswered, which the "
                "sweep judges: remove it, as this measure is judged packet by packet or by source"
            )
        return when

    @field_validator("then")
    @classmethod
    def _fits_measure(cls, then: str) -> str:
        if then not in cls.actions:
            raise ValueError(f"{then} cannot be done here: {cls.instead}")
        return then

    @field_validator("ban_for", mode="plain")
    @classmethod
    def _bans_need_a_time(cls, value: object, info: ValidationInfo) -> int | None:
        then = info.data.get("then")
        if value is None:
            if then == "ban":
                raise ValueError("is missing: a ban needs its time, as `for: 10m`")
            return None
        if then in ("observe", "drop", "reset"):
            raise ValueError(f"goes only with `then: ban`: remove it, or ban instead of {then}")
        return duration(SECOND, LONGEST_BAN, _TOO_LONG)(value)

    @field_validator("escalate", "keep_existing")
    @classmethod
    def _only_with_ban(cls, value: Any, info: ValidationInfo) -> Any:
        then = info.data.get("then")
        if then in ("observe", "drop", "reset"):
            raise ValueError(f"goes only with `then: ban`: remove it, or ban instead of {then}")
        first = info.data.get("ban_for")
        if isinstance(value, Escalate) and first and value.up_to < first:
            raise PydanticCustomError(
                "inner",
                "{up_to} is less than the first ban (`for: {first}`): write a longer time",
                {
                    "key": "up_to",
                    "up_to": duration_text(value.up_to),
                    "first": duration_text(first),
                },
            )
        return value

    @field_validator("ends")
    @classmethod
    def _only_with_reset(cls, value: str, info: ValidationInfo) -> str:
        then = info.data.get("then")
        if then in ("observe", "drop", "ban"):
            raise ValueError(f"goes only with `then: reset`: remove it, or reset instead of {then}")
        return value


class Unless(Model):
    """A source of whose connections so many carry data both ways may go `up_to` times as far."""

    productive: Annotated[int, PlainValidator(percent(50, 100))] = Field(examples=["80%"])
    up_to: Annotated[int, PlainValidator(count(2, 1000))] = 10


class SourceRule(RuleBase):
    """A rule that counts something of each source, prefix or service."""

    per: (
        Annotated[
            Annotated[Widths, Tag("widths")]
            | Annotated[DestinationWidths, Tag("destinations")]
            | Annotated[Literal["service"], Tag("service")],
            Discriminator(
                _per_tag,
                custom_error_type="per",
                custom_error_message="cannot be counted by: write {ipv4: 24, ipv6: 48}, "
                "{destination_ipv4: 24} or service",
            ),
        ]
        | None
    ) = None

    @field_validator("per")
    @classmethod
    def _targets_are_not_banned(cls, per: Counted, info: ValidationInfo) -> Counted:
        if _is_target(per) and info.data.get("then") == "ban":
            what = "service" if per == "service" else "destination"
            raise ValueError(
                f"a {what} cannot be banned, and who happens to cross its limit may be innocent: "
                "use `then: drop` or reset, or count per {ipv4: N, ipv6: M}"
            )
        return per


def _of_sources(unless: Unless | None, info: ValidationInfo) -> Unless | None:
    if unless is not None and info.data.get("per") is not None:
        raise ValueError("goes only with rules that count each source: remove it, or remove `per`")
    if info.data.get("measure") in ("bad_flags", "out_of_state", "reset_rate"):
        raise ValueError(
            "goes only with syn_rate, connection_rate, short_connections and connections: remove it"
        )
    return unless


UnlessProductive = Annotated[Unless | None, AfterValidator(_of_sources)]


class RateRule(SourceRule):
    """More than `over` packets of a kind in a time, `burst` of them at once."""

    measure: Literal["syn_rate", "connection_rate", "bad_flags", "out_of_state", "reset_rate"]
    over: RateValue = Field(examples=["100/s"])
    burst: Burst | None = None
    unless: UnlessProductive = None


class HalfOpenRule(SourceRule):
    """More than `over` SYNs of the last `within` never followed by their ACK."""

    measure: Literal["half_open"]
    over: Annotated[int, PlainValidator(count(1, 4096))] = Field(examples=["100"])
    # As long as the kernel keeps a half-open entry (nf_conntrack_tcp_timeout_syn_recv).
    within: Annotated[int, PlainValidator(duration(SECOND, 10 * MINUTE))] = 60 * SECOND


class DistinctRule(SourceRule):
    """More than `over` different ports or hosts tried `within` a time, or such that refused."""

    measure: Literal["distinct_ports", "distinct_hosts", "refused_ports"]
    over: Annotated[int, PlainValidator(count(1, 4096))] = Field(examples=["15"])
    within: Annotated[int, PlainValidator(duration(SECOND, DAY))] = Field(examples=["10s"])

    @field_validator("per")
    @classmethod
    def _of_a_source(cls, per: Counted) -> Counted:
        if _is_target(per):
            raise ValueError(
                "it counts what a source tries: count per {ipv4: N, ipv6: M}, or remove it"
            )
        return per


class ShortConnectionsRule(SourceRule):
    """More than `over` connections that ended before they were `shorter_than` old."""

    measure: Literal["short_connections"]
    shorter_than: Annotated[int, PlainValidator(duration(100 * MILLISECOND, HOUR))] = Field(
        examples=["10s"]
    )
    over: RateValue = Field(examples=["10/m"])
    burst: Burst | None = None
    unless: UnlessProductive = None


class ConnectionsRule(SourceRule):
    """More than `over` established connections at once; the newest are reset, as they begin."""

    actions: ClassVar[tuple[str, ...]] = ("observe", "reset", "ban")
    instead: ClassVar[str] = "use reset (ends the newest beyond the limit), ban or observe"
    by_sweep: ClassVar[bool] = True

    measure: Literal["connections"]
    over: Annotated[int, PlainValidator(count(1, 10_000_000))] = Field(examples=["200"])
    unless: UnlessProductive = None


class ByteRateRule(SourceRule):
    """More than `over` bytes a second, `burst` bytes at once."""

    actions: ClassVar[tuple[str, ...]] = ("observe", "reset", "ban")
    instead: ClassVar[str] = (
        "the bytes have passed when they are counted; use reset (ends the source's connections), "
        "ban or observe"
    )

    measure: Literal["byte_rate"]
    over: Annotated[int, PlainValidator(byte_rate)] = Field(examples=["10 MB/s"])
    burst: Annotated[int | None, PlainValidator(size)] = None


class PacketRateRule(RuleBase):
    """More than `over` small packets of clients in a time, as many requests on few connections are.

    What acknowledges a download, and an upload's full segments, do not count.
    """

    actions: ClassVar[tuple[str, ...]] = ("observe", "reset", "ban")
    instead: ClassVar[str] = (
        "the packets have passed when they are counted; use reset (ends the connections), ban or "
        "observe"
    )

    per: (
        Annotated[
            Annotated[Widths, Tag("widths")] | Annotated[Literal["connection"], Tag("connection")],
            Discriminator(
                _per_tag,
                custom_error_type="per",
                custom_error_message="cannot be counted by: write {ipv4: 24, ipv6: 48} "
                "or connection",
            ),
        ]
        | None
    ) = None
    measure: Literal["packet_rate"]
    over: RateValue = Field(examples=["200/s"])
    burst: Burst | None = None


class ConnectionRule(RuleBase):
    """A rule that judges each connection by itself."""

    actions: ClassVar[tuple[str, ...]] = ("observe", "reset", "ban")
    instead: ClassVar[str] = "it judges a whole connection, so use reset, ban or observe"


class SlowRule(ConnectionRule):
    """Older than `after`, and fewer bytes a second than `under`, in its life or `over_last`."""

    by_sweep: ClassVar[bool] = True

    measure: Literal["slow"]
    after: ConnectionTime = Field(examples=["20s"])
    under: Annotated[int, PlainValidator(byte_rate)] = Field(examples=["50 B/s"])
    of: Literal["client", "server", "both"] = "client"
    over_last: Annotated[int, PlainValidator(duration(10 * SECOND, DAY))] | None = None


class StalledRule(ConnectionRule):
    """The client has advertised at most `window` bytes for `over`."""

    measure: Literal["stalled"]
    window: Annotated[int, PlainValidator(count(0, 65535))] = Field(examples=["256"])
    over: Annotated[int, PlainValidator(duration(SECOND, HOUR))] = Field(examples=["60s"])


class IdleRule(ConnectionRule):
    """Silent for `over`, or older than `over`."""

    by_sweep: ClassVar[bool] = True

    measure: Literal["idle", "age"]
    over: ConnectionTime = Field(examples=["15m"])


class UnansweredRule(ConnectionRule):
    """Without a byte of its server for `over`, which shrinks to nothing as a pressed service fills.

    No more are ended than bring the service back to where pressure begins, and last those that can
    least be told from honest ones.
    """

    by_sweep: ClassVar[bool] = True

    measure: Literal["unanswered"]
    over: Annotated[int, PlainValidator(duration(SECOND, HOUR))] = Field(examples=["30s"])
    when: Literal["pressed"] = "pressed"


AnyRule = (
    RateRule | HalfOpenRule | DistinctRule | ShortConnectionsRule | ConnectionsRule | ByteRateRule
    | PacketRateRule | SlowRule | StalledRule | IdleRule | UnansweredRule
)  # fmt: skip

MEASURES = MappingProxyType(
    {
        measure: kind
        for kind in get_args(AnyRule)
        for measure in get_args(kind.model_fields["measure"].annotation)
    }
)
"""The model of each measure's rules."""
