"""By which interface packets to an address leave."""

from __future__ import annotations

import pytest

from rstguard.engine.address import parse_address
from rstguard.kernel.routes import ways
from tests.support.network import CLIENT4, CLIENT6, INSIDE4, SERVER4, SERVER6, ThreeHosts

pytestmark = pytest.mark.netns


def test_each_address_has_its_way_or_none() -> None:
    told = {
        CLIENT4: "out",
        CLIENT6: "out",
        SERVER4: "in",
        SERVER6: "in",
        INSIDE4: "lo",  # the gateway's own
        "198.51.100.1": "",  # the gateway has no default route
        "2001:db8::1": "",
    }
    with ThreeHosts("rgr") as lab, lab.inside("gateway"):
        assert ways([parse_address(text) for text in told]) == list(told.values())


def test_many_are_asked_for_in_one_conversation() -> None:
    with ThreeHosts("rgr") as lab, lab.inside("gateway"):
        first = parse_address("10.71.1.0")
        many = [first + number for number in range(2, 500) if 1 < number % 256 < 255]
        assert ways(many) == ["in" if address >= first + 256 else "out" for address in many]
        assert ways([]) == []
