"""``rstguard doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rstguard.cli.common import DEFAULT_DIR, FAILED, Json, RuntimeDir, ask, print_json
from rstguard.ipc.requests import ControlError
from rstguard.kernel.queues import DEFAULT_NUMBER

if TYPE_CHECKING:
    from rstguard.kernel.check import Check

_POLICY = Path("/etc/rstguard/policy.yaml")


def doctor(
    queue: Annotated[
        int, typer.Option(min=0, max=65535, help="Number of the first NFQUEUE to be used.")
    ] = DEFAULT_NUMBER,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Tell what this machine lacks, and the command that fixes it."""
    from rstguard.kernel.preflight import Outcome, checks

    found = [*checks(queue), *_policy(runtime_dir)]
    if as_json:
        rows = [
            {"name": c.name, "outcome": c.outcome.value, "text": c.sentence, "fix": c.fix}
            for c in found
        ]
        print_json(rows)
    else:
        for check in found:
            typer.echo(f"{check.outcome.value:8} {check.name}: {check.sentence}")
            if check.fix:
                typer.echo(f"         fix: {check.fix}")
    if any(check.outcome is Outcome.MISSING for check in found):
        raise typer.Exit(FAILED)


def _policy(directory: Path) -> list[Check]:
    """Say whether traffic can come under the policy in force, or else the service's."""
    from rstguard.kernel.check import Check, Outcome
    from rstguard.kernel.linux import Linux
    from rstguard.policy.compile import compile_policy
    from rstguard.policy.load import PolicyError, load, parse
    from rstguard.supervisor.around import stands

    try:
        try:
            shown = ask(directory, {"command": "policy-show"})
            file, loaded = shown["file"], parse(shown["text"], shown["file"])
        except (ControlError, LookupError, TypeError):
            if not _POLICY.exists():
                return []
            file, loaded = str(_POLICY), load(_POLICY)
    except PolicyError as error:
        first = str(error).partition("\n")[0]
        return [Check("policy", Outcome.WARNING, first, "rstguard policy check FILE")]
    amiss = stands(Linux(), compile_policy(loaded.policy).scope)
    if not amiss:
        return [Check("policy", Outcome.OK, f"traffic here can come under {file}")]
    said = "; ".join(one.sentence for one in amiss)
    return [Check("policy", Outcome.WARNING, f"{file}: {said}", f"rstguard policy check {file}")]
