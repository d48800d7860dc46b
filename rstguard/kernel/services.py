"""The services whose SYNs the kernel may answer with SYN cookies, in the rules.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rstguard.engine.address import address_text, is_v6
from rstguard.engine.offers import Offer, Service
from rstguard.kernel.matching import SYN_ONLY, Matching

SYN = f"-p tcp -m tcp --tcp-flags {SYN_ONLY}"

Known = Mapping[Service, Offer]


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

    def for_each(
        self, rule: str, towards: bool = True, ports: frozenset[int] | None = None
    ) -> tuple[str, ...]:
        """Return a rule for each service, in the direction towards it or from it.

        The rule begins behind the port.  `ports` are those that are asked for, None for all.
        """
        way, port = ("-d", "--dport") if towards else ("-s", "--sport")
        return tuple(
            f"{way} {address_text(s.address)} -p tcp -m tcp {port} {s.port} {rule}"
            for s in self.here
            if ports is None or s.port in ports
        )

    def for_each_offer(self, rule: str) -> tuple[str, ...]:
        """Return a rule for each service, in the direction towards it, that ends in its offer."""
        return tuple(
            f"-d {address_text(s.address)} -p tcp -m tcp --dport {s.port} {rule} {_options(offer)}"
            for s, offer in self.here.items()
        )


def _options(offer: Offer) -> str:
    """Window scale and SACK travel in the time stamp's cookie: without one they cannot be had."""
    options = f"--mss {offer.mss}"
    if offer.timestamps:
        options += " --timestamp"
        options += " --sack-perm" if offer.sack else ""
        options += f" --wscale {offer.scale}" if offer.scale >= 0 else ""
    return options
