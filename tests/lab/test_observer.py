"""Reading the kernel's connection tables; rows as a little-endian machine shows them."""

from __future__ import annotations

import sys

import pytest

from rstguard.lab.observer import Held, Observation, Sample, count_connections

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
TCP = HEAD + (
    "   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n"
    "   1: 0A7100CB:0016 420200C0:9C40 01 00000000:00000000 00:00000000 00000000     0\n"
    "   2: 0A7100CB:0016 420200C0:9C41 06 00000000:00000000 00:00000000 00000000     0\n"
    "   3: 0A7100CB:0016 0B6433C6:9C40 01 00000000:00000000 00:00000000 00000000     0\n"
)
MAPPED, CLIENT = "0000000000000000FFFF0000420200C0", "0000000000000000FFFF00000B6433C6"
SERVER = "0000000000000000FFFF00000A7100CB"
TCP6 = HEAD + "".join(
    f"  {row}: {SERVER}:0050 {remote}:{port:04X} {state} 00000000:00000000 00:00000000 0 0\n"
    for row, (remote, port, state) in enumerate(
        [
            (MAPPED, 1, "01"),
            (MAPPED, 2, "08"),
            (MAPPED, 3, "03"),
            (MAPPED, 4, "03"),
            (CLIENT, 5, "01"),
            (CLIENT, 6, "03"),
        ]
    )
)


@pytest.mark.skipif(sys.byteorder != "little", reason="the rows are a little-endian machine's")
def test_only_the_attackers_live_connections_count() -> None:
    assert count_connections([TCP, TCP6], "192.0.2.66") == (3, 2)
    assert count_connections([TCP], "192.0.2.66") == (1, 0)
    assert count_connections([HEAD], "192.0.2.66") == (0, 0)


def test_what_it_writes_is_read_back() -> None:
    seen = Observation.from_json("[[[1.5, 20, 3]], [[1.6, 7, 2]]]")
    assert seen == Observation([Sample(1.5, 20, 3)], [Held(1.6, 7, 2)])
