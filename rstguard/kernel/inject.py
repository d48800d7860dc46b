"""Send ready-made IP packets, with whatever source address they carry.

Every packet gets the mark `Marks.probe`, by which a rule in raw OUTPUT keeps it from the connection
tracker.  Receivers may be other hosts or sockets of this host.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable, Sequence
from struct import pack
from typing import Protocol

from rstguard.engine.flow import Flow, Tuple
from rstguard.kernel import KernelError
from rstguard.kernel.marks import Marks

_SEND_BUFFER = 4 << 20


class Sender(Protocol):
    """What sends packets: an `Injector`."""

    def send(self, packets: Iterable[bytes], mark: int = 0) -> int:
        """Send packets, routed by a mark; return how many left."""


def way_of(path: Tuple, flow: Flow, marks: Marks, tries: int) -> int:
    """Return the mark by which a probe of a connection is to be routed.

    With two uplinks the mark of a connection often says by which its client is reached, and may say
    nothing of its server, or the other way round: so each is tried in turn, the usual one first.
    `tries` counts from 1.
    """
    to_client = path == flow.original.turned
    return flow.mark & ~marks.mask if to_client == bool(tries & 1) else 0


def send_each(sender: Sender, packets: Sequence[tuple[bytes, int]]) -> None:
    """Send packets, each with the mark that it is to be routed by."""
    for way in dict.fromkeys(way for _, way in packets):
        sender.send((packet for packet, its in packets if its == way), way)


class Injector:
    """Two raw sockets in the network namespace of the thread that makes this object.

    `sent` counts the packets that the kernel took, `failed` those that it did not, by reason
    (``ENETUNREACH``, …): a packet for which there is no way must not keep the others from theirs.

    Raises:
        KernelError: privileges are missing.
    """

    def __init__(self, marks: Marks) -> None:
        self._marks, self._marked = marks, marks.probe.value
        self.sent = 0
        self.failed: dict[str, int] = {}
        try:
            # IPPROTO_RAW implies that we write the IP header: raw(7), ipv6 rawv6_init_sk.
            self._ipv4 = _open(socket.AF_INET, marks)
            self._ipv6: socket.socket | None = None
            with contextlib.suppress(OSError):  # a host may have no IPv6 at all
                self._ipv6 = _open(socket.AF_INET6, marks)
        except OSError as error:
            raise KernelError(
                f"No raw socket to be had ({error.strerror}): run as root or with CAP_NET_RAW."
            ) from error

    def close(self) -> None:
        """Close the sockets."""
        self._ipv4.close()
        if self._ipv6 is not None:
            self._ipv6.close()

    def __enter__(self) -> Injector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, packets: Iterable[bytes], mark: int = 0) -> int:
        """Send IPv4 and IPv6 packets; return how many the kernel took.

        They are routed by those bits of `mark` that are not the guard's.

        Never waits and never raises for a packet that cannot be sent; see `failed`.
        """
        before = self.sent
        self._mark(mark)
        for packet in packets:
            try:
                self._send(packet)
            except OSError as error:
                reason = errno.errorcode.get(error.errno or 0, str(error.errno))
                self.failed[reason] = self.failed.get(reason, 0) + 1
            else:
                self.sent += 1
        return self.sent - before

    def _mark(self, mark: int) -> None:
        mark = mark & ~self._marks.mask | self._marks.probe.value
        if mark == self._marked:
            return
        for raw in (self._ipv4, self._ipv6):
            if raw is not None:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, pack("=I", mark))
        self._marked = mark

    def _send(self, packet: bytes) -> None:
        if packet[0] >> 4 == 4:
            self._ipv4.sendto(packet, (socket.inet_ntop(socket.AF_INET, packet[16:20]), 0))
        elif self._ipv6 is None:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6")
        else:
            self._ipv6.sendto(packet, (socket.inet_ntop(socket.AF_INET6, packet[24:40]), 0))


def _open(family: socket.AddressFamily, marks: Marks) -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    raw = socket.socket(family, kind, socket.IPPROTO_RAW)
    try:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, pack("=I", marks.probe.value))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    except OSError:
        raw.close()
        raise
    return raw
