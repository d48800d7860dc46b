"""What other programs do with marks, read from what their tools print."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rstguard.kernel import NotThere, foreign
from rstguard.kernel.foreign import Use

OURS = 0xFF000000


@pytest.mark.parametrize(
    ("rule", "bits"),
    [
        ("-A PREROUTING -j MARK --set-xmark 0x6d6f6c65/0x6d6f6c65", 0x6D6F6C65),
        ("-A PREROUTING -j MARK --set-xmark 0x1/0xffffffff", 1),
        ("-A PREROUTING -j CONNMARK --set-xmark 0x1/0xffffffff", 0xFFFFFFFF),
        ("-A a -j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffff0000", 0xFFFF0000),
        ("-A a -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff", 0),
        ("-A a -p tcp -j TPROXY --on-port 1 --tproxy-mark 0x8000000/0x8000000", 1 << 27),
        ("-A a -m mark --mark 0x40000/0xff0000 -j RETURN", 0x40000),
        ("-A a -m connmark ! --mark 0x10000000/0xf0000000 -j RETURN", 1 << 28),
        ("-A PREROUTING -j rstguard-in", 0),
        ("-A rstguard-in -j MARK --set-xmark 0x1/0xff000000", 0),
        ("-A a -j ACCEPT", 0),
    ],
)  # fmt: skip
def test_iptables(rule: str, bits: int) -> None:
    uses = list(foreign.of_iptables(f"*mangle\n[0:0] {rule}\nCOMMIT\n"))
    assert uses == ([Use("iptables, mangle", rule, bits)] if bits else [])


@pytest.mark.parametrize(
    ("rule", "bits"),
    [
        ("meta mark set 0x08000000", 1 << 27),
        ("meta mark set mark or 0x80000", 0x80000),
        ("meta mark set mark and 0xff00ffff or 0x00040000", 0x40000),
        ("ct mark set meta mark", 0xFFFFFFFF),
        ("ct mark set ct mark & 0xff00ffff | 0x00040000", 0x40000),
        ("meta mark 0x6d6f6c65 accept", 0x6D6F6C65),
        ("meta mark & 0xf0000000 == 0x10000000 drop", 0xF0000000),
        ("tcp dport 80 accept", 0),
    ],
)
@pytest.mark.parametrize(
    ("table", "seen"),
    [
        ("inet mole", True),
        ("ip mangle", False),
        ("inet rstguard", False),
        ("inet rstguard-dnat", False),
    ],
)
def test_nft(rule: str, bits: int, table: str, seen: bool) -> None:
    printed = f"table {table} {{\n\tchain a {{\n\t\t{rule}\n\t}}\n}}\n"
    uses = list(foreign.of_nft(printed))
    assert uses == ([Use(f"nft, {table}", rule, bits)] if seen and bits else [])


class Tools:
    """What prints rules; a command that it does not know is not there."""

    def __init__(self, **printed: str) -> None:
        self._printed = printed

    def run(self, arguments: Sequence[str], text: str = "") -> str:
        words = "_".join(arguments).replace("-", "")
        if words not in self._printed:
            raise NotThere(f"the command {arguments[0]} is missing")
        return self._printed[words]


def test_what_is_told() -> None:
    assert foreign.told(foreign.look(Tools()), OURS) == []
    elsewhere = foreign.look(Tools(ip_rule="5210: from all fwmark 0x80000/0xff0000 lookup main\n"))
    assert foreign.told(elsewhere, OURS) == []
    counted = (
        "*mangle\n[3:120] -A rstguard-foreign -j MARK --set-xmark 0x0/0xff000000\nCOMMIT\n*filter\n"
        '[2:80] -A rstguard-condemned -m connlabel --label "126" -j RETURN'
    )
    found = foreign.look(
        Tools(
            iptablessave_c=counted,
            ip_rule="9: not from all fwmark 0x6d6f6c65 lookup 51820\n"
            "8: from all fwmark 0x20000/0xff0000 lookup 52\n",
        )
    )
    assert found.counts == {foreign.CLEARED: 3, foreign.SPARED: 2}
    (said,) = foreign.told(found, OURS)
    assert "ip rule: `9: not from all fwmark 0x6d6f6c65 lookup 51820`;" in said
    assert "set `marks:` in the policy" in said  # no byte is free of both
    assert found.overlapping(0xFF0000)
