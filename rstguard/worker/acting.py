"""What a worker does about decisions beyond verdicts: bans, RSTs to refused clients, reports."""

from __future__ import annotations

import logging
from itertools import compress

from rstguard.engine.flow import Tuple
from rstguard.engine.segment import cookie_rst
from rstguard.engine.verdict import Ban, Condemn, Decision, Shun, Verdict
from rstguard.engine.wire import Packet
from rstguard.ipc.messages import Observed, Reset, blocked_message
from rstguard.kernel.placing import place
from rstguard.kernel.seam import ElementSets, PacketSender
from rstguard.worker.reporting import Reporting

log = logging.getLogger(__name__)

Noted = tuple[Packet, Decision, bool]
"""A packet, what was decided, and whether it is a client's that is to be sent a RST."""


class Acting:
    """Carries out what decisions ask for, those of the last moments together."""

    def __init__(self, sets: ElementSets, injector: PacketSender, reporting: Reporting) -> None:
        """Ban by `sets`, refuse by `injector`, and tell of it by `reporting`."""
        self._sets, self._injector, self._reporting = sets, injector, reporting
        self._noted: list[Noted] = []
        self.enforce = False
        """Whether anything may be done; what would have been is told in any case."""

    def note(self, packet: Packet, decision: Decision, refused: bool) -> bool:
        """Count a rule's decision, and take it if it asks for anything to be done; tell whether."""
        counts = self._reporting.counts
        counts[f"verdict.{decision.verdict.name.lower()}"] += 1
        counts[f"rule.{decision.rule}"] += 1
        asks = bool(decision.effects) or decision.verdict is not Verdict.DROP or refused
        if asks:
            self._noted.append((packet, decision, refused))
        return asks

    def carry_out(self) -> None:
        """Do what was noted, bans first.

        Raises:
            Closed: the supervisor is gone.
        """
        if not self._noted:
            return
        noted, self._noted = self._noted, []
        self._block([e for _, d, _ in noted for e in d.effects if isinstance(e, Ban | Shun)])
        self._injector.send(cookie_rst(packet) for packet, _, refused in noted if refused)
        for packet, decision, _ in noted:
            self._tell(packet, decision)

    def _block(self, effects: list[Ban | Shun]) -> None:
        messages = [blocked_message(effect, self.enforce) for effect in effects]
        if messages and self.enforce:
            there, error = place(self._sets, [message.element for message in messages])
            if error:
                self._reporting.counts["block_failed"] += there.count(False)
                log.error("%s", error)
                messages = list(compress(messages, there))
        for message in messages:
            self._reporting.send(message)

    def _tell(self, packet: Packet, decision: Decision) -> None:
        """Tell of a reset or an observation; a drop or a block is told by what was done."""
        rule, reason, reporting = decision.rule, decision.reason, self._reporting
        flow = Tuple(*packet[:4])
        if decision.verdict is Verdict.RESET:
            known = any(isinstance(effect, Condemn) for effect in decision.effects)
            if known or reporting.worth_telling(rule):
                reporting.send(Reset(flow, decision.ends, rule, reason, self.enforce, known))
        elif decision.verdict is Verdict.DROP or decision.effects:
            return
        elif reporting.worth_telling(rule):
            reporting.send(Observed(flow, rule, reason))
