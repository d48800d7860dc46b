"""``rstguard policy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rstguard.cli.common import (
    BAD_POLICY,
    DEFAULT_DIR,
    Json,
    PolicyFile,
    RuntimeDir,
    ask_guard,
    interfaces,
    print_json,
    read_policy,
)

app = typer.Typer(help="Check, apply and show policies.", no_args_is_help=True)


@app.command("check", epilog="Example: rstguard policy check policies/web-edge.yaml")
def policy_check(file: PolicyFile, as_json: Json = False) -> None:
    """Read a policy file and name every mistake in it, with line and column."""
    from rstguard.policy.load import PolicyError, load

    problems: tuple[Any, ...]
    try:
        problems = load(file, interfaces()).warnings
        right = True
    except PolicyError as error:
        problems, right = error.problems, False
    if as_json:
        rows = [
            {
                "file": p.file,
                "line": p.line,
                "column": p.column,
                "where": p.where,
                "message": p.message,
                "severity": p.severity,
            }
            for p in problems
        ]
        print_json({"ok": right, "problems": rows})
    else:
        for problem in problems:
            typer.echo(str(problem), err=True)
        if right:
            typer.echo(f"{file}: the policy is good")
    if not right:
        raise typer.Exit(BAD_POLICY)


@app.command("apply", epilog="Example: rstguard policy apply /etc/rstguard/policy.yaml")
def policy_apply(
    file: PolicyFile, runtime_dir: RuntimeDir = DEFAULT_DIR, as_json: Json = False
) -> None:
    """Give the running guard another policy; rules that stay the same keep their counts."""
    loaded = read_policy(file)
    done = ask_guard(runtime_dir, "policy-apply", name=str(file.absolute()), text=loaded.text)
    if as_json:
        print_json(done)
    else:
        typer.echo(f"policy {done['name']} is in force (took {done['took_ms']} ms)")


@app.command(
    "show",
    epilog="Examples: rstguard policy show; rstguard policy show --compiled policy.yaml",
)
def policy_show(
    file: Annotated[
        Path | None, typer.Argument(help="A policy file instead of the policy in force.")
    ] = None,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compiled",
            help="Show what the policy means, which tier enforces each rule, and the exact rules.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the policy in force, or what becomes of a policy file."""
    if file is None:
        data = ask_guard(runtime_dir, "policy-show")
    else:
        data = {"file": str(file), "text": read_policy(file).text, "iptables": None}
    if compiled:
        data |= _compiled(data)
    else:
        del data["iptables"]
    if as_json:
        print_json(data)
    else:
        typer.echo(data["compiled" if compiled else "text"], nl=False)


def _compiled(data: dict[str, Any]) -> dict[str, Any]:
    """Return what a policy compiles to: for people, each rule's tier, and the iptables rules.

    What the SYN budget adds for a service is known only to a guard that has seen it answer.
    """
    from rstguard.kernel.footprint import rules_text
    from rstguard.kernel.queues import DEFAULT_NUMBER
    from rstguard.policy.compile import compile_policy, describe, tier_of
    from rstguard.policy.load import parse
    from rstguard.policy.offload import why_not

    ruleset = compile_policy(parse(data["text"], data["file"]).policy)
    rules = data["iptables"] or rules_text(ruleset, range(DEFAULT_NUMBER, DEFAULT_NUMBER + 1))
    shown = "\n".join(f"\n# {family}\n{lines}" for family, lines in rules.items())
    return {
        "compiled": describe(ruleset) + shown,
        "rules": [
            {"name": rule.name, "tier": tier_of(rule), "why_not_kernel": why_not(ruleset, rule)}
            for rule in ruleset.rules
        ],
        "iptables": rules,
    }
