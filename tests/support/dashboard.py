"""What the Grafana dashboard asks of Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "docs" / "grafana-rstguard.json"
_SELECTOR = re.compile(r"\b(rstguard_\w+)(?:{([^}]*)})?")
_MATCHER = re.compile(r'(\w+)=~"([^"]*)"')

Selector = tuple[str, dict[str, str]]
"""The name of a metric, and a regular expression for each of some labels."""


def asked() -> list[tuple[str, str]]:
    """Return every query of panels and variables, wherever it stands, with its legend."""
    return list(_queries(json.loads(FILE.read_text())))


def _queries(part: Any) -> Iterator[tuple[str, str]]:
    if isinstance(part, list):
        for one in part:
            yield from _queries(one)
    elif isinstance(part, dict):
        for key in ("expr", "query"):
            if "rstguard_" in str(part.get(key, "")):
                yield part[key], part.get("legendFormat", "")
        for one in part.values():
            yield from _queries(one)


def selectors(expression: str) -> list[Selector]:
    """Return which series an expression reads."""
    return [(name, dict(_MATCHER.findall(inner))) for name, inner in _SELECTOR.findall(expression)]
