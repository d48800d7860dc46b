"""Copies of packets that NFLOG rules send to a group: no verdict is owed for them."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from typing import Final, Self

from rstguard.kernel import InUse, KernelError, NotPermitted
from rstguard.kernel.netlink import (
    ATTRIBUTE,
    CHUNK,
    HEADER,
    NETLINK_NETFILTER,
    NFGEN,
    NLA_TYPE_MASK,
    RECEIVE_BUFFER,
    SO_RCVBUFFORCE,
    Request,
    attribute,
    configure,
    messages,
)
from rstguard.kernel.seam import Copies, Copy

# linux/netfilter/nfnetlink.h and nfnetlink_log.h
_SUBSYSTEM = 4
_PACKET, _CONFIG = 0, 1
_CFG_CMD, _CFG_MODE, _CFG_QTHRESH = 1, 2, 5
_BIND = 1
_COPY_PACKET = 2
_PAYLOAD, _PREFIX = 9, 10
_WHOLE = 0xFFFF
_AT_ONCE: Final = 4096
"""Packets that one reading brings at most, so that a flood of them holds nobody up for long."""


class PacketLog:
    """Receives what NFLOG rules of this network namespace send to one group.

    A packet that finds the socket full is lost, and nothing waits for it.
    """

    def __init__(self, group: int) -> None:
        """Bind group `group` (0-65535).

        Raises:
            InUse: another program has the group.
            KernelError: the kernel lacks NFLOG, or privileges are missing.
        """
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
        self._group = group
        try:
            self._configure(attribute(_CFG_CMD, bytes((_BIND,))))
            mode = struct.pack(">IBx", _WHOLE, _COPY_PACKET)
            self._configure(attribute(_CFG_MODE, mode))
            # The default collects a hundred packets before it sends them.
            self._configure(attribute(_CFG_QTHRESH, (1).to_bytes(4, "big")))
        except OSError as error:
            self._socket.close()
            raise _refused(group, error) from error
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    def close(self) -> None:
        """Give the group up."""
        self._socket.close()

    def receive(self) -> list[bytes]:
        """Return the packets that have arrived, each from its IP header on."""
        return [copy.packet for copy in self.read().copies]

    def read(self) -> Copies:
        """Return the packets that have arrived, with the prefix of the rule that sent each."""
        copies: list[Copy] = []
        lost = False
        while len(copies) < _AT_ONCE:
            try:
                chunk = self._socket.recv(CHUNK)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(f"cannot read logged packets ({error.strerror})") from error
                lost = True
                continue
            copies += _copies(chunk)
        return Copies(copies, lost)

    def _configure(self, attributes: bytes) -> None:
        kind = _SUBSYSTEM << 8 | _CONFIG
        configure(self._socket, Request(kind, socket.AF_UNSPEC, attributes, self._group))


def _copies(chunk: bytes) -> Iterator[Copy]:
    for start, end, kind, _, _ in messages(chunk):
        if kind != _SUBSYSTEM << 8 | _PACKET:
            continue
        at = start + HEADER.size + NFGEN.size
        packet, prefix = b"", ""
        while at + 4 <= end:
            length, attribute_kind = ATTRIBUTE.unpack_from(chunk, at)
            if length < 4 or at + length > end:
                break
            if attribute_kind & NLA_TYPE_MASK == _PAYLOAD:
                packet = chunk[at + 4 : at + length]
            elif attribute_kind & NLA_TYPE_MASK == _PREFIX:
                prefix = chunk[at + 4 : at + length].rstrip(b"\0").decode("ascii", "replace")
            at += (length + 3) & ~3
        if packet:
            yield Copy(prefix, packet)


def _refused(group: int, error: OSError) -> KernelError:
    if error.errno == errno.EBUSY:
        return InUse(f"NFLOG group {group} is in use by another program; stop it")
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermitted(
            "receiving logged packets needs root (CAP_NET_ADMIN): run the command with sudo"
        )
    return KernelError("the kernel has no NFLOG: load it with `modprobe nfnetlink_log`")
