"""A TCP service, by its address and port."""

from __future__ import annotations

from typing import NamedTuple

from rstguard.engine.flow import endpoint


class Service(NamedTuple):
    """A TCP port of a host: tagged address and port; of a protected one as clients know them."""

    address: int
    port: int

    def __str__(self) -> str:
        """Return ``192.0.2.1:80`` or ``[2001:db8::1]:80``."""
        return endpoint(self.address, self.port)
