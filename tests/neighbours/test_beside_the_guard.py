"""Nobody suffers for being near the guard: each neighbour with it, and without it as a control."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.neighbours import networks, programs, rules, tools
from tests.neighbours.trial import Neighbour, compare

pytestmark = [pytest.mark.netns, pytest.mark.neighbours]

NEIGHBOURS: dict[str, Neighbour] = {
    "nobody": Neighbour(),
    **networks.NEIGHBOURS,
    **rules.NEIGHBOURS,
    **tools.NEIGHBOURS,
    **programs.NEIGHBOURS,
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_neighbour(name: str, tmp_path: Path) -> None:
    neighbour = NEIGHBOURS[name]
    for program in neighbour.needs:
        if shutil.which(program) is None:
            missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
            missing(f"{program} is missing: run `.ci/setup --tests`")
    control, tried, told = compare(neighbour, tmp_path)
    assert control.tally.problems == []
    assert tried.tally.short_of(control.tally) == {}, tried.tally.problems
    assert tried.resets <= control.resets
    assert told.harmed == {}
    if neighbour.restored:
        assert all(problem.startswith("missing:") for problem in told.problems)
    else:
        assert told.problems == set()
