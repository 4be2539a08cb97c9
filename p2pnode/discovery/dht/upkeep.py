"""Keeping the routing table true: checks before adding, checks of old entries, refresh, joining and joining again. Pure.

It decides whom to ask and when; `kademlia.Kademlia` asks. Nobody is ever asked at the moment somebody else speaks to us:
checks wait in a bounded queue with jitter, so that strangers cannot have us send (discv5-theory.md: a ping on insertion "is
impractical and creates a DoS vector"). Joining is cheap on purpose: one lookup of our own id, then a handful of entries in
each far bucket, every ask of which is at once the check of the node asked; the rest fills in the course of time.
"""

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from p2pnode.discovery.dht.routing_table import CLIENT, ID_BITS, WRONG_NODE, Entry, RoutingTable, place_of
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import Contact

CHECKS_MAX: Final = 64
CHECKS_IN_FLIGHT_MAX: Final = 8
CHECK_JITTER_SECONDS: Final = 1.0
# A node that failed once is asked again soon, so that a lost packet costs nothing and a death costs others little.
RECHECK_SECONDS: Final = 4.0
# Candidates for far buckets that the answer to a background check may add: hearsay must not set the pace of our checks.
HEARSAY_MAX: Final = 1
# Without any answer for so long it is our own network that is down, and nobody is blamed for not answering.
OUTAGE_SECONDS: Final = 20.0
# Of an entry that answered so recently, another answer says nothing new.
STALE_SECONDS: Final = 10.0
# When more than this share of the stale entries asked lately turned out dead, something has happened to many at once, and old
# entries are checked so many times as often until it is known who is left: the whole table in half a minute, because until
# then everybody is told of the dead. A lost message costs three more checks.
TROUBLE_SHARE: Final = 0.12
TROUBLE_WEIGHT: Final = 0.3
TROUBLE_HASTE: Final = 40.0
NEED_SECONDS: Final = 5.0
NEED_SECONDS_MAX: Final = 60.0
# Small buckets are often fresh; then another one is checked.
BUCKET_TRIES: Final = 3
POOL_MAX: Final = 16
FILL_PARALLEL: Final = 3
# Refusals that a living node gives under load; also our own limits, which the driver reports as BUSY.
ALIVE: Final = frozenset({
    Reason.BUSY, Reason.RATE, Reason.TOO_MANY_REQUESTS, Reason.TOO_MANY_STREAMS, Reason.TOO_MANY_CONNECTIONS,
    Reason.DUPLICATE_SESSION,
})  # fmt: skip


# Why a node is asked: it is a candidate or failed before; it is an old entry; it helps to fill a bucket after joining.
CHECKED: Final = 0
BACKGROUND: Final = 1
FILL: Final = 2


@dataclass(frozen=True, slots=True)
class Check:
    """Ask this node for the nodes nearest to target. kind: CHECKED, BACKGROUND or FILL."""

    contact: Contact
    target: bytes
    kind: int


@dataclass(frozen=True, slots=True)
class Look:
    """Make a lookup. is_self: of our own id."""

    target: bytes
    is_self: bool


@dataclass(frozen=True, slots=True)
class Need:
    """Too few live entries are left to find anybody by."""

    live: int


Wish = Check | Look | Need


class Upkeep:
    """The plan of checks and refreshes of one table. uniform: a float in [0, 1) each call."""

    __slots__ = (
        "_checks", "_fill", "_fill_asks", "_fill_flying", "_in_flight", "_is_placed", "_last_answer", "_need_at", "_need_wait",
        "_next_check", "_next_random", "_next_self", "_queued", "_settings", "_table", "_trouble", "_uniform",
    )  # fmt: skip

    def __init__(self, table: RoutingTable, settings: KademliaSettings, uniform: Callable[[], float], now: float) -> None:
        self._table = table
        self._settings = settings
        self._uniform = uniform
        self._checks: list[tuple[float, bytes, Contact]] = []
        self._queued: dict[bytes, None] = {}
        self._in_flight = 0
        self._fill: dict[int, list[Contact]] = {}
        self._fill_asks: dict[int, int] = {}
        self._fill_flying: dict[bytes, int] = {}
        # Our own id was looked up once, so that we know which nodes are near us.
        self._is_placed = False
        self._last_answer = -inf
        self._next_check = now + settings.check_seconds * uniform()
        self._next_self = inf
        self._next_random = now + settings.self_lookup_seconds * (0.25 + 0.5 * uniform())
        self._need_at = now
        self._need_wait = NEED_SECONDS
        self._trouble = 0.0

    @property
    def deadline(self) -> float:
        """When `tick` has something to do."""
        due = min(self._next_check, self._next_self, self._next_random)
        if self._checks and self._in_flight < CHECKS_IN_FLIGHT_MAX:
            due = min(due, self._checks[0][0])
        return min(due, self._need_at) if self.is_needy else due

    @property
    def is_needy(self) -> bool:
        """Whether so few live entries are left that the network must be entered again."""
        return self._table.live() < self._settings.bucket_size / 4

    def tick(self, now: float) -> list[Wish]:
        """Give what is due."""
        wishes: list[Wish] = []
        if now >= self._next_self:
            self.look_soon(self._after(now, self._settings.self_lookup_seconds))
            wishes.append(Look(self._table.own_id, True))
        if now >= self._next_random:
            # A lookup that nobody else chose the target of: it measures the network, and refreshes some bucket.
            self._next_random = self._after(now, self._settings.self_lookup_seconds)
            if len(self._table):
                wishes.append(Look(self.random_target(ID_BITS), False))
        while self._checks and self._checks[0][0] <= now and self._in_flight < CHECKS_IN_FLIGHT_MAX:
            _, node_id, contact = self._checks.pop(0)
            self._queued.pop(node_id, None)
            self._in_flight += 1
            wishes.append(Check(contact, self._table.own_id, CHECKED))
        if now >= self._next_check:
            self._next_check = now + self._check_wait()
            self._background(now, wishes)
        if now >= self._need_at and self.is_needy:
            self._need_at = now + self._need_wait
            self._need_wait = min(NEED_SECONDS_MAX, self._need_wait * 2)
            wishes.append(Need(self._table.live()))
        return wishes

    def look_soon(self, when: float) -> None:
        """Look up our own id at this time instead of when it would be due."""
        self._next_self = when

    # --- what happened -----------------------------------------------------------------------------------------------

    def met(self, contact: Contact, is_server: bool | None, now: float) -> None:
        """A verified peer spoke to us: a server becomes a candidate, a client leaves. None: it did not say which it is."""
        if contact.node_id == self._table.own_id:
            return
        if is_server is False:
            if contact.node_id in self._table or contact.node_id in self._queued:
                self._table.remove(contact.node_id, CLIENT)
                self._unqueue(contact.node_id)
            return
        if is_server is None and self._table.why(contact.node_id) == CLIENT:
            return
        if contact.node_id not in self._queued and self._table.heard(contact, now):
            self._queue(contact, now + CHECK_JITTER_SECONDS * self._uniform())

    def answered(self, contact: Contact, is_server: bool, now: float) -> None:
        """A FIND_NODE or the like of ours was answered well by this node, as a server or as a client."""
        if -inf < self._last_answer < now - self._outage_seconds:
            # Back after an outage: whoever went and came meanwhile is found by looking for our own id.
            self._next_self = min(self._next_self, now + CHECK_JITTER_SECONDS * self._uniform())
        self._last_answer = now
        entry = self._table.get(contact.node_id)
        if entry is not None and now - entry.last_answer >= STALE_SECONDS:
            self._trouble *= 1 - TROUBLE_WEIGHT
        if not is_server:
            self._table.remove(contact.node_id, CLIENT)
        elif self._table.answered(contact, now):
            self._unqueue(contact.node_id)
        if self._need_wait > NEED_SECONDS and not self.is_needy:
            self._need_wait = NEED_SECONDS

    def failed(self, contact: Contact, reason: Reason | None, now: float) -> None:
        """An ask came to nothing: a strike, unless the reason shows that the node lives."""
        if reason in ALIVE:
            return
        node_id = contact.node_id
        if reason is Reason.WRONG_PEER:
            if self._table.remove(node_id, WRONG_NODE):
                self._replace(node_id, now)
            return
        may_leave = now - self._last_answer < self._outage_seconds
        entry = self._table.get(node_id)
        if entry is not None and not entry.strikes and may_leave:
            self._trouble += TROUBLE_WEIGHT * (1 - self._trouble)
            self._next_check = min(self._next_check, now + self._check_wait())
        if self._table.failed(node_id, may_leave):
            self._replace(node_id, now)
            return
        entry = self._table.get(node_id)
        if entry is not None and entry.strikes < self._settings.strikes and node_id not in self._queued:
            wait = RECHECK_SECONDS * (1.0 if self._trouble > TROUBLE_SHARE else entry.strikes**2)
            self._queue(entry.contact, now + wait * (0.75 + 0.5 * self._uniform()))

    def check_ended(self, kind: int, node_id: bytes) -> None:
        """A `Check` was answered or failed."""
        if kind == FILL:
            self._fill_flying.pop(node_id, None)
        else:
            self._in_flight -= 1

    def told(self, contacts: Sequence[Contact], is_background: bool, now: float) -> None:
        """The answer to a check named these: those we lack near us, and with the background one for a bucket with room.

        Before the first lookup of our own id, with a table nearly empty, everybody seems near; that lookup asks those who are.
        """
        if not self._is_placed and len(self._table) < self._settings.bucket_size:
            return
        left = HEARSAY_MAX if is_background else 0
        for contact in contacts:
            node_id = contact.node_id
            if node_id in self._queued or not self._table.heard(contact, now, is_met=False):
                continue
            if self._table.is_sibling(place_of(node_id)) or left > 0:
                left -= 1
                self._queue(contact, now + CHECK_JITTER_SECONDS * self._uniform())

    # --- joining -----------------------------------------------------------------------------------------------------

    def begin_fill(self, seen: Sequence[Contact], now: float) -> list[Wish]:
        """After a lookup of our own id: put some entries into each far bucket that lacks them. seen: contacts it heard of."""
        self._next_self = self._after(now, self._settings.self_lookup_seconds)
        self._is_placed = True
        own = place_of(self._table.own_id)
        siblings = self._table.siblings()
        if len(siblings) < self._settings.bucket_size:
            return []
        reach = (place_of(siblings[-1].node_id) ^ own).bit_length()
        counts = {index: len(bucket.entries) for index, bucket in self._table.buckets()}
        self._fill = {
            index: [] for index in range(ID_BITS, reach, -1) if counts.get(index, 0) < self._settings.fill
        }  # fmt: skip
        self._fill_asks = dict.fromkeys(self._fill, 0)
        self._pool(seen, now)
        return self.go_on_filling(now)

    def filled(self, contacts: Sequence[Contact], now: float) -> list[Wish]:
        """A fill's answer named these: those of buckets that still lack entries are asked next."""
        if self._fill:
            self._pool(contacts, now)
        return self.go_on_filling(now)

    def go_on_filling(self, now: float) -> list[Wish]:
        """Give the next asks of joining; none when every far bucket has enough, or nobody is left to ask."""
        wishes: list[Wish] = []
        for index in list(self._fill):
            while len(self._fill_flying) < FILL_PARALLEL:
                bucket = self._table.bucket(index)
                have = len(bucket.entries) if bucket is not None else 0
                if have >= self._settings.fill or self._fill_asks[index] >= 2 * self._settings.fill:
                    del self._fill[index]
                    break
                flying = sum(1 for other in self._fill_flying.values() if other == index)
                if have + flying >= self._settings.fill:
                    break
                target = self.random_target(index)
                contact = self._fill_candidate(index, place_of(target), now)
                if contact is None:
                    break
                self._fill_asks[index] += 1
                self._fill_flying[contact.node_id] = index
                wishes.append(Check(contact, target, FILL))
        if not self._fill_flying:
            self._fill = {}
        return wishes

    def random_target(self, index: int) -> bytes:
        """Give a random id in the bucket with this index: half of the key space for the highest."""
        own = place_of(self._table.own_id)
        low = 1 << (index - 1)
        offset = (int(self._uniform() * 2**53) << 203) % low if index > 1 else 0
        return (own ^ (low | offset)).to_bytes(ID_BITS // 8, "big")

    # --- inside ------------------------------------------------------------------------------------------------------

    def _after(self, now: float, seconds: float) -> float:
        return now + seconds * (0.9 + 0.2 * self._uniform())

    @property
    def _age_checked(self) -> float:
        return STALE_SECONDS if self._trouble > TROUBLE_SHARE else self._settings.check_seconds / 2

    def _check_wait(self) -> float:
        haste = TROUBLE_HASTE if self._trouble > TROUBLE_SHARE else 1.0
        return self._settings.check_seconds / haste * (0.7 + 0.3 * self._uniform())

    @property
    def _outage_seconds(self) -> float:
        return max(OUTAGE_SECONDS, 2 * self._settings.check_seconds)

    def _background(self, now: float, wishes: list[Wish]) -> None:
        """Check the oldest entry of a random bucket; refresh the bucket if no lookup went there for long."""
        buckets = self._table.buckets()
        if not buckets:
            return
        for _ in range(BUCKET_TRIES):
            index, bucket = buckets[int(self._uniform() * len(buckets))]
            waiting = [entry for entry in bucket.entries if entry.contact.node_id not in self._queued]
            oldest = min(waiting, key=_last_answer, default=None)
            if oldest is not None and now - oldest.last_answer >= self._age_checked:
                break
        else:
            oldest = None
        if oldest is not None:
            self._in_flight += 1
            near = self._table.is_sibling(oldest.place)
            wishes.append(Check(oldest.contact, self._table.own_id if near else self.random_target(index), BACKGROUND))
        candidate = self._table.take_replacement(index)
        if candidate is not None and candidate.node_id not in self._queued:
            self._queue(candidate, now)
        if now - bucket.touched >= self._settings.idle_bucket_seconds:
            target = self.random_target(index)
            self._table.touch(place_of(target), now)
            wishes.append(Look(target, False))

    def _replace(self, node_id: bytes, now: float) -> None:
        """An entry went: check a replacement, and if it was near us, ask the neighbourhood who else is there."""
        place = place_of(node_id)
        self._unqueue(node_id)
        candidate = self._table.take_replacement((place ^ place_of(self._table.own_id)).bit_length())
        if candidate is not None:
            self._queue(candidate, now + CHECK_JITTER_SECONDS * self._uniform())
        if self._table.is_sibling(place):
            siblings = self._table.siblings()
            if siblings:
                chosen = siblings[int(self._uniform() * len(siblings))]
                self._queue(chosen, now + CHECK_JITTER_SECONDS * self._uniform())

    def _queue(self, contact: Contact, due: float) -> None:
        if len(self._checks) < CHECKS_MAX and contact.node_id not in self._queued:
            self._queued[contact.node_id] = None
            insort(self._checks, (due, contact.node_id, contact), key=_due)

    def _unqueue(self, node_id: bytes) -> None:
        if node_id in self._queued:
            del self._queued[node_id]
            self._checks = [check for check in self._checks if check[1] != node_id]

    def _pool(self, contacts: Sequence[Contact], now: float) -> None:
        own = place_of(self._table.own_id)
        for contact in contacts:
            pool = self._fill.get((place_of(contact.node_id) ^ own).bit_length())
            if pool is not None and len(pool) < POOL_MAX and contact.node_id not in self._table and contact not in pool:
                pool.append(contact)

    def _fill_candidate(self, index: int, place: int, now: float) -> Contact | None:
        """Give whom to ask for a bucket: somebody in it, or to begin with, the nearest known to a place in it."""
        pool = self._fill[index]
        while pool:
            contact = pool.pop(int(self._uniform() * len(pool)))
            if contact.node_id not in self._fill_flying and self._table.heard(contact, now, is_met=False):
                return contact
        if self._fill_asks[index]:
            return None
        return next(
            (near for near in self._table.closest(place, FILL_PARALLEL + 1) if near.node_id not in self._fill_flying), None
        )


def _last_answer(entry: Entry) -> float:
    return entry.last_answer


def _due(check: tuple[float, bytes, Contact]) -> float:
    return check[0]
