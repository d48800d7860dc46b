"""Text of strangers, made plain: nothing in it that a terminal obeys, and nothing that forges."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rstguard.observe.text import LONGEST, plain, plain_lines

GONE = "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("policy-1.yaml", "policy-1.yaml"),
        ("Zoë, 日本語, [red]x[/red], [link=https://example.org]y", None),
        ("a\x1b]52;c;ZXZpbA==\x07b", "ab"),
        ("a\x1b]52;c;ZXZpbA==\x1b\\b", "ab"),
        ("a\x1b]0;title\x9cb", "ab"),
        ("a\x9d0;title\x07b", "ab"),
        ("a\x1bPq#0;2;0\x1b\\b\x1b_x\x1b\\c\x1b^y\x07d\x1bXz\x07e", "abcde"),
        ("a\x1b[31;1mb\x1b[0m\x1b[2J\x1b[?1049h\x9b5Ac", "abc"),
        ("a\x1b(0b\x1bcd", "abd"),
        ("a\x1b]52;unended", "a52;unended"),
        ("a\x1b", f"a{GONE}"),
        ("a\rb\nc\td\x0be\x85f\u2028g\u2029h\xa0i", "a b c d e f g h i"),
        ("a\x07b\x00c\x08d\x7fe\x90f", f"a{GONE}b{GONE}c{GONE}d{GONE}e{GONE}f"),
        ("a\u202eb\u2066c\u200fd\ufeffe\u200bf", f"a{GONE}b{GONE}c{GONE}d{GONE}e{GONE}f"),
        ("a\ud800b\udcffc", f"a{GONE}b{GONE}c"),
    ],
)
def test_what_is_shown(text: str, shown: str | None) -> None:
    assert plain(text) == (text if shown is None else shown)


def test_length() -> None:
    assert plain("a" * LONGEST) == "a" * LONGEST
    assert plain("a" * (LONGEST + 1)) == "a" * (LONGEST - 1) + "…"
    assert len(plain("\x07" * 10_000)) == LONGEST
    assert plain("abcdef", 3) == "ab…"


def test_lines_stay_lines() -> None:
    assert plain_lines("a\x1b[31mb\nc\rd\n") == "ab\nc d\n"


@given(st.text(st.characters(codec=None) | st.sampled_from("\x1b[]P_^X\x07\\\x9c\x9d;0m")))
def test_whatever_it_is(text: str) -> None:
    shown = plain(text)
    assert shown.isprintable()
    shown.encode("utf-8", "strict")
    assert plain(shown) == shown


@pytest.mark.parametrize("piece", ["\x1b]", "\x1b[0", "\x1b ", "\x90", "\x90a", "\x9b0", "\x07"])
def test_it_takes_no_time(piece: str) -> None:
    began = time.process_time()
    plain(piece * 1_000_000)
    plain(piece * 100_000, 10_000_000)
    assert time.process_time() - began < 5
