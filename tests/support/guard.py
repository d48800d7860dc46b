"""The guard as tests speak to it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from rstguard.lab.guard import GuardProcess
from tests.support.network import ThreeHosts
from tests.support.sources import network_of


class Guard(GuardProcess):
    """A guard in a namespace; a context manager that leaves no process behind.

    It has two workers, whatever the machine, unless a test wants to have all in one hand.
    """

    def __init__(
        self, lab: ThreeHosts, policy: str, directory: Path, *options: str, workers: int = 2
    ) -> None:
        super().__init__(lab, policy, directory, *options, workers=workers)
        self.lab = lab

    def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `rstguard` inside the namespace."""
        command = self.command(*words)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    def json(self, *words: str) -> Any:
        """Run a command with ``--json`` and return the data it printed."""
        done = self.cli(*words, "--json")
        assert not done.stderr, done.stderr
        return json.loads(done.stdout)

    def apply(self, policy: str) -> None:
        """Give it another policy, as `policy apply` does."""
        self.ask("policy-apply", name="policy.yaml", text=policy)

    def events(self, kind: str, rule: str) -> int:
        """Return how often something has happened by a rule."""
        return int(self.status()["counts"].get(kind, {}).get(rule, 0))

    def block_of(self, address: str) -> Any:
        """Return the ban or shun of a source, or None."""
        rows = [row for row in self.ask("ban-list") if row["source"] == network_of(address)]
        return rows[0] if rows else None

    def kill(self, **conditions: str | int) -> Any:
        """End connections and return the outcome."""
        return self.ask("kill", **conditions)
