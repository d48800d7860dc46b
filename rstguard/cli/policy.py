"""``rstguard policy``."""

from __future__ import annotations

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


@app.command("show")
def policy_show(
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Show what the policy means, rule by rule.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the policy in force."""
    data = ask_guard(runtime_dir, "policy-show")
    if compiled:
        from rstguard.policy.compile import compile_policy, describe
        from rstguard.policy.load import parse

        data["compiled"] = describe(compile_policy(parse(data["text"], data["file"]).policy))
    if as_json:
        print_json(data)
    else:
        typer.echo(data["compiled" if compiled else "text"], nl=False)
