"""Read a policy file: YAML in, a `Policy` and its warnings out, or every mistake at once.

A mistake is one line, ``file:line:column: where: what was wrong, and what would be right``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

from pydantic import ValidationError

from rstguard.policy.check import Around, check
from rstguard.policy.document import LARGEST, Document, read
from rstguard.policy.explain import Finding, explain
from rstguard.policy.model import MOST_RULES, Policy
from rstguard.policy.problems import PolicyError, Problem

__all__ = ["Loaded", "PolicyError", "Problem", "load", "parse"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid policy, the text it was read from, and what is odd about it though allowed.

    `told` are warnings and notes; a note says what the policy does not do, and is no mistake.
    """

    policy: Policy
    told: tuple[Problem, ...]
    text: str

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """What its author has probably not meant."""
        return tuple(problem for problem in self.told if problem.severity == "warning")


def load(
    path: str | os.PathLike[str],
    around: Around | None = None,
    one_sided: Collection[str] = (),
) -> Loaded:
    """Read and validate a policy file.

    Args:
        path: the file.
        around: tells what of the policy cannot match here, to warn of it; None: do not look.
        one_sided: services of which a guard here sees only one side, to warn of them.

    Raises:
        PolicyError: the file cannot be read, or is no valid policy.
    """
    name = os.fspath(path)
    try:
        with FilePath(path).open("rb") as file:
            text = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise _unreadable(name, "there is no such file: is the path right?") from None
    except IsADirectoryError:
        raise _unreadable(name, "this is a directory: name the policy file in it") from None
    except PermissionError:
        raise _unreadable(name, "permission denied: run as root, or make it readable") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _unreadable(name, f"the file cannot be read ({reason}): is it a file?") from None
    return parse(text, name, around, one_sided)


def parse(
    text: str | bytes,
    name: str,
    around: Around | None = None,
    one_sided: Collection[str] = (),
) -> Loaded:
    """Validate the text of a policy; `name` is the file's name in messages, the rest as for `load`.

    Raises:
        PolicyError: the text is no valid policy.  No other exception leaves this function.
    """
    document = read(text, name)
    _refuse_too_many_rules(document)
    policy: Policy | None = None
    problems = document.problems()
    try:
        # The context collects the names of rules, so that the second of a name is refused.
        policy = Policy.model_validate(document.data, context=set())
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems += _errors(document, map(explain, details))
    if problems or policy is None:
        raise PolicyError(_sorted(problems))
    told = [
        replace(_problem(document, finding), severity="note" if finding.note else "warning")
        for finding in check(policy, around, one_sided)
    ]
    return Loaded(policy, _sorted(told), text if isinstance(text, str) else text.decode())


def _refuse_too_many_rules(document: Document) -> None:
    """Say only that, and before each of them is judged: mistakes in thousands help nobody."""
    rules = document.data.get("rules") if isinstance(document.data, dict) else None
    if isinstance(rules, list) and len(rules) > MOST_RULES:
        said = f"there are {len(rules)} rules, and {MOST_RULES} are the most: this is the first"
        line, column = document.place(("rules", MOST_RULES))
        raise PolicyError((Problem(document.file, line, column, "rules", f"{said} too many"),))


def _errors(document: Document, findings: Iterable[Finding]) -> list[Problem]:
    found = [finding for finding in findings if not document.spoken_for(finding.path)]
    # In another version everything may have another meaning: only that is worth saying.
    other_version = [finding for finding in found if finding.path == ("version",)]
    if other_version and isinstance(document.data, dict) and "version" in document.data:
        found = other_version
    return [_problem(document, finding) for finding in found]


def _problem(document: Document, finding: Finding) -> Problem:
    line, column = document.place(finding.path, finding.at_key)
    return Problem(document.file, line, column, document.where(finding.path), finding.message)


def _sorted(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(problems, key=lambda problem: (problem.line, problem.column)))


def _unreadable(name: str, message: str) -> PolicyError:
    return PolicyError((Problem(name, 1, 1, "", message),))
