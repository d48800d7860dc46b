"""``rstguard policy``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rstguard.cli import learn, new, replay
from rstguard.cli.common import (
    BAD_POLICY,
    DEFAULT_DIR,
    FAILED,
    Json,
    PolicyFile,
    RuntimeDir,
    ask_guard,
    fail,
    load_here,
    print_json,
    print_text,
    read_policy,
    say,
    ssh_client,
    who,
)
from rstguard.cli.keeping import Kept, Save, keeping

app = typer.Typer(help="Check, apply and show policies.", no_args_is_help=True)
app.command(
    "replay",
    epilog="Examples: rstguard policy replay policy.yaml yesterday.pcap; "
    "rstguard policy replay policy.yaml yesterday.pcap --against stricter.yaml",
)(replay.policy_replay)
app.command("new", epilog=new.EXAMPLES)(new.policy_new)
app.command("learn", epilog=learn.EXAMPLES)(learn.policy_learn)


@app.command(
    "check",
    epilog="Examples: rstguard policy check policies/web-edge.yaml; "
    "rstguard policy new | rstguard policy check -",
)
def policy_check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Policy file (YAML); - reads a pipe.")
    ],
    as_json: Json = False,
) -> None:
    """Name every mistake in a policy file, with line and column, and what cannot match here."""
    from rstguard.policy.load import PolicyError

    problems: tuple[Any, ...]
    try:
        problems = load_here(file).told
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
            say(str(problem), err=True)
        if right:
            say(f"{file}: the policy is good")
    if not right:
        raise typer.Exit(BAD_POLICY)


@app.command(
    "apply",
    epilog="Examples: rstguard policy apply /etc/rstguard/policy.yaml; "
    "rstguard policy apply policy.yaml --confirm 60s; rstguard policy apply policy.yaml --save",
)
def policy_apply(
    file: PolicyFile,
    confirm: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Go back by itself after this time (1s to 1h) unless `policy confirm` follows.",
        ),
    ] = None,
    save: Save = False,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Give the running guard another policy; rules that stay the same keep their counts."""
    if save and confirm is not None:
        raise typer.BadParameter("what may be rolled back is saved by `policy confirm --save`")
    seconds = None if confirm is None else _seconds(confirm)
    loaded = read_policy(file)
    done = ask_guard(
        runtime_dir,
        "policy-apply",
        name=str(file.absolute()),
        text=loaded.text,
        confirm_s=seconds,
        who=who(),
        ssh=ssh_client(),
    )
    kept = keeping(done["start_file"], loaded.text, save)
    if as_json:
        print_json(done | kept._asdict())
        return
    say(f"policy {done['name']} is in force (took {done['took_ms']} ms)")
    protected = ", ".join(f"{row['address']} ({row['what']})" for row in done["protected"])
    say(f"never banned, shunned or reset: {protected}")
    if seconds is not None:
        say(f"rolls back in {seconds} s unless you run `rstguard policy confirm`")
    _tell_kept(kept)


def _seconds(text: str) -> int:
    from rstguard.engine.ruleset import SECOND
    from rstguard.policy.quantities import HOUR, duration

    try:
        return duration(SECOND, HOUR)(text) // SECOND
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--confirm") from None


@app.command("confirm", epilog="Examples: rstguard policy confirm; rstguard policy confirm --save")
def policy_confirm(
    save: Save = False, runtime_dir: RuntimeDir = DEFAULT_DIR, as_json: Json = False
) -> None:
    """Keep the policy that was applied with --confirm."""
    done = ask_guard(runtime_dir, "policy-confirm", who=who())
    text = ask_guard(runtime_dir, "policy-show")["text"]
    kept = keeping(done["start_file"], text, save)
    if as_json:
        print_json(done | kept._asdict())
        return
    say(f"policy {done['name']} stays")
    _tell_kept(kept)


def _tell_kept(kept: Kept) -> None:
    for sentence in kept.sentences():
        say(sentence)


@app.command("rollback", epilog="Example: rstguard policy rollback")
def policy_rollback(runtime_dir: RuntimeDir = DEFAULT_DIR, as_json: Json = False) -> None:
    """Go back to the policy that was in force before this one; again, to the one before that."""
    done = ask_guard(runtime_dir, "policy-rollback", who=who())
    if as_json:
        print_json(done)
    else:
        say(f"policy {done['name']} is in force again (took {done['took_ms']} ms)")


@app.command(
    "history",
    epilog="Examples: rstguard policy history; rstguard policy history 12 > policy.yaml",
)
def policy_history(
    number: Annotated[
        int | None, typer.Argument(help="Print the text of the policy of this number.")
    ] = None,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Tell which policies were in force, since when, and who wanted them."""
    entries = ask_guard(runtime_dir, "policy-history")
    if number is not None:
        entries = [entry for entry in entries if entry["number"] == number]
        if not entries:
            fail(f"there is no policy {number} in the history", FAILED)
    if as_json:
        print_json(entries)
    elif number is not None:
        print_text(entries[0]["text"])
    else:
        for entry in reversed(entries):
            say(_line(entry))


def _line(entry: dict[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
    state = {"kept": "", "pending": ", not yet confirmed", "undone": ", undone"}[entry["state"]]
    now = ", in force" if entry["in_force"] else ""
    what = f"{entry['number']:4}  {when}  {entry['action']:13} {entry['name']}"
    return f"{what} ({entry['file']}) by {entry['who']}{state}{now}"


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
        print_text(data["compiled" if compiled else "text"])


@app.command("diff", epilog="Example: rstguard policy diff /etc/rstguard/policy.yaml")
def policy_diff(
    file: PolicyFile,
    against: Annotated[
        Path | None,
        typer.Option(help="Compare with this file instead of the policy in force.", readable=False),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Show the iptables rules that change, too.")
    ] = False,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Tell what applying a policy file would change, and change nothing."""
    from rstguard.kernel.footprint import rules_text
    from rstguard.kernel.queues import DEFAULT_NUMBER
    from rstguard.policy.compile import compile_policy
    from rstguard.policy.differ import differences, rules_diff
    from rstguard.policy.load import parse

    new = compile_policy(read_policy(file).policy)
    if against is not None:
        old = compile_policy(read_policy(against).policy)
    else:
        shown = ask_guard(runtime_dir, "policy-show")
        old = compile_policy(parse(shown["text"], shown["file"]).policy)
    queues = range(DEFAULT_NUMBER, DEFAULT_NUMBER + 1)
    changes = differences(old, new)
    lines = rules_diff(rules_text(old, queues), rules_text(new, queues))
    if as_json:
        print_json({"changes": changes, "iptables": lines})
        return
    for change in changes:
        say(change)
    if not changes:
        say("nothing would change")
    if compiled and lines:
        print_text(f"\n{lines}")


@app.command("schema", epilog="Example: rstguard policy schema > policy.schema.json")
def policy_schema_command() -> None:
    """Print the JSON Schema of policy files, by which editors complete and check them."""
    from rstguard.policy.schema import policy_schema

    print_json(policy_schema())


@app.command("explain", epilog="Example: rstguard policy explain 198.51.100.7")
def policy_explain(
    address: Annotated[str, typer.Argument(help="Address of a source.")],
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Tell how a source stands now: which rules count it, how near each is, what would follow."""
    told = ask_guard(runtime_dir, "explain", source=address)
    if as_json:
        print_json(told)
        return
    say(f"{told['source']}: {told['state']}")
    say(f"  {told['connections']} connections in the kernel's table")
    if told["adopted"]:
        say(
            f"  {told['adopted']} of them were forgotten by it and taken up again: their age and "
            "window scale are not known, ages count from then on"
        )
    if told["productive_percent"] is not None:
        say(f"  {told['productive_percent']}% of its completed connections are productive")
    for row in told["rules"]:
        used = "not counted now" if row["used_percent"] is None else f"{row['used_percent']}% used"
        say(f"  {row['name']}: {used}; {row['says']}")


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
