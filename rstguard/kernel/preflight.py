"""What this machine lacks to run the guard, and the command that fixes each.

Nothing is changed but what the kernel does by itself when something is first used: trying a rule
makes it load the module.  Rules are tried in a network namespace made for it, never in this one
(`rstguard.kernel.trial`).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import sys
import time
from pathlib import Path

from rstguard.engine.ruleset import DEFAULT_MARKS
from rstguard.kernel import (
    KernelError,
    clearing,
    command,
    confine,
    foreign,
    protected,
    readers,
    surroundings,
)
from rstguard.kernel.check import Check, Host, Outcome
from rstguard.kernel.command import own_program
from rstguard.kernel.queues import owner
from rstguard.kernel.trial import feature_checks

__all__ = ["Check", "Outcome", "checks"]

_BUDGET = 2.5
"""Seconds for all checks together."""

_CAP_NET_ADMIN = 12
_CAP_NET_RAW = 13
_FILL_WARNING = 80
"""Per cent of nf_conntrack_max in use from which on it is worth a warning."""


def checks(queue: int, queues: int = 1) -> list[Check]:
    """Return the state of everything the guard needs, the most basic first.

    `queue` is the first NFQUEUE number to be used (0-65535), `queues` how many from there.  Takes
    less than three seconds.  Raises nothing for a machine in a bad state, and works without
    privileges: what could not be tried then says so.
    """
    host = Host.here()
    deadline = time.monotonic() + _BUDGET
    found = [_python(), _privileges(host)]
    found += [_tool(host, tool) for tool in ("iptables", "ip6tables", "ipset")]
    found += feature_checks(host, deadline)
    found += [
        _routing(host),
        _foreign(),
        _binding(host),
        _reader(host),
        _sweeps(),
        _tracking(host),
        _tracking_room(host),
        _queue_support(host),
    ]
    found += [_queue_free(number) for number in range(queue, queue + queues)]
    found += [_confinement(host), _reset_trace(host), _protected()]
    return [*found, *surroundings.checks()]


def _routing(host: Host) -> Check:
    """The table that clears marks before packets are routed is checked by the kernel, not made."""
    name = "routing by marks"
    if not host.capable(_CAP_NET_ADMIN):
        return Check(name, Outcome.WARNING, "not tried: it needs CAP_NET_ADMIN", "")
    try:
        clearing.trial()
    except KernelError as error:
        return Check(
            name,
            Outcome.WARNING,
            f"packets are routed with the guard's mark bits on them, so every `ip rule` with a"
            f" fwmark needs a mask without them: {error}",
            host.load_module("nf_tables"),
        )
    return Check(name, Outcome.OK, "no bit of the guard is on a packet while it is routed")


def _foreign() -> Check:
    """Look whether other programs use the bits of marks that are the guard's by default."""
    name = "marks of others"
    found = foreign.look(command)
    if problems := foreign.told(found, DEFAULT_MARKS):
        return Check(name, Outcome.WARNING, problems[0])
    return Check(name, Outcome.OK, f"no other program uses the mark bits {DEFAULT_MARKS:#010x}")


def _protected() -> Check:
    """Say which addresses the guard would protect, before it runs."""
    try:
        found = protected.find()
    except (KernelError, OSError) as error:
        return Check("protected", Outcome.WARNING, f"they could not be found: {error}")
    shown = ", ".join(f"{line.address} ({line.what})" for line in found)
    return Check("protected", Outcome.OK, f"never banned, shunned or reset: {shown or 'nobody'}")


def _python() -> Check:
    """The package does not install on less than 3.11, so this is only for the report."""
    return Check("python", Outcome.OK, f"Python {platform.python_version()} ({sys.executable})")


def _privileges(host: Host) -> Check:
    lacking = []
    if not host.capable(_CAP_NET_ADMIN):
        lacking.append("CAP_NET_ADMIN")
    if not host.capable(_CAP_NET_RAW):
        lacking.append("CAP_NET_RAW")
    if not lacking:
        return Check("privileges", Outcome.OK, "CAP_NET_ADMIN and CAP_NET_RAW")
    names = " and ".join(lacking)
    if os.geteuid() != 0:
        return Check(
            "privileges",
            Outcome.MISSING,
            f"this user may not change the firewall: {names} missing",
            "sudo rstguard doctor",
        )
    options = " ".join(f"--cap-add {name.removeprefix('CAP_')}" for name in lacking)
    return Check(
        "privileges",
        Outcome.MISSING,
        f"root here, but without {names}, as in a container that was started without them",
        f"docker run {options} --network host … (or the same in your container's settings)",
    )


def _tool(host: Host, tool: str) -> Check:
    if host.find(tool) is None:
        package = "iptables" if tool == "ip6tables" else tool
        sentence = f"the command {tool} is not installed"
        return Check(tool, Outcome.MISSING, sentence, host.install(package))
    said = host.ask([tool, "--version"], 1.0)
    version = re.search(r"v?(\d+(?:\.\d+)+)", said)
    backend = re.search(r"\((nf_tables|legacy)\)", said)
    text = f"{tool} {version[1] if version else 'of unknown version'}"
    return Check(tool, Outcome.OK, f"{text} ({backend[1]} back end)" if backend else text)


def _binding(host: Host) -> Check:
    try:
        importlib.import_module("netfilterqueue")
    except ImportError as problem:
        return Check(
            "netfilterqueue",
            Outcome.MISSING,
            f"the Python package netfilterqueue does not load: {problem}",
            f"{host.install('libnetfilter-queue-dev', 'gcc', 'python3-dev')} && "
            f"{sys.executable} -m pip install netfilterqueue",
        )
    return Check("netfilterqueue", Outcome.OK, "the Python package netfilterqueue loads")


def _reader(host: Host) -> Check:
    """Without the extension the guard works as well, at more cost a packet."""
    try:
        found = readers.extension()
    except KernelError as refusal:
        return Check("packet reader", Outcome.MISSING, str(refusal), f"unset {readers.CHOICE}")
    if found is not None:
        return Check("packet reader", Outcome.OK, "packets are read by rstguard's own extension")
    if os.environ.get(readers.CHOICE):
        sentence = f"packets are read by netfilterqueue, as {readers.CHOICE} asks"
        return Check("packet reader", Outcome.OK, sentence)
    problem = readers.built_in()[1]
    return Check(
        "packet reader",
        Outcome.WARNING,
        f"packets are read by netfilterqueue, at more cost: rstguard's own reader {problem}",
        f"{host.install('gcc', 'libc6-dev', 'python3-dev')}, and install rstguard again",
    )


def _sweeps() -> Check:
    """Without numpy the guard judges the same connections, one after the other."""
    if importlib.util.find_spec("numpy"):
        return Check("sweeps", Outcome.OK, "the whole connection table is judged at once")
    return Check(
        "sweeps",
        Outcome.WARNING,
        "connections are judged one after the other, at five times the cost: there is no numpy",
        f"{sys.executable} -m pip install 'rstguard[fast]'",
    )


def _tracking(host: Host) -> Check:
    names = ("acct", "timestamp")
    base = Path("/proc/sys/net/netfilter")
    missing = [name for name in names if not (base / f"nf_conntrack_{name}").exists()]
    if missing:
        return Check(
            "connection tracking",
            Outcome.MISSING,
            f"no sysctl net.netfilter.nf_conntrack_{missing[0]}: the tracker is not loaded",
            host.load_module("nf_conntrack"),
        )
    if host.capable(_CAP_NET_ADMIN) and not os.access(base / "nf_conntrack_acct", os.W_OK):
        return Check(
            "connection tracking",
            Outcome.MISSING,
            "/proc/sys is read-only here, as in a container that is not privileged",
            "sysctl -w net.netfilter.nf_conntrack_acct=1 on the host, or a writable /proc/sys",
        )
    return Check("connection tracking", Outcome.OK, "the tracker and its sysctls are there")


def _tracking_room(host: Host) -> Check:
    base = Path("/proc/sys/net/netfilter")
    count = host.number(base / "nf_conntrack_count")
    most = host.number(base / "nf_conntrack_max")
    if count is None or not most:
        return Check("connection table", Outcome.WARNING, "its fill level cannot be read")
    share = 100 * count // most
    sentence = f"{count} of {most} entries in use ({share} %)"
    if share < _FILL_WARNING:
        return Check("connection table", Outcome.OK, sentence)
    return Check(
        "connection table",
        Outcome.WARNING,
        f"{sentence}: when it is full the kernel drops new connections",
        f"sysctl -w net.netfilter.nf_conntrack_max={2 * most}",
    )


def _queue_support(host: Host) -> Check:
    if Path("/proc/net/netfilter/nfnetlink_queue").exists():
        return Check("queue support", Outcome.OK, "the kernel has nfnetlink_queue")
    if host.has_module("nfnetlink_queue"):
        return Check("queue support", Outcome.OK, "nfnetlink_queue will be loaded when needed")
    return Check(
        "queue support",
        Outcome.MISSING,
        "the kernel module nfnetlink_queue is not there, so no packet can reach rstguard",
        host.load_module("nfnetlink_queue"),
    )


def _queue_free(number: int) -> Check:
    name = f"queue {number}"
    try:
        holder = owner(number)
    except KernelError as problem:
        return Check(name, Outcome.WARNING, f"not known: {problem}", "sudo rstguard doctor")
    if holder is None:
        return Check(name, Outcome.OK, f"queue {number} is free")
    if holder.is_guard:
        sentence = f"queue {number} is read by {holder}: a guard runs here already"
        return Check(name, Outcome.WARNING, sentence, "rstguard status")
    return Check(
        name,
        Outcome.MISSING,
        f"queue {number} is read by {holder}, and only one program can read a queue",
        f"kill {holder.pid}" if holder.pid else "end the program that reads it",
    )


def _confinement(host: Host) -> Check:
    """Let a process confine itself, as workers and sweeper do."""
    name = "confinement"
    if not host.capable(_CAP_NET_ADMIN):
        return Check(name, Outcome.WARNING, "not tried: CAP_NET_ADMIN is missing")
    *lacking, last = host.ask(own_program(confine.__name__), 2.0).splitlines() or [""]
    if last != confine.DONE:
        sentence = f"a process that confines itself does not live: {last or 'it says nothing'}"
        return Check(name, Outcome.MISSING, sentence, "report this with the kernel's version")
    if not lacking:
        sentence = "workers and sweeper keep CAP_NET_ADMIN, open sockets and few system calls"
        return Check(name, Outcome.OK, sentence)
    fix = "docker run --cap-add SETUID --cap-add SETGID --cap-add SETPCAP --cap-add KILL …"
    asked = any("CAP_" in sentence for sentence in lacking)
    sentence = f"workers and sweeper are not wholly confined: {'; '.join(lacking)}"
    return Check(name, Outcome.WARNING, sentence, fix if asked else "")


def _reset_trace(host: Host) -> Check:
    for root in (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing")):
        try:
            if (root / "events/tcp/tcp_send_reset").is_dir():
                return Check("reset trace", Outcome.OK, f"{root}/events/tcp/tcp_send_reset")
        except PermissionError:
            return Check("reset trace", Outcome.WARNING, f"{root} needs root to be read")
    mounted = any((Path("/sys/kernel/tracing")).glob("events"))
    return Check(
        "reset trace",
        Outcome.WARNING,
        "why this host's own stack sends a RST cannot be told: no tcp_send_reset trace point"
        + ("" if mounted else ", tracefs is not mounted"),
        "a kernel with CONFIG_FTRACE" if mounted else host.mount_tracefs,
    )
