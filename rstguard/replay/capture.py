"""Reads captures: pcap and pcapng, also compressed with gzip, xz or zstd, from a file or a pipe.

A reader of our own, as a replay is to be faster than the traffic was.  It yields the beginning of
each IP packet with its time, many packets at once.  A damaged or truncated capture is used as far
as it can be read, and `Capture.damage` says where it broke.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from rstguard.engine.ruleset import SECOND
from rstguard.replay.links import ETHERNET, LINKS, Locate, ethernet, kind_of
from rstguard.replay.unpacking import BROKEN, CaptureError, Stream, unpacked

Batch = list[tuple[int, bytes]]
"""Time (nanoseconds since 1970) and IP packet, from its first header byte on, maybe cut off."""

KEPT = 256
"""Bytes of an IP packet that are kept at most: all headers fit in."""
LARGEST = 1 << 18
"""Bytes of one captured packet, as tcpdump limits them; more is damage."""

_CHUNK = 1 << 20
_LARGEST_BLOCK = 1 << 24
_MOST_KINDS = 64
"""Kinds of frames without IP that are told apart."""
_MAGIC = {
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
    b"\xa1\xb2\x3c\x4d": (">", 1),
}
"""Byte order, and nanoseconds in one unit of a record's fraction of a second."""
_SECTION = b"\x0a\x0d\x0d\x0a"
_ORDER = {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}
_INTERFACE, _SIMPLE, _ENHANCED = 1, 3, 6
_END_OF_OPTIONS, _RESOLUTION, _OFFSET = 0, 9, 14


class _Damage(Exception):
    """What is wrong with the bytes at the present place."""


class _Interface(NamedTuple):
    """How one interface of a pcapng section writes its packets."""

    link: int
    locate: Locate | None
    ticks: int
    """Units of time in a second."""
    offset: int
    """Nanoseconds that all its times are to be shifted by."""


class Capture:
    """One capture; `batches` can be read once.

    `damage` is a sentence that says where the file broke, "" if it did not.  `frames` counts all
    packets so far, `foreign` those that are neither IPv4 nor IPv6 or of an unknown link type, and
    `kinds` says what these are.
    `done` tells how much of it was read, from 0 to 1; always 0 if that cannot be known.

    Raises:
        CaptureError: the stream does not begin as a capture.
    """

    def __init__(self, stream: Stream, name: str, done: Callable[[], float] = lambda: 0.0) -> None:
        self.name, self.done = name, done
        self.damage = ""
        self.frames = self.foreign = 0
        self.kinds: Counter[str] = Counter()
        self._stream = stream
        self._data, self._before = b"", 0  # what is in hand, and how much of the file came earlier
        self._time = 0
        self._grow(24)
        magic = self._data[:4]
        if magic in _MAGIC and len(self._data) >= 24:
            self._read = self._pcap(*_MAGIC[magic])
        elif magic == _SECTION and self._data[8:12] in _ORDER:
            self._read = self._pcapng()
        elif self.damage:
            raise CaptureError(f"{name}: {self.damage}")
        else:
            raise CaptureError(f"{name} is no capture: name a pcap or pcapng file, as tcpdump -w")

    def batches(self) -> Iterator[Batch]:
        """Yield the IP packets, many at a time, in the order of the file."""
        return self._read

    def _grow(self, wanted: int = 0, at: int = 0) -> bool:
        """Read on, forgetting what is before `at`; False if there is nothing more."""
        size = max(_CHUNK, wanted)
        try:
            more = self._stream.read(size)
        except BROKEN as error:
            more = b""
            self.damage = f"it could not be read further ({error})"
        self._before += at
        self._data = self._data[at:] + more
        return bool(more)

    def _break(self, at: int, why: str) -> None:
        self.damage = (
            f"{self.name} breaks off after packet {self.frames:,} (byte {self._before + at:,}): "
            f"{self.damage or why}; what is before that was used"
        )

    def _pcap(self, order: str, unit: int) -> Iterator[Batch]:
        link = Struct(order + "I").unpack_from(self._data, 20)[0] & 0xFFFF
        locate = _locate(self.name, link)
        record, usual = Struct(order + "IIII").unpack_from, link == ETHERNET
        at = 24
        while True:
            batch: Batch = []
            add, data, end, frames = batch.append, self._data, len(self._data), 0
            while at + 16 <= end:
                seconds, fraction, kept, _ = record(data, at)
                body = at + 16
                following = body + kept
                if following > end or kept > LARGEST:
                    break
                if usual and data[body + 12 : body + 14] == b"\x08\x00":
                    start = body + 14
                else:
                    start = locate(data, body, following)
                at = following
                frames += 1
                if -1 < start < following:
                    time = seconds * SECOND + fraction * unit
                    add((time, data[start : start + KEPT if start + KEPT < at else at]))
                else:
                    self._note_kind(link, data, body, at)
            self.frames += frames
            self.foreign += frames - len(batch)
            if batch:
                yield batch
            if at + 16 <= end and kept > LARGEST:
                return self._break(at, f"a packet of {kept:,} bytes")
            rest = end - at
            if not self._grow(0, at):
                if rest or self.damage:
                    self._break(0, "the file ends in the middle of a packet")
                return None
            at = 0

    def _pcapng(self) -> Iterator[Batch]:
        section = _Section(self.name, "<")
        at = 0
        while True:
            batch: Batch = []
            data, end = self._data, len(self._data)
            wanted = 12
            try:
                while at + 12 <= end:
                    if data[at : at + 4] == _SECTION:
                        section = _new_section(self.name, data, at)
                    kind, length = section.head(data, at)
                    if length < 12 or length % 4 or length > _LARGEST_BLOCK:
                        raise _Damage(f"a block of {length:,} bytes")
                    if at + length > end:
                        wanted = length
                        break
                    self._block(section, kind, at, at + length - 4, batch)
                    at += length
            except _Damage as problem:
                if batch:
                    yield batch
                return self._break(at, str(problem))
            if batch:
                yield batch
            rest = end - at
            if not self._grow(wanted, at):
                if rest or self.damage:
                    self._break(0, "the file ends in the middle of a block")
                return None
            at = 0

    def _block(self, section: _Section, kind: int, at: int, end: int, batch: Batch) -> None:
        """Read one whole block whose body ends at `end`; kinds that say nothing here are passed."""
        data = self._data
        if kind == _INTERFACE:
            section.add_interface(data, at + 8, end)
            return
        if kind == _ENHANCED:
            interface, time, body, kept = section.enhanced(data, at + 8, end)
            self._time = time
        elif kind == _SIMPLE:
            interface, body, kept = section.simple(data, at + 8, end)
        else:
            return
        if kept > end - body:
            raise _Damage(f"a packet of {kept:,} bytes in a block of {end - at + 4:,}")
        self.frames += 1
        start = interface.locate(data, body, body + kept) if interface.locate else -1
        if -1 < start < body + kept:
            batch.append((self._time, data[start : min(start + KEPT, body + kept)]))
        else:
            self.foreign += 1
            self._note_kind(interface.link, data, body, body + kept)

    def _note_kind(self, link: int, data: bytes, start: int, end: int) -> None:
        kind = kind_of(link, data, start, end)
        if kind in self.kinds or len(self.kinds) < _MOST_KINDS:
            self.kinds[kind] += 1


class _Section:
    """One section of a pcapng file: its byte order, and the interfaces that it has named."""

    def __init__(self, name: str, order: str) -> None:
        self._name = name
        self._interfaces: list[_Interface] = []
        self.head = Struct(order + "II").unpack_from
        self._enhanced = Struct(order + "IIII").unpack_from
        self._word = Struct(order + "I").unpack_from
        self._short = Struct(order + "HH").unpack_from
        self._signed = Struct(order + "q").unpack_from

    def add_interface(self, data: bytes, at: int, end: int) -> None:
        """Read an interface description block (its body begins at `at`)."""
        if end - at < 8:
            raise _Damage("an interface without a description")
        link, _ = self._short(data, at)
        ticks, offset = 1_000_000, 0
        at += 8
        while at + 4 <= end:
            code, length = self._short(data, at)
            at += 4
            if code == _END_OF_OPTIONS or at + length > end:
                break
            if code == _RESOLUTION and length == 1:
                power = data[at] & 0x7F
                ticks = 2 ** min(power, 64) if data[at] & 0x80 else 10 ** min(power, 18)
            elif code == _OFFSET and length == 8:
                offset = self._signed(data, at)[0] * SECOND
            at += length + 3 & ~3
        if not self._interfaces:
            _locate(self._name, link)  # the first one must be of a known kind: else nothing is read
        self._interfaces.append(_Interface(link, LINKS.get(link), ticks, offset))

    def _interface(self, number: int) -> _Interface:
        if number >= len(self._interfaces):
            raise _Damage(f"a packet of interface {number}, which is not described")
        return self._interfaces[number]

    def enhanced(self, data: bytes, at: int, end: int) -> tuple[_Interface, int, int, int]:
        """Return interface, time, place and length of a packet."""
        if end - at < 20:
            raise _Damage("a block too short for a packet")
        number, high, low, kept = self._enhanced(data, at)
        interface = self._interface(number)
        time = (high << 32 | low) * SECOND // interface.ticks + interface.offset
        return interface, time, at + 20, kept

    def simple(self, data: bytes, at: int, end: int) -> tuple[_Interface, int, int]:
        """Return interface, place and length of a packet without a time: it has the last one's."""
        if end - at < 4:
            raise _Damage("a block too short for a packet")
        return self._interface(0), at + 4, min(self._word(data, at)[0], end - at - 4)


def _new_section(name: str, data: bytes, at: int) -> _Section:
    order = _ORDER.get(data[at + 8 : at + 12])
    if order is None:
        raise _Damage("a section of unknown byte order")
    return _Section(name, order)


def _locate(name: str, link: int) -> Locate:
    if link not in LINKS:
        raise CaptureError(
            f"{name} has {kind_of(link, b'', 0, 0)}, which are not known here: capture on an "
            "Ethernet interface, or on `any`"
        )
    return LINKS[link] if link != ETHERNET else ethernet


@contextmanager
def open_capture(path: Path) -> Iterator[Capture]:
    """Open a capture file, or standard input for ``-``; gzip, xz and zstd are recognised.

    Raises:
        CaptureError: there is no such file, it cannot be read, or it is no capture.
    """
    standard = str(path) == "-"
    name = "standard input" if standard else str(path)
    try:
        source = open(0, "rb", closefd=False) if standard else path.open("rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CaptureError(f"{name} cannot be read ({reason}): is the path right?") from None
    with source:
        yield Capture(unpacked(source, name), name, _progress(source))


def _progress(source: BufferedReader) -> Callable[[], float]:
    size = os.fstat(source.fileno()).st_size
    return lambda: source.tell() / size if size else 0.0
