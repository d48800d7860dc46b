"""``rstguard install`` and ``uninstall``: the service, its directories and a first policy."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from rstguard.cli.common import FAILED, Json, errors_in_one_sentence, fail, print_json
from rstguard.cli.files import replace
from rstguard.cli.new import Interfaces
from rstguard.kernel import KernelError
from rstguard.kernel.command import run

_POLICY = Path("etc/rstguard/policy.yaml")
STATE = Path("var/lib/rstguard")
_UNIT = Path("etc/systemd/system/rstguard.service")
_FILES = {
    "rstguard.service": _UNIT,
    "rstguard.sysusers": Path("etc/sysusers.d/rstguard.conf"),
    "rstguard.tmpfiles": Path("etc/tmpfiles.d/rstguard.conf"),
    "rstguard.modules": Path("etc/modules-load.d/rstguard.conf"),
}
_SYSCTLS = Path("etc/sysctl.d/60-rstguard.conf")
_FAIL2BAN = Path("etc/fail2ban/action.d")
_FAIL2BAN_FILE = _FAIL2BAN / "rstguard.conf"
Root = Annotated[
    Path, typer.Option("--root", help="Directory that stands for /, to make a package.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


class Changes:
    """Makes changes to files below a root, and tells of each."""

    def __init__(self, root: Path, dry_run: bool) -> None:
        self._root, self._dry_run = root, dry_run
        self.told: list[str] = []

    def write(self, path: Path, text: str) -> None:
        """Write a file."""
        target = self._root / path
        there = target.read_text(encoding="utf-8") if target.is_file() else None
        if there == text:
            self.told.append(f"{target}: stays as it is")
            return
        self.told.append(f"{target}: {'written' if there is None else 'replaced'}")
        if not self._dry_run:
            target.parent.mkdir(parents=True, exist_ok=True)
            replace(target, text)

    def remove(self, path: Path) -> None:
        """Remove a file or directory, if it is there."""
        target = self._root / path
        if not target.exists() and not target.is_symlink():
            return
        self.told.append(f"{target}: removed")
        if self._dry_run:
            return
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink()

    def command(self, *words: str) -> None:
        """Run a command of this system; what it says against it is told, and no failure."""
        if self._root != Path("/") or shutil.which(words[0]) is None:
            return
        self.told.append(" ".join(words))
        if not self._dry_run:
            try:
                run(list(words))
            except KernelError as error:
                self.told.append(f"  {error}")


def install(
    interface: Interfaces = None,
    fail2ban: Annotated[
        bool, typer.Option("--fail2ban", help="Put an action for fail2ban in place, too.")
    ] = False,
    root: Root = Path("/"),
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Put the systemd service, its directories and a first policy in place; starts nothing.

    A policy that is there already stays.  The first one only observes; it is written from what is
    found on this machine, as by `rstguard policy new`.  A package (--root) gets one only for an
    interface that is named.
    """
    changes = Changes(root, dry_run)
    program = _program()
    with errors_in_one_sentence(), _file_errors():
        _require_root(root, dry_run)
        policy = first_policy(root, tuple(interface or ()), changes)
        for name, path in _FILES.items():
            changes.write(path, _text("systemd", name).replace("/usr/bin/rstguard", program))
        if policy:
            changes.write(_POLICY, policy)
        if fail2ban and (root / _FAIL2BAN).is_dir():
            text = _text("fail2ban", "rstguard.conf").replace("/usr/bin/rstguard", program)
            changes.write(_FAIL2BAN_FILE, text)
        elif fail2ban:
            changes.told.append(f"{root / _FAIL2BAN}: fail2ban is not installed here")
        size_tracker(changes, root, dry_run)
        changes.command("systemd-sysusers")
        changes.command("systemd-tmpfiles", "--create", f"/{_FILES['rstguard.tmpfiles']}")
        changes.command("systemctl", "daemon-reload")
    if Path(program).parts[1:2] in (("home",), ("root",)):
        changes.told.append(f"{program}: the service cannot see it there; install it into /opt")
    _tell(changes, as_json, "next: rstguard doctor; systemctl enable --now rstguard")


def uninstall(
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove policies, bans and history, too.")
    ] = False,
    root: Root = Path("/"),
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Stop the service and take away what `install` put in place."""
    changes = Changes(root, dry_run)
    with errors_in_one_sentence(), _file_errors():
        _require_root(root, dry_run)
        if (root / _UNIT).exists():
            changes.command("systemctl", "disable", "--now", "rstguard")
        for path in (*_FILES.values(), _FAIL2BAN_FILE, _SYSCTLS):
            changes.remove(path)
        unsize_tracker(changes, root, dry_run)
        if purge:
            changes.remove(_POLICY.parent)
            changes.remove(STATE)
        changes.command("systemctl", "daemon-reload")
    _tell(changes, as_json, "" if purge else "policies and history are left: --purge removes them")


class _file_errors:  # noqa: N801 - used like a function
    """Turn what the file system refuses into one sentence."""

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Say what was refused."""
        if isinstance(error, OSError):
            fail(f"{error.filename}: {error.strerror}", FAILED)


def first_policy(root: Path, interfaces: tuple[str, ...], changes: Changes) -> str:
    """Return the text of the first policy, before anything is changed; "" if none can be written.

    Of a package nothing is known but the interface that is named.
    """
    from rstguard.cli.fresh import Wanted
    from rstguard.cli.new import look, text_for
    from rstguard.kernel.place import Place

    there = root / _POLICY
    if there.is_file():
        changes.told.append(f"{there}: stays as it is")
        return ""
    wanted = Wanted(interfaces, file=f"/{_POLICY}")
    if root == Path("/"):
        return text_for(look(), wanted)
    if interfaces:
        return text_for(Place(), wanted)
    new = f"rstguard policy new --out /{_POLICY}"
    changes.told.append(f"{there}: not written, as this is not its machine; there: `{new}`")
    return ""


def size_tracker(changes: Changes, root: Path, dry_run: bool) -> None:
    """Make the connection table as large as memory allows, now and after a reboot, or say why not.

    What it was is noted in the state directory, for `uninstall`.
    """
    from rstguard.kernel import sizing
    from rstguard.kernel.linux import Linux

    if root != Path("/"):
        changes.told.append("connection table: not sized, as this is not its machine")
        return
    kernel = Linux()
    try:
        now = sizing.present(kernel)
        wanted = sizing.sizes_for(sizing.memory(), now)
        if wanted == now:
            changes.told.append(f"connection table: {now.most} entries are enough, nothing changed")
            return
        if not dry_run:
            sizing.enlarge(kernel, wanted, root / STATE / sizing.RECORD)
        lines = "".join(f"{name} = {value}\n" for name, value in wanted.settings.items())
        changes.write(_SYSCTLS, f"# Sized by memory by `rstguard install`.\n{lines}")
        changes.told.append(f"connection table: {wanted.most} entries (was {now.most})")
    except KernelError as error:
        changes.told.append(f"connection table: not sized: {error}")


def unsize_tracker(changes: Changes, root: Path, dry_run: bool) -> None:
    """Give the connection table the size that it had before `install`."""
    from rstguard.kernel import sizing
    from rstguard.kernel.linux import Linux

    record = root / STATE / sizing.RECORD
    if root != Path("/") or dry_run or not record.exists():
        return
    try:
        changes.told += sizing.give_back(Linux(), record)
    except KernelError as error:
        changes.told.append(f"connection table: not given back: {error}")


def _require_root(root: Path, dry_run: bool) -> None:
    if root == Path("/") and not dry_run and os.geteuid() != 0:
        raise KernelError("this needs root; use sudo, or --root DIR for a package")


def _program() -> str:
    """Return the path of this program, as a service is to call it."""
    found = Path(sys.argv[0])
    if found.name == "rstguard" and found.exists():
        return str(found.absolute())
    beside = Path(sys.executable).with_name("rstguard")
    return str(beside if beside.exists() else shutil.which("rstguard") or "/usr/bin/rstguard")


def _text(directory: str, name: str) -> str:
    return files("rstguard").joinpath(directory, name).read_text(encoding="utf-8")


def _tell(changes: Changes, as_json: bool, last: str) -> None:
    if as_json:
        print_json({"done": changes.told, "next": last})
        return
    for line in changes.told:
        typer.echo(line)
    typer.echo(last or "nothing of rstguard is left but its program")
