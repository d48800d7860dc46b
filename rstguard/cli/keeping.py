"""Whether the guard will start with the policy in force, and how it is made to (``--save``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from rstguard.cli.common import FAILED, fail
from rstguard.cli.files import BACKUP, replace

Save = Annotated[
    bool,
    typer.Option(
        "--save",
        help="Put it into the file that the guard starts with, too; what was there is kept beside.",
    ),
]


class Kept(NamedTuple):
    """What a guard starts with after a restart, and whether that is the policy in force.

    `saved` tells that it was put there just now, `backup` where what had been there is, or "".
    """

    start_file: str
    starts_with_it: bool
    saved: bool = False
    backup: str = ""

    def sentences(self) -> Iterator[str]:
        """Yield what people are to know of it: nothing if all is as it was."""
        if self.saved:
            before = f"; what was there is in {self.backup}" if self.backup else ""
            yield f"saved: the guard starts with it from {self.start_file}{before}"
        elif not self.starts_with_it:
            yield (
                f"the guard starts with {self.start_file}, which holds another policy: that "
                "returns with a restart or reboot; --save puts this one there"
            )


def keeping(start_file: str, text: str, save: bool) -> Kept:
    """Look at the file that a guard starts with, and with `save` put a policy's text there.

    Leaves with a sentence if it cannot be written: the policy is in force all the same.
    """
    file = Path(start_file)
    try:
        there = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        there = None
    if there == text or not save:
        return Kept(start_file, there == text)
    try:
        replace(file, text, backup=True)
    except OSError as error:
        why = f"{file} cannot be written ({error.strerror})"
        fail(f"the policy is in force, but not saved: {why}; as root, or copy it there", FAILED)
    return Kept(start_file, True, True, "" if there is None else f"{file}{BACKUP}")
