"""A rule as iptables-save prints it, which is not always as it was written.

Only what rstguard's rules and the tests' other programs need: tried with iptables-nft 1.8.9.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

_SAFE = re.compile(r"[A-Za-z0-9_-]*")
_IMPLIED = re.compile(r"--(dport|sport|syn|tcp-flags|tcp-option)")
_SYNPROXY = ("--sack-perm", "--timestamp", "--wscale", "--mss")
"""In the order in which they are printed."""
_SCALE = 1_000_000
"""XT_HASHLIMIT_SCALE_v2, linux/netfilter/xt_hashlimit.h."""
_LIVES = "--hashlimit-htable-expire"
_UNITS = {"day": 86400, "hour": 3600, "min": 60, "sec": 1}


def written(words: Sequence[str], family: int) -> str:
    """Return the text of a rule, less its chain."""
    words = list(words)
    whole = "32" if family == 4 else "128"
    for at, word in enumerate(words[:-1]):
        if word in ("-s", "-d") and "/" not in words[at + 1]:
            words[at + 1] += f"/{whole}"
    words = _with_implied(words)
    words = _hashlimit(words, whole)
    words = _synproxy(words)
    quoted = [words[0]] if words else []
    for before, word in pairwise(words):
        quote = before in ("--u32", "--bytecode", "--label") or (
            before == "--comment" and not _SAFE.fullmatch(word)
        )
        quoted.append(f'"{word}"' if quote else word)
    return " ".join(quoted)


def _with_implied(words: list[str]) -> list[str]:
    """``-p tcp --dport 80`` names the match of the protocol, too."""
    for at in range(len(words) - 2):
        if words[at] == "-p" and _IMPLIED.fullmatch(words[at + 2]):
            return [*words[: at + 2], "-m", words[at + 1], *words[at + 2 :]]
    return words


def _hashlimit(words: list[str], whole: str) -> list[str]:
    """The width of a source or destination comes last, and what is the default not at all.

    A rate is printed in the shortest unit that shows it well, and how long entries live unless it
    is as long as that.
    """
    if "hashlimit" not in words:
        return words
    start = words.index("hashlimit") + 1
    ends = (at for at in range(start, len(words)) if words[at] in ("-j", "-g", "-m"))
    end = next(ends, len(words))
    options: list[str] = words[start:end]
    mask: list[str] = []
    for width in ("--hashlimit-srcmask", "--hashlimit-dstmask"):
        if width in options:
            at = options.index(width)
            mask += options[at : at + 2] if options[at + 1] != whole else []
            del options[at : at + 2]
    for rate in ("--hashlimit-above", "--hashlimit-upto"):
        if rate in options:
            at = options.index(rate)
            given = options[at + 1]
            options[at + 1] = _rate(given)
            lives = [str(1000 * _UNITS[one.partition("/")[2]]) for one in (given, options[at + 1])]
            if lives[0] != lives[1] and _LIVES not in options:
                options += [_LIVES, lives[0]]
            elif _LIVES in options and options[options.index(_LIVES) + 1] == lives[1]:
                at = options.index(_LIVES)
                del options[at : at + 2]
    if "--hashlimit-rate-interval" in options:
        at = options.index("--hashlimit-rate-interval")
        if options[at + 1] == "1":
            del options[at : at + 2]
    return [*words[:start], *options, *mask, *words[end:]]


def _rate(written: str) -> str:
    """Return a rate as `print_rate` of libxt_hashlimit.c does."""
    number, _, unit = written.partition("/")
    period = _SCALE * _UNITS[unit] // int(number)
    shown, name = 0, ""
    for shorter, seconds in _UNITS.items():
        whole, rest = divmod(_SCALE * seconds, period)
        if name and (period > _SCALE * seconds or whole < rest):
            break
        shown, name = whole, shorter
    return f"{shown}/{name}"


def _synproxy(words: list[str]) -> list[str]:
    if "SYNPROXY" not in words:
        return words
    start = words.index("SYNPROXY") + 1
    given = words[start:]
    ordered: list[str] = []
    for option in _SYNPROXY:
        if option in given:
            at = given.index(option)
            ordered += given[at : at + (2 if option in ("--wscale", "--mss") else 1)]
    return [*words[:start], *ordered]
