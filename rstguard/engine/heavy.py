"""Heavy hitters in a fixed amount of memory."""

from __future__ import annotations


class HeavyHitters:
    """Keys that make up more than one in `size` + 1 of all that is counted.

    The frequent-elements algorithm of J. Misra and D. Gries ("Finding repeated elements", Science
    of Computer Programming 2, 1982).  Of N counted keys, one that came f times has a count between
    f - N / (size + 1) and f here: a count is never too high, so nobody is blamed for what others
    sent.  Each step takes constant time on average, whatever the keys.

    Args:
        size: keys held at most, at least 1.
        window: after so many it begins anew, at least 1.
    """

    __slots__ = ("_counts", "_size", "_window", "total")

    def __init__(self, size: int, window: int) -> None:
        self._size = size
        self._window = window
        self._counts: dict[int, int] = {}
        self.total = 0

    def add(self, key: int) -> int:
        """Count a key; return its count so far, never more than it really came."""
        if self.total >= self._window:
            self.clear()
        self.total += 1
        counts = self._counts
        count = counts.get(key)
        if count is not None:
            counts[key] = count = count + 1
            return count
        if len(counts) < self._size:
            counts[key] = 1
            return 1
        # The key and one of each other cancel out.
        self._counts = {other: count - 1 for other, count in counts.items() if count > 1}
        return 0

    def clear(self) -> None:
        """Begin anew."""
        self._counts.clear()
        self.total = 0

    def __len__(self) -> int:
        return len(self._counts)
