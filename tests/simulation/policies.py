"""Policies that the simulated administrators apply: drawn, each with a name of its own."""

from __future__ import annotations

import random

_RULES = (
    """{name: guess, measure: short_connections, ports: [22], shorter_than: 10s, over: 5/m,
       then: ban, for: 10m, escalate: {factor: 2, up_to: 2h, memory: 1d}}""",
    "{name: scan, measure: distinct_ports, over: 8, within: 10s, then: ban, for: 5m}",
    "{name: half, measure: half_open, over: 30, within: 20s, then: drop}",
    "{name: shake, measure: connection_rate, over: 20/s, burst: 40, then: reset}",
    "{name: idle, measure: idle, over: 10m, then: reset}",
    "{name: bytes, measure: byte_rate, over: 100 MB/s, then: reset}",
    "{name: packets, measure: packet_rate, over: 5000/s, then: ban, for: 1m}",
    "{name: service, measure: syn_rate, over: 500/s, burst: 1000, then: drop}",
    "{name: watch, measure: distinct_ports, over: 3, within: 10s, then: observe}",
)
TRUSTED = "10.1.0.0/16"


class Policies:
    """Draws policies, and knows their texts by their names."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.texts: dict[str, str] = {}

    def draw(self) -> str:
        """Return a policy's text; most enforce."""
        rng = self._rng
        name = f"p{len(self.texts) + 1}"
        more = rng.sample(_RULES, rng.randrange(4))
        rules = [
            "{name: syn, measure: syn_rate, over: 10/s, burst: 20, then: ban, for: 10m}",
            "{name: many, measure: connections, over: 8, then: "
            + rng.choice(("reset}", "'ban', for: 5m}")),
            *more,
        ]
        text = f"""version: 1
name: {name}
mode: {"observe" if rng.random() < 0.15 else "enforce"}
on_failure: {rng.choice(("open", "open", "closed"))}
offload: never
bans_per_minute: {rng.choice((12, 1000))}
sweep_every: {rng.choice(("1s", "2s"))}
protect: {{interfaces: [eth0], ports: [22, 80, 443]}}
trusted: [{rng.choice((TRUSTED, f"{TRUSTED}, 10.7.0.0/16"))}]
"""
        if rng.random() < 0.3:
            text += f"forged_resets: {rng.choice(('hold', 'hold', 'observe'))}\n"
        if rng.random() < 0.3:
            text += "syn_budget: {rate: 1000/s}\n"
        text += "rules:\n" + "".join(f"  - {rule}\n" for rule in rules)
        self.texts[name] = text
        return text

    def whole(self, mode: str = "enforce", budget: bool = False) -> str:
        """Return a policy of all kinds of rules, with limits that are soon crossed."""
        name = f"p{len(self.texts) + 1}"
        self.texts[name] = f"""version: 1
name: {name}
mode: {mode}
offload: never
sweep_every: 1s
protect: {{interfaces: [eth0], ports: [22, 80, 443]}}
trusted: [{TRUSTED}]
{"syn_budget: {rate: 1000/s}" if budget else ""}
rules:
  - {{name: syn, measure: syn_rate, over: 10/s, burst: 20, then: ban, for: 10m}}
  - {{name: many, measure: connections, over: 8, then: reset}}
  - {{name: idle, measure: idle, over: 8s, then: reset}}
  - {{name: guess, measure: short_connections, ports: [22], shorter_than: 10s, over: 5/m,
     then: ban, for: 1m, escalate: {{factor: 2, up_to: 2h, memory: 1d}}}}
"""
        return self.texts[name]

    @staticmethod
    def wrong() -> str:
        """Return a text that is no policy."""
        return "version: 1\nname: wrong\nrules: [{name: x}]\n"
