"""What becomes of a document that comes in: checked before it is held, held before it is passed on, and charged to its bringer.

A false document is its bringer's fault, because an honest node checks before it passes on. An expired one is nobody's: clocks
differ. Documents that are known or come too often are charged to an allowance that honest luck does not use up.
"""

from collections.abc import Iterable
from math import inf
from typing import Final

from p2pnode.discovery.gossip.events import Arrived, Effect, Gone, Republish, Violated
from p2pnode.discovery.gossip.items import Check, Item, ItemStore, Kind, Outcome, split_entries
from p2pnode.discovery.gossip.monitoring import Monitoring
from p2pnode.discovery.gossip.spreading import Spreading
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire.messages.gossip import KEY_PREFIX_SIZE, WANTED_MAX

# Documents from one peer that were no use: this many at once and this many a second are luck, more are not looked at.
USELESS_BURST: Final = 600
USELESS_PER_SECOND: Final = 5.0
REMEMBERED_MAX: Final = 2048
# An entry whose document was refused (no monitor of that publisher, say) is not asked for again so soon.
REFUSED_SECONDS: Final = 120.0
# A document that one peer was asked for is not asked of another so soon.
FETCHING_SECONDS: Final = 5.0
REPUBLISH_SECONDS: Final = 10.0


class Intake:
    """The door of the book. own: this node's id."""

    def __init__(self, own: bytes, store: ItemStore, watch: Monitoring, spreading: Spreading, check: Check) -> None:
        self._own = own
        self._store = store
        self._watch = watch
        self._spreading = spreading
        self._check = check
        self._useless: dict[bytes, float] = {}
        self._refused: dict[bytes, float] = {}
        self._fetching: dict[bytes, float] = {}
        self._next_republish = 0.0

    def checked(self, data: bytes, now: float) -> Item:
        """Give the item behind a document. Raises ProtocolViolation."""
        return self._check(data, round(now * 1000))

    def take_all(self, effects: list[Effect], documents: Iterable[bytes], source: bytes, now: float) -> int:
        """Check and hold documents of a peer, with what follows from each; gives how many were news.

        Stops at a false one, which is reported, and where the peer's allowance for useless ones ends.
        """
        fresh = 0
        for data in documents:
            if self._useless.get(source, 0.0) - now > USELESS_BURST / USELESS_PER_SECOND:
                break
            try:
                outcome = self.take(effects, self.checked(data, now), source, now)
            except ProtocolViolation as error:
                if error.reason not in (Reason.EXPIRED, Reason.NOT_YET_VALID):
                    effects.append(Violated(source, error.reason))
                    break
                outcome = Outcome.OLD
            if outcome is Outcome.NEW:
                fresh += 1
            else:
                self._charge(source, now)
        return fresh

    def take(self, effects: list[Effect], item: Item, source: bytes | None, now: float) -> Outcome:
        """Hold an item, if it is news and may be believed, and queue it for the neighbours. source: None for our own."""
        if item.kind is Kind.SUSPICION and not self._believes(item, now):
            self._refuse(item, now)
            return Outcome.OLD
        outcome, dropped = self._store.put(item, now)
        self._fetching.pop(item.key[:KEY_PREFIX_SIZE], None)
        if outcome is Outcome.NEW:
            self._watch.arrived(item, dropped, now)
            effects += [Gone(old) for old in dropped if old.key != item.key]
            effects.append(Arrived(item))
            self._spreading.news(item, source, now)
        elif outcome is not Outcome.SAME:
            self._refuse(item, now)
        elif source is not None:
            self._spreading.knows(source, item.key, item.sequence)
        if source is not None and item.subject == self._own:
            effects += self._about_own(item, outcome, now)
        return outcome

    def wanted(self, entries: bytes, source: bytes, now: float) -> list[bytes]:
        """Give the key prefixes of those entries of a peer whose documents are to be asked for."""
        prefixes: list[bytes] = []
        for prefix, sequence in split_entries(entries):
            if self._store.lacks(prefix, sequence):
                if len(prefixes) < WANTED_MAX and self._may_fetch(prefix, sequence, now):
                    prefixes.append(prefix)
                continue
            held = self._store.find(prefix)
            if held is not None:
                self._spreading.knows(source, held.key, sequence)
        return prefixes

    def forget(self, source: bytes, now: float) -> None:
        """A link has ended: drop its bringer's allowance if it is full again."""
        if self._useless.get(source, -inf) <= now or len(self._useless) > REMEMBERED_MAX:
            self._useless.pop(source, None)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _believes(self, item: Item, now: float) -> bool:
        return item.publisher != item.subject and self._watch.is_assigned(item.publisher, item.subject, now)

    def _may_fetch(self, prefix: bytes, sequence: int, now: float) -> bool:
        if self._refused.get(prefix + sequence.to_bytes(6, "big"), -inf) > now or self._fetching.get(prefix, -inf) > now:
            return False
        if len(self._fetching) >= REMEMBERED_MAX:
            self._fetching = {each: until for each, until in self._fetching.items() if until > now}
        if len(self._fetching) >= REMEMBERED_MAX:
            return False
        self._fetching[prefix] = now + FETCHING_SECONDS
        return True

    def _refuse(self, item: Item, now: float) -> None:
        if len(self._refused) >= REMEMBERED_MAX:
            self._refused.clear()
        self._refused[item.entry] = now + REFUSED_SECONDS

    def _charge(self, source: bytes, now: float) -> None:
        self._useless[source] = max(now, self._useless.get(source, 0.0)) + 1.0 / USELESS_PER_SECOND

    def _about_own(self, item: Item, outcome: Outcome, now: float) -> list[Effect]:
        """Ask for a newer signature when others hold a suspicion of this node, or a later word of it than it has published.

        The second happens after its data folder was lost or restored from an old copy.
        """
        held = self._store.get(self._own)
        is_other_word = (
            outcome is Outcome.SAME and held is not None and held.publisher == item.publisher and held.data != item.data
        )
        if not (outcome is Outcome.NEW or is_other_word) or now < self._next_republish:
            return []
        self._next_republish = now + REPUBLISH_SECONDS
        return [Republish(item.about)]
