"""The filter of system calls, run by a small machine of the kernel's kind.  Needs no privileges."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from rstguard.kernel import syscalls
from rstguard.kernel.syscalls import ALLOW, KILL, REFUSE, TRAP, Machine, machine_of, program

X86, ARM = machine_of("x86_64"), machine_of("aarch64")
assert X86 is not None
assert ARM is not None
BOTH = pytest.mark.parametrize("machine", [X86, ARM], ids=["x86_64", "aarch64"])
RAW = (7, 9)
EXECUTABLE, ANONYMOUS = 4, 0x22
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def verdict(machine: Machine, number: int, *arguments: int, architecture: int = 0) -> int:
    """Run the filter as the kernel does (net/core/filter.c, the few instructions it uses)."""
    six = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", number, architecture or machine.architecture, 0, *six)
    code = list(struct.iter_unpack("=HBBI", program(machine, RAW)))
    at = loaded = 0
    while True:
        kind, yes, no, value = code[at]
        at += 1
        if kind == 0x20:
            (loaded,) = struct.unpack_from("<I", data, value)
        elif kind == 0x06:
            return int(value)
        else:
            holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}
            at += yes if holds[kind] else no


def number(machine: Machine, name: str) -> int:
    text = HEADERS["x86_64" if machine is X86 else "aarch64"].read_text()
    # The generic table names some calls for 32 and 64 bits together.
    names = f"{name}|{name.removeprefix('new')}"
    found = re.search(rf"define __NR(?:3264)?_(?:{names})\s+(\d+)", text)
    assert found is not None, name
    return int(found[1])


@pytest.mark.parametrize("name", HEADERS)
def test_the_numbers_are_those_of_the_kernels_headers(name: str) -> None:
    machine = machine_of(name)
    assert machine is not None
    if not HEADERS[name].exists():
        pytest.skip("linux-libc-dev is not here, or of another architecture")
    tables = {**syscalls._ALLOWED, **syscalls._FILES}
    tables |= {"sendto": syscalls._SENDTO, "mmap": syscalls._MMAP}
    tables |= {"setsockopt": syscalls._SETSOCKOPT}
    for call, numbers in tables.items():
        if numbers[machine.column] != -1:
            assert numbers[machine.column] == number(machine, call), call


@BOTH
@pytest.mark.parametrize(
    "name",
    ["recvmmsg", "ppoll", "recvfrom", "write", "pread64", "brk", "munmap", "exit_group", "close"],
)
def test_what_the_work_needs_passes(machine: Machine, name: str) -> None:
    assert verdict(machine, number(machine, name)) == ALLOW


@BOTH
@pytest.mark.parametrize(
    "name",
    [
        *("socket", "socketpair", "connect", "bind", "listen", "accept4", "setsockopt", "sendmsg"),
        *("sendmmsg", "ioctl", "execve", "execveat", "clone", "clone3", "kill", "tgkill", "tkill"),
        *("ptrace", "process_vm_readv", "process_vm_writev", "setuid", "setresuid", "capset"),
        *("mount", "unshare", "setns", "bpf", "io_uring_setup", "io_uring_enter", "prctl"),
        *("seccomp", "init_module", "perf_event_open", "keyctl", "pidfd_open", "pidfd_getfd"),
        *("rt_sigqueueinfo", "mprotect", "pkey_mprotect", "memfd_create", "unlinkat", "fchmodat"),
        *("openat2", "open_by_handle_at", "userfaultfd", "reboot", "read", "dup3", "pwrite64"),
    ],
)
def test_whatever_else_ends_the_process(machine: Machine, name: str) -> None:
    assert verdict(machine, number(machine, name)) == TRAP


@BOTH
def test_every_other_number_ends_the_process(machine: Machine) -> None:
    passed = {n for n in range(1024) if verdict(machine, n) != TRAP}
    assert len(passed) <= 40


@BOTH
@pytest.mark.parametrize("name", ["openat", "newfstatat", "statx", "readlinkat", "getcwd"])
def test_looking_for_files_is_refused(machine: Machine, name: str) -> None:
    numbers = syscalls._FILES[name]
    assert verdict(machine, numbers[machine.column]) == REFUSE


@BOTH
@pytest.mark.parametrize(
    ("descriptor", "address", "expected"),
    [
        (3, 0, ALLOW),
        (3, 0x7FFF12345678, TRAP),
        (3, 1 << 32, TRAP),
        (RAW[0], 0x7FFF12345678, ALLOW),
        (RAW[1], 1 << 32, ALLOW),
        (8, 1, TRAP),
        (RAW[0] | 5 << 32, 1, ALLOW),  # the kernel takes the lower half for the descriptor, too
    ],
)
def test_only_raw_sockets_choose_whom_they_send_to(
    machine: Machine, descriptor: int, address: int, expected: int
) -> None:
    sendto = syscalls._SENDTO[machine.column]
    assert verdict(machine, sendto, descriptor, 1, 1, 0, address, 16) == expected


@BOTH
@pytest.mark.parametrize(
    ("descriptor", "level", "option", "expected"),
    [(RAW[0], 1, 36, ALLOW), (RAW[1], 1, 36, ALLOW), (3, 1, 36, TRAP), (RAW[0], 1, 26, TRAP),
     (RAW[0], 0, 36, TRAP)],
)  # fmt: skip
def test_only_raw_sockets_are_given_a_mark_and_nothing_else(
    machine: Machine, descriptor: int, level: int, option: int, expected: int
) -> None:
    call = syscalls._SETSOCKOPT[machine.column]
    assert verdict(machine, call, descriptor, level, option, 1, 4, 0) == expected


@BOTH
@pytest.mark.parametrize(
    ("protection", "flags", "expected"),
    [
        (3, ANONYMOUS, ALLOW),
        (3 | EXECUTABLE, ANONYMOUS, TRAP),
        (EXECUTABLE, ANONYMOUS, TRAP),
        (1, 2, TRAP),  # a file
    ],
)
def test_memory_is_for_data(machine: Machine, protection: int, flags: int, expected: int) -> None:
    mmap = syscalls._MMAP[machine.column]
    assert verdict(machine, mmap, 0, 4096, protection, flags, 2**64 - 1) == expected


@BOTH
def test_no_other_calling_convention(machine: Machine) -> None:
    other = ARM if machine is X86 else X86
    assert other is not None
    assert verdict(machine, 45, architecture=other.architecture) == KILL
    assert verdict(machine, 45, architecture=0x40000003) == KILL  # i386
    if machine is X86:
        assert verdict(machine, 0x40000000 | 45) == KILL  # x32


def test_an_architecture_that_is_not_known_is_told() -> None:
    assert machine_of("riscv64") is None
