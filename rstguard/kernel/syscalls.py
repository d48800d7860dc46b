"""The system calls that a worker or the sweeper needs once it serves, as a seccomp filter.  Pure.

A filter is a program for the kernel's classic BPF machine, run before every system call
(Documentation/userspace-api/seccomp_filter.rst, include/uapi/linux/seccomp.h and filter.h).  It
sees numbers only, never what a pointer points to.

- What is listed in `_ALLOWED` is carried out.
- `sendto` names no receiver, so that a netlink socket, which is connected to the kernel, speaks to
  nobody else; raw sockets, which must name one, are told apart by their descriptors.
- `setsockopt` gives raw sockets a mark, by which their packets are routed, and does nothing else.
- New memory is for data: nothing that could be executed, and no files.
- Looking for files is refused (EACCES) and no crime: Python does so by itself, for the lines of a
  traceback, and goes on without.
- Any other call is not carried out and ends the process (SIGSYS), so that it is noticed: no code of
  the guard's makes one, hence it is a mistake of ours, or the process is no longer the guard's.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Collection, Mapping
from struct import pack
from types import MappingProxyType
from typing import NamedTuple

# linux/bpf_common.h: load a word of the data, compare, return
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# linux/seccomp.h
ALLOW, TRAP, KILL = 0x7FFF0000, 0x00030000, 0x80000000
REFUSE = 0x00050000 | errno.EACCES
# struct seccomp_data
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

_EXECUTABLE = 4
"""PROT_EXEC."""
_ANONYMOUS = 0x20
"""MAP_ANONYMOUS."""
_X32 = 0x40000000
"""x86-64 kernels take numbers from here on for another calling convention."""


class Machine(NamedTuple):
    """One architecture: its AUDIT_ARCH (linux/audit.h), and its place in the table below."""

    architecture: int
    column: int


_MACHINES: Mapping[str, Machine] = MappingProxyType(
    {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}
)
_ABSENT = -1

# arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h
_SENDTO, _MMAP, _SETSOCKOPT = (44, 206), (9, 222), (54, 208)
_SOL_SOCKET, _SO_MARK = 1, 36  # asm-generic/socket.h
_ALLOWED: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        # packets, netlink and the channel
        "recvfrom": (45, 207),
        "recvmsg": (47, 212),
        "recvmmsg": (299, 243),
        "poll": (7, _ABSENT),
        "ppoll": (271, 73),
        # the queue's state, the log
        "pread64": (17, 67),
        "write": (1, 64),
        # memory
        "brk": (12, 214),
        "munmap": (11, 215),
        "mremap": (25, 216),
        "madvise": (28, 233),
        # time, where the kernel does not give it without a call
        "clock_gettime": (228, 113),
        "gettimeofday": (96, 169),
        # what a log record names, and what Python or its library do by themselves
        "getpid": (39, 172),
        "getsockname": (51, 204),
        "getpeername": (52, 205),
        "gettid": (186, 178),
        "futex": (202, 98),
        "getrandom": (318, 278),
        # signals: those of others end or stop the process; its own end begins with `rt_sigaction`
        "restart_syscall": (219, 128),
        "rt_sigaction": (13, 134),
        "rt_sigprocmask": (14, 135),
        "rt_sigreturn": (15, 139),
        "sigaltstack": (131, 132),
        # the end
        "close": (3, 57),
        "exit": (60, 93),
        "exit_group": (231, 94),
    }
)
_FILES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "open": (2, _ABSENT),
        "openat": (257, 56),
        "stat": (4, _ABSENT),
        "lstat": (6, _ABSENT),
        "newfstatat": (262, 79),
        "statx": (332, 291),
        "readlink": (89, _ABSENT),
        "readlinkat": (267, 78),
        "getcwd": (79, 17),
    }
)

_Instruction = tuple[int, int, int, int]


def machine_of(name: str) -> Machine | None:
    """Return the architecture of a name that uname(2) gives, or None if it is not known here."""
    return _MACHINES.get(name) if sys.byteorder == "little" else None


def program(machine: Machine, raw: Collection[int]) -> bytes:
    """Return the filter, an array of struct sock_filter; `raw` are the raw sockets' descriptors."""
    column = machine.column
    code = [_load(_ARCHITECTURE), *_unless(machine.architecture, KILL), _load(_NUMBER)]
    if column == 0:
        code += _if(_AT_LEAST, _X32, KILL)
    code += _block(_SENDTO[column], _send(raw))
    code += _block(_MMAP[column], _map())
    code += _block(_SETSOCKOPT[column], _mark(raw))
    for table, action in ((_ALLOWED, ALLOW), (_FILES, REFUSE)):
        for numbers in table.values():
            if numbers[column] != _ABSENT:
                code += _if(_EQUAL, numbers[column], action)
    code.append(_return(TRAP))
    return b"".join(pack("=HBBI", *instruction) for instruction in code)


def _send(raw: Collection[int]) -> list[_Instruction]:
    """Judge `sendto`: the descriptor is the first argument, the receiver's address the fifth."""
    code = [_load(_argument(0))]
    for descriptor in sorted(raw):
        code += _if(_EQUAL, descriptor, ALLOW)
    for half in (0, 4):
        code += [_load(_argument(4) + half), *_unless(0, TRAP)]
    return [*code, _return(ALLOW)]


def _mark(raw: Collection[int]) -> list[_Instruction]:
    """Judge `setsockopt`: descriptor, level and option are the first three arguments."""
    code = [_load(_argument(1)), *_unless(_SOL_SOCKET, TRAP)]
    code += [_load(_argument(2)), *_unless(_SO_MARK, TRAP), _load(_argument(0))]
    for descriptor in sorted(raw):
        code += _if(_EQUAL, descriptor, ALLOW)
    return [*code, _return(TRAP)]


def _map() -> list[_Instruction]:
    """Judge `mmap`: the protection is the third argument, the flags are the fourth."""
    return [
        _load(_argument(2)),
        *_if(_ANY_BIT, _EXECUTABLE, TRAP),
        _load(_argument(3)),
        *_if(_ANY_BIT, _ANONYMOUS, ALLOW),
        _return(TRAP),
    ]


def _argument(index: int) -> int:
    """Return where the lower half of an argument stands, on a little-endian machine."""
    return _ARGUMENTS + 8 * index


def _load(offset: int) -> _Instruction:
    return (_LOAD, 0, 0, offset)


def _return(action: int) -> _Instruction:
    return (_RETURN, 0, 0, action)


def _if(condition: int, value: int, action: int) -> list[_Instruction]:
    return [(condition, 0, 1, value), _return(action)]


def _unless(value: int, action: int) -> list[_Instruction]:
    return [(_EQUAL, 1, 0, value), _return(action)]


def _block(number: int, code: list[_Instruction]) -> list[_Instruction]:
    """Judge one call by `code`, which always returns; others go past it."""
    if len(code) > 255:
        raise ValueError(f"{len(code)} instructions are too many to be passed over")
    return [(_EQUAL, 0, len(code), number), *code]
