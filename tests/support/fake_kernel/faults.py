"""What is to go wrong, and how often: switched on by a test, met by the operation it names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rstguard.kernel import KernelError


@dataclass(slots=True)
class Fault:
    """One kind of failure that is yet to come; `times` is None for always."""

    operation: str
    naming: str
    process: str | None
    error: KernelError
    times: int | None
    after: bool

    def fits(self, operation: str, subject: str, process: str, after: bool) -> bool:
        """Tell whether an operation is to fail by it."""
        return (
            self.after is after
            and self.times != 0
            and fnmatchcase(operation, self.operation)
            and self.naming in subject
            and self.process in (None, process)
        )


class Faults:
    """The faults of one kernel."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def fail(
        self,
        operation: str,
        error: KernelError | None = None,
        times: int | None = 1,
        *,
        naming: str = "",
        process: str | None = None,
        after: bool = False,
    ) -> Fault:
        """Let an operation fail from now on.

        Args:
            operation: a method of the kernel or of what it hands out, with globs: ``run``,
                ``sets.add``, ``table.*``, ``queue``.
            error: what is raised; a KernelError that says it is a fault, if omitted.
            times: how often; None for always.
            naming: only where this is part of the subject: the command line and its input, the
                names of the sets, the sysctl, the number of the queue.
            process: only for what this process asks; see `FakeKernel.process`.
            after: the operation is carried out, and only its answer is lost.
        """
        wrong = error or KernelError(f"a fault of the test: {operation} {naming}".strip())
        fault = Fault(operation, naming, process, wrong, times, after)
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Let everything succeed again."""
        self._faults.clear()

    @contextmanager
    def around(self, operation: str, subject: str = "", process: str = "") -> Iterator[None]:
        """Fail before or after the block if that is to be."""
        self._meet(operation, subject, process, after=False)
        yield
        self._meet(operation, subject, process, after=True)

    def _meet(self, operation: str, subject: str, process: str, after: bool) -> None:
        for fault in self._faults:
            if fault.fits(operation, subject, process, after):
                if fault.times is not None:
                    fault.times -= 1
                raise fault.error
