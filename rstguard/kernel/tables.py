"""The guard's own tables of nf_tables: as they should be, or put in place anew."""

from __future__ import annotations

from collections.abc import Sequence

from rstguard.kernel import Changed
from rstguard.kernel.nftables import Chain
from rstguard.kernel.seam import Kernel


def missing(kernel: Kernel, table: str, chains: Sequence[Chain]) -> list[str]:
    """Return what of a table is not in the kernel, in words; empty if all is well.

    Raises:
        KernelError: the kernel has no nf_tables, or could not be asked.
    """
    held = kernel.table_comments(table)
    return [
        f"the chain {chain.name} in the nf_tables table inet {table}"
        for chain in chains
        if held.get(chain.name, []) != [rule.comment for rule in chain.rules]
    ]


def keep(kernel: Kernel, table: str, chains: Sequence[Chain]) -> None:
    """Put a table in place; one that is as it should be is left alone.

    Raises:
        KernelError: the kernel has no nf_tables, or refused.
    """
    try:
        if not missing(kernel, table, chains):
            return
    except Changed:  # other programs change their rules at present
        pass
    kernel.replace_table(table, chains)
