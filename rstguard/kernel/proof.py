"""Proof of address: which connections nobody can have forged who sees no answers.  Pure.

A handshake proves less than it seems.  The tracker takes a first ACK whose number is up to 66,000
too low (nf_conntrack_proto_tcp.c, tcp_in_window: MAXACKWINCONST), so one forged SYN and 66,077 ACKs
in steps of 65,000 complete a handshake in anybody's name.  Two things cannot be had that way:

- *No wrong ACK before the right one.*  An ACK that fits no connection puts its source into the set
  rstguard-suspect for `SUSPECT_SECONDS`.  A handshake of any other source is LIKELY: a forger has
  one try in that time, of 1 in 66,077, and many such connections are no chance any more.
- *Data of the server.*  A bare ACK of it is none: a request socket answers a wrong segment with
  one (tcp_check_req in net/ipv4/tcp_minisocks.c).  A segment of the server with payload makes the
  connection CONFIRMED and its source proven, whatever else was sent in its name.

So an attacker does not become immune by sending wrong ACKs, nor can a forger keep a visitor
unproven.  A returned SYN cookie is proof as well (`rstguard.kernel.cookies`).
"""

from __future__ import annotations

from typing import Final

from rstguard.kernel.marks import Labels
from rstguard.kernel.matching import SYN_ACK, Matching, negated
from rstguard.kernel.names import PREFIX, set_name

SUSPECT_SECONDS: Final = 600
"""How long a bare handshake proves nothing after an ACK that fitted no connection."""
_RENEWING: Final = 256
"""One in so many packets of servers to proven sources renews the proof, so that the client of a
long upload is still known when the tracker forgets it."""
PLAIN_ACK: Final = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK ACK"

MPTCP_OPTION: Final = 30  # RFC 8684, 3

# Classic BPF, as `-m bpf --bytecode` takes it: the number of instructions, then code, jt, jf, k of
# each (linux/filter.h).  The packet begins at its IP header, `len` is its true length, also where
# the header says 0 (BIG TCP).  Segments behind IPv6 extension headers do not match.
_HAS_PAYLOAD = {
    4: "10,"
    "177 0 0 0,"  # ldxb 4*([0]&0xf)  X: length of the IP header
    "80 0 0 12,"  # ldb [x + 12]      TCP data offset, in the high four bits
    "116 0 0 2,"  # rsh #2
    "84 0 0 60,"  # and #60           in bytes
    "12 0 0 0,"  # add x
    "7 0 0 0,"  # tax                X: length of both headers
    "128 0 0 0,"  # ld #len
    "45 0 1 0,"  # jgt x             the packet is longer: it matches
    "6 0 0 1,"  # ret #1
    "6 0 0 0",  # ret #0
    6: "11,"
    "48 0 0 6,"  # ldb [6]           next header
    "21 0 8 6,"  # jeq #6            TCP, or it does not match
    "48 0 0 52,"  # ldb [52]          TCP data offset, in the high four bits
    "116 0 0 2,"  # rsh #2
    "84 0 0 60,"  # and #60           in bytes
    "4 0 0 40,"  # add #40           the IPv6 header
    "7 0 0 0,"  # tax                X: length of both headers
    "128 0 0 0,"  # ld #len
    "45 0 1 0,"  # jgt x
    "6 0 0 1,"  # ret #1
    "6 0 0 0",  # ret #0
}


def has_payload(family: int) -> str:
    """Match a TCP segment that carries data."""
    return f'-m bpf --bytecode "{_HAS_PAYLOAD[family]}"'


def label(number: int, add: bool = False) -> str:
    """Match a connection that has a label; or with `add` give it one, if it has room for it."""
    return f'-m connlabel --label "{number}"{" --set" if add else ""}'


def suspects(matching: Matching, wrong: str = PLAIN_ACK) -> list[str]:
    """Return the rule that notes who sends an ACK that fits nothing; `wrong` matches it."""
    return [f"{wrong} -j SET --add-set {set_name('suspect', matching.family)} src --exist"]


def likely(matching: Matching, first: str) -> list[str]:
    """Return the rule for the first ACK of a connection; `first` matches that no other came yet."""
    labels = Labels(matching.ruleset.labels)
    return [f"{first} {negated(matching.in_set('suspect'))} {label(labels.likely, add=True)}"]


def bits(matching: Matching, likely: bool = True) -> list[str]:
    """Return the rules that tell the reader of the queue that a segment's connection is proven.

    They add a bit.  Without `likely` it must be CONFIRMED: for what bans over one connection.
    Without a rule that bans nobody asks.
    """
    add = f"-j MARK --set-xmark {matching.marks.to_queue_proven}"
    if not matching.ruleset.bans:
        return [add]
    labels = Labels(matching.ruleset.labels)
    numbers = (labels.likely, labels.confirmed) if likely else (labels.confirmed,)
    # On an entry that is used again they are those of the connection before, until the next sweep.
    own = f'-m connlabel ! --label "{labels.anew}"'
    return [f"{own} {label(number)} {add}" for number in numbers]


def unless_proven(matching: Matching) -> list[str]:
    """Return the rules by which connections that may have been forged leave the chain."""
    if not matching.ruleset.bans:
        return []
    labels = Labels(matching.ruleset.labels)
    neither = (f'-m connlabel ! --label "{n}"' for n in (labels.likely, labels.confirmed))
    return [f"{' '.join(neither)} -j RETURN"]


def agreed(matching: Matching) -> list[str]:
    """Return the rule that notes that a server's SYN-ACK has agreed to MPTCP, whoever it is."""
    number = Labels(matching.ruleset.labels).mptcp
    option = f"-m tcp --tcp-option {MPTCP_OPTION}"
    answer = f"{SYN_ACK.replace('-m tcp', option)} -m conntrack --ctdir REPLY"
    return [f"{answer} {label(number, add=True)}"]


def not_condemned(matching: Matching) -> str:
    """Match a connection that the guard has not condemned, whatever its mark says.

    Those that are older than the guard have no room for labels: there the mark alone tells.
    """
    labels = Labels(matching.ruleset.labels)
    return f'{label(labels.begun)} -m connlabel ! --label "{labels.condemned}"'


def chains(matching: Matching) -> dict[str, tuple[str, ...]]:
    """Return the chains that look at what goes out on protected interfaces, by name.

    Nearly every packet leaves at the second rule: its connection is CONFIRMED already.
    """
    marks = matching.marks
    confirmed = Labels(matching.ruleset.labels).confirmed
    answer = "-p tcp -m tcp --tcp-flags SYN,RST,ACK ACK"
    known = "-m conntrack --ctstate ESTABLISHED --ctdir REPLY"
    prove = f"-j SET --add-set {set_name('proven', matching.family)} dst --exist"
    one_in_many = f"-m statistic --mode nth --every {_RENEWING} --packet 0"
    return {
        f"{PREFIX}-answers": (
            f"-m connmark --mark {marks.unguarded} -j RETURN",
            f"{label(confirmed)} -g {PREFIX}-renew",
            f"{answer} {known} {has_payload(matching.family)} -j {PREFIX}-confirm",
        ),
        f"{PREFIX}-confirm": (prove, label(confirmed, add=True)),
        f"{PREFIX}-renew": (f"{one_in_many} {prove}",),
    }
