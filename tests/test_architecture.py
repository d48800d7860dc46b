"""The rules of the house that a reader relies on, held by reading the source, not by running it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.engine.ruleset import Measure
from rstguard.engine.verdict import Reason

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rstguard"
MODULES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    "engine": 0,
    "policy": 1,
    "kernel": 1,
    "observe": 1,
    "ipc": 2,
    "asker": 3,
    "worker": 3,
    "sweeper": 3,
    "state": 3,
    "supervisor": 4,
    "control": 5,
    "daemon": 6,
    "lab": 7,
    "replay": 7,
    "cli": 8,
    "__main__": 9,
}
"""Imports go to a lower layer or stay in one part; parts of one layer do not know each other."""

TOP = {"__version__"}
"""What any part may import from the package itself."""

IMPURE = {
    "asyncio", "builtins", "concurrent", "ctypes", "datetime", "fcntl", "glob", "io", "logging",
    "mmap", "multiprocessing", "os", "pathlib", "random", "secrets", "select", "selectors",
    "shutil", "signal", "socket", "ssl", "subprocess", "syslog", "tempfile", "threading", "time",
    "urllib", "uuid",
}  # fmt: skip
"""Clock, chance and I/O: the engine gets what it needs of these as arguments."""

OF_NUMPY = {
    "rstguard.engine.columned", "rstguard.engine.columns", "rstguard.engine.grouping",
    "rstguard.engine.paths", "rstguard.engine.remembered", "rstguard.kernel.columns",
}  # fmt: skip
"""What needs numpy, and is found by its name where numpy is there: nothing else imports it."""

IMPURE_BUILTINS = {"open", "print", "input", "exec", "eval", "breakpoint", "__import__"}

FORBIDDEN_WORDS = ("manager", "handler", "helper", "utils", "shield", "sentinel")
MACHINE_PATHS = re.compile(r"/(?:work|tmp/v\d|root|home)/")

LONGEST_MODULE = 400
LONGEST_FUNCTION = 60


def name_of(path: Path) -> str:
    """Return ``rstguard/engine/wire.py`` for a file of the package."""
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """Return which part of the package a file belongs to: ``engine``, ``cli`` …"""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full dotted name of everything a module imports, at any depth of it."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def module_of(path: Path) -> str:
    """Return the dotted name of a file of the package; a folder's is that of its __init__."""
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


def graph(part: str) -> dict[str, set[str]]:
    """Return which modules of one part import which, imports for types alone counted as well."""
    names = {module_of(path): path for path in MODULES if part_of(path) == part}
    found: dict[str, set[str]] = {}
    for module, path in names.items():
        imported = (name for _, name in imports(path))
        reached = {name if name in names else name.rpartition(".")[0] for name in imported}
        found[module] = (reached & names.keys()) - {module}
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle, or nothing if there is none."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for other in sorted(edges[module]):
            if found := walk(other, [*way, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (walk(module, []) for module in sorted(edges))), [])


every_module = pytest.mark.parametrize("path", MODULES, ids=name_of)
every_engine_module = pytest.mark.parametrize(
    "path", [p for p in MODULES if part_of(p) == "engine"], ids=name_of
)


@every_module
def test_imports_point_down_only(path: Path) -> None:
    here = part_of(path)
    if here == "__init__":
        return
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "rstguard":
            continue
        there = parts[1]
        if there == here or there in TOP:
            continue
        assert LAYERS[there] < LAYERS[here], f"{name_of(path)}:{line} must not import {name}"


@pytest.mark.parametrize("part", sorted({part_of(path) for path in MODULES}))
def test_no_part_has_a_circle_of_imports(part: str) -> None:
    assert circle(graph(part)) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("part", ["worker", "sweeper"])
def test_worker_and_sweeper_know_neither_each_other_nor_anything_above(part: str) -> None:
    below = {part, *(name for name, layer in LAYERS.items() if layer < LAYERS[part])}
    for path in MODULES:
        if part_of(path) == part:
            for line, name in imports(path):
                top, _, rest = name.partition(".")
                known = top != "rstguard" or rest.split(".")[0] in below | TOP
                assert known, f"{name_of(path)}:{line}: {name}"


@every_module
def test_the_daemons_successors_are_short(path: Path) -> None:
    parts = {"ipc", "worker", "sweeper", "state", "supervisor", "control", "daemon"}
    if part_of(path) in parts:
        lines = len(path.read_text().splitlines())
        assert lines <= 300, f"{name_of(path)} has {lines} lines"


@every_engine_module
def test_the_engine_imports_the_standard_library_only_and_nothing_impure(path: Path) -> None:
    for line, name in imports(path):
        top = name.split(".")[0]
        where = f"{name_of(path)}:{line}"
        ours = {"rstguard", "numpy"} if module_of(path) in OF_NUMPY else {"rstguard"}
        assert top in sys.stdlib_module_names or top in ours, f"{where}: {name} is foreign"
        assert top not in IMPURE, f"{where}: {name} brings a clock, chance or I/O into the engine"


@every_module
def test_the_guard_works_without_numpy(path: Path) -> None:
    if module_of(path) not in OF_NUMPY:
        for line, name in imports(path):
            needs = name.split(".")[0] == "numpy" or {name, name.rpartition(".")[0]} & OF_NUMPY
            assert not needs, f"{name_of(path)}:{line} imports {name}"


@every_engine_module
def test_the_engine_calls_no_impure_builtin(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            where = f"{name_of(path)}:{node.lineno}"
            assert node.func.id not in IMPURE_BUILTINS, f"{where}: {node.func.id}() does I/O"


@every_module
def test_modules_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= LONGEST_MODULE, f"{name_of(path)} is too long"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            where = f"{name_of(path)}:{node.lineno}"
            assert length <= LONGEST_FUNCTION, f"{where}: {node.name} has {length} lines"


@every_module
def test_names_say_what_a_thing_is(path: Path) -> None:
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text())
    for name in [path.stem, *(node.name for node in ast.walk(tree) if isinstance(node, named))]:
        low = name.lower()
        assert not low.lstrip("_").startswith("process_"), f"{name_of(path)}: {name}"
        assert not any(word in low for word in FORBIDDEN_WORDS), f"{name_of(path)}: {name}"


CHANGES = {
    "append", "add", "clear", "discard", "extend", "insert", "pop", "popitem", "remove",
    "setdefault", "update",
}  # fmt: skip


def changed_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name wherever a thing is changed in place: ``x[k] = v``, ``x.append(v)``."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                yield node.lineno, name
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attribute)):
                if attribute in CHANGES:
                    yield node.lineno, name


@every_module
def test_no_module_has_mutable_state(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{name_of(path)}:{node.lineno}: global statement"
    tables = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for line, name in changed_names(tree):
        assert name not in tables, f"{name_of(path)}:{line}: {name} belongs to the module"


@every_module
def test_no_shell_strings(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        where = f"{name_of(path)}:{node.lineno}"
        for keyword in node.keywords:
            assert keyword.arg != "shell", f"{where}: commands are lists, not shell strings"
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            called = f"{node.func.value.id}.{node.func.attr}"
            assert called not in {"os.system", "os.popen"}, f"{where}: {called}"


def test_scapy_stays_off_the_packet_path() -> None:
    for path in MODULES:
        if part_of(path) in {"lab", "replay", "cli"}:
            continue
        for line, name in imports(path):
            assert name.split(".")[0] != "scapy", f"{name_of(path)}:{line}"


@pytest.mark.parametrize("reason", Reason)
def test_each_reason_has_a_sentence_of_its_own(reason: Reason) -> None:
    assert reason.code == reason.name.lower()
    assert len(reason.value.split()) >= 3
    assert not reason.value.endswith(".")
    # Enum members of equal value would be one member under two names.
    assert Reason[reason.name] is reason
    assert reason.name in {member.name for member in Reason}


def test_no_two_reasons_share_a_sentence() -> None:
    assert len(Reason.__members__) == len({reason.value for reason in Reason})


@pytest.mark.parametrize("measure", Measure)
def test_each_measure_has_its_reason(measure: Measure) -> None:
    assert Reason[measure.name].code == measure.value


def test_the_top_level_stays_small() -> None:
    allowed = {
        "pyproject.toml", "README.md", "rstguard", "policies", "systemd", "tests", "LICENSE",
        "CHANGELOG.md", "SECURITY.md", "Makefile", "docs", "hatch_build.py",
    }  # fmt: skip
    made = {"build", "dist"}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    assert found <= allowed | made


def test_no_path_of_a_single_machine_is_written_down() -> None:
    kept = [p for place in ("rstguard", "policies", "systemd") for p in (ROOT / place).rglob("*")]
    kept += [ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml"]
    for path in kept:
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".service", ""} and path.is_file():
            for number, text in enumerate(path.read_text().splitlines(), 1):
                assert not MACHINE_PATHS.search(text), f"{name_of(path)}:{number}: {text.strip()}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_own_programs_are_started_in_one_way(path: Path) -> None:
    """What a module is run by says that the present directory does not count."""
    if path != PACKAGE / "kernel" / "command.py":
        assert '"-m",' not in re.sub(r"-m pip", "", path.read_text())
