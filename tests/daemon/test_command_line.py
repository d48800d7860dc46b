"""Every command as a script sees it: output, exit status, the one sentence of a failure."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.lab.guard import leftovers
from rstguard.lab.usage import children_of
from rstguard.lab.waiting import wait_until
from rstguard.supervisor.claims import LOCKS
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import source
from tests.support.traffic import Open, answer

pytestmark = pytest.mark.netns

PORT = 8001
POLICY = f"""
version: 1
name: shown
protect: {{interfaces: [out]}}
trusted: [192.0.2.0/24, "2001:db8::/32"]
rules:
  - {{name: crowd, measure: connection_rate, ports: [{PORT}], over: 1/m, burst: 2,
     then: ban, for: 60s}}
"""
NOBODY = """
import os, sys
import rstguard.cli
import rstguard.supervisor.supervisor
import rstguard.kernel.preflight
import rstguard.policy.compile
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
rstguard.cli.main()
"""
"""Give root up after everything is imported: nobody may be unable to read this tree."""


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("cli"), workers=1) as guard:
        yield guard


def fails(
    guard: Guard, status: int, sentence: str, *words: str
) -> subprocess.CompletedProcess[str]:
    """See that a command fails with one sentence and prints nothing else."""
    done = guard.cli(*words)
    assert done.returncode == status, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if status in (1, 3):
        assert done.stderr.startswith("rstguard: ")
        assert done.stderr.count("\n") == 1
    return done


def test_status(guard: Guard) -> None:
    done = guard.cli("status")
    assert done.returncode == 0
    assert done.stdout.startswith("filtering, policy shown (enforce), up ")
    data = guard.json("status")
    assert data["filtering"]
    assert data["missing"] == []
    assert data["policy"]["rules"] == ["crowd"]
    assert data["supervisor"]["pid"] == guard.pid
    assert {data["workers"][0]["pid"], data["sweeper"]["pid"]} == set(guard.children())


def test_status_tells_what_another_tool_took_away(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    lab.run("gateway", "ip6tables", "-w", "-t", "mangle", "-F", "PREROUTING")
    done = guard.cli("status")
    assert done.returncode == 1
    assert done.stdout.startswith("NOT FILTERING")
    assert "missing: the jump from mangle PREROUTING (IPv6)" in done.stdout
    guard.apply(POLICY)
    assert guard.cli("status").returncode == 0


def test_bans(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    service = serve(PORT)
    address = source(False)
    assert guard.json("ban", "list") == []
    assert guard.cli("ban", "list").stdout == "nobody is banned or shunned\n"
    link = service.connect(address)
    done = guard.cli("ban", "add", address, "--for", "2h")
    assert (done.returncode, done.stdout) == (
        0,
        f"{address} is banned for 7200 s; its connections are reset\n",
    )
    link.wait_reset()
    done = guard.cli("ban", "add", "2001:dba::/48")
    assert done.stdout == "2001:dba::/48 is banned for 600 s; its connections are reset\n"
    listed = {row["source"]: row for row in guard.json("ban", "list")}
    assert set(listed) == {address, "2001:dba::/48"}
    assert listed[address]["kind"] == "ban"
    assert listed[address]["rule"] == "manual"
    assert 7100 < listed[address]["remaining_s"] <= 7200
    table = guard.cli("ban", "list").stdout
    assert address in table
    assert "manual" in table
    assert answer(lab, address, service.address, PORT) == "silence"
    done = guard.cli("ban", "remove", address)
    assert (done.returncode, done.stdout) == (0, f"{address} is free\n")
    service.connect(address).talk()
    fails(guard, 1, f"{address} is neither banned nor shunned", "ban", "remove", address)
    assert guard.cli("ban", "remove", "2001:dba::/48").returncode == 0
    assert guard.json("ban", "list") == []


def test_a_ban_that_keeps_connections(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    service = serve(9000)
    address = source(False)
    link = service.connect(address)
    assert guard.cli("ban", "add", address, "--keep-existing").returncode == 0
    assert answer(lab, address, service.address, 9000) == "silence"
    link.talk()
    assert guard.cli("ban", "remove", address).returncode == 0


REFUSALS = [
    (("ban", "add", "192.0.2.7"), 1, "trusted network 192.0.2.0/24"),
    (("ban", "add", "192.0.0.0/16"), 1, "trusted network 192.0.2.0/24"),
    (("ban", "add", "2001:db8:1::/48"), 1, "trusted network 2001:db8::/32"),
    (("ban", "add", "somebody"), 1, "'somebody' is no address or network"),
    (("ban", "add", "0.0.0.0/0"), 1, "would ban everybody"),
    (("ban", "remove", "1.2.3.4.5"), 1, "is no address or network"),
    (("ban", "remove", "203.0.113.77"), 1, "neither banned nor shunned"),
    (("ban", "add", "203.0.113.7", "--for", "soon"), 2, "--for"),
    (("ban", "add", "203.0.113.7", "--for", "10y"), 2, "--for"),
    (("ban", "add", "203.0.113.7", "--for", "0s"), 2, "--for"),
    (("kill",), 2, "say which connections"),
    (("kill", "--source", "nowhere"), 1, "'nowhere' is no address"),
    (("kill", "--port", "70000"), 2, "--port"),
    (("frobnicate",), 2, "frobnicate"),
    (("status", "--frobnicate"), 2, "frobnicate"),
    (("policy", "apply", "/nowhere/policy.yaml"), 4, "/nowhere/policy.yaml"),
    (("cleanup",), 1, "another rstguard guards this network namespace"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "status", "sentence"), REFUSALS, ids=[" ".join(r[0]) for r in REFUSALS]
)
def test_refusals(guard: Guard, words: tuple[str, ...], status: int, sentence: str) -> None:
    fails(guard, status, sentence, *words)
    assert guard.filtering()


def test_policy_show(guard: Guard) -> None:
    assert guard.cli("policy", "show").stdout == POLICY
    assert "crowd" in guard.cli("policy", "show", "--compiled").stdout
    assert guard.json("policy", "show")["text"] == POLICY


def test_what_needs_no_guard(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(POLICY.replace("[out]", "[nowhere0]"))
    bad.write_text(POLICY.replace("1/m", "1/x").replace("name: shown", "name: 7"))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rstguard", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    done = run("policy", "check", str(good))
    assert (done.returncode, done.stdout) == (0, f"{good}: the policy is good\n")
    assert "nowhere0" in done.stderr
    done = run("policy", "check", str(bad))
    assert done.returncode == 4
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == ["3", "7"]
    data = json.loads(run("policy", "check", "--json", str(bad)).stdout)
    assert not data["ok"]
    assert [problem["line"] for problem in data["problems"]] == [3, 7]
    assert json.loads(run("lab", "list", "--json").stdout)
    assert isinstance(json.loads(run("doctor", "--json").stdout), list)
    assert run("--version").stdout.startswith("rstguard ")
    assert run("--help").returncode == 0


@pytest.mark.parametrize("words", [("reasons",), ("man",), ("lab", "list", "--json")], ids=" ".join)
def test_output_into_a_full_disk(words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "rstguard", *words],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "rstguard: the output cannot be written (No space left on device)\n"


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("ban", "list"),
        ("ban", "add", "203.0.113.7"),
        ("ban", "remove", "203.0.113.7"),
        ("kill", "--port", "80"),
        ("policy", "show"),
        ("policy", "apply", "FILE"),
    ],
    ids=" ".join,
)
def test_no_daemon(lab: ThreeHosts, tmp_path: Path, words: tuple[str, ...]) -> None:
    nobody = Guard(lab, POLICY, tmp_path / "none", workers=1)
    words = tuple(str(nobody.file) if word == "FILE" else word for word in words)
    fails(nobody, 3, "no guard is running", *words)
    # A socket that a killed guard left behind is nobody, too.
    import socket

    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(nobody.runtime / "control.sock"))
    fails(nobody, 3, "no guard is running", *words)


def test_the_environment_names_the_guard(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSTGUARD_RUNTIME_DIR", str(guard.runtime))
    command = [sys.executable, "-m", "rstguard", "status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert json.loads(done.stdout)["supervisor"]["pid"] == guard.pid


@pytest.mark.parametrize("words", [("run", "--policy", "FILE"), ("cleanup",)], ids=" ".join)
def test_not_root(guard: Guard, words: tuple[str, ...]) -> None:
    words = tuple(str(guard.file) if word == "FILE" else word for word in words)
    command = [sys.executable, "-c", NOBODY, *words, "--runtime-dir", "/tmp/rstguard-nobody"]  # noqa: S108
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "needs root" in done.stderr
    assert done.stderr.count("\n") == 1


def test_not_root_at_the_socket(guard: Guard) -> None:
    parents = [guard.runtime, *guard.runtime.parents]
    modes = {path: path.stat().st_mode & 0o7777 for path in parents}
    for path, mode in modes.items():  # pytest's directories are for root only
        path.chmod(mode | 0o111)
    try:
        command = [sys.executable, "-c", NOBODY, "status", "--runtime-dir", str(guard.runtime)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert done.returncode == 1
    assert "you may not talk to the guard" in done.stderr


def starts_not(guard: Guard, status: int, *sentences: str) -> None:
    guard.launch()
    assert guard.wait() == status, guard.log.read_text()
    log = guard.log.read_text()
    assert "Traceback" not in log
    for sentence in sentences:
        assert sentence in log
    assert not (guard.runtime / "control.sock").exists()


def test_a_second_guard_is_refused(
    lab: ThreeHosts, guard: Guard, serve: Open, tmp_path: Path
) -> None:
    starts_not(
        Guard(lab, POLICY, tmp_path / "second", workers=1),
        1,
        "another rstguard guards this network namespace",
    )
    same = guard.command("run", "--policy", str(guard.file))
    done = subprocess.run(same, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert guard.cli("status").returncode == 0
    serve(PORT).connect(source(False)).talk()


def test_guards_of_two_namespaces(guard: Guard, tmp_path: Path) -> None:
    with ThreeHosts("rgf2") as other, Guard(other, POLICY, tmp_path / "other", workers=1) as second:
        assert guard.filtering()
        assert second.filtering()
        second.ask("ban-add", source="203.0.113.9", seconds=60)
        assert [row["source"] for row in second.ask("ban-list")] == ["203.0.113.9"]
        assert "203.0.113.9" not in str(guard.ask("ban-list"))
        assert second.stop() == 0
        assert leftovers(other) == []
    assert guard.filtering()


def test_a_runtime_directory_is_one_guard_s(guard: Guard) -> None:
    """The guard of a second namespace must not take the socket and the record of the first."""
    with ThreeHosts("rgf5") as other:
        second = Guard(other, POLICY, guard.runtime, workers=1)
        for words in (("run", "--policy", str(guard.file)), ("cleanup",)):
            done = second.cli(*words)
            assert done.returncode == 1
            assert "of another network namespace uses the directory" in done.stderr
            assert done.stderr.count("\n") == 1
        assert leftovers(other) == []
    assert guard.cli("status").returncode == 0
    assert (guard.runtime / "sysctls.json").exists()


USURPER = """
import fcntl, os, socket, sys
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
name.bind("\\0rstguard")
for path in sys.argv[1:]:
    try:
        fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX)
    except PermissionError:
        print("refused", path, flush=True)
print("done", flush=True)
sys.stdin.read()
"""


def test_no_user_can_keep_a_guard_away(tmp_path: Path) -> None:
    with ThreeHosts("rgf6") as lab, Guard(lab, POLICY, tmp_path / "run", workers=1) as guard:
        ours = LOCKS / f"net-{Path(f'/proc/{guard.pid}/ns/net').stat().st_ino}"
        assert ours.stat().st_mode & 0o777 == 0o600
        assert LOCKS.stat().st_mode & 0o777 == 0o700
        assert guard.stop() == 0
        assert not ours.exists()
        places = [str(LOCKS), str(ours), "/proc/self/ns/net"]
        command = lab.command("gateway", sys.executable, "-c", USURPER)
        with subprocess.Popen(
            [*command, *places], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as usurper:
            assert usurper.stdout is not None
            said = list(iter(usurper.stdout.readline, "done\n"))
            assert said == [f"refused {place}\n" for place in places[:2]]
            guard.start()
            assert guard.filtering()
            usurper.stdin.close()  # type: ignore[union-attr]


TAKER = """
import sys
from netfilterqueue import NetfilterQueue
queue = NetfilterQueue()
queue.bind(5640, lambda packet: packet.accept())
print("bound", flush=True)
sys.stdin.read()
"""


def test_what_keeps_it_from_starting(tmp_path: Path) -> None:
    with ThreeHosts("rgf3") as lab:
        in_use = lab.command("gateway", sys.executable, "-c", TAKER)
        with subprocess.Popen(in_use, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as taker:
            assert taker.stdout is not None
            assert taker.stdout.readline() == b"bound\n"
            guard = Guard(lab, POLICY, tmp_path / "queue", workers=1)
            starts_not(guard, 1, "queue 5640 is in use by another program")
            assert leftovers(lab) == []
            assert not (guard.runtime / "sysctls.json").exists()
            with Guard(lab, POLICY, tmp_path / "another", "--queue", "7", workers=1) as elsewhere:
                assert elsewhere.filtering()
            taker.stdin.close()  # type: ignore[union-attr]
        starts_not(
            Guard(lab, "version: 1\nrules: [", tmp_path / "yaml", workers=1), 4, "policy.yaml:2:"
        )
        missing = Guard(lab, POLICY, tmp_path / "missing", workers=1)
        missing.file.unlink()
        starts_not(missing, 4, "policy.yaml")
        starts_not(
            Guard(lab, POLICY, tmp_path / ("long" * 30), workers=1),
            1,
            "the control socket",
            "AF_UNIX path too long",
        )
        assert leftovers(lab) == []
        file = tmp_path / "file"
        file.write_text("")
        done = subprocess.run(
            lab.command("gateway", sys.executable, "-m", "rstguard")
            + ["run", "--policy", str(elsewhere.file), "--runtime-dir", str(file)],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "runtime directory" in done.stderr
        assert leftovers(lab) == []


def test_ctrl_c_stops_it_like_sigterm(tmp_path: Path) -> None:
    with ThreeHosts("rgf4") as lab, Guard(lab, POLICY, tmp_path / "run", workers=1) as guard:
        children = guard.children()
        for pid in (*children, guard.pid):  # a terminal signals the whole group
            os.kill(pid, signal.SIGINT)
        assert guard.wait() == 0
        wait_until(lambda: leftovers(lab) == [])
        assert "Traceback" not in guard.log.read_text()


def test_ctrl_c_in_the_midst_of_starting(tmp_path: Path) -> None:
    with ThreeHosts("rgf7") as lab:
        guard = Guard(lab, POLICY, tmp_path / "run", workers=1)
        command = guard.command(
            "run", "--policy", str(guard.file), "--state-dir", str(tmp_path / "state")
        )
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as run:

            def child_begins() -> bool:
                with contextlib.suppress(OSError):
                    commands = [Path(f"/proc/{pid}/cmdline") for pid in children_of(run.pid)]
                    return any(b"\0rstguard.worker" in path.read_bytes() for path in commands)
                return False

            wait_until(child_begins)
            end = time.monotonic() + 20
            while run.poll() is None and time.monotonic() < end:  # somebody is in a hurry
                os.killpg(run.pid, signal.SIGINT)  # as a terminal does
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(0.02)
            # When all is undone, the last of them may end it as it would end any program.
            assert run.returncode in (0, -signal.SIGINT)
            assert run.stderr is not None
            said = run.stderr.read()
            assert "died while starting" not in said
            assert "failed" not in said
        assert leftovers(lab) == []


def test_no_file_of_the_present_directory_is_run(tmp_path: Path) -> None:
    """Root may stand in a directory in which others can write."""
    ran = tmp_path / "ran"
    for name in ("msgspec.py", "asyncio.py", "rstguard.py"):
        (tmp_path / name).write_text(f"open({str(ran)!r}, 'w')")
    with ThreeHosts("rgf8") as lab:
        guard = Guard(lab, POLICY, tmp_path / "run", workers=1)
        command = str(Path(sys.executable).with_name("rstguard"))
        words = ["--policy", str(guard.file), "--state-dir", str(tmp_path / "state")]
        words += ["--runtime-dir", str(guard.runtime)]
        with subprocess.Popen(
            lab.command("gateway", command, "run", *words), cwd=tmp_path, stderr=subprocess.DEVNULL
        ) as run:
            try:
                wait_until(guard.at_work)
            finally:
                run.terminate()
        assert run.returncode == 0
    assert not ran.exists()
