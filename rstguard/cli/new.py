"""``rstguard policy new``, and the first policy that `install` puts in place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rstguard.cli.common import (
    DEFAULT_DIR,
    FAILED,
    Json,
    RuntimeDir,
    ask,
    errors_in_one_sentence,
    fail,
    print_json,
    print_text,
    say,
)
from rstguard.cli.files import replace
from rstguard.ipc.requests import ControlError

if TYPE_CHECKING:
    from rstguard.cli.fresh import Wanted
    from rstguard.kernel.place import Place

EXAMPLES = (
    "Examples: sudo rstguard policy new --out policy.yaml; "
    "sudo rstguard policy new --for web --for ssh | rstguard policy check -"
)
_QUIET_SECONDS = 1.0
"""After so long it is said that the machine is still looked at."""


class For(Enum):
    """What a policy can be for; `rstguard.cli.fresh.PURPOSES` says which ports that means."""

    WEB = "web"
    SSH = "ssh"
    MAIL = "mail"


Interfaces = Annotated[
    list[str] | None,
    typer.Option(
        "--interface",
        metavar="NAME",
        help="Where the internet comes in, if not by the default route; may be repeated.",
    ),
]


def policy_new(
    purposes: Annotated[
        list[For] | None,
        typer.Option("--for", help="Guard only what serves this, and forget the rest; repeatable."),
    ] = None,
    interface: Interfaces = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it; else it is printed.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Look at this machine and write a policy that fits, with the reasons in comments.

    Looked at are interfaces, addresses and routes, ports that listen, what is translated
    (DNAT), and who holds a large share of the connections, as a CDN does; a running guard
    is asked, too. Nothing is changed. The policy observes: it counts, and does nothing.
    """
    if out is not None and out.exists() and not force:
        fail(f"{out} exists: name another file, or overwrite it with --force", FAILED)
    from rstguard.cli.fresh import Wanted

    named = tuple(purpose.value for purpose in dict.fromkeys(purposes or ()))
    file = str(out.absolute()) if out is not None else "FILE"
    wanted = Wanted(tuple(interface or ()), named, file)
    with errors_in_one_sentence():
        place = with_guard(look(), runtime_dir)
    text = text_for(place, wanted)
    if out is not None:
        try:
            replace(out, text)
        except OSError as error:
            fail(f"{out} cannot be written ({error.strerror}): is the path right?", FAILED)
    if as_json:
        print_json({"file": file if out else None, "policy": text, "unknown": list(place.unknown)})
    elif out is None:
        print_text(text)
    else:
        say(f"{out}: written; look at it, then `rstguard policy check {out}`")
    for what in place.unknown:
        say(f"note: not known: {what}", err=True)


def text_for(place: Place, wanted: Wanted) -> str:
    """Return the policy for a place; leaves with a sentence if none can be written."""
    from rstguard.cli.fresh import interfaces, policy_text
    from rstguard.policy.load import PolicyError, parse

    if not interfaces(place, wanted):
        there = ", ".join(link.name for link in place.links if link.name != "lo") or "none"
        fail(
            "no default route, so where the internet comes in cannot be told: say --interface NAME "
            f"(there are: {there})",
            FAILED,
        )
    text = policy_text(place, wanted)
    try:
        parse(text, "the policy")
    except PolicyError as error:
        fail(f"no policy can be written for what is here: {error.problems[0]}", FAILED)
    return text


def look() -> Place:
    """Look at this machine, and say so if it takes long.

    Raises:
        KernelError: the interfaces could not be asked for.
    """
    from rstguard.kernel.linux import Linux
    from rstguard.kernel.place import look_around

    with _telling("looking at routes and rules, which are many here …"):
        return look_around(Linux())


def with_guard(place: Place, directory: Path) -> Place:
    """Add the large sources that a running guard has found, if there is one."""
    from rstguard.engine.address import parse_prefix
    from rstguard.kernel.holders import Holder

    try:
        rows = ask(directory, {"command": "status"})["large_sources"]
        found = tuple(
            Holder(parse_prefix(row["source"]), int(row["percent"]), int(row["connections"]))
            for row in rows
        )
    except (ControlError, ValueError):
        return place
    return place._replace(holders=(*found, *place.holders))


@contextmanager
def _telling(sentence: str) -> Iterator[None]:
    """Say what goes on, if it takes long."""
    timer = threading.Timer(_QUIET_SECONDS, say, (sentence, True))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
