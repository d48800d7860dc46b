"""Compressed captures: gzip and xz, and zstd where Python can."""

from __future__ import annotations

import gzip
import importlib
import lzma
import zlib
from io import BufferedReader
from typing import Any, BinaryIO, Final, Protocol, cast

_GZIP: Final = b"\x1f\x8b"
_XZ: Final = b"\xfd7zXZ\x00"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"


class CaptureError(Exception):
    """The file is no capture, or cannot be read; in one sentence."""


class Stream(Protocol):
    """What a capture is read from."""

    def read(self, size: int, /) -> bytes:
        """Return at most so many bytes, none at the end."""


class _AsItComes:
    """Reads what can be had at once: where the file breaks off, what is before that is not lost."""

    def __init__(self, packed: lzma.LZMAFile) -> None:
        self._packed = packed

    def read(self, size: int, /) -> bytes:
        return self._packed.read1(size)


def _zstd() -> Any:
    """Return the module of the standard library, which has one since Python 3.14."""
    try:
        return importlib.import_module("compression.zstd")
    except ImportError:
        return None


def _broken() -> tuple[type[Exception], ...]:
    zstd = _zstd()
    more = (zstd.ZstdError,) if zstd else ()
    return (OSError, EOFError, zlib.error, lzma.LZMAError, *more)


BROKEN: Final = _broken()
"""What reading on can raise."""


def unpacked(source: BufferedReader, name: str) -> Stream:
    """Return what reads a file, unpacked if it is packed.

    Raises:
        CaptureError: it cannot be read, or not unpacked by this Python.
    """
    try:
        head = source.peek(6)[:6]
    except OSError as error:
        raise CaptureError(f"{name} cannot be read ({error.strerror})") from None
    if head.startswith(_GZIP):
        return cast(Stream, gzip.GzipFile(fileobj=cast(BinaryIO, source)))
    if head == _XZ:
        return _AsItComes(lzma.LZMAFile(source))
    if not head.startswith(_ZSTD):
        return source
    if (zstd := _zstd()) is None:
        raise CaptureError(
            f"{name} is compressed with zstd, which Python can read since 3.14: unpack it first, "
            "`zstd -d FILE`, or pipe it in, `zstd -dc FILE | rstguard policy replay POLICY -`"
        )
    return cast(Stream, zstd.ZstdFile(source))
