"""Mistakes put into the guard one at a time, and how many of them the simulation finds.

`python -m tests.simulation.mutants`: MUTANTS=10 of them, drawn by DRAW=1, from the processes' code;
each is tried with SEEDS=300 seeds in a copy of the tree.  cosmic-ray makes them.  Left out is what
no behaviour depends on, and what the simulation puts something else in the place of.
"""

from __future__ import annotations

import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from difflib import unified_diff
from pathlib import Path
from typing import Any, Final, NamedTuple

_ROOT: Final = Path(__file__).parent.parent.parent
_PARTS: Final = ("supervisor", "sweeper", "worker", "state")
_REPLACED: Final = {
    "claims.py": "locks of the real file system",
    "spawn.py": "starts real processes",
    "notify.py": "speaks to systemd",
    "options.py": "values alone",
    "__main__.py": "starts real processes",
    "__init__.py": "text",
}
"""Files that the simulation has something else for."""
_OPERATORS: Final = (
    "AddNot", "NumberReplacer", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceFalseWithTrue",
    "ReplaceTrueWithFalse", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak",
    "ReplaceUnaryOperator_Delete_Not", "ZeroIterationForLoop",
    *(f"ReplaceComparisonOperator_{one}" for one in (
        "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE",
        "GtE_Gt", "GtE_Lt", "Is_IsNot", "IsNot_Is",
    )),
    *(f"ReplaceBinaryOperator_{one}" for one in (
        "Add_Sub", "Sub_Add", "Mul_FloorDiv", "Div_Mul", "FloorDiv_Mul", "BitAnd_BitOr",
        "BitOr_BitAnd", "LShift_RShift", "RShift_LShift",
    )),
)  # fmt: skip
"""cosmic-ray's, less those whose outcome mostly does not even run (a sum turned into a shift)."""
_CONSTANT: Final = re.compile(r"_?[A-Z_]+(: Final)? = ")
_CHECK: Final = (
    "import sys; from tests.simulation.__main__ import first_problem; "
    "sys.exit(bool(print(first_problem({seeds}))))"
)


class Mutant(NamedTuple):
    """One mistake: where, and which of its kind in that file."""

    file: str
    operator: str
    line: int
    occurrence: int

    @property
    def before(self) -> str:
        """The source as it is."""
        return (_ROOT / self.file).read_text()

    def after(self) -> str:
        """Return the source with the mistake."""
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        operator: Any = get_operator(f"core/{self.operator}")
        source: str = mutate_code(self.before, operator(), self.occurrence)
        return source


def main() -> int:
    """Draw mutants, try them, and tell; return 0 if at least eight of ten are found."""
    wanted, seeds = int(os.environ.get("MUTANTS", "10")), int(os.environ.get("SEEDS", "300"))
    rng = random.Random(int(os.environ.get("DRAW", "1")))
    mutants, skipped = all_mutants()
    print(f"{len(mutants)} mutants; left out: {dict(skipped)}", flush=True)
    killed = 0
    chosen = rng.sample(mutants, wanted)
    for number, mutant in enumerate(chosen, 1):
        began = time.monotonic()
        problem = attempt(mutant, seeds)
        killed += bool(problem)
        print(f"\n{number}. {mutant.file}:{mutant.line} {mutant.operator}")
        print(_diff(mutant))
        took = time.monotonic() - began
        print(f"   {'found: ' + problem if problem else 'NOT FOUND'} ({took:.0f} s)", flush=True)
    print(f"\n{killed} of {wanted} found")
    return int(killed * 10 < wanted * 8)


def all_mutants() -> tuple[list[Mutant], Counter[str]]:
    """Return all mutants of the processes' code, and how many were left out and why."""
    found: list[Mutant] = []
    skipped: Counter[str] = Counter()
    for part in _PARTS:
        for path in sorted((_ROOT / "rstguard" / part).glob("*.py")):
            if why := _REPLACED.get(path.name):
                skipped[f"{path.name}: {why}"] += 1
                continue
            found += _mutants_of(path, skipped)
    return found, skipped


def _mutants_of(path: Path, skipped: Counter[str]) -> list[Mutant]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    source = path.read_text()
    spared, tree = _spared_lines(source), get_ast(source)
    nodes, found = list(ast_nodes(tree)), []
    for name in _OPERATORS:
        operator: Any = get_operator(f"core/{name}")
        places = [place for node in nodes for place in operator().mutation_positions(node)]
        for occurrence, ((line, _), _) in enumerate(places):
            text = source.splitlines()[line - 1]
            if why := _reason_to_skip(text, line, spared, name):
                skipped[why] += 1
                continue
            found.append(Mutant(str(path.relative_to(_ROOT)), name, line, occurrence))
    return found


def _reason_to_skip(text: str, number: int, spared: dict[int, str], operator: str) -> str:
    if number in spared:
        return spared[number]
    if operator == "NumberReplacer" and _CONSTANT.match(text):
        return "constants: one second more or less is no mistake"
    return ""


def _spared_lines(source: str) -> dict[int, str]:
    """Return lines on which no behaviour depends: annotations, docstrings, logs, `run` loops."""
    spared: dict[int, str] = {}
    for node in ast.walk(ast.parse(source)):
        logs = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log.")
        if logs or isinstance(node, ast.Raise):
            _spare(spared, node, "text of logs and errors")
        elif isinstance(node, ast.AnnAssign):
            _spare(spared, node.annotation, "annotations")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            _spare(spared, node, "imports")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for argument in [*node.args.args, *node.args.kwonlyargs]:
                if argument.annotation:
                    _spare(spared, argument.annotation, "annotations")
            if node.returns:
                _spare(spared, node.returns, "annotations")
            if node.name == "run" and source.count("def turn("):
                _spare(spared, node, "waits for real packets")
    return spared


def _spare(spared: dict[int, str], node: Any, why: str) -> None:
    for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
        spared.setdefault(line, why)


def _diff(mutant: Mutant) -> str:
    after = mutant.after().splitlines()
    lines = unified_diff(mutant.before.splitlines(), after, n=0, lineterm="")
    return "\n".join(f"   {line}" for line in list(lines)[3:])


def attempt(mutant: Mutant, seeds: int) -> str:
    """Return what the simulation finds in a copy of the tree with this mistake, or ""."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        for name in ("rstguard", "tests"):
            shutil.copytree(_ROOT / name, Path(directory) / name)
        (Path(directory) / mutant.file).write_text(mutant.after())
        environment = {**os.environ, "PYTHONPATH": directory, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-c", _CHECK.format(seeds=seeds)],
                cwd=directory, env=environment, capture_output=True, text=True, check=False,
                timeout=600,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "a world that does not end"
        last = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        return (last[0] if last else "") or done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
