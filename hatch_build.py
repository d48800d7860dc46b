"""Builds rstguard/kernel/_queue.c with the package, if that is possible here.

Without a compiler or Python's headers the package is built without it: packets are then read
through the netfilterqueue binding, and `rstguard doctor` says so.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "rstguard/kernel/_queue.c"
HARDENING = (
    "-fstack-protector-strong",
    "-U_FORTIFY_SOURCE",  # some distributions set it to a lower value, which would be a warning
    "-D_FORTIFY_SOURCE=2",
    "-Wl,-z,relro,-z,now,-z,noexecstack",
)
"""Against mistakes in what parses strangers' packets: what Debian builds its own programs with."""


class ExtensionHook(BuildHookInterface[Any]):
    """Compiles the extension into the wheel, or beside its source for an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; `version` says which kind of wheel is built."""
        if self.target_name != "wheel":
            return
        target = SOURCE.removesuffix(".c") + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
        if version == "editable":
            output = Path(self.root, target)
        else:
            self._scratch = tempfile.TemporaryDirectory()
            output = Path(self._scratch.name, Path(target).name)
        problem = compile_extension(Path(self.root, SOURCE), output)
        if problem:
            output.unlink(missing_ok=True)  # an older one does not fit what stands beside it
            self.app.display_warning(
                f"rstguard is built without its fast packet reader ({problem}); it works, but "
                "reads packets more slowly"
            )
            return
        build_data["pure_python"], build_data["infer_tag"] = False, True
        if version != "editable":
            build_data["force_include"][str(output)] = target

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled for the wheel."""
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()


def compile_extension(source: Path, output: Path) -> str:
    """Compile a C file into an extension module; return what went wrong, or ""."""
    flags = ["-O2", "-g", "-fPIC", "-shared", *HARDENING]
    flags += shlex.split(os.environ.get("CFLAGS", ""))
    include = [f"-I{sysconfig.get_paths()[which]}" for which in ("include", "platinclude")]
    # The new file takes the old one's place at once: a running guard has that one mapped.
    fresh = output.with_suffix(".new")
    command = [*shlex.split(os.environ.get("CC", "cc")), *flags, *include, str(source)]
    try:
        subprocess.run([*command, "-o", str(fresh)], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        return f"no C compiler {command[0]!r} here"
    except subprocess.CalledProcessError as error:
        fresh.unlink(missing_ok=True)
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        return (lines or [f"{command[0]} failed"])[0]
    fresh.replace(output)
    return ""
