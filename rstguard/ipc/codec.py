"""Messages of children as bytes: JSON, of which nothing is believed that was not checked.

msgspec was chosen by measurement (``python -m tests.bench messages``): pickle takes four times as
long, and whoever writes a pickle decides what its reader runs.  MessagePack would be no faster here
and holds no integer of more than 64 bits, as the addresses are.
"""

from __future__ import annotations

from typing import Final

import msgspec

from rstguard.ipc.messages import FromChild
from rstguard.ipc.values import one_line

_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(FromChild)


class Unreadable(ValueError):
    """Bytes that are no message of a child; the text says what is wrong with them."""


def encoded(message: FromChild) -> bytes:
    """Return the bytes of a message to the supervisor."""
    return _ENCODER.encode(message)


def decoded(data: bytes | memoryview) -> FromChild:
    """Return the message that bytes from a child stand for.

    Everything is checked that whoever reads it relies on: types, ranges, addresses that can be
    written, names that a policy could hold, texts without control characters.

    Raises:
        Unreadable: they stand for none.
    """
    try:
        message: FromChild = _DECODER.decode(data)
    # Not only what the decoder promises to raise: these bytes are somebody else's choice, and no
    # mistake in reading them may end the supervisor.
    except Exception as error:  # noqa: BLE001
        raise Unreadable(one_line(str(error), 200)) from None
    return message
