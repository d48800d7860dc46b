"""One guard for a network namespace and for each of its directories."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from rstguard.kernel import KernelError, owned

LOCKS = Path("/run/rstguard-locks")
"""One file for each network namespace that is guarded now; for root alone.

A name in the kernel, such as an abstract socket's, would be anybody's to take.
"""


def claim(*directories: Path) -> contextlib.ExitStack:
    """Make sure that this is the only guard of its network namespace and of its directories.

    Both claims go with their process, however it ends; close what is returned to give them up.

    Raises:
        KernelError: another guard runs here, others than root may write to a directory, or the
            claims cannot be made.
    """
    with contextlib.ExitStack() as claims:
        _claim_namespace(claims)
        for directory in directories:
            if directory.is_dir():  # else no guard can be using it
                claims.callback(os.close, _claim_directory(directory))
        return claims.pop_all()


def is_claimed() -> bool:
    """Tell whether a guard has claimed this network namespace."""
    try:
        descriptor = os.open(_lock_of_namespace(), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not _locked(descriptor)
    finally:
        os.close(descriptor)


def _lock_of_namespace() -> Path:
    return LOCKS / f"net-{Path('/proc/thread-self/ns/net').stat().st_ino}"


def _claim_directory(directory: Path) -> int:
    """Lock a directory: another guard's socket and sysctl record in it are not ours to replace."""
    owned.require_directory(directory)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    if not _locked(descriptor):
        os.close(descriptor)
        raise KernelError(
            f"the guard of another network namespace uses the directory {directory}; "
            "name others with --runtime-dir and --state-dir"
        )
    return descriptor


def _claim_namespace(claims: contextlib.ExitStack) -> None:
    """Lock the file that stands for this network namespace; it is removed with the claim."""
    file = _lock_of_namespace()
    try:
        LOCKS.mkdir(mode=0o700, exist_ok=True)
        owned.require_directory(LOCKS)
        descriptor = _lock_file(file)
    except OSError as error:
        raise KernelError(
            f"{file} cannot be made ({error.strerror}), by which one guard keeps another away"
        ) from None
    if descriptor is None:
        raise KernelError(
            "another rstguard guards this network namespace already; stop it first, "
            "or change its policy with `rstguard policy apply FILE`"
        )
    claims.callback(os.close, descriptor)
    claims.callback(file.unlink, missing_ok=True)  # before it is closed: nobody else's by then


def _lock_file(file: Path) -> int | None:
    """Return a descriptor of a locked file, or None if another process holds it."""
    while True:
        descriptor = os.open(file, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if not _locked(descriptor):
                os.close(descriptor)
                return None
            there = file.stat()
            if os.path.samestat(there, os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass  # its last holder removed it after it was opened here
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
