"""The JSON Schema: current beside the samples, and right about what is and what is no policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from rstguard.policy.load import PolicyError, parse
from rstguard.policy.schema import FILE_NAME, policy_schema

ROOT = Path(__file__).parent.parent.parent
SAMPLES = sorted((ROOT / "policies").glob("*.yaml"))
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.yaml"))


def plain(text: str) -> Any:
    """Return what an editor sees of a file."""
    return json.loads(json.dumps(YAML(typ="safe", pure=True).load(text)))


def accepted(text: str) -> bool:
    try:
        jsonschema.validate(plain(text), policy_schema())
    except jsonschema.ValidationError:
        return False
    return True


def test_the_file_beside_the_samples_is_current() -> None:
    text = (ROOT / "policies" / FILE_NAME).read_text()
    assert json.loads(text) == policy_schema(), (
        "run: rstguard policy schema > policies/" + FILE_NAME
    )


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(policy_schema())


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_samples_refer_to_it_and_fit_it(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(f"# yaml-language-server: $schema={FILE_NAME}\n")
    assert accepted(text)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_what_it_refuses_is_no_policy(path: Path) -> None:
    text = path.read_text()
    try:
        parse(text, path.name)
    except PolicyError:
        return
    assert accepted(text)


@pytest.mark.parametrize(
    ("rule", "right"),
    [
        ("{name: a, measure: idle, over: 5m, then: reset}", True),
        ("{name: a, measure: idle, over: 5, then: reset}", False),
        ("{name: a, measure: idle, then: reset}", False),
        ("{name: a, measure: idol, over: 5m, then: reset}", False),
        ("{name: a, measure: idle, over: 5m, then: reset, burst: 3}", False),
        ("{name: a, measure: syn_rate, over: 5/s, then: ban, for: 1h}", True),
        ("{name: a, measure: syn_rate, over: fast, then: drop}", False),
    ],
)
def test_editors_find_plain_mistakes(rule: str, right: bool) -> None:
    text = f"version: 1\nprotect: {{interfaces: [eth0]}}\nrules: [{rule}]\n"
    assert accepted(text) is right
