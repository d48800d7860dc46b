"""What the kernel needs to answer SYNs by cookies: what servers offer, and who is over budget.

For the SYN budget and for shuns that challenge alike.  The kernel engages and disengages by itself,
service by service and source by source.  Here the samples of the servers' SYN-ACKs are read, the
rules rewritten when a service offers something new, and the changes noted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from rstguard.engine.flow import Tuple
from rstguard.engine.offers import Offer, Offers, has_jumbo_frames, read_offer
from rstguard.engine.ruleset import SECOND, RuleSet
from rstguard.engine.segment import cookie_reminder, cookie_rst
from rstguard.engine.service import Service
from rstguard.engine.wire import ACK, SYN, Packet, parse
from rstguard.kernel import KernelError, cookies, dnat, syn_budget
from rstguard.kernel.footprint import Footprint
from rstguard.kernel.marks import Marks
from rstguard.kernel.seam import Connections, CookieCounts, Kernel, PacketCopies, PacketSender
from rstguard.observe.events import Event, EventLog

log = logging.getLogger(__name__)

_LOOK_EVERY = 1.0
_REWRITE_AFTER = 0.05
"""Seconds in which samples that come together lead to one change of the rules."""
_REWRITE_EVERY = 1.0
"""Seconds from one change of the rules to the next, at least."""
_FRESH = SECOND * 9 // 10
"""Age (ns) of a connection whose SYN-ACK is surely not a repeated one (RFC 6298, 2: after 1 s)."""
_OVER_SECONDS = 5
"""A service is told as disengaged when it was below budget for so long."""


class Budget:
    """Watches the SYN cookies of one guard while its policy may have some given out."""

    def __init__(
        self,
        kernel: Kernel,
        footprint: Footprint,
        events: EventLog,
        rewrite: Callable[[dict[Service, Offer]], Awaitable[None]],
    ) -> None:
        """`rewrite` puts the rules in place anew, for what services are known to offer."""
        self.engaged: dict[Service, float] = {}
        """The services over budget, and since when (monotonic seconds)."""
        self._kernel = kernel
        self._footprint = footprint
        self._events = events
        self._rewrite = rewrite
        self._offers = Offers()
        self._log: PacketCopies | None = None
        self._log_of_translated: PacketCopies | None = None
        self._table: Connections | None = None
        self._injector: PacketSender | None = None
        self.problem = ""
        """Why nothing can be learned, though the policy does without a SYN budget; or ""."""
        self.late = 0
        """Clients whose connection could not go on behind their cookie, and who were told so."""
        self._has_budget = False
        self._ended = False
        self._changed = asyncio.Event()
        self._counted = CookieCounts(0, 0, 0)

    async def follow(self, _old: RuleSet, ruleset: RuleSet) -> None:
        """Begin to watch, or stop, as the policy in force says.

        Raises:
            KernelError: what the rules log cannot be received, and a SYN budget has a rate.
        """
        self.problem = ""
        self._has_budget = syn_budget.in_force(ruleset)
        if not self._has_budget:
            self.engaged.clear()
        if self._ended or not cookies.wanted(ruleset):
            self.stop()
        elif self._log is None:
            self._injector = self._injector or self._kernel.injector(Marks(ruleset.marks))
            try:
                self._listen()
            except KernelError as error:
                if syn_budget.has_rate(ruleset):
                    raise
                self.problem = str(error)
                log.warning("no SYN cookies are given out: %s", error)

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._table = self._table or self._kernel.table()
        self._log = self._kernel.packet_log(cookies.LOG_GROUP)
        loop.add_reader(self._log.fileno(), self._receive)
        try:
            self._log_of_translated = self._kernel.packet_log(dnat.LOG_GROUP)
        except KernelError:
            self.stop()
            raise
        loop.add_reader(self._log_of_translated.fileno(), self._receive_translated)

    def stop(self) -> None:
        """Stop watching; what was learned is kept for another policy."""
        for one in (self._log, self._log_of_translated):
            if one is not None:
                asyncio.get_running_loop().remove_reader(one.fileno())
                one.close()
        self._log = self._log_of_translated = None
        self.engaged.clear()

    def end(self) -> None:
        """Stop watching for good: a change of policy that is still under way begins nothing."""
        self._ended = True
        self.stop()

    @property
    def counts(self) -> CookieCounts:
        """Cookies sent, accepted and refused, as last read."""
        return self._counted

    def _receive(self) -> None:
        """Take in SYN-ACKs of servers, SYNs of SYNPROXY that could begin no connection, and ACKs.

        Those ask whether the window of a cookie is still zero, whose ACK was lost.
        """
        assert self._log is not None
        assert self._injector is not None
        now = time.monotonic_ns()
        for data in self._log.receive():
            read = read_offer(data)
            if read is not None and self._offers.learn(*read, now):
                self._changed.set()
            packet = parse(data)
            if not isinstance(packet, Packet):
                continue
            opening = packet.flags & (SYN | ACK) == SYN
            if opening and not has_jumbo_frames(data):
                self.late += self._injector.send([cookie_rst(packet)])
            elif opening or (packet.flags & (SYN | ACK) == ACK and not packet.payload_length):
                self._injector.send([cookie_reminder(packet)])

    def _receive_translated(self) -> None:
        """Take in SYN-ACKs as servers behind DNAT send them; the tracker knows who was asked."""
        assert self._log_of_translated is not None
        assert self._table is not None
        now = time.monotonic_ns()
        for data in self._log_of_translated.receive():
            read, packet = read_offer(data), parse(data)
            if read is None or not isinstance(packet, Packet):
                continue
            server, offer = read
            answer = Tuple(*packet[:4])
            try:
                flow = self._table.find(answer)
            except KernelError as error:
                log.error("where a service is translated to cannot be read: %s", error)
                return
            if flow is None or flow.reply != answer or flow.age > _FRESH:
                continue  # a repeated SYN-ACK tells where its SYN went long ago
            asked = flow.original
            service = Service(asked.destination, asked.destination_port)
            if self._offers.learn(service, offer, now, server, asked.source):
                self._changed.set()

    async def apply(self) -> None:
        """Rewrite the rules whenever something new was learned; does not end by itself."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(_REWRITE_AFTER)
            self._changed.clear()
            before, known = self._footprint.known, self._offers.known
            try:
                await self._rewrite(known)
            except KernelError as error:
                log.error("what servers offer was learned but not put to use: %s", error)
                await asyncio.sleep(_LOOK_EVERY)
                self._changed.set()
                continue
            for service, offer in known.items():
                if before.get(service) != offer:
                    self._events.add(Event("learned", str(service), detail=str(offer)))
            await asyncio.sleep(_REWRITE_EVERY - _REWRITE_AFTER)

    async def look(self) -> None:
        """Tell when a service goes over budget, and when it has been below for some seconds.

        Does not end by itself.
        """
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            if self._log is None:
                continue
            try:
                counted = await asyncio.to_thread(self._kernel.cookie_counts)
                if self._has_budget and (self.engaged or counted.sent != self._counted.sent):
                    self._note(await asyncio.to_thread(self._kernel.seconds_since_over))
                self._counted = counted
                self._lapse()
            except KernelError as error:
                log.error("the state of the SYN cookies cannot be read: %s", error)

    def _lapse(self) -> None:
        """Forget where services are that are asked, and do not answer from there any more."""
        since = asyncio.get_running_loop().time() - dnat.LAPSE_SECONDS
        asked = [service for service, began in self.engaged.items() if began <= since]
        if self._offers.lapse(asked, time.monotonic_ns() - dnat.LAPSE_SECONDS * SECOND):
            self._changed.set()

    def _note(self, since_over: dict[Service, int]) -> None:
        now = asyncio.get_running_loop().time()
        over = {service for service, ago in since_over.items() if ago < _OVER_SECONDS}
        for service in sorted(over - self.engaged.keys()):
            self.engaged[service] = now
            self._events.add(
                Event("cookies_on", str(service), detail="over its SYN budget: SYN cookies")
            )
        for service in sorted(self.engaged.keys() - over):
            seconds = now - self.engaged.pop(service)
            self._events.add(Event("cookies_off", str(service), detail=f"after {seconds:.0f} s"))
