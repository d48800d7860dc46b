"""Open handshakes, read from the lists that the kernel fills."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rstguard.control.open_handshakes import Open, read
from rstguard.engine.address import parse_address
from rstguard.engine.offers import Offer
from rstguard.engine.ruleset import SECOND, RuleSet, Scope, SynBudget
from rstguard.engine.service import Service
from rstguard.kernel import KernelError, half_open
from rstguard.kernel.footprint import Footprint
from rstguard.kernel.half_open import MOST_OWN
from rstguard.kernel.services import Services
from tests.support.fake_kernel.kernel import FakeKernel

RULESET = RuleSet(
    name="test",
    enforce=True,
    fail_open=True,
    scope=Scope(("eth0",), (), None, ()),
    rules=(),
    syn_budget=SynBudget(None, None, 100),
)
OFFER = Offer(1460, 7, sack=True, timestamps=True)
WEB4 = Service(parse_address("192.0.2.1"), 80)
WEB6 = Service(parse_address("2001:db8::1"), 80)
MANY = {Service(WEB4.address, 1000 + number): OFFER for number in range(MOST_OWN + 2)}
FIRST, *_, BEFORE_LAST, LAST = MANY


class Clock:
    """Nanoseconds, set by hand."""

    now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kernel(clock: Clock, tmp_path: Path) -> FakeKernel:
    kernel = FakeKernel(clock)
    footprint = Footprint(kernel, tmp_path, range(5640, 5641))
    footprint.known = {WEB6: OFFER, **MANY}
    footprint.prepare(RULESET)
    return kernel


def hold(kernel: FakeKernel, service: Service, clients: int, beside: bool = False) -> None:
    """Have so many handshakes open, for the usual time."""
    known, family = {WEB6: OFFER, **MANY}, 6 if service == WEB6 else 4
    usual, other, _ = half_open.names(Services(RULESET, family, known))[service]
    name = other if beside else usual
    address = "2001:db8::7" if service == WEB6 else "198.51.100.7"
    for port in range(clients):
        kernel.run(["ipset", "add", name, f"{address},tcp:{2000 + port}"])


def test_each_service_has_its_own_count(kernel: FakeKernel, clock: Clock) -> None:
    known = {WEB6: OFFER, **MANY}
    hold(kernel, FIRST, 5)
    hold(kernel, FIRST, 2, beside=True)
    hold(kernel, WEB6, 3)
    found = read(kernel, RULESET, known)
    assert found.keys() == known.keys()
    assert found[FIRST] == Open(5, 2, 100, shared=False)
    assert found[WEB6] == Open(3, 0, 100, shared=False)
    clock.now += (half_open.OPEN_SECONDS + 1) * SECOND
    assert read(kernel, RULESET, known)[FIRST] == Open(0, 0, 100, shared=False)


def test_those_without_lists_of_their_own_are_counted_together(kernel: FakeKernel) -> None:
    hold(kernel, LAST, 4)
    found = read(kernel, RULESET, MANY)
    assert found[LAST] == found[BEFORE_LAST] == Open(4, 0, 100, shared=True)
    assert found[FIRST] == Open(0, 0, 100, shared=False)


@pytest.mark.parametrize(
    "ruleset",
    [
        replace(RULESET, syn_budget=None),
        replace(RULESET, syn_budget=SynBudget(100, None)),
        replace(RULESET, enforce=False),
    ],
)
def test_where_nothing_is_counted_nobody_is_asked(kernel: FakeKernel, ruleset: RuleSet) -> None:
    kernel.faults.fail("sets", KernelError("not asked for"))
    assert read(kernel, ruleset, MANY) == {}


def test_a_list_that_is_not_there_yet_is_left_out(kernel: FakeKernel) -> None:
    new = Service(WEB4.address, 9)
    assert set(read(kernel, RULESET, {WEB6: OFFER, new: OFFER})) == {WEB6}
