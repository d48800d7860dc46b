"""The fake kernel against the real one: lists of operations, drawn by chance, end alike."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest

from rstguard.kernel.linux import Linux
from rstguard.kernel.seam import Kernel
from rstguard.lab.namespace import own_network
from rstguard.lab.waiting import wait_until
from tests.kernel.random_operations import SYSCTLS, Side, random_operations
from tests.support.fake_kernel import FakeKernel

pytestmark = pytest.mark.netns

_VOLATILE = re.compile(r" (hashsize|bucketsize|initval) \S+")
_REMAINING = re.compile(r" timeout [1-9]\d*")
_REFERENCES = re.compile(r"Name: (\S+)|References: (\d+)")
_SAVE = {4: "iptables-save", 6: "ip6tables-save"}


def state(kernel: Kernel) -> dict[str, object]:
    """Return all that is compared: rules, sets and sysctls, less counters, comments and times."""
    found: dict[str, object] = {name: kernel.read_sysctl(name) for name in SYSCTLS}
    for family, save in _SAVE.items():
        for table, lines in _tables(kernel.run([save])).items():
            found[f"IPv{family} {table}"] = lines
    for line in kernel.run(["ipset", "save"]).splitlines():
        order, name, *rest = line.split(" ", 2)
        says = _VOLATILE.sub("", " ".join(rest))
        if order == "create":
            found[name] = (says, members := set[str]())
        else:
            members.add(_REMAINING.sub(" timeout later", says))
    return found


def _tables(saved: str) -> dict[str, list[str]]:
    tables: dict[str, list[str]] = {}
    for line in saved.splitlines():
        if line.startswith("*"):
            lines = tables[line] = []
        elif line[:1] in (":", "-"):
            lines.append(line.partition(" [")[0])
    # With the real one a table comes to be by a mere question, too.
    return {
        table: lines
        for table, lines in tables.items()
        if any(not line.endswith(" ACCEPT") or line[0] == "-" for line in lines)
    }


def references(kernel: Kernel) -> list[str]:
    """Return each set and how many rules use it."""
    found = _REFERENCES.findall(kernel.run(["ipset", "list", "-terse"]))
    return [name or count for name, count in found]


def differences(seed: int, directory: Path, look_often: bool = False) -> list[str]:
    """Carry out a list on both kernels; return in words what differs.

    With `look_often` the kernels are compared after each operation, not only at the end.
    """
    operations = random_operations(Random(seed))
    kernels: dict[str, Kernel] = {"real": Linux(), "fake": FakeKernel()}
    real, fake = (
        Side.of(kernel, directory / f"{seed}-{look_often}-{kind}")
        for kind, kernel in kernels.items()
    )
    said = []
    with own_network():
        for operation in operations:
            outcomes = operation.on(real), operation.on(fake)
            said.append(f"{operation.words}: {outcomes[0]}")
            if outcomes[0] != outcomes[1]:
                return [*said, f"but the fake: {outcomes[1]}"]
            try:
                # iptables gives up its references to a set a moment after it has answered.
                wait_until(lambda: references(real.kernel) == references(fake.kernel), 2)
            except TimeoutError:
                return [*said, f"{references(real.kernel)}", f"{references(fake.kernel)}"]
            if look_often and (unlike := _unlike(real, fake)):
                return [*said, *unlike]
        unlike = _unlike(real, fake)
    return [*said, *unlike] if unlike else []


def _unlike(real: Side, fake: Side) -> list[str]:
    truth, belief = state(real.kernel), state(fake.kernel)
    return [
        f"{key}:\n    real {_beyond(truth.get(key), belief.get(key))}"
        f"\n    fake {_beyond(belief.get(key), truth.get(key))}"
        for key in truth | belief
        if truth.get(key) != belief.get(key)
    ]


def _beyond(one: object, other: object) -> object:
    """Return what of a table's lines only one has; all of them if few have another order."""
    if isinstance(one, list) and isinstance(other, list):
        return [line for line in one if line not in other] or (one if len(one) < 9 else "order")
    return one


def check(seeds: range, directory: Path) -> None:
    """Fail with the first list after which the two kernels are not alike."""
    for seed in seeds:
        if found := differences(seed, directory):
            found = differences(seed, directory, look_often=True) or found
            pytest.fail("\n".join([f"seed {seed}:", *found]), pytrace=False)


def test_both_kernels_end_alike(tmp_path: Path) -> None:
    check(range(60), tmp_path)


@pytest.mark.kernel_long
@pytest.mark.timeout(0)
def test_both_kernels_end_alike_many_times(tmp_path: Path) -> None:
    check(range(60, 2060), tmp_path)
