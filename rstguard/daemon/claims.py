"""One guard for a network namespace and for each of its directories."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from rstguard.kernel import KernelError


def claim(*directories: Path) -> contextlib.ExitStack:
    """Make sure that this is the only guard of its network namespace and of its directories.

    Both claims go with their process, however it ends; close what is returned to give them up.

    Raises:
        KernelError: another guard runs here.
    """
    with contextlib.ExitStack() as claims:
        claims.enter_context(_claim_namespace())
        for directory in directories:
            if directory.is_dir():  # else no guard can be using it
                claims.callback(os.close, _claim_directory(directory))
        return claims.pop_all()


def _claim_directory(directory: Path) -> int:
    """Lock a directory: another guard's socket and sysctl record in it are not ours to replace."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise KernelError(
            f"the guard of another network namespace uses the directory {directory}; "
            "name others with --runtime-dir and --state-dir"
        ) from None
    return descriptor


def _claim_namespace() -> socket.socket:
    """Bind an abstract socket name: it belongs to one namespace."""
    claimed = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claimed.bind("\0rstguard")
    except OSError:
        claimed.close()
        raise KernelError(
            "another rstguard guards this network namespace already; stop it first, "
            "or change its policy with `rstguard policy apply FILE`"
        ) from None
    return claimed
