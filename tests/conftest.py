"""What every test shares: the rule for tests that need the kernel, and the generators' settings."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

TOOLS = ("ip", "iptables-restore", "ip6tables-restore", "ipset", "conntrack")

# The same inputs in every run: a failure in CI is the failure at home. `make fuzz` goes further.
settings.register_profile(
    "same",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let programs that a test starts keep their compiled modules, as where they are installed."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("compiled"))


@cache
def why_no_namespaces() -> str:
    """Return what keeps network namespaces from working here, or "" if nothing does."""
    if os.geteuid() != 0:
        return "needs root: run `make test`"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}: run `make setup`"
    name = f"rstguard-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are impossible here: {made.stderr.strip()}"
    try:
        listed = subprocess.run(
            ["ip", "netns", "exec", name, "iptables", "-w", "-S"],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    if listed.returncode:
        return f"iptables does not work in a network namespace here: {listed.stderr.strip()}"
    return ""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a `netns` test where it cannot run; in CI that is a failure, never a skip."""
    if item.get_closest_marker("netns") is None:
        return
    reason = why_no_namespaces()
    if not reason:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must run every test, but: {reason}", pytrace=False)
    pytest.skip(reason)
