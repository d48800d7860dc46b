"""What a validation error means to the person who wrote the file.

pydantic says where (a path of keys, indexes and union tags) and what kind; this module turns both
into a path of the file and a sentence that says what is wrong and what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from rstguard.engine.ruleset import Measure
from rstguard.policy.base import Widths
from rstguard.policy.document import Path
from rstguard.policy.model import Inspect, Policy, Pressure, Protect, SynBudget
from rstguard.policy.quantities import show
from rstguard.policy.rules import MEASURES, Escalate, RuleBase, Unless


class Finding(NamedTuple):
    """Something to say about a part of a policy; `at_key` points at the key, not its value.

    A `note` says what the policy does not do, which need be no mistake.
    """

    path: Path
    message: str
    at_key: bool = False
    note: bool = False


def explain(error: ErrorDetails) -> Finding:
    """Return path and sentence of one pydantic error."""
    path = _path(error["loc"])
    kind, given = error["type"], error["input"]
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, error["loc"])
    if kind == "missing":
        return Finding(path, f"is missing: write `{path[-1]}: {_example(error['loc'])}`")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _measure(path, given)
    if kind == "inner":
        return Finding((*path, str(context["key"])), error["msg"])
    if kind == "value_error":
        return Finding(path, str(context["error"]))
    if kind == "literal_error":
        expected = str(context["expected"]).replace("'", "")
        return Finding(path, f"{show(given)} is not a choice here: write {expected}")
    if kind == "too_long":
        return Finding(path, f"the list is too long: {context['max_length']} items are the most")
    return Finding(path, _plain(kind, given, error["msg"]))


def _plain(kind: str, given: object, otherwise: str) -> str:
    if kind == "tuple_type":
        if isinstance(given, dict):
            return "must be a list: begin each item with `- `"
        return "must be a list: write [{}]".format(show(given).replace("'", '"'))
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a mapping of keys to values, not {_kind_of(given)}"
    if kind == "bool_type":
        return f"{show(given)} is not a choice here: write true or false"
    return otherwise


def _kind_of(value: object) -> str:
    return "a list" if isinstance(value, list) else show(value)


def _path(location: Sequence[str | int]) -> Path:
    """Return the path in the file: without the tags that pydantic adds for unions."""
    path = list(location)
    if len(path) > 3 and path[3] == "per":
        del path[4:5]
    if len(path) > 2 and path[0] == "rules":
        del path[2]
    if path[-1] == "[key]":  # of a mapping whose keys are anybody's choice
        path.pop()
    # An absent key that has an alias is named by its field.
    return tuple("for" if part == "ban_for" else part for part in path)


def _model_at(location: Sequence[str | int]) -> type[BaseModel]:
    """Return the model of the mapping that the last key of a location stands in."""
    models: dict[object, type[BaseModel]] = {
        "protect": Protect,
        "source": Widths,
        "inspect": Inspect,
        "syn_budget": SynBudget,
        "pressure": Pressure,
        "escalate": Escalate,
        "per": Widths,
        "unless": Unless,
    }
    enclosing = list(location[:-1])
    if not enclosing:
        return Policy
    if enclosing[0] == "rules":
        return MEASURES[str(enclosing[2])] if len(enclosing) == 3 else models[enclosing[3]]
    return models[enclosing[0]]


def keys_of(model: type[BaseModel]) -> list[str]:
    """Return the keys that a mapping may have, as and in the order that people write them."""
    keys = [field.alias or name for name, field in model.model_fields.items()]
    if issubclass(model, RuleBase):
        common = [field.alias or name for name, field in RuleBase.model_fields.items()]
        own = [key for key in keys if key not in common and key != "measure"]
        keys = ["name", "measure", *own, *common[1:]]
    return keys


def _example(location: Sequence[str | int]) -> str:
    for name, field in _model_at(location).model_fields.items():
        if (field.alias or name) == location[-1] and field.examples:
            return str(field.examples[0])
    return "..."


def nearest(word: str, words: Iterable[str]) -> str:
    """Return "; did you mean …?" if one of `words` is near, else ""."""
    close = difflib.get_close_matches(word[:60].lower(), list(words), n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else ""


def _unknown_key(path: Path, location: Sequence[str | int]) -> Finding:
    key, model = str(path[-1]), _model_at(location)
    known = keys_of(model)
    here = f"write one of {', '.join(known)}"
    elsewhere = {key for kind in MEASURES.values() for key in keys_of(kind)}
    if len(path) == 3 and path[0] == "rules":
        measure = str(location[2])
        here = f"{measure} takes {', '.join(known)}"
        if key in elsewhere:
            return Finding(path, f"does not go with this measure: {here}", at_key=True)
    near = nearest(key, known)
    return Finding(path, f"unknown key{near}" if near else f"unknown key: {here}", at_key=True)


def _measure(path: Path, rule: object) -> Finding:
    """Explain a rule whose measure is absent or unknown."""
    known = ", ".join(measure.value for measure in Measure)
    if not isinstance(rule, dict):
        return Finding(path, f"must be a mapping of keys to values, not {_kind_of(rule)}")
    if "measure" not in rule:
        return Finding((*path, "measure"), f"is missing: write one of {known}")
    given = rule["measure"]
    near = nearest(given, MEASURES) if isinstance(given, str) else ""
    message = f"{show(given)} is not a measure{near or f': write one of {known}'}"
    return Finding((*path, "measure"), message)
