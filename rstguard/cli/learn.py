"""``rstguard policy learn``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer

from rstguard.cli.common import (
    BAD_POLICY,
    DEFAULT_DIR,
    FAILED,
    Json,
    RuntimeDir,
    ask_guard,
    fail,
    print_json,
    say,
)
from rstguard.cli.replay import progress_on_stderr

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from rstguard.replay.learn import Lesson

EXAMPLES = (
    "Examples: rstguard policy learn yesterday.pcap --out proposed.yaml --margin 3; "
    "rstguard policy learn --live --for 1h --out proposed.yaml (waits); "
    "rstguard policy learn --live --start --for 1d, and tomorrow "
    "rstguard policy learn --live --out proposed.yaml"
)
_ASK_EVERY = 1.0
_BY_ITSELF = "1d"
"""For how long a guard learns that was only told to begin."""
_TELLING_SECONDS = 60.0
_CLOSE_SECONDS = 60
"""A guard that was to learn for an hour has measured for some seconds less."""


Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Where to write the proposed policy.")
]
Base = Annotated[
    Path | None,
    typer.Option(
        metavar="POLICY", help="Whose rules are measured in a capture; else those of web-edge."
    ),
]
Live = Annotated[
    bool, typer.Option("--live", help="Learn from the running guard, which must be observing.")
]
Duration = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="TIME",
        help="How long the guard is to learn (1s to 30d); Ctrl-C proposes from what there is.",
    ),
]
Start = Annotated[
    bool,
    typer.Option("--start", help=f"Have the guard begin, for {_BY_ITSELF} or --for, and leave."),
]
Stop = Annotated[
    bool, typer.Option("--stop", help="Have the guard end, and forget what it has learned.")
]


def policy_learn(
    capture: Annotated[
        Path | None,
        typer.Argument(metavar="CAPTURE", help="pcap or pcapng, maybe gzipped; - reads a pipe."),
    ] = None,
    out: Out = None,
    live: Live = False,
    duration: Duration = None,
    start: Start = False,
    stop: Stop = False,
    base: Base = None,
    margin: Annotated[
        float, typer.Option(min=1.0, max=100.0, help="How far limits are from honest sources.")
    ] = 2.0,
    least_sources: Annotated[
        int, typer.Option(min=0, help="Propose nothing from fewer productive sources.")
    ] = 100,
    least_time: Annotated[
        str, typer.Option(metavar="TIME", help="Propose nothing from less time (1s to 30d).")
    ] = "1h",
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Propose limits: what 99.9 % of productive sources do, doubled.

    Writes a policy whose comments say what was measured, and how many sources
    other limits would have hit. Take a capture on an ordinary busy day, or let
    the running guard learn for one (--live): it measures by its own policy's
    rules while that observes, and goes on if this command ends, until --for
    is over. Of fewer than 100 sources, or less than an hour, nothing is proposed:
    such limits would be chance. A source that carries a large share of all
    connections, as a CDN does, is named, with what to say of it. Read which
    sources showed most, and try the limits with `rstguard policy replay`, or
    in a policy that observes.
    """
    if wrong := _wrong(capture, out, duration, base, live=live, start=start, stop=stop):
        raise typer.BadParameter(wrong)
    seconds = _seconds(duration) if duration else None
    enough = _Enough(least_sources, _seconds(least_time, "--least-time"))
    if stop:
        _stop(runtime_dir, as_json)
        return
    if start:
        _start(runtime_dir, seconds or _seconds(_BY_ITSELF), as_json)
        return
    assert out is not None
    if out.exists() and not force:
        fail(f"{out} exists: name another file, or overwrite it with --force", FAILED)
    if capture is not None:
        _report(_of_capture(capture, base, margin, out, enough), out, as_json)
        return
    if seconds:
        if not out.absolute().parent.is_dir():
            fail(f"{out.parent} is no directory: where is {out.name} to be written?", FAILED)
        _watch(runtime_dir, seconds)
    lesson = _of_guard(runtime_dir, margin, out, enough)
    if seconds:
        ask_guard(runtime_dir, "learn-stop")
    _report(lesson, out, as_json)


def _wrong(
    capture: Path | None,
    out: Path | None,
    duration: str | None,
    base: Path | None,
    *,
    live: bool,
    start: bool,
    stop: bool,
) -> str:
    """Return what is wrong with the options together, or ""."""
    if live == (capture is not None):
        return "name a capture, or say --live to learn from the running guard"
    if not live and (start or stop or duration):
        return "--for, --start and --stop are for the running guard: add --live"
    if live and base:
        return "the guard measures by its own policy's rules: leave --base out"
    if stop and (start or duration):
        return "--stop ends the learning: leave --start and --for out"
    if (start or stop) and out:
        return "--out is for later, when something has been learned"
    return "" if start or stop or out else "say with --out FILE where to write the proposed policy"


def _seconds(text: str, option: str = "--for") -> int:
    from rstguard.engine.ruleset import SECOND
    from rstguard.policy.quantities import duration
    from rstguard.supervisor.learning import LONGEST

    try:
        return duration(SECOND, LONGEST * SECOND)(text) // SECOND
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _start(directory: Path, seconds: int, as_json: bool) -> None:
    told = ask_guard(directory, "learn-start", seconds=seconds)
    if as_json:
        print_json(told)
    else:
        until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + seconds))
        say(
            f"the guard learns until {until}; take what it has learned, then or before, with "
            "`rstguard policy learn --live --out FILE`"
        )


def _stop(directory: Path, as_json: bool) -> None:
    told = ask_guard(directory, "learn-stop")
    if as_json:
        print_json(told)
    else:
        say("the guard has stopped learning" if told["stopped"] else "it was not learning")


def _watch(directory: Path, seconds: int) -> None:
    """Have the guard learn for so long; Ctrl-C ends the waiting, not what comes of it."""
    ask_guard(directory, "learn-start", seconds=seconds)
    with suppress(KeyboardInterrupt), _bar(seconds) as show:
        while True:
            status = ask_guard(directory, "learn-status")
            if status is None:
                fail("the guard began anew or was told to stop learning: nothing is left", FAILED)
            show(status)
            if not status["left_s"]:
                return
            time.sleep(min(_ASK_EVERY, status["left_s"]))


@contextmanager
def _bar(seconds: int) -> Iterator[Any]:
    """Give what shows on a terminal how far the guard is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda status: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("learning (Ctrl-C proposes from what there is)", total=seconds)
        yield lambda status: _show(bar, task, status, seconds)


def _show(bar: Progress, task: TaskID, status: dict[str, Any], seconds: int) -> None:
    told = f"learning: {status['packets']:,} packets, {status['productive']:,} productive sources"
    bar.update(task, description=told, completed=seconds - status["left_s"])


class _Enough(NamedTuple):
    """From how many productive sources, in how many seconds, limits are proposed."""

    sources: int
    seconds: int

    def require(self, lesson: Lesson, advice: str) -> None:
        """Leave, and say what is lacking, if there was less."""
        from rstguard.engine.ruleset import SECOND
        from rstguard.policy.quantities import duration_text

        length = lesson.length + _CLOSE_SECONDS * SECOND
        lacking = []
        if lesson.productive < self.sources:
            lacking.append(f"{lesson.productive} productive sources of {self.sources}")
        if length < self.seconds * SECOND:
            seen = duration_text(lesson.length // SECOND * SECOND)
            lacking.append(f"{seen} of {duration_text(self.seconds * SECOND)}")
        if lacking:
            fail(
                f"nothing is proposed, limits from so little are chance: there are "
                f"{' and '.join(lacking)}; {advice}, or say --least-sources or --least-time",
                FAILED,
            )


def _of_guard(directory: Path, margin: float, out: Path, enough: _Enough) -> Lesson:
    """Write what the guard has learned as a policy."""
    from rstguard.policy.compile import compile_policy
    from rstguard.policy.load import parse
    from rstguard.replay.learn import lesson_of_guard
    from rstguard.replay.proposal import policy_text

    told = ask_guard(directory, "learned", patience=_TELLING_SECONDS)
    policy = told["policy"]
    ruleset = compile_policy(parse(policy["text"], policy["file"]).policy)
    lesson = lesson_of_guard(ruleset, told, margin)
    enough.require(lesson, "let the guard go on learning")
    try:
        out.write_text(policy_text(policy["text"], lesson))
    except OSError as error:
        _unwritten(error, out)
    return lesson


def _of_capture(
    capture: Path, base: Path | None, margin: float, out: Path, enough: _Enough
) -> Lesson:
    """Write what a capture teaches as a policy."""
    from rstguard.policy.compile import compile_policy
    from rstguard.policy.load import PolicyError, parse
    from rstguard.replay.learn import learn
    from rstguard.replay.proposal import everywhere, policy_text
    from rstguard.replay.unpacking import CaptureError

    try:
        text = base.read_text() if base else everywhere(_sample())
        ruleset = compile_policy(parse(text, str(base or "web-edge.yaml")).policy)
        with progress_on_stderr() as progress:
            lesson = learn(ruleset, capture, margin, progress)
        enough.require(lesson, "take a longer capture on an ordinary busy day")
        out.write_text(policy_text(text, lesson))
    except PolicyError as error:
        fail(str(error), BAD_POLICY)
    except CaptureError as error:
        fail(str(error), FAILED)
    except (OSError, UnicodeDecodeError) as error:
        _unwritten(error, base or out)
    return lesson


def _unwritten(error: OSError | UnicodeDecodeError, file: Path) -> NoReturn:
    name = getattr(error, "filename", None) or file
    fail(f"{name} cannot be read or written ({error}): is the path right?", FAILED)


def _report(lesson: Lesson, out: Path, as_json: bool) -> None:
    """Say which limits were proposed, and what a reader should know of them."""
    from rstguard.replay.learn import lesson_data

    data = lesson_data(lesson)
    if as_json:
        print_json(data | {"file": str(out)})
        return
    sources = "source" if lesson.productive == 1 else "sources"
    found = f"{lesson.productive:,} productive {sources} in {lesson.packets:,} packets"
    say(f"{out}: limits from {found}")
    for one in data["rules"]:
        kept = f"kept: {one['kept_because']}"
        say(f"  {one['rule']}: {one['limit'] or kept}")
    for note in lesson.remarks:
        say(f"note: {note}", err=True)


def _sample() -> str:
    """Return the sample policy web-edge, from the package or from beside it."""
    from importlib.resources import files

    package = Path(str(files("rstguard")))
    places = [place / "policies" / "web-edge.yaml" for place in (package, package.parent)]
    found = [file for file in places if file.is_file()]
    if not found:
        fail("the sample policies are not installed: name a policy with --base", FAILED)
    return found[0].read_text()
