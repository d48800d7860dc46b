"""What a program started, and the processor time of it all."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_seconds(root: int) -> float:
    """Return the processor time of a process and all those below it."""
    ticks = 0
    parents, used = _processes()
    for pid in used:
        above: int | None = pid
        while above is not None and above != root:
            above = parents.get(above)
        if above is not None:
            ticks += used[pid]
    return ticks / os.sysconf("SC_CLK_TCK")


def _processes() -> tuple[dict[int, int], dict[int, int]]:
    """Return parent and processor ticks of every process (proc(5), /proc/pid/stat)."""
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # It ended while we looked.
        pid = int(text.split(maxsplit=1)[0])
        # The name in parentheses may hold anything: fields are counted from the last one on.
        fields = text.rpartition(")")[2].split()
        parents[pid] = int(fields[1])
        used[pid] = int(fields[11]) + int(fields[12])
    return parents, used


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started and not yet waited for; none if it is gone.

    They are those of its first thread (Linux, proc_pid_children(5)).
    """
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
