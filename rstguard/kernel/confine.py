"""Give up, for good, what a process needs no more that reads what strangers send.

A worker or the sweeper begins as root, opens all that it needs, and then confines itself.  What it
keeps: its memory, its open sockets, and the capability to change Netfilter's state.  Raw sockets
need no capability once they are open.  `rstguard.kernel.syscalls` lists the system calls.

Own code, as a library would be bound to libseccomp.so, and needs as many lines to be called.  What
it calls: prctl(2), capset(2), landlock(7), seccomp(2) by prctl.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import os
import platform
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rstguard.kernel.syscalls import machine_of, program

ACCOUNT: Final = "rstguard-worker"
"""The user that a confined process runs as.  Its group is not `rstguard`, whose members may talk
to the supervisor."""
OTHERWISE: Final = 61029
"""Its number, and its group's, where there is no such user: Debian gives the numbers 60706-61183 to
nobody, nor does systemd (its UIDS-GIDS page).  `nobody` would not do: whoever shares a number with
another process may signal it."""

DONE: Final = "confined"
"""The last line of ``python -m rstguard.kernel.confine``, after what could not be given up."""

_CAP_KILL: Final = 5
_CAP_NET_ADMIN: Final = 12
_CAPABILITIES: Final = 64
"""More than any kernel has; it says itself which it has."""

# linux/prctl.h, linux/seccomp.h, linux/capability.h
_SET_DUMPABLE, _SET_KEEPCAPS, _SET_SECCOMP, _CAPBSET_READ, _CAPBSET_DROP = 4, 8, 22, 23, 24
_SET_NO_NEW_PRIVS, _CAP_AMBIENT, _CLEAR_ALL = 38, 47, 4
_FILTER: Final = 2
_CAPABILITY_VERSION: Final = 0x20080522

# linux/landlock.h; the numbers are the same on all architectures
_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_ASK_VERSION: Final = 1
_FILE_RIGHTS: Final = (0, 13, 14, 15, 15, 16)
"""How many of the rights on files each version of Landlock knows; later ones know no more."""
_NETWORK_SINCE, _SCOPES_SINCE = 4, 6


def confine() -> list[str]:
    """Give up what can be given up; return, in sentences, what could not be.

    There is no way back.  A forbidden system call ends the process by SIGSYS, having told in its
    log where it stood; `cause_of_death` tells it from other ends.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    lacking: list[str] = []
    raw, held = _raw_sockets(), capabilities()
    faulthandler.register(signal.SIGSYS, file=sys.stderr, all_threads=False, chain=True)
    steps: tuple[tuple[Callable[[], None], str], ...] = (
        (lambda: _prctl(libc, _SET_NO_NEW_PRIVS, 1), "its programs may gain privileges"),
        (
            lambda: _bound(libc),
            "its bounding set stays whole, as CAP_SETPCAP is missing",
        ),
        (
            lambda: _change_user(libc, held),
            "it stays root, as CAP_SETUID, CAP_SETGID or CAP_KILL is missing",
        ),
        (lambda: _keep_one_capability(libc), "it keeps all its capabilities"),
        (lambda: _prctl(libc, _SET_DUMPABLE, 0), "others may read its memory"),
        (lambda: _lock_files(libc), "Landlock, which this kernel or container lacks, is not used"),
        (lambda: _filter(libc, raw), "it may make any system call"),
    )
    for step, otherwise in steps:
        try:
            step()
        except OSError as error:
            lacking.append(f"{otherwise}: {error.strerror}")
    return lacking


def capabilities() -> int:
    """Return the effective capabilities of this process as bits (linux/capability.h)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def cause_of_death(status: int | None) -> str:
    """Return in words how a process ended; `status` is as in `subprocess.Popen.returncode`."""
    if status == -signal.SIGSYS:
        return (
            "made a system call that its confinement forbids, and was ended by SIGSYS; the log "
            "above names the place"
        )
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _raw_sockets() -> list[int]:
    """Return the descriptors of the open Internet sockets; the guard has only raw ones."""
    found = []
    for descriptor in (int(entry.name) for entry in Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):  # that of the listing is closed by now
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6):
                    found.append(descriptor)
    return found


def _prctl(libc: ctypes.CDLL, option: int, *arguments: int) -> None:
    words = [ctypes.c_ulong(word) for word in (*arguments, 0, 0, 0, 0)[:4]]
    _done(libc.prctl(option, *words))


def _done(result: int) -> int:
    """Return what a call returned.

    Raises:
        OSError: it failed.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _bound(libc: ctypes.CDLL) -> None:
    _prctl(libc, _CAP_AMBIENT, _CLEAR_ALL)
    for capability in range(_CAPABILITIES):
        there = libc.prctl(_CAPBSET_READ, ctypes.c_ulong(capability), 0, 0, 0)
        if there == 1 and capability != _CAP_NET_ADMIN:
            _prctl(libc, _CAPBSET_DROP, capability)


def _change_user(libc: ctypes.CDLL, held: int) -> None:
    if not held >> _CAP_KILL & 1:  # then the supervisor could not end a process of another user
        raise OSError(errno.EPERM, "the supervisor could not end another user's")
    user, group = _account()
    _prctl(libc, _SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)


def _account(users: Path = Path("/etc/passwd")) -> tuple[int, int]:
    """Return the numbers of user and group; a system user is in the file.

    The C library would also ask whatever directory this machine knows, and may wait for it.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in users.read_text(errors="replace").splitlines():
            name, _, user, group, *_ = [*line.split(":"), "", "", ""]
            if name == ACCOUNT and int(user) and int(group):
                return int(user), int(group)
    return OTHERWISE, OTHERWISE


def _keep_one_capability(libc: ctypes.CDLL) -> None:
    """Set the three sets of capabilities: struct __user_cap_data_struct, for bits 0-31 and 32-63.

    What is not permitted any more is out of reach: nothing can be added.
    """
    kept = 1 << _CAP_NET_ADMIN
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    data = struct.pack("=6I", kept, kept, 0, 0, 0, 0)
    _done(libc.capset(header, data))


def _lock_files(libc: ctypes.CDLL) -> None:
    """Deny by Landlock all that it knows: files, TCP, and signals to processes outside."""
    version = _done(_landlock(libc, _CREATE_RULESET, None, 0, _ASK_VERSION))
    rights = (1 << _FILE_RIGHTS[min(version, len(_FILE_RIGHTS) - 1)]) - 1
    attributes = struct.pack("=Q", rights)
    if version >= _NETWORK_SINCE:
        attributes += struct.pack("=Q", 3)  # to bind, to connect
    if version >= _SCOPES_SINCE:
        attributes += struct.pack("=Q", 3)  # abstract Unix sockets, signals
    rules = _done(_landlock(libc, _CREATE_RULESET, attributes, len(attributes), 0))
    try:
        _done(_landlock(libc, _RESTRICT_SELF, rules, 0))
    finally:
        os.close(rules)


def _landlock(libc: ctypes.CDLL, call: int, *arguments: bytes | int | None) -> int:
    words = (word if isinstance(word, bytes) else ctypes.c_long(word or 0) for word in arguments)
    return int(libc.syscall(ctypes.c_long(call), *words))


def _filter(libc: ctypes.CDLL, raw: list[int]) -> None:
    """Install the seccomp filter: struct sock_fprog, a length and a pointer."""
    machine = machine_of(platform.machine())
    if machine is None:
        raise OSError(0, f"its numbers are not known here for {platform.machine()}")
    code = program(machine, raw)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    _done(libc.prctl(_SET_SECCOMP, ctypes.c_ulong(_FILTER), header, 0, 0))


if __name__ == "__main__":
    # `rstguard doctor` asks; the last line tells that all was tried.
    sys.stdout.writelines(f"{sentence}\n" for sentence in [*confine(), DONE])
