"""What gossip holds: the newest checked item of every publisher, and fingerprints by which two books are compared.

An offer and its withdrawal share one place, so that a withdrawal is simply the newer word. Suspicions have a place per
monitor and publisher. Fingerprints are XORs over 256 buckets of the key space, kept up with every change: two books are
equal when one number is, and a difference is found in two more questions.
"""

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from hashlib import blake2b
from operator import xor
from typing import Final

from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.wire.messages.gossip import ENTRY_SIZE, FINGERPRINT_SIZE, KEY_PREFIX_SIZE

BUCKETS: Final = 256
PARTS: Final = 16
SEQUENCE_MAX: Final = 2**48 - 1


class Kind(Enum):
    """What an item is."""

    OFFER = "offer"
    WITHDRAWAL = "withdrawal"
    SUSPICION = "suspicion"


@dataclass(frozen=True, slots=True)
class Item:
    """One checked document.

    key: its place, 32 bytes. publisher: who signed it. subject: whose offer it is about. sequence: of this document at its
    place; about: of the offer that it is, takes back or suspects. addresses: where the publisher can be dialled, if it is an
    offer. data: the exact bytes. mark: what it adds to a fingerprint.
    """

    kind: Kind
    key: bytes
    publisher: bytes
    subject: bytes
    sequence: int
    about: int
    expires_ms: int
    data: bytes
    addresses: tuple[str, ...] = ()
    mark: int = 0

    @property
    def entry(self) -> bytes:
        """The 14 bytes that stand for it in a digest."""
        return self.key[:KEY_PREFIX_SIZE] + self.sequence.to_bytes(ENTRY_SIZE - KEY_PREFIX_SIZE, "big")


# Checks a document's bytes at a time in milliseconds: gives the item, or raises ProtocolViolation. Expired is no crime:
# clocks differ, and it is dropped in silence.
Check = Callable[[bytes, int], Item]


class Outcome(Enum):
    """What became of an item that was put."""

    NEW = "new"
    SAME = "same"
    OLD = "old"
    TOO_OFTEN = "too-often"
    FULL = "full"


def item_key(kind: Kind, publisher: bytes, subject: bytes) -> bytes:
    """Give an item's place: the publisher's node id for its offer, a hash of both for a word about another."""
    return publisher if kind is not Kind.SUSPICION else blake2b(publisher + subject, digest_size=32).digest()


def make_item(
    kind: Kind, publisher: bytes, subject: bytes, sequence: int, about: int, expires_ms: int, data: bytes,
    addresses: tuple[str, ...] = (),
) -> Item:  # fmt: skip
    """Give an item with its place and its mark. sequence: at most 2^48 - 1, raises ValueError beyond."""
    if sequence > SEQUENCE_MAX:
        raise ValueError("a sequence has 48 bits")
    key = item_key(kind, publisher, subject)
    entry = key[:KEY_PREFIX_SIZE] + sequence.to_bytes(ENTRY_SIZE - KEY_PREFIX_SIZE, "big")
    mark = int.from_bytes(blake2b(entry, digest_size=FINGERPRINT_SIZE).digest(), "big")
    return Item(kind, key, publisher, subject, sequence, about, expires_ms, data, addresses, mark)


def split_entries(entries: bytes) -> Iterator[tuple[bytes, int]]:
    """Give (key prefix, sequence) of each whole entry."""
    for start in range(0, len(entries) - ENTRY_SIZE + 1, ENTRY_SIZE):
        middle = start + KEY_PREFIX_SIZE
        yield entries[start:middle], int.from_bytes(entries[middle : start + ENTRY_SIZE], "big")


def split_prefixes(keys: bytes) -> Iterator[bytes]:
    """Give each whole key prefix."""
    for start in range(0, len(keys) - KEY_PREFIX_SIZE + 1, KEY_PREFIX_SIZE):
        yield keys[start : start + KEY_PREFIX_SIZE]


class ItemStore:
    """The items of one node, bounded: at most `offers_max` publishers, `voices_max` suspicions about each.

    When it is full, a publisher that nobody reaches any more makes room, and otherwise newcomers are turned away: those
    who have been there are likelier to stay, and a flood of new identities displaces nobody.
    """

    def __init__(self, settings: GossipSettings) -> None:
        self._settings = settings
        self._items: dict[bytes, Item] = {}
        self._prefixes: dict[bytes, bytes] = {}
        self._voices: dict[bytes, dict[bytes, Item]] = {}
        self._marks = array("Q", bytes(8 * BUCKETS))
        self._publishers = 0
        self._expiries: list[tuple[int, bytes]] = []
        # Publisher -> when its allowance of updates is full again (the generic cell rate algorithm).
        self._allowances: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: bytes) -> Item | None:
        """Give the item at a place."""
        return self._items.get(key)

    def find(self, prefix: bytes) -> Item | None:
        """Give the item whose key starts with these 8 bytes."""
        key = self._prefixes.get(prefix)
        return None if key is None else self._items[key]

    def items(self) -> Iterable[Item]:
        """Give everything that is held, in the order of first arrival."""
        return self._items.values()

    def offers(self) -> Iterator[Item]:
        """Give the offers that stand, suspected ones too."""
        return (item for item in self._items.values() if item.kind is Kind.OFFER)

    def voices(self, publisher: bytes) -> Iterable[Item]:
        """Give the suspicions about a publisher's present offer."""
        return self._voices.get(publisher, {}).values()

    def lacks(self, prefix: bytes, sequence: int) -> bool:
        """Say whether an entry is news."""
        held = self.find(prefix)
        return held is None or held.sequence < sequence

    def put(self, item: Item, now: float) -> tuple[Outcome, list[Item]]:
        """Hold an item if it is news; gives what became of it and the items it replaced or voided."""
        if item.expires_ms <= now * 1000:
            return Outcome.OLD, []
        held = self._items.get(item.key)
        if held is not None and held.sequence >= item.sequence:
            return (Outcome.SAME if held.sequence == item.sequence else Outcome.OLD), []
        refusal = self._refusal(item, held, now)
        if refusal is not None:
            return refusal, []
        dropped: list[Item] = []
        if held is not None:
            dropped.append(self._remove(item.key))
        elif item.kind is not Kind.SUSPICION and self._publishers >= self._settings.offers_max:
            lost = self._unreached()
            if lost is None:
                return Outcome.FULL, []
            dropped += self._remove_publisher(lost)
        self._add(item)
        if item.kind is not Kind.SUSPICION:
            is_gone = item.kind is Kind.WITHDRAWAL
            answered = [voice.key for voice in self.voices(item.publisher) if is_gone or voice.about < item.sequence]
            dropped += [self._remove(key) for key in answered]
        return Outcome.NEW, dropped

    def expire(self, now: float) -> list[Item]:
        """Drop what is over."""
        dropped: list[Item] = []
        while self._expiries and self._expiries[0][0] <= now * 1000:
            expires_ms, key = heapq.heappop(self._expiries)
            item = self._items.get(key)
            if item is None or item.expires_ms != expires_ms:
                continue
            if item.kind is Kind.SUSPICION:
                dropped.append(self._remove(key))
            else:
                dropped += self._remove_publisher(item.publisher)
        return dropped

    @property
    def next_expiry(self) -> float:
        """When `expire` has something to do next, seconds of Unix time; infinite for never."""
        return self._expiries[0][0] / 1000 if self._expiries else float("inf")

    # --- comparing ----------------------------------------------------------------------------------------------------

    def whole(self) -> bytes:
        """Give the fingerprint of everything."""
        return _packed(reduce(xor, self._marks))

    def parts(self) -> bytes:
        """Give the fingerprints of the 16 parts."""
        return b"".join(_packed(reduce(xor, self._marks[16 * part : 16 * part + 16])) for part in range(PARTS))

    def buckets(self, part: int) -> bytes:
        """Give the fingerprints of the 16 buckets of one part."""
        return b"".join(_packed(mark) for mark in self._marks[16 * part : 16 * part + 16])

    def in_buckets(self, wanted: bytes) -> dict[int, list[Item]]:
        """Give bucket -> items for these buckets, one byte each."""
        found: dict[int, list[Item]] = {bucket: [] for bucket in wanted}
        for item in self._items.values():
            members = found.get(item.key[0])
            if members is not None:
                members.append(item)
        return found

    # --- inside -------------------------------------------------------------------------------------------------------

    def _refusal(self, item: Item, held: Item | None, now: float) -> Outcome | None:
        if item.kind is Kind.SUSPICION:
            offer = self._items.get(item.subject)
            if offer is None or offer.kind is not Kind.OFFER or offer.sequence > item.about:
                return Outcome.OLD
            if held is None and len(self._voices.get(item.subject, ())) >= self._settings.voices_max:
                return Outcome.FULL
        every = self._settings.update_seconds
        full_at = max(now, self._allowances.get(item.key, 0.0))
        if full_at - now > every * (self._settings.updates_burst - 1):
            return Outcome.TOO_OFTEN
        if held is not None or item.kind is not Kind.SUSPICION:
            self._allowances[item.key] = full_at + every
        return None

    def _unreached(self) -> bytes | None:
        """Give the publisher with the most voices against it, if they are enough."""
        if not self._voices:
            return None
        publisher = max(self._voices, key=lambda each: len(self._voices[each]))
        return publisher if len(self._voices[publisher]) >= self._settings.voices_needed else None

    def _add(self, item: Item) -> None:
        self._items[item.key] = item
        self._prefixes[item.key[:KEY_PREFIX_SIZE]] = item.key
        self._marks[item.key[0]] ^= item.mark
        heapq.heappush(self._expiries, (item.expires_ms, item.key))
        if len(self._expiries) > 4 * len(self._items) + 64:
            # Renewals leave their old dates behind; a publisher that renews all the time must not make this grow.
            self._expiries = [(each.expires_ms, each.key) for each in self._items.values()]
            heapq.heapify(self._expiries)
        if item.kind is Kind.SUSPICION:
            self._voices.setdefault(item.subject, {})[item.publisher] = item
        else:
            self._publishers += 1

    def _remove(self, key: bytes) -> Item:
        item = self._items.pop(key)
        self._prefixes.pop(key[:KEY_PREFIX_SIZE], None)
        self._marks[key[0]] ^= item.mark
        if item.kind is Kind.SUSPICION:
            self._allowances.pop(key, None)
            voices = self._voices[item.subject]
            del voices[item.publisher]
            if not voices:
                del self._voices[item.subject]
        else:
            self._publishers -= 1
        return item

    def _remove_publisher(self, publisher: bytes) -> list[Item]:
        dropped = [self._remove(voice.key) for voice in list(self.voices(publisher))]
        dropped.append(self._remove(publisher))
        for item in dropped:
            self._allowances.pop(item.key, None)
        return dropped


def _packed(mark: int) -> bytes:
    return mark.to_bytes(FINGERPRINT_SIZE, "big")
