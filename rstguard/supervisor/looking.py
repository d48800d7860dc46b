"""What is looked at again and again, as long as the guard runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from rstguard.kernel import KernelError

log = logging.getLogger(__name__)


async def keep_looking(
    look: Callable[[], Awaitable[None]], every: float, says: str = "%s", *, at_once: bool = False
) -> None:
    """Look every so many seconds; does not end by itself.

    What the kernel refuses is logged once, until it is something else or all is well: `says` is the
    line, with a place for the reason.  With `at_once` the first look is not waited for.
    """
    complaint = ""
    if not at_once:
        await asyncio.sleep(every)
    while True:
        try:
            await look()
            complaint = ""
        except KernelError as error:
            if str(error) != complaint:
                log.error(says, error)
            complaint = str(error)
        await asyncio.sleep(every)
