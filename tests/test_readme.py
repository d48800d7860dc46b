"""The README and the pages it names say what is true."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from rstguard.cli import app
from rstguard.engine.ruleset import Measure
from rstguard.lab.scenarios import SCENARIOS
from rstguard.observe.events import reasons_table
from rstguard.policy.load import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs" / "commands.md").read_text()
HOW = (ROOT / "docs" / "how-it-works.md").read_text()


def test_the_table_of_reasons_is_the_one_in_the_code() -> None:
    shown = re.search(r"<!-- reasons:.*?-->\n(.*?)<!-- end of reasons -->", HOW, re.DOTALL)
    assert shown is not None
    assert shown[1] == reasons_table()


def test_every_measure_is_in_the_table_of_measures() -> None:
    for measure in Measure:
        assert f"`{measure.value}`" in README


def test_the_policy_shown_is_a_valid_policy() -> None:
    for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL):
        parse(text, "README.md")


def test_every_command_shown_exists() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    shown = set(re.findall(r"`(?:sudo )?rstguard ([a-z]+)", README + COMMANDS + HOW))
    unknown = {word for word in shown if word not in commands}
    assert not unknown


def test_every_command_is_shown() -> None:
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"rstguard {name}" in COMMANDS, name


def test_every_scenario_of_the_lab_is_in_its_table() -> None:
    assert re.findall(
        r"^\| `([a-z-]+)` \|", README.partition("## In its lab")[2], re.MULTILINE
    ) == [scenario.name for scenario in SCENARIOS]


def test_every_page_that_is_named_is_there() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{link} in {page.name}"


def test_every_test_that_the_threat_model_names_is_there() -> None:
    page = (ROOT / "docs" / "threat-model.md").read_text()
    named = set(re.findall(r"`(tests/[\w/.]+)`", page))
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / name).exists()]
