"""A confined process: what it tries and fails to do, and that it can still do its work.

Each attempt has a process of its own, forked off one small program, which opens what a worker
opens, confines itself, and tries.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rstguard.kernel import confine
from rstguard.kernel.check import Outcome
from rstguard.kernel.syscalls import machine_of

pytestmark = pytest.mark.netns

PROGRAM = r"""
import ctypes, json, os, platform, resource, select, signal, socket, subprocess, sys, time
import traceback
from pathlib import Path
from rstguard.kernel import confine, netlink, nfqueue
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from rstguard.kernel.netlink import Netlink

libc = ctypes.CDLL(None, use_errno=True)
setting = json.load(sys.stdin)
if setting["machine"]:
    platform.machine = lambda: setting["machine"]

def call(function, *arguments):
    if getattr(libc, function)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), function)

def syscall(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)) < 0:
        raise OSError(ctypes.get_errno(), str(number))

def work():
    assert table.count() >= 0
    assert not list(table.dump())
    v4 = bytes.fromhex("450000280000000040060000 7f000001 7f000001")
    v6 = bytes.fromhex("6000000000140640") + 2 * (bytes(15) + b"\1")
    injector.send([v4 + bytes(20), v6 + bytes(20)])
    assert injector.sent == 2, injector.failed
    left.send(b"x"), right.recv(1)
    select.poll().poll(1)
    time.time(), time.monotonic_ns(), time.process_time_ns()
    grown = [bytearray(1 << 20) for _ in range(200)]
    grown.clear()
    many = [str(n) for n in range(500_000)]
    os.pread(queues.fileno(), 4096, 0)
    try:
        int("no number")
    except ValueError:
        assert "ValueError" in traceback.format_exc()

with open("/dev/null", "w") as quiet:
    table, injector, link = Conntrack(), Injector(Marks()), Netlink()
    raw = injector._ipv4
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    queues = open("/proc/self/net/netfilter/nfnetlink_queue", "rb", buffering=0)
    parent = os.getpid()
    try:
        raise RuntimeError
    except RuntimeError:
        traceback.format_exc()
    outcomes = {}
    for attempt in setting["attempts"]:
        child = os.fork()
        if not child:
            os.dup2(quiet.fileno(), 2)
            confine.confine()
            try:
                exec(attempt)
            except OSError:
                os._exit(3)
            except BaseException:
                traceback.print_exc(file=sys.stdout)
                os._exit(4)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        words = {0: "done", 3: "refused", -signal.SIGSYS: "ended"}
        outcomes[attempt] = words.get(status, str(status))
print(json.dumps(outcomes))
"""

CALLS = [
    # sockets
    *(f"socket.socket({family}, {kind}, {protocol})" for family, kind, protocol in (
        (socket_family, 1, 0) for socket_family in range(1, 46)
    )),
    "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_ROUTE)",
    "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_NETFILTER)",
    "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)",
    "socket.socketpair()",
    "raw.connect(('192.0.2.1', 0))",
    "link._socket.bind((0, 1))",
    "link._socket.sendto(b'x' * 16, (1, 0))",
    "link._socket.sendmsg([b'x' * 16])",
    "link._socket.setsockopt(270, 1, 1)",
    "left.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b'\\0' * 4)])",
    # processes
    "subprocess.run(['true'])",
    "os.execv('/bin/true', ['true'])",
    "os.fork()",
    "os.kill(parent, 0)",
    "os.kill(parent, signal.SIGTERM)",
    "os.kill(os.getpid(), signal.SIGTERM)",
    "syscall({'x86_64': 101, 'aarch64': 117}[os.uname().machine], 16, parent, 0, 0)",  # ptrace
    "call('process_vm_readv', parent, None, 0, None, 0, 0)",
    "os.pidfd_open(parent)",
    # privileges
    "os.setuid(0)",
    "os.setresgid(0, 0, 0)",
    "os.setgroups([0])",
    "call('prctl', 4, 1, 0, 0, 0)",
    "call('mount', b'none', b'/mnt', b'tmpfs', 0, None)",
    "call('unshare', 0x10000000)",
    "call('unshare', 0x40000000)",
    "syscall({'x86_64': 321, 'aarch64': 280}[os.uname().machine], 0, 0, 0)",  # bpf
    "syscall(425, 8, 0)",  # io_uring_setup
    "call('mprotect', None, 4096, 4)",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))",
    "os.nice(1)",
    # the route, by ioctl
    "__import__('fcntl').ioctl(raw, 0x890B, bytes(120))",
]  # fmt: skip
FILES = [
    "open('/etc/passwd')",
    "open('/tmp/x', 'w')",
    "open('/proc/self/mem', 'rb')",
    "os.stat('/etc/passwd')",
    "Path('/proc/sys/net/netfilter/nf_conntrack_acct').write_text('0')",
    "Path('/proc/sys/kernel/core_pattern').write_text('|/bin/true')",
    "os.listdir('/')",
    "__import__('rstguard.cli')",
]


def attempt(*attempts: str, machine: str = "", prefix: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what came of each: "done", "refused", "ended" (by SIGSYS), or an exit status."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", PROGRAM],
        input=json.dumps({"attempts": attempts, "machine": machine}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return {str(k): str(v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.fixture(autouse=True)
def _known_here(own_namespace: None) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if machine_of(platform.machine()) is None:
        pytest.skip("there is no filter for this architecture")


def test_forbidden_calls_end_the_process() -> None:
    outcomes = attempt(*CALLS)
    assert {a: o for a, o in outcomes.items() if o != "ended"} == {}


def test_files_are_refused() -> None:
    outcomes = attempt(*FILES)
    # A module that cannot be found is an ImportError: status 4.
    assert outcomes.pop(FILES[-1]) == "4"
    assert {a: o for a, o in outcomes.items() if o != "refused"} == {}


def test_its_work_goes_on() -> None:
    assert attempt("work()") == {"work()": "done"}


def test_without_the_filter_the_rest_holds() -> None:
    """As on an architecture whose numbers are not known."""
    files = attempt(*FILES[:-1], machine="unknown")
    stat = files.pop("os.stat('/etc/passwd')")
    assert stat == "done"  # Landlock does not hide what exists
    refused = [
        *("os.kill(parent, 0)", "os.setuid(0)", "os.setresgid(0, 0, 0)", "os.setgroups([0])"),
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)",
        "call('mount', b'none', b'/mnt', b'tmpfs', 0, None)",
        "open(f'/proc/{parent}/environ')",
        "os.execv('/bin/true', ['true'])",
    ]
    outcomes = files | attempt(*refused, machine="unknown")
    assert {a: o for a, o in outcomes.items() if o != "refused"} == {}
    assert attempt("work()", machine="unknown") == {"work()": "done"}


def status_of(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def shown(code: str, *prefix: str) -> tuple[list[str], dict[str, str]]:
    """Return what could not be given up, and the process's status (proc(5)) afterwards."""
    program = (
        "import select, sys\nfrom rstguard.kernel import confine\n"
        f"{code}\n"
        "sys.stdout.writelines(s + '\\n' for s in [*confine.confine(), 'confined'])\n"
        "sys.stdout.flush()\n"
        "select.poll().poll()\n"
    )
    command = [*prefix, sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = list(iter(process.stdout.readline, "confined\n"))
            return said, status_of(process.pid)
        finally:
            process.kill()


def test_all_is_given_up_but_one_capability() -> None:
    said, status = shown("")
    assert said == []
    user = status["Uid"].split()
    assert user == [user[0]] * 4
    assert user[0] != "0"
    assert set(status["Gid"].split()) != {"0"}
    assert status["Groups"].split() == []
    for which, value in (("Inh", 0), ("Prm", 1 << 12), ("Eff", 1 << 12), ("Bnd", 1 << 12)):
        assert int(status[f"Cap{which}"], 16) == value, which
    assert int(status["CapAmb"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1")


@pytest.mark.parametrize(
    ("missing", "sentences"),
    [
        ("-setpcap", ["its bounding set stays whole"]),
        ("-setuid", ["it stays root"]),
        ("-setgid", ["it stays root"]),
        ("-kill", ["it stays root"]),
        ("-setuid,-setgid,-setpcap", ["its bounding set", "it stays root"]),
    ],
)
def test_what_a_container_forbids_is_told_and_the_rest_is_done(
    missing: str, sentences: list[str]
) -> None:
    said, status = shown("", "setpriv", "--bounding-set", missing)
    assert len(said) == len(sentences)
    assert all(map(str.startswith, said, sentences)), said
    assert status["Seccomp"] == "2"
    assert int(status["CapEff"], 16) == 1 << 12


def test_a_kernel_without_landlock_is_told() -> None:
    said, status = shown("confine._CREATE_RULESET = 5000")
    assert len(said) == 1
    assert said[0].startswith("Landlock, which this kernel or container lacks, is not used")
    assert status["Seccomp"] == "2"


def test_an_architecture_without_a_filter_is_told() -> None:
    said, status = shown("import platform; platform.machine = lambda: 'riscv64'")
    assert said == ["it may make any system call: its numbers are not known here for riscv64\n"]
    assert status["Seccomp"] == "0"
    assert int(status["CapEff"], 16) == 1 << 12


def test_a_forbidden_call_names_its_place_in_the_log() -> None:
    code = (
        "import os\nfrom rstguard.kernel.confine import confine\n"
        "def taken_over():\n    os.kill(1, 0)\nconfine()\ntaken_over()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGSYS
    assert "in taken_over" in done.stderr
    assert "confinement forbids" in confine.cause_of_death(done.returncode)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "ended with status 0"),
        (1, "ended with status 1"),
        (-9, "was ended by SIGKILL"),
        (-200, "ended with status -200"),
        (None, "ended with status None"),
    ],
)
def test_other_deaths(status: int | None, text: str) -> None:
    assert confine.cause_of_death(status) == text


def test_the_user_is_one_of_its_own(tmp_path: Path) -> None:
    users = tmp_path / "passwd"
    assert confine._account(users) == (confine.OTHERWISE, confine.OTHERWISE)
    users.write_text("root:x:0:0::/:/bin/sh\nrstguard-worker:x:991:990::/:/usr/sbin/nologin\n")
    assert confine._account(users) == (991, 990)
    users.write_text("rstguard-worker:x:0:0::/:/bin/sh\nrstguard-worker\n")
    assert confine._account(users) == (confine.OTHERWISE, confine.OTHERWISE)
    assert os.geteuid() == 0


@pytest.mark.parametrize(
    ("prefix", "outcome", "sentence"),
    [
        ((), Outcome.OK, "workers and sweeper keep CAP_NET_ADMIN, open sockets and few"),
        (
            ("setpriv", "--bounding-set", "-setpcap"),
            Outcome.WARNING,
            "not wholly confined: its",
        ),
        (("setpriv", "--bounding-set", "-net_admin"), Outcome.WARNING, "not tried: CAP_NET_ADMIN"),
    ],
)
def test_the_doctor_tells(prefix: tuple[str, ...], outcome: Outcome, sentence: str) -> None:
    code = (
        "from rstguard.kernel import check, preflight\n"
        "found = preflight._confinement(check.Host.here())\n"
        "print(found.outcome.value, found.sentence, found.fix)\n"
    )
    command = [*prefix, sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{outcome.value} ")
    assert sentence in said
    assert ("--cap-add SETPCAP" in said) == ("wholly" in said)
