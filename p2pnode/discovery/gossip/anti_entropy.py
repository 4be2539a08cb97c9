"""Making two books equal, whatever was lost: fingerprints first, then the entries that differ, then the documents.

Equal books cost one question of eight bytes. Otherwise the asker learns which sixteenths differ, sends the fingerprints of
their buckets, is told what the other holds in those that differ, fetches what it lacks and pushes what the other lacks. The
answering side keeps no state but a budget per peer.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from p2pnode.discovery.gossip.items import PARTS, Item, ItemStore, split_entries, split_prefixes
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.discovery.gossip.spreading import wanted_items
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.reasons import Reason
from p2pnode.wire.messages.gossip import (
    ENTRIES_MAX,
    FINGERPRINT_SIZE,
    KEY_PREFIX_SIZE,
    WANTED_MAX,
    Announce,
    Differences,
    Reconcile,
)  # fmt: skip

_PART_SIZE: Final = 16 * FINGERPRINT_SIZE
# A comparison may be followed by so many questions about what differs: enough to fetch ten thousand documents.
QUESTIONS_MAX: Final = 400
BUDGETS_MAX: Final = 1024


class Comparison:
    """The asking side of one comparison with one peer. `next` gives the next question, or None when it is over."""

    def __init__(self, peer: bytes, store: ItemStore) -> None:
        self.peer = peer
        self.moved = 0
        self._store = store
        self._questions = 0
        self._uncovered = b""
        self._wanted: dict[bytes, int] = {}
        self._pushes: dict[bytes, Item] = {}

    def first(self) -> Reconcile:
        """Give the opening question."""
        return Reconcile(fingerprints=self._store.whole())

    def next(self, question: Reconcile | Announce, answer: Differences | None) -> Reconcile | Announce | None:
        """Give the next question after an answer; `answer` is None after an Announce.

        Raises ProtocolViolation(WRONG_TYPE) for an answer that does not fit.
        """
        self._questions += 1
        if self._questions > QUESTIONS_MAX:
            return None
        if isinstance(question, Reconcile) and answer is not None:
            if answer.fingerprints and not (question.parts or question.buckets or question.wanted):
                return self._descend(answer.fingerprints)
            if answer.buckets:
                self._compare(question, answer)
            if question.wanted:
                self._drop_wanted(question, answer)
        return self._question()

    def _descend(self, fingerprints: bytes) -> Reconcile | None:
        if len(fingerprints) != PARTS * FINGERPRINT_SIZE:
            raise ProtocolViolation(Reason.WRONG_TYPE, "16 fingerprints were asked for")
        own = self._store.parts()
        differing = [
            part
            for part in range(PARTS)
            if own[part * FINGERPRINT_SIZE : (part + 1) * FINGERPRINT_SIZE]
            != fingerprints[part * FINGERPRINT_SIZE : (part + 1) * FINGERPRINT_SIZE]
        ]
        if not differing:
            return None
        return Reconcile(parts=bytes(differing), fingerprints=b"".join(self._store.buckets(part) for part in differing))

    def _compare(self, question: Reconcile, answer: Differences) -> None:
        covered = answer.buckets[: answer.covered]
        if answer.covered == 0 or not _is_ascending(answer.buckets):
            raise ProtocolViolation(Reason.WRONG_TYPE, "buckets without their entries")
        self._uncovered = answer.buckets[answer.covered :]
        theirs = dict(split_entries(answer.entries))
        for prefix, sequence in theirs.items():
            if prefix[0] in covered and self._store.lacks(prefix, sequence):
                self._wanted[prefix] = sequence
        for items in self._store.in_buckets(covered).values():
            for item in items:
                if theirs.get(item.key[:KEY_PREFIX_SIZE], -1) < item.sequence:
                    self._pushes[item.key] = item

    def _drop_wanted(self, question: Reconcile, answer: Differences) -> None:
        """What came is no longer wanted; what did not, though nothing else came either, is not to be had."""
        self.moved += len(answer.documents)
        for prefix in split_prefixes(question.wanted):
            sequence = self._wanted.get(prefix)
            if sequence is not None and (not answer.documents or not self._store.lacks(prefix, sequence)):
                del self._wanted[prefix]
        if len(answer.documents) * KEY_PREFIX_SIZE >= len(question.wanted):
            # All were given: those still lacking were refused here, and asking again would bring them again.
            for prefix in split_prefixes(question.wanted):
                self._wanted.pop(prefix, None)

    def _question(self) -> Reconcile | Announce | None:
        if self._uncovered:
            buckets, self._uncovered = self._uncovered, b""
            return Reconcile(buckets=buckets)
        self._wanted = {prefix: sequence for prefix, sequence in self._wanted.items() if self._store.lacks(prefix, sequence)}
        if self._wanted:
            return Reconcile(wanted=b"".join(list(self._wanted)[:WANTED_MAX]))
        present = [self._store.get(key) for key in self._pushes]
        chosen = wanted_items([item for item in present if item is not None])
        self.moved += len(chosen)
        for item in chosen:
            del self._pushes[item.key]
        if not chosen:
            return None
        return Announce(documents=tuple(item.data for item in chosen))


def _is_ascending(buckets: bytes) -> bool:
    return all(first < second for first, second in pairwise(buckets))


@dataclass(slots=True)
class _Budget:
    """syncs: when the allowance is full again. questions: left in the present comparison."""

    syncs: float = 0.0
    questions: int = 0


@dataclass(slots=True)
class Answering:
    """The answering side: what each peer may still ask."""

    store: ItemStore
    settings: GossipSettings
    _budgets: dict[bytes, _Budget] = field(default_factory=dict)

    def answer(self, peer: bytes, question: Reconcile, now: float) -> Differences:
        """Answer one question. Raises Refused(RATE), ProtocolViolation(WRONG_TYPE)."""
        self._charge(peer, question, now)
        if question.wanted:
            found = wanted_items([self.store.find(prefix) for prefix in split_prefixes(question.wanted)])
            return Differences(documents=tuple(item.data for item in found))
        if question.buckets:
            if not _is_ascending(question.buckets):
                raise ProtocolViolation(Reason.WRONG_TYPE, "buckets in ascending order")
            return self._entries(question.buckets)
        if question.parts:
            return self._descend(question)
        if len(question.fingerprints) != FINGERPRINT_SIZE:
            raise ProtocolViolation(Reason.WRONG_TYPE, "one fingerprint over everything")
        if question.fingerprints == self.store.whole():
            return Differences()
        return Differences(fingerprints=self.store.parts())

    def forget(self, peer: bytes) -> None:
        """A link has ended. Its budget stays while it is not full again, so that a new link brings no new one."""
        budget = self._budgets.get(peer)
        if budget is not None:
            budget.questions = 0

    def _charge(self, peer: bytes, question: Reconcile, now: float) -> None:
        budget = self._budgets.get(peer)
        if budget is None:
            if len(self._budgets) >= BUDGETS_MAX:
                self._budgets = {each: held for each, held in self._budgets.items() if held.syncs > now}
            budget = self._budgets[peer] = _Budget()
        if question.wanted or question.buckets or question.parts:
            if budget.questions <= 0:
                raise Refused(Reason.RATE, "compare first")
            budget.questions -= 1
            return
        every = 60.0 / self.settings.syncs_per_minute
        full_at = max(now, budget.syncs)
        if full_at - now > every:
            raise Refused(Reason.RATE, f"{self.settings.syncs_per_minute:g} comparisons a minute")
        budget.syncs = full_at + every
        budget.questions = QUESTIONS_MAX

    def _descend(self, question: Reconcile) -> Differences:
        parts, theirs = question.parts, question.fingerprints
        if len(theirs) != len(parts) * _PART_SIZE or not _is_ascending(parts) or parts[-1] >= PARTS:
            raise ProtocolViolation(Reason.WRONG_TYPE, "16 fingerprints for each part")
        differing = []
        for index, part in enumerate(parts):
            own = self.store.buckets(part)
            for bucket in range(16):
                at = bucket * FINGERPRINT_SIZE
                if (
                    own[at : at + FINGERPRINT_SIZE]
                    != theirs[index * _PART_SIZE + at : index * _PART_SIZE + at + FINGERPRINT_SIZE]
                ):
                    differing.append(16 * part + bucket)
        return self._entries(bytes(differing))

    def _entries(self, buckets: bytes) -> Differences:
        entries: list[bytes] = []
        covered = 0
        for items in self.store.in_buckets(buckets).values():
            if covered and len(entries) + len(items) > ENTRIES_MAX:
                break
            entries += [item.entry for item in items[:ENTRIES_MAX]]
            covered += 1
        return Differences(buckets=buckets, covered=covered, entries=b"".join(entries))
