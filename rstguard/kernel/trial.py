"""Try the kernel's features for real, in a network namespace that exists only for this."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from rstguard.kernel.check import Check, Host, Outcome
from rstguard.kernel.names import set_name
from rstguard.kernel.proof import has_payload

_CAP_SYS_ADMIN = 21
_SET = set_name("try")
_RESTORE = {4: "iptables-restore", 6: "ip6tables-restore"}


class _Feature(NamedTuple):
    name: str
    table: str
    rule: str
    module: str


_PLAIN = _Feature("plain rules", "filter", "-A INPUT -p tcp -j DROP", "ip_tables")
_FEATURES = (
    _Feature(
        "NFQUEUE target",
        "mangle",
        "-A PREROUTING -p tcp -j NFQUEUE --queue-num 0 --queue-bypass",
        "xt_NFQUEUE",
    ),
    _Feature(
        "connection marks",
        "mangle",
        "-A PREROUTING -m connmark --mark 0x1/0x1 -j CONNMARK --set-xmark 0x1/0x1",
        "xt_connmark",
    ),
    _Feature(
        "packet marks",
        "mangle",
        "-A PREROUTING -m mark --mark 0x1/0x1 -j MARK --set-xmark 0x0/0x1",
        "xt_mark",
    ),
    _Feature(
        "connection states",
        "mangle",
        "-A PREROUTING -m conntrack --ctstate ESTABLISHED --ctdir REPLY -j RETURN",
        "xt_conntrack",
    ),
    _Feature(
        "reset of connections",
        "filter",
        "-A INPUT -p tcp -j REJECT --reject-with tcp-reset",
        "ipt_REJECT",
    ),
    _Feature(
        "match on sets",
        "raw",
        f"-A PREROUTING -m set --match-set {_SET} src -j DROP",
        "xt_set",
    ),
    _Feature(
        "additions to sets",
        "mangle",
        f"-A PREROUTING -j SET --add-set {_SET} src --exist",
        "xt_set",
    ),
    _Feature(
        "match on header bytes",
        "mangle",
        '-A PREROUTING -m u32 --u32 "12>>8&0x3=0" -j RETURN',
        "xt_u32",
    ),
    _Feature(
        "packet counts of connections",
        "mangle",
        "-A PREROUTING -m connbytes --connbytes 10: --connbytes-mode packets"
        " --connbytes-dir original -j RETURN",
        "xt_connbytes",
    ),
    _Feature(
        "lists of ports",
        "mangle",
        "-A PREROUTING -p tcp -m multiport --dports 80,443 -j RETURN",
        "xt_multiport",
    ),
    _Feature(
        "samples",
        "mangle",
        "-A PREROUTING -m statistic --mode nth --every 16 --packet 0 -j RETURN",
        "xt_statistic",
    ),
    _Feature(
        "match on the route back",
        "raw",
        "-A PREROUTING -p tcp -m rpfilter --invert -j DROP",
        "ipt_rpfilter",
    ),
    _Feature(
        "match on local addresses",
        "raw",
        "-A PREROUTING -p tcp -m addrtype --dst-type LOCAL -j RETURN",
        "xt_addrtype",
    ),
    _Feature("exemption from tracking", "raw", "-A OUTPUT -p tcp -j CT --notrack", "xt_CT"),
)
_HOPS = {
    4: _Feature(
        "match on the TTL", "raw", "-A PREROUTING -p tcp -m ttl --ttl-lt 4 -j DROP", "xt_hl"
    ),
    6: _Feature(
        "match on the hop limit", "raw", "-A PREROUTING -p tcp -m hl --hl-lt 4 -j DROP", "xt_hl"
    ),
}
_FOR_COOKIES = (
    _Feature(
        "SYN cookies",
        "filter",
        "-A INPUT -p tcp -m conntrack --ctstate INVALID,UNTRACKED -j SYNPROXY --mss 1460"
        " --timestamp --sack-perm --wscale 7",
        "ipt_SYNPROXY",
    ),
    _Feature(
        "rates per service",
        "raw",
        "-A PREROUTING -p tcp -m hashlimit --hashlimit-above 9/sec --hashlimit-burst 1"
        f" --hashlimit-mode dstip,dstport --hashlimit-name {_SET} --hashlimit-rate-match"
        " --hashlimit-rate-interval 1 -j CT --notrack",
        "xt_hashlimit",
    ),
    _Feature(
        "packets without a socket",
        "raw",
        "-A OUTPUT -p tcp -m owner ! --socket-exists -j CT --notrack",
        "xt_owner",
    ),
    _Feature(
        "removal of TCP options",
        "mangle",
        "-A OUTPUT -p tcp -j TCPOPTSTRIP --strip-options timestamp",
        "xt_TCPOPTSTRIP",
    ),
    _Feature("packet log", "mangle", "-A OUTPUT -p tcp -j NFLOG --nflog-group 1", "xt_NFLOG"),
    _Feature("rules behind filters", "security", "-A INPUT -p tcp -j DROP", "iptable_security"),
)


def feature_checks(host: Host, deadline: float) -> list[Check]:
    """Return a check for the set support and for each family's rules; `deadline` is monotonic s."""
    if not host.capable(_CAP_SYS_ADMIN):
        return [
            Check(
                "kernel features",
                Outcome.WARNING,
                "not tried: making a network namespace for it needs CAP_SYS_ADMIN",
                "sudo rstguard doctor" if os.geteuid() else "docker run --cap-add SYS_ADMIN …",
            )
        ]
    with _namespace(host, deadline) as inside:
        if inside is None:
            sentence = "not tried: no network namespace could be made here"
            return [Check("kernel features", Outcome.WARNING, sentence, "unshare --net true")]
        trial = _Trial(host, inside, deadline)
        tried = (trial.rules, trial.cookies, trial.proof, trial.holding)
        return [trial.sets(), *(check(family) for family in (4, 6) for check in tried)]


class _Trial(NamedTuple):
    host: Host
    inside: Sequence[str]
    deadline: float

    def sets(self) -> Check:
        """Make the kinds of sets that the guard uses."""
        kinds = {
            "hash:net": "timeout 0 comment",
            "hash:ip": "timeout 600 netmask 24 forceadd",
            "bitmap:port": "range 0-65535",
            "hash:ip,port": "timeout 60",
            "hash:ip,port,ip": "timeout 3 forceadd",
        }
        if self.host.find("ipset") is None:
            return Check("kernel sets", Outcome.WARNING, "not tried: ipset is not installed")
        for kind, options in kinds.items():
            set_name = f"{_SET}-{kind.partition(':')[2].replace(',', '-')}"
            if not self._succeeds(["ipset", "create", set_name, kind, *options.split()]):
                module = f"ip_set_{kind.replace(':', '_').replace(',', '')}"
                sentence = f"the kernel cannot make a set of type {kind}"
                return self._failed("kernel sets", sentence, self.host.load_module(module))
        return Check("kernel sets", Outcome.OK, f"the kernel makes {', '.join(kinds)} sets")

    def rules(self, family: int) -> Check:
        """Load a small rule set; only if that fails, look for the rule that it was."""
        name = f"IPv{family} rules"
        restore = _RESTORE[family]
        if self.host.find(restore) is None:
            return Check(name, Outcome.WARNING, f"not tried: {restore} is not installed")
        family_name = "inet" if family == 4 else "inet6"
        target = f"{_SET}{family}"
        self._succeeds(["ipset", "create", target, "hash:net", "family", family_name])
        if not self._loads(family, (_PLAIN,)):
            return self._failed(name, *self._why_not_even_plain(restore, family))
        return self._each(name, family, (*_FEATURES, _HOPS[family]))

    def cookies(self, family: int) -> Check:
        """Load the rules that give out SYN cookies."""
        name = f"IPv{family} SYN cookies"
        if self.host.find(_RESTORE[family]) is None:
            return Check(name, Outcome.WARNING, f"not tried: {_RESTORE[family]} is not installed")
        found = self._each(name, family, _FOR_COOKIES)
        if found.outcome is not Outcome.MISSING:
            return found
        sentence = (
            "shunned sources are blocked, not challenged, and a policy with syn_budget may be "
            f"refused: {found.sentence}"
        )
        return found._replace(outcome=Outcome.WARNING, sentence=sentence)

    def proof(self, family: int) -> Check:
        """Load the rules that know proven sources and adopted connections."""
        name = f"IPv{family} proof of address"
        if self.host.find(_RESTORE[family]) is None:
            return Check(name, Outcome.WARNING, f"not tried: {_RESTORE[family]} is not installed")
        payload = f"-A POSTROUTING -p tcp {has_payload(family)} -j RETURN"
        labels = "-A POSTROUTING -m connlabel --label 127 --set"
        features = (
            _Feature("connection labels", "mangle", labels, "xt_connlabel"),
            _Feature("packets with payload", "mangle", payload, "xt_bpf"),
        )
        return self._each(name, family, features)

    def holding(self, family: int) -> Check:
        """Load the rules that only a policy with `forged_resets` needs."""
        name = f"IPv{family} forged RSTs"
        if self.host.find(_RESTORE[family]) is None:
            return Check(name, Outcome.WARNING, f"not tried: {_RESTORE[family]} is not installed")
        limit = (
            "-A PREROUTING -p tcp -m hashlimit --hashlimit-above 20/sec --hashlimit-burst 8"
            " --hashlimit-mode srcip,srcport,dstip,dstport --hashlimit-htable-expire 3000"
            f" --hashlimit-name {_SET}-rst -j DROP"
        )
        features = (
            _Feature("limits per connection", "mangle", limit, "xt_hashlimit"),
            _Feature("packet lengths", "mangle", "-A OUTPUT -m length --length 0:120", "xt_length"),
        )
        found = self._each(name, family, features)
        if found.outcome is not Outcome.MISSING:
            return found
        sentence = f"a policy with forged_resets cannot be used: {found.sentence}"
        return found._replace(outcome=Outcome.WARNING, sentence=sentence)

    def _each(self, name: str, family: int, features: Sequence[_Feature]) -> Check:
        restore = _RESTORE[family]
        if self._loads(family, features):
            listed = ", ".join(feature.name for feature in features)
            return Check(name, Outcome.OK, f"{restore} --noflush works with {listed}")
        for feature in features:
            if not self._loads(family, (feature,)):
                module = re.sub("^ipt", "ip6t" if family == 6 else "ipt", feature.module)
                sentence = f"the kernel or {restore} lacks this: {feature.name} (module {module})"
                return self._failed(name, sentence, self.host.load_module(module))
        return self._failed(name, f"{restore} refuses all rules together, each alone works", "")

    def _why_not_even_plain(self, restore: str, family: int) -> tuple[str, str]:
        if family == 6 and not Path("/proc/net/if_inet6").exists():
            fix = "remove ipv6.disable=1 from the kernel's command line, and reboot"
            return "the kernel runs without IPv6, which rstguard guards as well", fix
        said = self._ask([restore, "--noflush", "-w", "1"], _text((_PLAIN,), family)).strip()
        last = said.splitlines()[-1] if said else "no message"
        module = "nf_tables" if "nf_tables" in said else "ip_tables"
        return f"{restore} does not work: {last}", self.host.load_module(module)

    def _loads(self, family: int, features: Sequence[_Feature]) -> bool:
        return self._succeeds([_RESTORE[family], "--noflush", "-w", "1"], _text(features, family))

    def _succeeds(self, command: Sequence[str], text: str = "") -> bool:
        return self.host.succeeds([*self.inside, *command], self._left, text)

    def _ask(self, command: Sequence[str], text: str) -> str:
        return self.host.ask([*self.inside, *command], self._left, text)

    @property
    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _failed(self, name: str, sentence: str, fix: str) -> Check:
        if self._left <= 0:
            return Check(name, Outcome.WARNING, "not tried to the end: this machine is too busy")
        return Check(name, Outcome.MISSING, sentence, fix)


def _text(features: Sequence[_Feature], family: int) -> str:
    """Return input for iptables-restore that adds each feature's rule, table by table."""
    lines = []
    for table in dict.fromkeys(feature.table for feature in features):
        lines += [f"*{table}", *(f.rule for f in features if f.table == table), "COMMIT"]
    return "\n".join([*lines, ""]).replace(_SET, f"{_SET}{family}")


@contextmanager
def _namespace(host: Host, deadline: float) -> Iterator[tuple[str, ...] | None]:
    """Yield the beginning of commands that run in a namespace of their own, None if impossible.

    The namespace lives as long as the `cat` in it, and that as long as the pipe to this process:
    nothing stays behind, however this process ends.
    """
    unshare, nsenter = host.find("unshare"), host.find("nsenter")
    if unshare is None or nsenter is None:
        yield None
        return
    holder = subprocess.Popen(
        [unshare, "--net", "cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        made = _echoes(holder, deadline)
        yield (nsenter, f"--net=/proc/{holder.pid}/ns/net") if made else None
    finally:
        with suppress(BrokenPipeError):
            holder.communicate()


def _echoes(holder: subprocess.Popen[bytes], deadline: float) -> bool:
    """Wait until `cat` answers, which is when the namespace is there."""
    if holder.stdin is None or holder.stdout is None:
        return False
    try:
        holder.stdin.write(b"\n")
        holder.stdin.flush()
    except BrokenPipeError:
        return False
    ready, _, _ = select.select([holder.stdout], [], [], max(0.0, deadline - time.monotonic()))
    return bool(ready) and holder.stdout.readline() == b"\n"
