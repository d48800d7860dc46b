"""Whether what stands under a path is root's alone: only then does the guard believe it.

What a file in the runtime directory says is done by root: values of sysctls are written, all
traffic is let through.  So nobody else may be able to put a file there, or to change one.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from rstguard.kernel import KernelError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_LARGEST = 1 << 20


def require_directory(directory: Path) -> None:
    """Make sure that a directory is root's, and that nobody else may write to it.

    Raises:
        KernelError: it is not, and what to do.
    """
    os.close(_open_directory(directory))


def read(file: Path) -> str | None:
    """Return the text of a file that is root's alone, or None if there is none.

    Raises:
        KernelError: it or its directory may be another's work, or it cannot be read.
    """
    try:
        directory = _open_directory(file.parent)
    except FileNotFoundError:
        return None
    try:
        # O_NONBLOCK: a FIFO would keep us waiting.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(file.name, flags, dir_fd=directory)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or not _is_roots(status):
                raise _others_work(file)
            return stream.read(_LARGEST).decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        if file.is_symlink():
            raise _others_work(file) from None
        raise KernelError(f"{file} cannot be read ({error}): look at it, and remove it") from None
    finally:
        os.close(directory)


def write(file: Path, text: str) -> None:
    """Replace a file whole: written beside it, on the disk before it takes the name.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    with tempfile.NamedTemporaryFile(
        "w", dir=file.parent, prefix=f"{file.name}.", delete=False
    ) as fresh:
        try:
            fresh.write(text)
            fresh.flush()
            os.fsync(fresh.fileno())
            Path(fresh.name).replace(file)
        except OSError:
            Path(fresh.name).unlink(missing_ok=True)
            raise
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def exists(file: Path) -> bool:
    """Tell whether there is a file that is root's alone.

    Raises:
        KernelError: there is another's.
    """
    return read(file) is not None


def _open_directory(directory: Path) -> int:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise  # for the caller to judge
    except OSError as error:
        raise KernelError(f"the directory {directory} cannot be used ({error.strerror})") from None
    if not _is_roots(os.fstat(descriptor)):
        os.close(descriptor)
        raise KernelError(
            f"others than root may write to the directory {directory}, so nothing in it is "
            f"believed: run `chown root {directory}; chmod go-w {directory}`, or name another"
        )
    return descriptor


def _is_roots(status: os.stat_result) -> bool:
    # Or of whoever tries the guard out without being root.
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & _OTHERS


def _others_work(file: Path) -> KernelError:
    return KernelError(
        f"{file} is not a file that only root may write, so it is not believed: look at it, and "
        "remove it"
    )
