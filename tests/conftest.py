"""What every test shares: the rule for tests that need the kernel, and the generators' settings."""

from __future__ import annotations

import os
import shutil
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

from rstguard.lab import LabError
from rstguard.lab.network import Host, Network

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
    try:
        with Network(f"rstguard-try-{os.getpid()}", {"gateway": Host()}) as network:
            network.run("gateway", "iptables", "-w", "-S")
    except (LabError, OSError) as error:
        return f"network namespaces, or iptables in one, do not work here: {error}"
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
