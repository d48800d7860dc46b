"""Whatever the text, `parse` answers with a policy or a PolicyError, and its lines are real."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rstguard.policy.compile import compile_policy, describe
from rstguard.policy.load import PolicyError, Problem, parse

EXAMPLES = tuple(
    path.read_text() for path in sorted((Path(__file__).parent / "golden").glob("*.yaml"))
)
SNIPPETS = (
    "*a", "&a ", "!!int ", "!x ", "{", "}", "[", "]", ": ", "- ", "\n", "\t", "'", '"', "? ", "~",
    "<<: ", "null", "1e999", ".nan", "0x", "-1", "9" * 30, "service", "ban", "10y", "---\n",
    "\\U9", "!!set ", "%YAML 1.1\n---\n", "...\n", "\\", "\x85", "\ufeff", "|\n", ">-\n", "#",
    "on", "2024-01-01",
)  # fmt: skip


def check(text: str | bytes) -> None:
    found: tuple[Problem, ...]
    try:
        loaded = parse(text, "fuzz.yaml", lambda _: ())
    except PolicyError as error:
        found = error.problems
        assert_that_something_is_said(found)
    else:
        found = loaded.told
        assert describe(compile_policy(loaded.policy)).startswith("policy ")
    for problem in found:
        assert problem.line >= 1
        assert problem.column >= 1
        assert str(problem).isprintable()


def assert_that_something_is_said(found: tuple[Problem, ...]) -> None:
    assert found
    assert all(problem.message for problem in found)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """Return an example in which some pieces are cut, doubled, moved or replaced."""
    text = draw(st.sampled_from(EXAMPLES))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        piece = draw(
            st.sampled_from(SNIPPETS)
            | st.just("")
            | st.just(text[start:end] * 2)
            | st.text(max_size=4)
            | st.integers().map(str)
        )
        text = text[:start] + piece + text[end:]
    return text


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(SNIPPETS) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.text())
def test_any_text(text: str) -> None:
    check(text)


@given(st.binary())
def test_any_bytes(text: bytes) -> None:
    check(text)


@settings(max_examples=250)
@given(mutated())
def test_mutated_policies(text: str) -> None:
    check(text)


@given(
    st.sampled_from(
        ["name", "mode", "protect", "trusted", "source", "inspect", "rules", "version"]
    ),
    values,
)
def test_any_value_at_any_key(key: str, value: object) -> None:
    check(f"version: 1\nprotect: {{interfaces: [eth0]}}\n{key}: {value!r}\n")


@given(
    st.sampled_from(["syn_rate", "half_open", "slow", "stalled", "short_connections", "byte_rate"]),
    st.sampled_from(["over", "then", "for", "per", "escalate", "ports", "within", "under", "name"]),
    values,
)
def test_any_value_in_a_rule(measure: str, key: str, value: object) -> None:
    rule = f"  - name: r\n    measure: {measure}\n    {key}: {value!r}\n"
    check(f"version: 1\nprotect: {{interfaces: [eth0]}}\nrules:\n{rule}")


@pytest.mark.fuzz_long
@settings(max_examples=20_000)
@given(mutated())
def test_many_mutated_policies(text: str) -> None:
    check(text)
