"""What must hold, each a function with its sentence; all of them raise `Broken`."""

from __future__ import annotations

from typing import Any, Final

from rstguard.kernel import ipset
from rstguard.kernel.footprint import Footprint
from rstguard.kernel.names import BLOCK_SETS
from rstguard.supervisor.child import READY_SECONDS, State
from rstguard.supervisor.health import Condition, health
from tests.simulation.ledger import SLACK, Ledger
from tests.simulation.processes import Process
from tests.simulation.traffic import Traffic
from tests.simulation.world import QUEUE, Broken, Incarnation, World
from tests.support.fake_kernel import FakeKernel

_BACK_OFF: Final = 5.0
_PATIENCE: Final = {"asker": 3.0, "worker": 3.0, "sweeper": 62.0}
"""Seconds after which the guard is to have noticed that a process hangs: see health.py for a
worker, child.py for the sweeper."""


def holds(condition: object, sentence: str, found: object = "") -> None:
    """Raise `Broken` unless the condition holds."""
    if not condition:
        raise Broken(f"{sentence}{f' ({found})' if found not in ('', None) else ''}")


def blocked(world: World) -> dict[tuple[str, str], tuple[str, float]]:
    """Return who is blocked as the kernel has it: source and kind, rule and seconds left."""
    found: dict[tuple[str, str], tuple[str, float]] = {}
    with world.kernel.sets() as sets:
        for one in sets.list():
            key = str(one.source), str(one.kind)
            left = float("inf") if one.remaining is None else float(one.remaining)
            if key not in found or found[key][1] < left:
                found[key] = (one.rule, left)
    return found


def every_told_ban_is_in_force(world: World, ledger: Ledger) -> None:
    """Every ban that an event told is in force until its end, or was lifted by somebody named."""
    now = world.loop.time()
    there = blocked(world)
    for key, promise in ledger.due(now).items():
        holds(key in there, "a ban that was told is not in force", f"{key}, {promise.rule}")
        left = there[key][1]
        holds(
            left >= promise.until - now - SLACK,
            "a ban ends before the time that was told",
            f"{key}: {left} s left, not {promise.until - now:.1f}",
        )


def every_ban_was_told(world: World, ledger: Ledger) -> None:
    """Nobody is blocked of whom nothing was told."""
    for key, (rule, left) in blocked(world).items():
        excused = ledger.doubts[key] or key[0] in ledger.untold or left <= SLACK
        holds(key in ledger.bans or excused, "somebody is blocked untold", f"{key}, {rule}")


def store_and_sets_agree(world: World, one: Incarnation, ledger: Ledger) -> None:
    """What the store remembers and what the kernel's sets hold is the same."""
    store = one.parts.record.store
    holds(store is not None, "the store is not open though its directory can be used")
    assert store is not None
    kept = {(str(e.source), str(e.kind)): float(e.remaining or 0) for e in store.blocks()}
    there = blocked(world)
    # What the disk had not yet when the supervisor was killed is in the sets alone.
    fragile = {key for key, promise in ledger.bans.items() if promise.fragile}
    for key, left in kept.items():
        if left <= SLACK or ledger.doubts[key]:
            continue
        holds(key in there, "the store remembers a ban that is not in force", key)
        slack = SLACK + world.latest  # what was done may be noted that much later
        holds(
            abs(there[key][1] - left) <= slack or key in fragile,
            "store and set differ in when a ban ends",
            f"{key}: {left:.0f} s in the store, {there[key][1]:.0f} s in the set",
        )
    for key, (rule, left) in there.items():
        excused = ledger.doubts[key] or key[0] in ledger.untold or left <= SLACK or key in fragile
        holds(key in kept or excused, "the store forgot a ban that is in force", f"{key} {rule}")


def rules_are_those_of_the_policy(world: World, one: Incarnation) -> None:
    """Sets and chains are what a fresh start with the policy in force would make them."""
    fresh = FakeKernel()
    directory = world.root / "fresh"
    directory.mkdir(exist_ok=True)
    queues = range(QUEUE, QUEUE + world.workers)
    footprint = Footprint(fresh, directory, queues)
    footprint.known = dict(one.parts.footprint.known)
    footprint.prepare(one.guard.ruleset)
    footprint.divert(one.guard.ruleset)
    for family in (4, 6):
        for table, chains in fresh.iptables[family].tables.items():
            held = world.kernel.iptables[family].tables.get(table, {})
            for chain, rules in chains.items():
                found = held.get(chain, [])
                if not chain.startswith("rstguard"):
                    found = [rule for rule in found if "rstguard" in rule]
                holds(found == rules, "a chain is not what the policy says", f"{table} {chain}")
    for name in fresh.ipsets.names:
        holds(name in world.kernel.ipsets.names, "a set of the policy is missing", name)
        wanted, held_set = fresh.ipsets.get(name), world.kernel.ipsets.get(name)
        holds(wanted.header == held_set.header, "a set has other options", name)
        if not any(
            part in name
            for part in (
                *("ban", "gate", "shun", "proven", "engaged", "challenged", "thin"),
                *("counting", "live"),
            )
        ):
            holds(wanted.members.keys() == held_set.members.keys(), "a set holds others", name)


def no_set_is_left_over(world: World, one: Incarnation) -> None:
    """Sets that the policy in force does not need are gone."""
    known = one.parts.footprint.known
    needed = {spec.name for spec in ipset.plan(one.guard.ruleset, world.workers, known)}
    over = [n for n in world.kernel.ipsets.names if n.startswith("rstguard") and n not in needed]
    holds(not over, "a set is left that no rule needs", over)


def all_follow_the_policy(world: World, one: Incarnation, ledger: Ledger) -> None:
    """The policy in force is the last one accepted, in every process too."""
    guard = one.guard
    holds(
        guard.loaded.policy.name == ledger.policy == guard.ruleset.name,
        "the policy in force is not the last one that was told",
        f"{guard.loaded.policy.name}, {guard.ruleset.name}, told {ledger.policy}",
    )
    for process in world.processes.alive:
        serving: Any = process.serving
        ruleset = (
            serving._engine.ruleset if process.kind == "worker" else serving._sweeping._ruleset
        )
        holds(ruleset == guard.ruleset, "a process has another policy", process.owner.name)


async def the_history_tells_it(one: Incarnation) -> None:
    """The history names the policy in force, and nothing waits for ever."""
    rows = await one.ask(command="policy-history")
    current = [row for row in rows if row["in_force"]]
    holds(len(current) == 1, "the history names no policy, or several, as that in force", len(rows))
    holds(
        current[0]["text"] == one.guard.loaded.text,
        "the history names another policy as that in force",
        f"{current[0]['name']}, in force {one.guard.loaded.policy.name}",
    )
    holds(current[0]["state"] == "kept", "the policy in force is not kept", current[0]["state"])
    waiting = [row for row in rows if row["state"] == "pending"]
    old = [row for row in waiting if row["number"] < current[0]["number"]]
    holds(not waiting or old == waiting, "a policy waits though nobody will confirm it", waiting)


def nobody_is_missing(one: Incarnation, world: World) -> None:
    """All processes serve, each with a process that lives."""
    for child in one.guard.children:
        holds(child.serves, f"the {child.name} does not serve", child.state.value)
        alive = [p for p in world.processes.alive if p.pid == child.pid and p.serving]
        holds(alive, f"the {child.name} serves, but has no process", child.pid)
    count = len(world.processes.alive)
    holds(count == world.workers + 1, "processes are left over", count)


def no_process_waits_too_long(one: Incarnation, world: World, ledger: Ledger) -> None:
    """No process is missing for longer than its back-off, or than a start may take."""
    now = world.loop.time()
    for child in one.guard.children:
        told = ledger.changed.get(child.name)
        if told is None or not one.up:
            continue
        for_s = now - told[1]
        if child.state is State.BACKOFF:
            holds(
                for_s <= _BACK_OFF + 1, f"the {child.name} is not started again", f"{for_s:.1f} s"
            )
        if child.state is State.STARTING:
            holds(for_s <= READY_SECONDS + 7, f"the {child.name} never begins to serve", for_s)
        holds(child.state is not State.FAILED, f"the {child.name} is given up while others serve")


def status_is_true(world: World, one: Incarnation, since: dict[int, float]) -> None:
    """The guard never says filtering while a process does not serve, or panic is on.

    `since` says from when on each process has not been at work.
    """
    now = world.loop.time()
    how = health(one.guard, now)
    if how.condition is not Condition.FILTERING:
        return
    for child in one.guard.children:
        process = child._process
        assert isinstance(process, Process), f"filtering, but the {child.name} has no process"
        idle = now - since.get(process.pid, now)
        limit = 1.5 if not process.alive else _PATIENCE[process.kind]
        holds(idle <= limit, f"filtering, but the {child.name} does not serve", f"for {idle:.1f} s")


def every_packet_has_one_verdict(world: World, traffic: Traffic) -> None:
    """Every packet got exactly one verdict, or what on_failure says where its reader was gone."""
    traffic.verdicts()
    waiting = {
        packet.sequence
        for bound in world.kernel.packets.queues.values()
        for _, _, packet in bound.waiting
        if not isinstance(packet, bytes)
    }
    for number, sent in traffic.sent.items():
        if sent.queued:
            holds(sent.verdicts <= 1, "a packet has several verdicts", number)
            holds(sent.verdicts or number in waiting, "a packet has no verdict", number)
        if sent.honest and sent.queued and sent.verdicts and not sent.lost:
            holds(
                sent.passed, "an honest client's packet was dropped by a reader that lived", number
            )


def nothing_is_left(world: World) -> None:
    """No rule, set, sysctl, queue, process or file is left after the end."""
    kernel = world.kernel
    for netfilter in kernel.iptables.values():
        for table, chains in netfilter.tables.items():
            for chain, rules in chains.items():
                ours = chain.startswith("rstguard") or any("rstguard" in rule for rule in rules)
                holds(not ours, "a rule is left after the end", f"{table} {chain}")
    keeps = BLOCK_SETS if world.keep_bans else ()
    left = [n for n in kernel.ipsets.names if n.startswith("rstguard") and not n.startswith(keeps)]
    holds(not left or (keeps and not left), "a set is left after the end", left)
    fresh = FakeKernel()
    for name, value in fresh.sysctls.items():
        if not name.endswith("acct"):  # a rule that counts switches it on for good
            holds(kernel.sysctls[name] == value, "a sysctl is left changed", name)
    holds(not kernel.packets.queues, "a queue is left bound", list(kernel.packets.queues))
    holds(not kernel.packets.logs, "a log group is left bound", list(kernel.packets.logs))
    holds(not world.processes.alive, "a process is left", len(world.processes.alive))
    files = [p.name for p in world.run_directory.iterdir() if p.name != "panic"]
    holds(not files, "a file is left in the runtime directory", files)


def nothing_unexpected_was_logged(world: World) -> None:
    """No exception is in the log that was not put there on purpose."""
    holds(not world.tracebacks, "an exception nobody expected", world.tracebacks[:1])
