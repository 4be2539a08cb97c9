"""The routing table: k-buckets by XOR distance, a replacement cache per bucket, and the k nearest nodes whatever the buckets.

Every entry has answered a FIND_NODE of ours (`answered`); what others say, or who merely speaks to us (`heard`), makes a
candidate at most, because tables that believe unsolicited messages are poisoned by sending them (arXiv 2601.16560). Old
live entries win over new ones (Maymounkov & Mazieres 2002: the longer a node was up, the longer it will stay). Indexing
buckets by the length of the common prefix is the same as splitting only the bucket that holds our own id. Pure.
"""

from bisect import insort
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final

from p2pnode.discovery.diversity import contact_group
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.wire.messages.discovery import Contact

ID_BITS: Final = 256
# Verdicts remembered for `why`: enough for one screen of `net peers`, little for 100 000 simulated tables.
REJECTED_MAX: Final = 32
# An entry that failed more often than this is not told to others, though it stays until its last strike.
RELAY_STRIKES_MAX: Final = 0

OWN: Final = "this node itself"
IN_TABLE: Final = "in the table: it answered us"
STRUCK: Final = "in the table, but it failed to answer lately"
WAITING: Final = "waits in a replacement cache: its bucket is full of live nodes"
UNKNOWN: Final = "never met, or long ago"
NO_ADDRESS: Final = "out: it has no address"
NO_PUZZLE: Final = "out: its id does not solve the network's key puzzle"
CLIENT: Final = "out: it is a client, which answers no lookups"
WRONG_RECORD: Final = "out: it sent a record that nobody signed, or another than was asked for"
SILENT: Final = "out: it failed too often in a row"
WRONG_NODE: Final = "out: another node answers at its address"
BUCKET_GROUP: Final = "out: its bucket has enough nodes of that network"
TABLE_GROUP: Final = "out: the table has enough nodes of that network"


@lru_cache(maxsize=1 << 16)
def place_of(node_id: bytes) -> int:
    """Give an id's place in key space: a big-endian integer. Remembered so that many tables share one integer."""
    return int.from_bytes(node_id, "big")


class Entry:
    """One node in the table. last_answer, added_at: seconds. strikes: failures in a row. group: its network, or empty."""

    __slots__ = ("added_at", "contact", "group", "last_answer", "place", "strikes")

    def __init__(self, contact: Contact, place: int, group: str, now: float) -> None:
        self.contact = contact
        self.place = place
        self.group = group
        self.added_at = now
        self.last_answer = now
        self.strikes = 0


class Bucket:
    """Nodes at one length of common prefix. replacements: the most recently met last. touched: last lookup into it."""

    __slots__ = ("entries", "replacements", "touched")

    def __init__(self, now: float) -> None:
        self.entries: list[Entry] = []
        self.replacements: list[Contact] = []
        self.touched = now


class RoutingTable:
    """The nodes that this node knows, by distance from its own id.

    is_acceptable: says whether an id solves the network's puzzle; None where there is none.
    """

    __slots__ = (
        "_accept", "_buckets", "_entries", "_groups", "_indices", "_own", "_rejected", "_settings", "_sibling_limit",
        "_struck", "own_id",
    )  # fmt: skip

    def __init__(self, own_id: bytes, settings: KademliaSettings, is_acceptable: Callable[[bytes], bool] | None = None) -> None:
        self.own_id = own_id
        self._own = place_of(own_id)
        self._settings = settings
        self._accept = is_acceptable
        self._buckets: dict[int, Bucket] = {}
        # Of all buckets, the nearest first.
        self._indices: list[int] = []
        self._entries: dict[bytes, Entry] = {}
        self._groups: dict[str, int] = {}
        self._rejected: dict[bytes, str] = {}
        self._struck = 0
        self._sibling_limit = -1

    # --- what happened -----------------------------------------------------------------------------------------------

    def answered(self, contact: Contact, now: float) -> bool:
        """A node answered a FIND_NODE of ours well: refresh its entry, or insert it if there is room; True if it is in.

        Without room it goes to the replacement cache: old live entries win.
        """
        entry = self._entries.get(contact.node_id)
        if entry is None:
            return self._insert(contact, now)
        entry.last_answer = now
        if entry.strikes:
            entry.strikes = 0
            self._struck -= 1
        if entry.contact is not contact and entry.contact.addresses != contact.addresses:
            self._move(entry, contact)
        return True

    def heard(self, contact: Contact, now: float, is_met: bool = True) -> bool:
        """Somebody says that this node exists; True if it is worth a check now. Never changes the entries.

        is_met: the node itself spoke to us, so it may displace the longest unmet in a replacement cache; hearsay may not.
        """
        entry = self._entries.get(contact.node_id)
        if entry is not None:
            return entry.strikes > 0 and is_met
        place = place_of(contact.node_id)
        bucket = self._buckets.get((place ^ self._own).bit_length())
        if bucket is not None and (len(bucket.entries) < self._settings.bucket_size or self.is_sibling(place)):
            bucket = None  # There is room.
        if bucket is not None and not is_met and len(bucket.replacements) >= self._settings.replacements_max:
            return False
        verdict = self._verdict(contact)
        if verdict:
            self._reject(contact.node_id, verdict)
            return False
        if bucket is None:
            return True
        self._keep_replacement(bucket, contact, is_met)
        return False

    def failed(self, node_id: bytes, may_leave: bool = True) -> bool:
        """A node did not answer: a strike. At the last one its entry goes; True if it went.

        may_leave: False while nobody at all answers, which is our own network's fault and must not empty the table.
        """
        entry = self._entries.get(node_id)
        if entry is None:
            self._drop_replacement(node_id)
            return False
        self._struck += not entry.strikes
        entry.strikes = min(entry.strikes + 1, self._settings.strikes)
        if entry.strikes < self._settings.strikes or not may_leave:
            return False
        self.remove(node_id, SILENT)
        return True

    def remove(self, node_id: bytes, why: str) -> bool:
        """Take a node out of the table and the caches, with a reason from this module; True if it was in the table."""
        self._drop_replacement(node_id)
        self._reject(node_id, why)
        entry = self._entries.pop(node_id, None)
        if entry is None:
            return False
        self._buckets[(entry.place ^ self._own).bit_length()].entries.remove(entry)
        self._uncount(entry.group)
        self._struck -= entry.strikes > 0
        self._sibling_limit = -1
        return True

    def touch(self, place: int, now: float) -> None:
        """A lookup into this part of the key space was made, so its bucket needs no refresh for a while."""
        bucket = self._buckets.get((place ^ self._own).bit_length())
        if bucket is not None:
            bucket.touched = now

    def take_replacement(self, index: int) -> Contact | None:
        """Give the most recently met candidate of a bucket that has room, to be checked before it counts."""
        bucket = self._buckets.get(index)
        if bucket is None or not bucket.replacements or len(bucket.entries) >= self._settings.bucket_size:
            return None
        return bucket.replacements.pop()

    # --- what is known -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._entries

    def get(self, node_id: bytes) -> Entry | None:
        """Give a node's entry."""
        return self._entries.get(node_id)

    def entries(self) -> Iterator[Entry]:
        """Give every entry, longest in the table first."""
        return iter(self._entries.values())

    def bucket(self, index: int) -> Bucket | None:
        """Give the bucket of one index: 256 minus the length of the common prefix."""
        return self._buckets.get(index)

    def buckets(self) -> list[tuple[int, Bucket]]:
        """Give (256 - common prefix length, bucket), nearest first."""
        return sorted((index, bucket) for index, bucket in self._buckets.items() if bucket.entries or bucket.replacements)

    def live(self) -> int:
        """Give the number of entries that answered when they were last asked."""
        return len(self._entries) - self._struck

    def closest(self, place: int, count: int, strikes_max: int = RELAY_STRIKES_MAX, but: bytes = b"") -> list[Contact]:
        """Give the entries nearest to a place, in order, without those that failed more often than strikes_max and `but`."""
        found: list[tuple[int, Contact]] = []
        without = (place_of(but) ^ self._own).bit_length()
        for index in self._by_distance(place):
            entries = self._buckets[index].entries
            near = [(entry.place ^ place, entry.contact) for entry in entries if entry.strikes <= strikes_max]
            if index == without:
                near = [pair for pair in near if pair[1].node_id != but]
            near.sort()
            found += near
            if len(found) >= count:
                break
        return [contact for _, contact in found[:count]]

    def siblings(self) -> list[Contact]:
        """Give the k nodes nearest to our own id of all that are known to live: exact, whatever the buckets hold."""
        return self.closest(self._own, self._settings.bucket_size, self._settings.strikes)

    def sibling_distances(self) -> list[int]:
        """Give the distances of the siblings from our own id, nearest first."""
        return [place_of(contact.node_id) ^ self._own for contact in self.siblings()]

    def is_sibling(self, place: int) -> bool:
        """Say whether a place is, or would be, among the k nearest to our own."""
        if self._sibling_limit < 0:
            self._sibling_limit = self._find_sibling_limit()
        return (place ^ self._own) <= self._sibling_limit

    def anchors(self, count: int = 4) -> list[Contact]:
        """Give the nodes that have been in the table for longest and answer: the best ways back after a restart."""
        live = [entry for entry in self._entries.values() if not entry.strikes]
        live.sort(key=_age)
        return [entry.contact for entry in live[:count]]

    def why(self, node_id: bytes) -> str:
        """Say in words why a node is in or out of the table."""
        if node_id == self.own_id:
            return OWN
        entry = self._entries.get(node_id)
        if entry is not None:
            return STRUCK if entry.strikes else IN_TABLE
        bucket = self._buckets.get((place_of(node_id) ^ self._own).bit_length())
        if bucket is not None and any(contact.node_id == node_id for contact in bucket.replacements):
            return WAITING
        return self._rejected.get(node_id, UNKNOWN)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _by_distance(self, place: int) -> list[int]:
        """Give the indices of the buckets in order of distance from a place; their ranges of distance do not overlap.

        A bucket at a bit that the place and our id differ in lies on the place's side at that bit: those come first, the
        highest bit first. Then those at equal bits, the lowest first.
        """
        gap = place ^ self._own
        nearer = [index for index in self._indices if gap >> (index - 1) & 1]
        nearer.reverse()
        return nearer + [index for index in self._indices if not gap >> (index - 1) & 1]

    def _find_sibling_limit(self) -> int:
        distances: list[int] = []
        size = self._settings.bucket_size
        for index in self._indices:
            distances += sorted(entry.place ^ self._own for entry in self._buckets[index].entries)
            if len(distances) >= size:
                return distances[size - 1]
        return 1 << ID_BITS

    def _verdict(self, contact: Contact) -> str:
        """Give why a node that is not in the table may not come in; empty if it may."""
        if contact.node_id == self.own_id:
            return OWN
        if not contact.addresses:
            return NO_ADDRESS
        if self._accept is not None and not self._accept(contact.node_id):
            return NO_PUZZLE
        return self._group_verdict(contact_group(contact, self._settings.strict_diversity), contact.node_id)

    def _group_verdict(self, group: str, node_id: bytes) -> str:
        in_table = self._groups.get(group, 0) if group else 0
        if in_table >= self._settings.per_table_group_max:
            return TABLE_GROUP
        if in_table >= self._settings.per_bucket_group_max:
            bucket = self._buckets.get((place_of(node_id) ^ self._own).bit_length())
            same = sum(1 for entry in bucket.entries if entry.group == group) if bucket else 0
            if same >= self._settings.per_bucket_group_max:
                return BUCKET_GROUP
        return ""

    def _insert(self, contact: Contact, now: float) -> bool:
        verdict = self._verdict(contact)
        if verdict:
            self._reject(contact.node_id, verdict)
            return False
        place = place_of(contact.node_id)
        index = (place ^ self._own).bit_length()
        bucket = self._buckets.get(index)
        if bucket is None:
            bucket = self._buckets[index] = Bucket(now)
            insort(self._indices, index)
        if len(bucket.entries) >= self._settings.bucket_size and not self.is_sibling(place):
            self._keep_replacement(bucket, contact, True)
            return False
        group = contact_group(contact, self._settings.strict_diversity)
        entry = Entry(contact, place, group, now)
        bucket.entries.append(entry)
        self._entries[contact.node_id] = entry
        if group:
            self._groups[group] = self._groups.get(group, 0) + 1
        if bucket.replacements:
            self._drop_replacement(contact.node_id)
        self._rejected.pop(contact.node_id, None)
        self._sibling_limit = -1
        if len(bucket.entries) > self._settings.bucket_size:
            self._trim(bucket)
        return True

    def _trim(self, bucket: Bucket) -> None:
        """A bucket grew beyond k for the sake of a sibling: its newest entry that is no sibling any more makes room."""
        for entry in reversed(bucket.entries):
            if not self.is_sibling(entry.place):
                self.remove(entry.contact.node_id, WAITING)
                self._keep_replacement(bucket, entry.contact, True)
                return

    def _move(self, entry: Entry, contact: Contact) -> None:
        """A node answered at other addresses than known; believed unless that would break the limits per network."""
        group = contact_group(contact, self._settings.strict_diversity)
        if group != entry.group:
            if not contact.addresses or self._group_verdict(group, contact.node_id):
                return
            self._uncount(entry.group)
            entry.group = group
            if group:
                self._groups[group] = self._groups.get(group, 0) + 1
        entry.contact = contact

    def _keep_replacement(self, bucket: Bucket, contact: Contact, is_met: bool) -> None:
        waiting = bucket.replacements
        group = contact_group(contact, self._settings.strict_diversity)
        same = 0
        for position, other in enumerate(waiting):
            if other.node_id == contact.node_id:
                if is_met:
                    del waiting[position]
                    waiting.append(contact)
                return
            same += bool(group) and contact_group(other, self._settings.strict_diversity) == group
        if same >= self._settings.per_bucket_group_max or (len(waiting) >= self._settings.replacements_max and not is_met):
            return
        if is_met:
            waiting.append(contact)
        else:
            waiting.insert(0, contact)
        if len(waiting) > self._settings.replacements_max:
            del waiting[0]

    def _drop_replacement(self, node_id: bytes) -> None:
        bucket = self._buckets.get((place_of(node_id) ^ self._own).bit_length())
        if bucket is not None and bucket.replacements:
            bucket.replacements = [contact for contact in bucket.replacements if contact.node_id != node_id]

    def _reject(self, node_id: bytes, why: str) -> None:
        self._rejected.pop(node_id, None)
        if len(self._rejected) >= REJECTED_MAX:
            del self._rejected[next(iter(self._rejected))]
        self._rejected[node_id] = why

    def _uncount(self, group: str) -> None:
        if group:
            self._groups[group] -= 1
            if not self._groups[group]:
                del self._groups[group]


def _age(entry: Entry) -> float:
    return entry.added_at
