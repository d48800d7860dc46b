"""Condemns connections in the kernel's table, so that the rules believe it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rstguard.engine.flow import Flow
from rstguard.kernel.marks import Labels, Marks


class Table(Protocol):
    """The part of `rstguard.kernel.conntrack.Conntrack` that is needed here."""

    def set_mark(self, flows: Sequence[Flow], bits: int, mask: int) -> list[int]:
        """Mark connections; return an errno for each."""

    def set_labels(self, flows: Sequence[Flow], bits: int, mask: int) -> list[int]:
        """Label connections; return an errno for each."""


def condemn(table: Table, flows: Sequence[Flow], labels: Labels, bits: int, mask: int) -> list[int]:
    """Give connections the label and then the bits that condemn; return an errno for each.

    Where a connection has no room for labels, as it is older than the guard, or none are used, the
    bits count by themselves (`rstguard.kernel.proof.not_condemned`).

    Raises:
        KernelError: the kernel could not be asked.
    """
    label = 1 << labels.condemned
    table.set_labels(flows, label, label)
    return table.set_mark(flows, bits, mask)


def is_condemned(flow: Flow, marks: Marks, labels: Labels) -> bool:
    """Tell whether the guard has condemned a connection, and not only another program's mark."""
    begun = flow.labels >> labels.begun & 1
    return bool(flow.mark & marks.condemned.mask) and (
        not begun or bool(flow.labels >> labels.condemned & 1)
    )
