"""A table of nf_tables of our own: made whole, compared, taken away.

Written as netlink messages (linux/netfilter/nf_tables.h), for the command `nft` may not be there.
Only what `rstguard.kernel.clearing` and `rstguard.kernel.dnat` need: chains at hooks, rules that
match, set marks and translate targets.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from rstguard.engine.address import is_v6, packed
from rstguard.engine.service import Service
from rstguard.kernel import Changed, KernelError
from rstguard.kernel.entry import walk
from rstguard.kernel.marks import Bits
from rstguard.kernel.netlink import (
    CHUNK,
    HEADER,
    NETLINK_NETFILTER,
    NFGEN,
    NLM_F_ACK,
    NLMSG_ERROR,
    PATIENCE,
    Netlink,
    Request,
    attribute,
    encode,
    messages,
    nest,
)

_INET: Final = 1
_SUBSYSTEM: Final = 10
_HEADERS: Final = HEADER.size + NFGEN.size
_READINGS: Final = 10
"""So often is read what others change meanwhile."""
_BEGIN, _END = 0x10, 0x11
_CREATE, _APPEND = 0x400, 0x800
_NEW_TABLE, _DELETE_TABLE, _NEW_CHAIN = 0, 2, 3
_NEW_RULE, _GET_RULE, _DELETE_RULE = 6, 7, 8
_TABLE_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_TYPE = 1, 3, 4, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS, _RULE_COMMENT = 1, 2, 4, 7
_EQUAL, _UNEQUAL = 0, 1
_NAME_BYTES = 16  # IFNAMSIZ
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_PORT_AT, _FLAGS_AT = 2, 13
_IPV4, _IPV6 = 2, 10  # NFPROTO_IPV4, NFPROTO_IPV6
_DESTINATION = {False: (16, 4), True: (24, 16)}
"""Where the IP header has it, and how long it is."""
_TRANSLATE_DESTINATION, _RANDOM = 1, 1
_TCP, _SYN, _SYN_RST_ACK_FIN = 6, 0x02, 0x17
_REGISTER, _SECOND_REGISTER = struct.pack(">I", 1), struct.pack(">I", 2)
_ALL_BITS = 0xFFFFFFFF


class Field(NamedTuple):
    """Something that an expression reads or writes: 32 bits of a packet or of its connection."""

    expression: str
    key: int


MARK_OF_PACKET: Final = Field("meta", 3)
_DEVICE_OF_PACKET: Final = Field("meta", 6)
_FAMILY_OF_PACKET: Final = Field("meta", 15)
_PROTOCOL_OF_PACKET: Final = Field("meta", 16)
MARK_OF_CONNECTION: Final = Field("ct", 3)
_LABELS_OF_CONNECTION: Final = Field("ct", 13)
_LABEL_BYTES = 16
STATE_OF_CONNECTION: Final = Field("ct", 0)
INVALID, NEW = 1, 8
"""Bits of the state (NF_CT_STATE_INVALID_BIT, NF_CT_STATE_BIT)."""


class Rule(NamedTuple):
    """One rule: what it is for, which `nft list ruleset` shows, and its expressions."""

    comment: str
    expressions: bytes


class Chain(NamedTuple):
    """A chain at a hook (enum nf_inet_hooks), of type filter, route or nat."""

    name: str
    hook: int
    priority: int
    kind: str
    rules: tuple[Rule, ...]


def replace(table: str, chains: Sequence[Chain], commit: bool = True) -> None:
    """Give a table of family inet these chains and rules, in one transaction.

    Chains that are there already stay, and only their rules change: with a chain its hook goes, and
    with a hook all that waits in a queue (nf_queue_nf_hook_drop).  Without `commit` the kernel
    checks it and makes nothing: a batch that is not ended is undone.

    Raises:
        KernelError: the kernel has no nf_tables, lacks a part of it, or refused.
    """
    error = _transact(_making(table, chains, anew=False), commit)
    if error in (errno.EEXIST, errno.EOPNOTSUPP):  # chains of another kind are in their place
        error = _transact(_making(table, chains, anew=True), commit)
    if error == errno.EPERM:
        raise KernelError("changing nf_tables needs root (CAP_NET_ADMIN): use sudo")
    if error:
        said = os.strerror(error)
        raise KernelError(f"the kernel has no nf_tables, or lacks a part of it ({said})")


def remove(table: str) -> bool:
    """Take a table away; tell whether it was there.

    Raises:
        KernelError: the kernel refused.
    """
    error = _transact([(_DELETE_TABLE, 0, attribute(_TABLE_NAME, _text(table)))])
    if error in (0, errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL):  # the last two: no nf_tables
        return not error
    raise KernelError(f"the table inet {table} could not be removed: {os.strerror(error)}")


def comments(table: str) -> dict[str, list[str]]:
    """Return the comments of a table's rules, by chain; nothing if there is no such table.

    Raises:
        KernelError: the kernel has no nf_tables, or could not be asked.
    """
    netlink = Netlink()
    try:
        # Any other program's change, to any table, interrupts it (nft_base_seq).
        for _ in range(_READINGS - 1):
            with suppress(Changed):
                return _comments(netlink, table)
        return _comments(netlink, table)
    finally:
        netlink.close()


def _comments(netlink: Netlink, table: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    kind = _SUBSYSTEM << 8 | _GET_RULE
    for chunk, spans in netlink.dump(Request(kind, _INET, _named(_RULE_TABLE, table))):
        for start, end in spans:
            values = {
                path: chunk[value:value_end]
                for path, value, value_end in walk(chunk, start + _HEADERS, end)
            }
            chain = values[(_RULE_CHAIN,)].rstrip(b"\0").decode()
            comment = values.get((_RULE_COMMENT,), b"")[2:].rstrip(b"\0")
            found.setdefault(chain, []).append(comment.decode(errors="replace"))
    return found


_Message = tuple[int, int, bytes]
"""Its kind, its flags, its attributes."""


def _making(table: str, chains: Sequence[Chain], anew: bool) -> list[_Message]:
    name = _named(_TABLE_NAME, table)
    made = [(_NEW_TABLE, _CREATE, name)]
    if anew:
        made += [(_DELETE_TABLE, 0, name), (_NEW_TABLE, _CREATE, name)]
    for chain in chains:
        hook = attribute(_HOOK_NUMBER, struct.pack(">i", chain.hook))
        hook += attribute(_HOOK_PRIORITY, struct.pack(">i", chain.priority))
        attributes = _named(_CHAIN_TABLE, table) + _named(_CHAIN_NAME, chain.name)
        attributes += nest(_CHAIN_HOOK, hook) + _named(_CHAIN_TYPE, chain.kind)
        made.append((_NEW_CHAIN, _CREATE, attributes))
        place = _named(_RULE_TABLE, table) + _named(_RULE_CHAIN, chain.name)
        made.append((_DELETE_RULE, 0, place))
        for rule in chain.rules:
            comment = bytes((0, len(rule.comment) + 1)) + _text(rule.comment)  # as nft writes it
            rest = nest(_RULE_EXPRESSIONS, rule.expressions) + attribute(_RULE_COMMENT, comment)
            made.append((_NEW_RULE, _CREATE | _APPEND, place + rest))
    return made


def _transact(made: Sequence[_Message], commit: bool = True) -> int:
    """Send one batch, of which all or nothing is done; return the first errno, 0 for success."""
    last = len(made)
    parts = [encode(Request(_BEGIN, socket.AF_UNSPEC, b"", _SUBSYSTEM), 0, 0)]
    for number, (kind, flags, attributes) in enumerate(made, 1):
        request = Request(_SUBSYSTEM << 8 | kind, _INET, attributes)
        parts.append(encode(request, flags | (NLM_F_ACK if number == last else 0), number))
    if commit:
        parts.append(encode(Request(_END, socket.AF_UNSPEC, b"", _SUBSYSTEM), 0, last + 1))
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    try:
        with socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER) as channel:
            channel.settimeout(PATIENCE)
            channel.sendto(b"".join(parts), (0, 0))
            return _first_error(channel, last)
    except OSError as error:
        raise KernelError(f"nf_tables could not be asked: {error.strerror or error}") from error


def _first_error(channel: socket.socket, last: int) -> int:
    found = 0
    while True:
        chunk = channel.recv(CHUNK)
        for start, _, kind, _, number in messages(chunk):
            if kind == NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", chunk, start + HEADER.size)
                found = found or -code
                if number in (0, last):  # the batch as a whole, or the end of it
                    return found


def _text(text: str) -> bytes:
    return text.encode() + b"\0"


def _named(kind: int, name: str) -> bytes:
    return attribute(kind, _text(name))


# Expressions.  Each works on one register; a rule goes on while they match.


def is_exactly(field: Field, bits: Bits) -> bytes:
    """Match if the bits are these under their mask."""
    return _load(field) + _bitwise(bits.mask) + _compare(_EQUAL, bits.value)


def has_any(field: Field, mask: int) -> bytes:
    """Match if one of these bits is there; what belongs to no connection has no mark of one."""
    return _load(field) + _bitwise(mask) + _compare(_UNEQUAL, 0)


def came_in_on(name: str) -> bytes:
    """Match what came in on a device; a name that ends in "*" or "+" is the beginning of one."""
    whole = name.encode().ljust(_NAME_BYTES, b"\0")
    wanted = name[:-1].encode() if name[-1:] in ("*", "+") else whole
    return _load(_DEVICE_OF_PACKET) + (_compare_bytes(_EQUAL, wanted) if wanted else b"")


def is_tcp() -> bytes:
    """Match TCP."""
    return _load(_PROTOCOL_OF_PACKET) + _compare_bytes(_EQUAL, bytes((_TCP,)))


def is_syn(yes: bool = True) -> bytes:
    """Match a TCP segment that is, or is not, the first of its connection."""
    load = _load_bytes(_TRANSPORT_HEADER, _FLAGS_AT, 1)
    registers = attribute(1, _REGISTER) + attribute(2, _REGISTER)
    mask = nest(4, attribute(1, bytes((_SYN_RST_ACK_FIN,))))
    only = _expression(
        "bitwise", registers, attribute(3, struct.pack(">I", 1)), mask, nest(5, attribute(1, b"\0"))
    )
    return load + only + _compare_bytes(_EQUAL if yes else _UNEQUAL, bytes((_SYN,)))


def is_of(v6: bool) -> bytes:
    """Match IPv6, or IPv4."""
    return _load(_FAMILY_OF_PACKET) + _compare_bytes(_EQUAL, bytes((_IPV6 if v6 else _IPV4,)))


def goes_to(service: Service) -> bytes:
    """Match TCP to a service, of packets of its family."""
    address = _load_bytes(_NETWORK_HEADER, *_DESTINATION[is_v6(service.address)])
    port = _load_bytes(_TRANSPORT_HEADER, _PORT_AT, 2)
    return (
        is_tcp()
        + address
        + _compare_bytes(_EQUAL, packed(service.address))
        + port
        + _compare_bytes(_EQUAL, service.port.to_bytes(2, "big"))
    )


def one_in(number: int) -> bytes:
    """Match one packet in so many, by chance."""
    values = ((2, number), (3, _RANDOM))
    drawn = (attribute(kind, struct.pack(">I", value)) for kind, value in values)
    return _expression("numgen", attribute(1, _REGISTER), *drawn) + _compare(_EQUAL, 0)


def send_to(service: Service) -> bytes:
    """Translate the target of a new connection."""
    address, port = packed(service.address), service.port.to_bytes(2, "big")
    return (
        _immediate(_REGISTER, address)
        + _immediate(_SECOND_REGISTER, port)
        + _translation(is_v6(service.address), with_port=True)
    )


def leave(v6: bool) -> bytes:
    """Translate the target of a new connection to what it is, so that nobody does so after us."""
    return _load_bytes(_NETWORK_HEADER, *_DESTINATION[v6]) + _translation(v6, with_port=False)


def _translation(v6: bool, with_port: bool) -> bytes:
    kind = attribute(1, struct.pack(">I", _TRANSLATE_DESTINATION))
    family = attribute(2, struct.pack(">I", _IPV6 if v6 else _IPV4))
    address = attribute(3, _REGISTER) + attribute(4, _REGISTER)
    port = attribute(5, _SECOND_REGISTER) + attribute(6, _SECOND_REGISTER) if with_port else b""
    return _expression("nat", kind, family, address, port)


def put(field: Field, bits: Bits) -> bytes:
    """Make the bits these under their mask, and leave the others."""
    return _load(field) + _bitwise(_ALL_BITS ^ bits.mask, bits.value) + _store(field)


def give_label(number: int) -> bytes:
    """Give the connection a label, if it has room for any."""
    value = (1 << number).to_bytes(_LABEL_BYTES, sys.byteorder)
    return _immediate(_REGISTER, value) + _store(_LABELS_OF_CONNECTION)


def _expression(name: str, *attributes: bytes) -> bytes:
    return nest(1, attribute(1, _text(name)), nest(2, *attributes))


def _immediate(register: bytes, value: bytes) -> bytes:
    return _expression("immediate", attribute(1, register), nest(2, attribute(1, value)))


def _load_bytes(header: int, at: int, length: int) -> bytes:
    """Load bytes of a packet, by where they are in one of its headers."""
    where = ((2, header), (3, at), (4, length))
    attributes = (attribute(kind, struct.pack(">I", value)) for kind, value in where)
    return _expression("payload", attribute(1, _REGISTER), *attributes)


def _value(kind: int, value: int) -> bytes:
    return nest(kind, attribute(1, struct.pack("=I", value)))


def _load(field: Field) -> bytes:
    key = attribute(2, struct.pack(">I", field.key))
    return _expression(field.expression, attribute(1, _REGISTER), key)


def _store(field: Field) -> bytes:
    source = 3 if field.expression == "meta" else 4
    key = attribute(2, struct.pack(">I", field.key))
    return _expression(field.expression, attribute(source, _REGISTER), key)


def _bitwise(mask: int, xor: int = 0) -> bytes:
    registers = attribute(1, _REGISTER) + attribute(2, _REGISTER)
    length = attribute(3, struct.pack(">I", 4))
    return _expression("bitwise", registers, length, _value(4, mask), _value(5, xor))


def _compare(operation: int, value: int) -> bytes:
    return _compare_bytes(operation, struct.pack("=I", value))


def _compare_bytes(operation: int, value: bytes) -> bytes:
    how = attribute(2, struct.pack(">I", operation))
    return _expression("cmp", attribute(1, _REGISTER), how, nest(3, attribute(1, value)))


ACCEPT: Final = _expression(
    "immediate", attribute(1, bytes(4)), nest(2, nest(2, attribute(1, struct.pack(">I", 1))))
)
"""The packet goes on at the next hook function."""
