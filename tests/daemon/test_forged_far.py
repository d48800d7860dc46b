"""Forged RSTs on connections over a slow wire, behind translators and strict firewalls.

`python -m tests.bench ways` tries every way, and tcp_loose and tcp_be_liberal as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.lab.guard import GuardProcess
from tests.support.forged import HOLDING
from tests.support.ways import WAYS, SlowNetwork, Trial

pytestmark = pytest.mark.netns

_CONNECTIONS, _BUSY = 10, 5
_FORGOTTEN = 11
"""Seconds after which the tracker has forgotten what it takes for closed."""


@pytest.fixture(scope="module")
def network() -> Iterator[SlowNetwork]:
    """The slow network."""
    with SlowNetwork(prefix="rgs") as network:
        yield network


def test_forged_resets_end_nothing_behind_translators_and_strict_firewalls(
    network: SlowNetwork, tmp_path: Path
) -> None:
    """A translator answers in its client's place what does not fit, as if that were dead."""
    ways = [way for way in WAYS if way.at_home or way.strict]
    trials = [Trial(network, way, v6) for way in ways for v6 in (False, True)]
    with GuardProcess(network, HOLDING, tmp_path / "guard") as guard:
        for trial in trials:
            trial.connect(_CONNECTIONS)
            trial.forge(_BUSY)
        time.sleep(_FORGOTTEN)
        found = {trial.name: (trial.dead, trial.lost(), trial.stuck()) for trial in trials}
        assert found == dict.fromkeys(found, (0, 0, 0)), guard.status()["counts"]
    for trial in trials:
        trial.close()
