"""What is wrong with a policy file, each mistake with its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

MOST_PROBLEMS: Final = 200
"""Mistakes that are told one by one; more of them are only counted."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a policy file; `line` and `column` begin at 1.

    `where` is a path such as ``rules[2] (port-scan).over``, or "" for the file as a whole.
    """

    file: str
    line: int
    column: int
    where: str
    message: str
    severity: Literal["error", "warning", "note"] = "error"

    def __str__(self) -> str:
        parts = [f"{self.file}:{self.line}:{self.column}"]
        parts += [self.severity] * (self.severity != "error")
        parts += [self.where] * bool(self.where)
        return ": ".join([*parts, self.message])


class PolicyError(Exception):
    """A policy that cannot be used.

    `problems` holds every reason, sorted by line; beyond `MOST_PROBLEMS` the last of them says how
    many more there are.
    """

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        if (more := len(problems) - MOST_PROBLEMS) > 0:
            problems = _bounded(problems, more)
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def _bounded(problems: tuple[Problem, ...], more: int) -> tuple[Problem, ...]:
    following = problems[MOST_PROBLEMS]
    said = f"from here on there are {more} mistakes more: correct those above first"
    place = (following.file, following.line, following.column)
    return (*problems[:MOST_PROBLEMS], Problem(*place, "", said))
