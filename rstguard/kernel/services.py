"""The services whose SYNs the kernel may answer with SYN cookies, in the rules.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from rstguard.engine.address import address_text, is_v6
from rstguard.engine.offers import Offer
from rstguard.engine.service import Service
from rstguard.kernel.matching import SYN_ONLY, Matching

SYN = f"-p tcp -m tcp --tcp-flags {SYN_ONLY}"

Known = Mapping[Service, Offer]
NOBODY: Final[Known] = MappingProxyType({})
"""No known services."""


@dataclass(frozen=True, slots=True)
class Services(Matching):
    """The known services of one address family; `known` may hold others besides."""

    known: Known

    @property
    def here(self) -> Known:
        """Those of this family that the policy protects."""
        scope, v6 = self.ruleset.scope, self.family == 6
        return {
            service: offer
            for service, offer in self.known.items()
            if is_v6(service.address) == v6 and scope.protects(*service)
        }

    @property
    def untranslated(self) -> Services:
        """Those whose SYNs bear their server's address."""
        return self._those(lambda offer: not offer.to)

    @property
    def translated(self) -> Services:
        """Those behind DNAT."""
        return self._those(lambda offer: bool(offer.to))

    @property
    def challengeable(self) -> Services:
        """Those for which a shunned source may get a cookie."""
        return self._those(lambda offer: len(offer.to) < 2)

    @property
    def led(self) -> Services:
        """Those behind DNAT that lead to one server alone."""
        return self._those(lambda offer: len(offer.to) == 1)

    def _those(self, wanted: Callable[[Offer], bool]) -> Services:
        return replace(self, known={s: offer for s, offer in self.known.items() if wanted(offer)})

    def for_each(
        self, rule: str, towards: bool = True, ports: frozenset[int] | None = None
    ) -> tuple[str, ...]:
        """Return a rule for each service, in the direction towards it or from it.

        The rule begins behind the port.  `ports` are those that are asked for, None for all.
        """
        match = goes_to if towards else comes_from
        return tuple(f"{match(s)} {rule}" for s in self.here if ports is None or s.port in ports)

    def for_each_origin(self, rule: str) -> tuple[str, ...]:
        """Return a rule for each service, for what clients sent to it, translated by now or not."""
        return tuple(f"{began_to(s)} {rule}" for s in self.here)

    def for_each_offer(self, rule: str) -> tuple[str, ...]:
        """Return a rule for each service, in the direction towards it, that ends in its offer."""
        return tuple(f"{goes_to(s)} {rule} {_options(offer)}" for s, offer in self.here.items())


def goes_to(service: Service) -> str:
    """Match what is addressed to a service."""
    return f"-d {address_text(service.address)} -p tcp -m tcp --dport {service.port}"


def began_to(service: Service) -> str:
    """Match what belongs to a connection that its client addressed to a service."""
    address = address_text(service.address)
    return f"-p tcp -m conntrack --ctorigdst {address} --ctorigdstport {service.port}"


def comes_from(service: Service) -> str:
    """Match what bears a service's address as its source."""
    return f"-s {address_text(service.address)} -p tcp -m tcp --sport {service.port}"


def _options(offer: Offer) -> str:
    """Window scale and SACK travel in the time stamp's cookie: without one they cannot be had."""
    options = f"--mss {offer.mss}"
    if offer.timestamps:
        options += " --timestamp"
        options += " --sack-perm" if offer.sack else ""
        options += f" --wscale {offer.scale}" if offer.scale >= 0 else ""
    return options
