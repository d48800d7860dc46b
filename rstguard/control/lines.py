"""The lines of the control socket: requests read, answers written and read.

Every string of a request but a policy's text is made plain (`rstguard.observe.text`) before
anybody sees it.
"""

from __future__ import annotations

import json
from typing import Any, Final

from rstguard.ipc.requests import ControlError, Request
from rstguard.observe.text import plain, plain_lines

_DEEPEST: Final = 8
_AS_IT_IS: Final = "text"
"""The field of a policy's text, which is parsed, kept and given back as it was written."""


def parsed(text: bytes) -> Request:
    """Return the request of a line.

    Raises:
        ControlError: it is none.
    """
    try:
        request = json.loads(text)
    except (ValueError, RecursionError):
        raise ControlError("the request is no JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("command"), str):
        raise ControlError('a request is a JSON object with a "command"')
    return {
        plain(key): value if key == _AS_IT_IS and isinstance(value, str) else _plain(value)
        for key, value in request.items()
    }


def _plain(value: Any, depth: int = 0) -> Any:
    """Return a value all of whose strings are plain.

    Raises:
        ControlError: it is nested more deeply than any request needs.
    """
    if depth > _DEEPEST:
        raise ControlError("the request is nested too deeply")
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list):
        return [_plain(one, depth + 1) for one in value]
    if isinstance(value, dict):
        return {plain(key): _plain(one, depth + 1) for key, one in value.items()}
    return value


def line_of(value: object) -> bytes:
    """Return the line of a request or an answer."""
    return json.dumps(value).encode() + b"\n"


def refusal(sentence: str) -> bytes:
    """Return the answer to a request that is not met, and why."""
    return line_of({"ok": False, "error": sentence})


def list_line(rows: list[object]) -> bytes:
    """Return the answer that is a long list, made row by row: one call would hold all threads."""
    return b'{"ok": true, "data": [%s]}\n' % ", ".join(map(json.dumps, rows)).encode()


class _Told(dict[str, Any]):
    """An object of the guard's answer; what it lacks is an error of the guard, not of the code."""

    def __missing__(self, key: str) -> Any:
        raise ControlError(misunderstood(f"it lacks {key!r}"))


def told(text: bytes) -> Any:
    """Return the data of an answer; to look there for what it lacks raises ControlError, too.

    Raises:
        ControlError: the request was refused, or this is no answer.
    """
    try:
        answer = json.loads(text, object_hook=_Told)
    except (ValueError, RecursionError):
        raise ControlError(misunderstood("it is no JSON")) from None
    if not isinstance(answer, dict):
        raise ControlError(misunderstood("it is no JSON object"))
    if answer["ok"] is not True:
        raise ControlError(plain_lines(str(answer["error"])))
    return answer["data"]


def misunderstood(why: str) -> str:
    """Return what to say of an answer that is not what was asked for."""
    return (
        f"the guard's answer cannot be understood: {why}; is the guard of another version than "
        "this command? Restart it"
    )
