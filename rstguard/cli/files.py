"""Files that commands write: whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

BACKUP = ".bak"
"""What the name of the copy ends with that `replace` keeps of a file."""


def replace(target: Path, text: str, *, backup: bool = False) -> None:
    """Write a file: beside its place, on the disk before it takes the name, with the old mode.

    With `backup` what was there stays as a file of the same name and `BACKUP`.  A link stays one,
    and what is no file, such as /dev/stdout, is only written to.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    target = target.resolve()
    fresh = target.with_name(f".{target.name}.new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, fresh)
            if backup:
                shutil.copy2(target, target.with_name(target.name + BACKUP))
        fresh.replace(target)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
