"""Packets and verdicts through a real queue, by both ways to read one."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from rstguard.engine.ruleset import RuleSet
from rstguard.engine.verdict import PASS, PASS_AND_TRUST, Decision, Reason, Verdict
from rstguard.engine.wire import ACK, Malformed, Packet, parse
from rstguard.ipc.channel import child_end, pair
from rstguard.ipc.messages import Start
from rstguard.kernel import KernelError
from rstguard.kernel.linux import Linux
from rstguard.kernel.marks import Marks
from rstguard.kernel.nfqueue import LENGTH, MOST, Queue, Queued, states
from rstguard.kernel.readers import BINDING, BUILT_IN, CHOICE
from rstguard.worker.worker import Worker
from tests.support.packets import ipv4, ruleset, tcp

pytestmark = pytest.mark.netns

NUMBER, PORT, OTHER = 7, 8001, 8002
MARK = 5 << 24
HOME = "127.0.0.1"
SO_SNDBUFFORCE = 32
DROPPED = Decision(Verdict.DROP, Reason.SYN_RATE)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(params=[BUILT_IN, BINDING])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(CHOICE, request.param)
    return str(request.param)


@pytest.fixture
def diverted(own_namespace: None, reader: str) -> None:
    """Send what goes to two ports through the queue; count marked packets behind it."""
    run("ip", "link", "set", "lo", "up")
    for port in (PORT, OTHER):
        words = f"-w -t mangle -A OUTPUT -p tcp --dport {port} -j NFQUEUE --queue-num {NUMBER}"
        run("iptables", *words.split())
    run("iptables", *f"-w -t mangle -A POSTROUTING -m mark --mark {MARK}".split())


@pytest.fixture
def queue(diverted: None) -> Iterator[Queue]:
    made = Queue(NUMBER, fail_open=False, marks=Marks())
    yield made
    made.close()


@pytest.fixture
def arrivals(own_namespace: None) -> Iterator[socket.socket]:
    """A socket that gets a copy of every TCP segment that arrives."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.setblocking(False)
        yield raw


def send(*ports: int, payload: bytes = b"", mark: int = 0) -> None:
    """Send a segment from each of these source ports."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        raw.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 64 << 20)  # it all waits in the queue
        for port in ports:
            segment = tcp(ACK, source_port=port, destination_port=PORT, payload=payload)
            raw.sendto(ipv4(segment, source=HOME, destination=HOME), (HOME, 0))


def arrived(arrivals: socket.socket) -> list[int]:
    """Return the source ports of what arrived at `PORT`."""
    ports = []
    while select.select([arrivals], [], [], 0)[0]:
        here, there = struct.unpack_from(">HH", arrivals.recv(65536), 20)
        if there == PORT:
            ports.append(here)
    return ports


def packet_of(queued: Queued) -> Packet:
    found = parse(queued[2]) if isinstance(queued[2], bytes) else queued[2]
    assert isinstance(found, Packet)
    return found


def marked() -> int:
    listed = run("iptables", "-w", "-t", "mangle", "-nvxL", "POSTROUTING")
    return int(listed.splitlines()[2].split()[0])


def test_one_batch_many_verdicts(queue: Queue, arrivals: socket.socket, reader: str) -> None:
    assert queue.reader == reader
    send(*range(1, 11))
    batch = queue.receive(MOST, 0)
    assert [packet_of(queued).source_port for queued in batch] == list(range(1, 11))
    assert [number for number, _, _ in batch] == list(range(1, 11))
    queue.give(
        [
            *((2, True, None), (3, True, None), (4, False, None), (5, True, MARK), (6, True, MARK)),
            *((7, True, None), (9, False, None), (10, True, MARK)),
        ]
    )
    assert arrived(arrivals) == [1, 2, 3, 5, 6, 7, 10]
    assert marked() == 3
    assert states()[NUMBER].waiting == 0


def test_verdicts_leave_alone_what_came_later(queue: Queue, arrivals: socket.socket) -> None:
    send(*range(1, 6))
    assert len(queue.receive(3, 0)) == 3
    queue.give([(3, False, None)])
    assert queue.state().waiting == 2
    assert queue.state() == states()[NUMBER]
    assert [number for number, _, _ in queue.receive(3, 0)] == [4, 5]
    queue.give([(5, True, None)])
    assert queue.state().waiting == 0
    assert arrived(arrivals) == [4, 5]
    assert queue.receive(MOST, 0) == []


def test_what_leaves_bears_no_bit_and_is_known_by_its_hook(queue: Queue) -> None:
    run("iptables", *["-w", "-t", "mangle", "-F", "OUTPUT"])
    words = f"-w -t mangle -A POSTROUTING -p tcp --dport {PORT} -j NFQUEUE --queue-num {NUMBER}"
    run("iptables", *words.split())
    send(1, mark=MARK)
    ((number, mark, _),) = queue.receive(MOST, 0)
    assert mark == MARK | Marks().outbound
    queue.give([(number, True, None)])


def test_a_mark_comes_with_the_packet_and_stays_unless_changed(queue: Queue) -> None:
    send(1, 2, 3, mark=MARK)
    batch = queue.receive(MOST, 0)
    assert [mark for _, mark, _ in batch] == [MARK] * 3
    queue.give([(1, True, None), (2, True, 1), (3, True, None)])
    assert marked() == 2


def test_a_packet_longer_than_what_is_copied(queue: Queue, arrivals: socket.socket) -> None:
    send(1, payload=bytes(9000))
    batch = queue.receive(MOST, 0)
    assert packet_of(batch[0]).payload_length == 9000
    queue.give([(1, True, None)])
    assert len(arrivals.recv(65536)) == 9040


def test_a_stream_of_large_packets_passes_whole(queue: Queue) -> None:
    """Packets that the kernel has not segmented yet come as they are, and go on so."""
    size, got, lengths = 3_000_000, list[int](), list[int]()
    with socket.create_server((HOME, PORT)) as server, socket.socket() as client:

        def take() -> None:
            link, _ = server.accept()
            with link:
                while data := link.recv(1 << 20):
                    got.append(len(data))

        def speak() -> None:
            client.connect((HOME, PORT))
            client.sendall(bytes(size))
            client.shutdown(socket.SHUT_WR)

        threads = [threading.Thread(target=target) for target in (take, speak)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            select.select([queue], [], [], 0.05)
            if batch := queue.receive(MOST, 0):
                lengths += [packet_of(queued).payload_length for queued in batch]
                queue.give([(batch[-1][0], True, None)])
    assert sum(got) == size
    assert max(lengths) > 1024
    assert states()[NUMBER].dropped_full == states()[NUMBER].dropped_reader == 0


def test_a_reader_that_was_too_slow_goes_on(queue: Queue, arrivals: socket.socket) -> None:
    with socket.socket(fileno=os.dup(queue.fileno())) as channel:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        send(*range(1, 101))
        lost = states()[NUMBER].dropped_reader
        assert lost > 0
        batch = queue.receive(MOST, 0)
        assert len(batch) == 100 - lost
        queue.give([(batch[-1][0], True, None)])
        assert len(arrived(arrivals)) == 100 - lost
        send(101)
        assert [packet_of(q).source_port for q in queue.receive(MOST, 0)] == [101]


def test_a_full_queue_drops_or_lets_pass(queue: Queue, arrivals: socket.socket) -> None:
    send(*range(1, LENGTH + 1))
    send(5000)
    assert states()[NUMBER].dropped_full == 1
    queue.set_fail_open(True)
    send(5001)
    assert states()[NUMBER].dropped_full == 1
    assert arrived(arrivals) == [5001]


def test_what_nobody_gave_a_verdict_is_dropped_at_the_end(
    diverted: None, arrivals: socket.socket
) -> None:
    queue = Queue(NUMBER, fail_open=True, marks=Marks())
    send(*range(1, 6))
    queue.receive(2, 0)
    queue.give([(1, True, None)])
    queue.close()
    assert NUMBER not in states()
    assert arrived(arrivals) == [1]


def test_a_queue_has_one_reader(queue: Queue) -> None:
    with pytest.raises(KernelError, match=f"queue {NUMBER} is in use by another program"):
        Queue(NUMBER, fail_open=True, marks=Marks())
    send(1)
    assert len(queue.receive(MOST, 0)) == 1


def test_a_reader_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "fast")
    with pytest.raises(KernelError, match="it can be rstguard or netfilterqueue"):
        Queue(NUMBER, fail_open=True, marks=Marks())


@pytest.mark.parametrize("fail_open", [True, False])
@pytest.mark.parametrize("enforce", [True, False])
def test_what_cannot_be_judged_fares_as_on_failure_says(
    diverted: None, arrivals: socket.socket, fail_open: bool, enforce: bool
) -> None:
    """An engine that fails in the middle of a batch costs no other packet its own verdict."""
    rules: RuleSet = replace(ruleset(), fail_open=fail_open, enforce=enforce)
    ours, _theirs = pair()
    worker = Worker(child_end(ours), Start(rules, NUMBER), Linux())

    def decide(packet: Packet | Malformed, now: int) -> Decision:
        assert isinstance(packet, Packet)
        if packet.source_port % 5 == 0:
            raise RuntimeError("as if the engine had a bug")
        return (PASS, PASS_AND_TRUST, DROPPED)[packet.source_port % 3]

    worker._judging.decide = decide
    send(*range(1, 101))
    worker.turn()
    assert arrived(arrivals) == [
        port
        for port in range(1, 101)
        if (fail_open if port % 5 == 0 else port % 3 != 2 or not enforce)
    ]
    assert worker._reporting.counts == Counter(failed=20)
    assert states()[NUMBER].waiting == 0
    worker.close()
