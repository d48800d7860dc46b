"""How a process of the guard ends that made a mistake: it says so before."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rstguard.ipc.channel import ChildEnd, Closed
from rstguard.ipc.messages import Failed
from rstguard.kernel import KernelError

log = logging.getLogger(__name__)


@contextmanager
def last_words(channel: ChildEnd) -> Iterator[None]:
    """Tell the supervisor in a sentence what ends this process, if nobody expected it to.

    The log gets the traceback.  `Closed`, the supervisor's own end, and `KernelError`, which has a
    sentence of its own, go on to `rstguard.ipc.entry.run_child`.

    Raises:
        SystemExit: with status 1, after an unexpected exception.
    """
    try:
        yield
    except (Closed, KernelError):
        raise
    except Exception as error:
        log.exception("this is a mistake in rstguard; please report it with these lines")
        channel.send_last(Failed(f"it failed on something unexpected: {error!r}"))
        sys.exit(1)
