"""All Linux I/O: queue, chains, sets, connection table, raw packets, preflight.

`seam.Kernel` is all of it that a running guard uses, `linux.Linux` the one that is real.
"""


class KernelError(Exception):
    """Something the kernel or one of its tools refused; the text says what to do about it.

    Its subclasses say what was wrong to whoever must decide by it; the text is for people.
    """


class NotPermitted(KernelError):
    """This process may not do that: it lacks root, or a capability."""


class NotThere(KernelError):
    """What was named does not exist: a set, a chain, a sysctl, a command."""


class InUse(KernelError):
    """What is to be removed or taken is still used by something else."""


class Full(KernelError):
    """A set holds as many elements as it can."""


class Changed(KernelError):
    """Others changed it while it was read: what came is incomplete, and may be read again."""


class Undone(KernelError):
    """It was done, and is not there: another program took it away at once."""
