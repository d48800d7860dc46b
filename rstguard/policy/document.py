"""A policy file as plain data, with the place of every key and value.

YAML is read by ruamel.yaml down to its node graph, which knows line and column of everything.  What
YAML offers beyond plain data (aliases, tags, empty values, repeated keys) is refused here, each
with its place, so that what the model sees is a tree and its size is the size of the file.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from rstguard.policy.problems import PolicyError, Problem
from rstguard.policy.quantities import show

Path = tuple[str | int, ...]
"""Where something is in the data: keys and list indexes from the top."""

Data = dict[str, "Data"] | list["Data"] | str | int | float | bool | None

LARGEST: Final = 64 << 10
"""Bytes that a policy file may have; 500 rules of 120 bytes take 60,000."""

_DEEPEST = 8
_DEEPEST_READ = 64
"""Levels beyond which nothing more is read: the reader's time grows with their square."""
_PARSER_SLIPS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip
_TAG = "tag:yaml.org,2002:"
_SCALARS = ("str", "int", "float", "bool")


@dataclass(slots=True)
class Document:
    """The data of one file and where each part of it stands (line, column, from 1)."""

    file: str
    data: Data = None
    keys: dict[Path, tuple[int, int]] = field(default_factory=dict)
    values: dict[Path, tuple[int, int]] = field(default_factory=dict)
    notes: list[tuple[Path, str, tuple[int, int]]] = field(default_factory=list)
    refused: set[Path] = field(default_factory=set)

    def place(self, path: Path, at_key: bool = False) -> tuple[int, int]:
        """Return line and column of a value, or of its key; of what encloses it if it is absent."""
        if at_key and path in self.keys:
            return self.keys[path]
        while path not in self.values and path:
            path = path[:-1]
        return self.values.get(path, (1, 1))

    def where(self, path: Path) -> str:
        """Return a path as people read it: ``rules[2] (port-scan).over``."""
        text = ""
        for depth, part in enumerate(path, 1):
            if isinstance(part, int):
                text += f"[{part}]" + self._rule_name(path[:depth])
            else:
                text += f".{_bare(part)}" if text else _bare(part)
        return text

    def _rule_name(self, path: Path) -> str:
        if len(path) != 2 or path[0] != "rules" or not isinstance(self.data, dict):
            return ""
        rules = self.data.get("rules")
        rule = rules[int(path[1])] if isinstance(rules, list) else None
        name = rule.get("name") if isinstance(rule, dict) else None
        return f" ({_bare(name)})" if isinstance(name, str) and name else ""

    def note(self, path: Path, message: str, place: tuple[int, int]) -> None:
        """Note an error at a place of its own."""
        self.notes.append((path, message, place))

    def problems(self) -> list[Problem]:
        """Return the errors noted so far."""
        return [
            Problem(self.file, *place, self.where(path), message)
            for path, message, place in self.notes
        ]

    def refuse(self, path: Path, message: str) -> None:
        """Note an error, and that nothing more need be said about this part of the file."""
        self.refused.add(path)
        self.note(path, message, self.place(path))

    def spoken_for(self, path: Path) -> bool:
        """Tell whether an error has been noted for this part or what encloses it."""
        return any(path[:depth] in self.refused for depth in range(len(path) + 1))


def _bare(text: str) -> str:
    """Return a name as it is if it is plain, else quoted and cut."""
    return text if text.isascii() and text.isprintable() and len(text) < 60 else show(text)


def read(text: str | bytes, name: str) -> Document:
    """Read YAML text; what is wrong with single values is noted in the document.

    Raises:
        PolicyError: nothing can be made of the text as a whole.
    """
    document = Document(name)
    try:
        root = _compose(_decoded(text, name))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        said = f"this is not valid YAML: {_said(error)}"
        if isinstance(error, _TooDeep):
            said = "values are nested too deeply for a policy"
        raise _unusable(name, said, line, column) from None
    except YAMLError:
        raise _unusable(name, "this is not text: a policy holds no control characters") from None
    except RecursionError:
        raise _unusable(name, "values are nested too deeply for a policy") from None
    except _PARSER_SLIPS as error:
        # Some malformed directives and escapes end in a plain exception of the parser.
        raise _unusable(name, f"this is not valid YAML: {show(str(error))}") from None
    if root is None:
        raise _unusable(name, "the file is empty: a policy begins with `version: 1`")
    if not isinstance(root, MappingNode):
        raise _unusable(name, "a policy is a mapping of keys to values, beginning `version: 1`")
    walk = _Walk(document)
    document.data = walk.value(root, ())
    if walk.aliased:
        document.note((), *_first_alias(_decoded(text, name)))
    return document


def _first_alias(text: str) -> tuple[str, tuple[int, int]]:
    """Return message and place for aliases; a node does not know where it is used again."""
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, AliasEvent):
            place = (event.start_mark.line + 1, event.start_mark.column + 1)
            alias = show(str(event.anchor))[1:-1]
            return f"aliases (*{alias}) are not allowed: write the values out", place
    raise AssertionError("a node was met twice, but there is no alias")


def _unusable(name: str, message: str, line: int = 1, column: int = 1) -> PolicyError:
    return PolicyError((Problem(name, line, column, "", message),))


def _decoded(text: str | bytes, name: str) -> str:
    too_large = len(text) > LARGEST
    if isinstance(text, str) and not too_large:
        too_large = len(text.encode(errors="surrogatepass")) > LARGEST
    if too_large:
        raise _unusable(
            name, "a policy has at most 64 KiB, and this is larger: is it the right file?"
        )
    if isinstance(text, str):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise _unusable(name, "this is not UTF-8 text: save the policy as UTF-8", line) from None


def _compose(text: str) -> Node | None:
    with warnings.catch_warnings():  # the parser's own are about things refused below
        warnings.simplefilter("ignore")
        reader = YAML(typ="safe", pure=True)
        reader.Composer = _Shallow
        root: Node | None = reader.compose(text)
        return root


class _TooDeep(MarkedYAMLError):
    """Values are nested beyond what any policy needs."""


class _Shallow(Composer):
    """Makes nodes of what is read, down to a level."""

    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._level += 1
        if self._level > _DEEPEST_READ:
            raise _TooDeep(problem_mark=self.parser.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node


def _said(error: MarkedYAMLError) -> str:
    """Return the parser's complaint on one line, with the usual cure."""
    parts = [str(part).strip() for part in (error.context, error.problem) if part]
    text = ", ".join(" ".join(part.split()) for part in parts) or "unreadable"
    if "\\t" in text:
        text += "; indent with spaces, not tabs"
    elif "single document" in text:
        text += "; one file holds one policy"
    elif "mapping values are not allowed" in text:
        text += "; is the indentation right, or does a value with `: ` need quotes?"
    return "".join(c if c.isprintable() else "?" for c in text)


class _Walk:
    """Turns nodes into data, once each."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.constructor = YAML(typ="safe", pure=True).constructor
        self.seen: set[int] = set()
        self.aliased = False

    def value(self, node: Node, path: Path) -> Data:
        mark = node.start_mark
        self.document.values[path] = (mark.line + 1, mark.column + 1)
        if id(node) in self.seen:
            self.document.refused.add(path)
            self.aliased = True
            return None
        self.seen.add(id(node))
        tag = str(node.tag)
        if len(path) > _DEEPEST:
            self.document.refuse(path, "this is nested too deeply for a policy")
        elif isinstance(node, MappingNode) and tag == f"{_TAG}map":
            return self.mapping(node, path)
        elif isinstance(node, SequenceNode) and tag == f"{_TAG}seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        elif isinstance(node, ScalarNode) and tag.startswith(_TAG):
            return self.scalar(node, path)
        else:
            written = show(tag.replace(_TAG, "!!"))[1:-1]
            self.document.refuse(path, f"tags ({written}) are not allowed: remove it")
        return None

    def mapping(self, node: MappingNode, path: Path) -> Data:
        result: dict[str, Data] = {}
        for key_node, value_node in node.value:
            place = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if not isinstance(key_node, ScalarNode):
                self.document.note(path, "a key must be a plain word", place)
                continue
            key = str(key_node.value)
            inner = (*path, key)
            if key in result:
                first = self.document.keys[inner][0]
                message = f"this key stands here twice, first on line {first}: remove one"
                self.document.note(inner, message, place)
                continue
            self.document.keys[inner] = place
            result[key] = self.value(value_node, inner)
        return result

    def scalar(self, node: ScalarNode, path: Path) -> Data:
        if node.tag == f"{_TAG}null":
            self.document.refuse(path, "has no value: give one, or remove the key")
            return None
        kind = str(node.tag).removeprefix(_TAG)
        if kind not in _SCALARS:  # dates and the like: the model says what it wants instead
            return str(node.value)
        try:
            value = self.constructor.construct_object(node)
        except (*_PARSER_SLIPS, YAMLError):  # such as an int of ten thousand digits
            return str(node.value)
        assert isinstance(value, str | int | float | bool)
        return value
