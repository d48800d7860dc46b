"""What is asked of a running guard from outside, and how it is refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

Request = dict[str, Any]
"""A JSON object with a "command"; "account" is who asks, as the kernel knows it."""
Answer = Callable[[Request], Awaitable[object]]
"""Carries out one request; raises ControlError if it cannot be met."""


class ControlError(Exception):
    """A request that cannot be met; the text is one sentence for the user."""


def text_of(request: Request, key: str) -> str:
    """Return a text that a request must have.

    Raises:
        ControlError: it has none under that key, or something else.
    """
    value = request.get(key)
    if not isinstance(value, str):
        raise ControlError(f"the request lacks {key!r}")
    return value
