"""What the models of the policy language share: the base class and the types of simple values."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from rstguard.engine.address import LEAST_IPV6, Prefix
from rstguard.engine.ruleset import RULE_NAME
from rstguard.policy.quantities import PortRange, count, network, show
from rstguard.policy.quantities import ports as port_range

Item = TypeVar("Item")


def _name(value: object) -> str:
    if isinstance(value, str) and RULE_NAME.fullmatch(value):
        return value
    raise ValueError(
        f"{show(value)} is not a name: write letters, digits, '-', '_' and '.', 48 at most"
    )


def not_empty(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """Refuse an empty list: it could be read as "none" and as "any"."""
    if not items:
        raise ValueError("the list is empty: name at least one, or remove the key to mean any")
    return items


Name = Annotated[str, PlainValidator(_name)]
Ports = Annotated[
    tuple[Annotated[PortRange, PlainValidator(port_range)], ...],
    Field(max_length=1000),
    AfterValidator(not_empty),
]


Network = Annotated[Prefix, PlainValidator(network)]
Networks = Annotated[tuple[Network, ...], Field(max_length=1000), AfterValidator(not_empty)]


class Model(BaseModel):
    """What all parts of a policy share: unknown keys are errors, and nothing changes later."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Widths(Model):
    """How wide one counted source is, in bits of the address.

    Wider than /8 or /32 one offence would count against a continent, or against a provider; a
    worker is also chosen by the bits that all addresses of a counted prefix share, so there must be
    some; and keys of 32 bits or more of IPv6 are never those of IPv4
    (`rstguard.engine.address.source_key`).
    """

    ipv4: Annotated[int, PlainValidator(count(8, 32))] = 32
    ipv6: Annotated[int, PlainValidator(count(LEAST_IPV6, 128))] = 64


class DestinationWidths(Model):
    """How wide one counted destination is, in bits of the address."""

    destination_ipv4: Annotated[int, PlainValidator(count(8, 32))] = 24
    destination_ipv6: Annotated[int, PlainValidator(count(LEAST_IPV6, 128))] = 48
