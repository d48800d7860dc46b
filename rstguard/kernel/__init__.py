"""All Linux I/O: queue, chains, sets, connection table, raw packets, preflight."""


class KernelError(Exception):
    """Something the kernel or one of its tools refused; the text says what to do about it."""
