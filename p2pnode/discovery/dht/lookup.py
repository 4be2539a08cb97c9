"""One lookup: from the nearest nodes we know to the nearest nodes there are. A pure machine without timers of its own.

alpha asks are kept in flight, not sent in rounds; the lookup is over when the k nearest live nodes have answered. Failed
ones leave the result, and of one network only a few count, at every moment, so that a crowd of identities at one place can
neither stand in the result nor use up the asks. A region lookup goes on until everybody within a radius was asked: whoever
crowds around the key with addresses in many networks can stand nearest, but cannot push the honest nodes out of the region
(arXiv 2307.12212, 2505.01139). Driven by `kademlia.Kademlia`, which owns time-outs and ids.
"""

from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import inf
from typing import Final

from p2pnode.discovery.addresses import is_address
from p2pnode.discovery.dht.routing_table import place_of
from p2pnode.discovery.diversity import group_of, has_room
from p2pnode.discovery.records.record import CheckedRecord
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.wire.messages.discovery import CONTACTS_MAX, Contact

# What one lookup remembers: candidates in all, and of one network. An honest network needs some fifty.
CANDIDATES_MAX: Final = 512
GROUP_CANDIDATES_MAX: Final = 8
# Asks of a lookup without a region, however many nodes claim to be still nearer and then do not answer.
NEAREST_ASKS_MAX: Final = 96
# So many dead referrals and no live one, and what a node named is asked after everything else.
DEAD_REFERRALS_MAX: Final = 3
# Beyond a region, so many nodes of each of the bands up to 2 and 4 times its radius are asked too: when everybody known within
# it is one crowd, all of them name each other only, and honest nodes around it are the way to the honest nodes inside.
SHORE_BANDS: Final = 2
SHORE_ASKS: Final = 3
# A region with more than this many times k candidates is crowded by somebody: agreement near the key proves nothing there.
CROWD_FACTOR: Final = 2

# Asks under way at once, in alphas, when some of them are late.
FLYING_FACTOR: Final = 2

WAITING: Final = 0
ASKED: Final = 1
ANSWERED: Final = 2


@lru_cache(maxsize=1 << 17)
def _usable_group(address: str, strict: bool) -> str | None:
    return group_of(address, strict) if is_address(address) else None


class Candidate:
    """A node that the lookup has heard of. depth: how many asks it took to hear of it. dead, live: how its referrals went."""

    __slots__ = ("asked_at", "contact", "dead", "depth", "distance", "group", "live", "referrer", "sequence", "state")

    def __init__(self, contact: Contact, distance: int, group: str, depth: int, referrer: "Candidate | None") -> None:
        self.contact = contact
        self.distance = distance
        self.group = group
        self.depth = depth
        self.referrer = referrer
        self.state = WAITING
        self.dead = 0
        self.live = 0
        self.sequence = -1
        self.asked_at = 0.0


class Lookup:
    """The state of one lookup. The driver asks whom `next` gives and reports each with `answered` or `failed`.

    radius: 0 for the k nearest only, otherwise everybody within it too. quorum: equal records that end it; 0 to go on to
    the end. is_acceptable: says whether an id solves the network's puzzle.
    """

    __slots__ = (
        "_accept", "_agreeing", "_by_distance", "_far_turn", "_groups", "_in_flight", "_order", "_own_id", "_place", "_quorum",
        "_seen", "_settings", "asked", "best", "failures", "is_over", "providers", "radius", "target",
    )  # fmt: skip

    def __init__(
        self,
        target: bytes,
        own_id: bytes,
        settings: KademliaSettings,
        radius: int = 0,
        quorum: int = 0,
        is_acceptable: Callable[[bytes], bool] | None = None,
    ) -> None:
        self.target = target
        self.radius = radius
        self.asked = 0
        self.failures = 0
        self.is_over = False
        self.best: CheckedRecord | None = None
        self.providers: dict[bytes, Contact] = {}
        self._place = place_of(target)
        self._own_id = own_id
        self._settings = settings
        self._quorum = quorum
        self._accept = is_acceptable
        self._seen: dict[bytes, Candidate | None] = {own_id: None}
        self._by_distance: dict[int, Candidate] = {}
        self._order: list[int] = []
        self._groups: dict[str, int] = {}
        self._in_flight: list[Candidate] = []
        self._agreeing = 0
        self._far_turn = False

    # --- events ------------------------------------------------------------------------------------------------------

    def add_seeds(self, contacts: Sequence[Contact]) -> None:
        """Begin from these: entries of our own table, or entry points."""
        for contact in contacts:
            self._add(contact, 1, None)

    def answered(
        self, node_id: bytes, contacts: Sequence[Contact], wanted: int, address: str = "", is_server: bool = True
    ) -> None:
        """A node answered with contacts; those beyond what was wanted are ignored. address: where it was reached, if known.

        is_server: False for a node that leads on but does not belong into the result.
        """
        candidate = self._seen.get(node_id)
        if candidate is None or candidate.state != ASKED:
            return
        candidate.state = ANSWERED
        self._in_flight.remove(candidate)
        if candidate.referrer is not None:
            candidate.referrer.live += 1
        if address and address != candidate.contact.addresses[0]:
            self._reached_at(candidate, address)
        depth = candidate.depth + 1
        seen = self._seen
        for contact in contacts[:wanted]:
            known = seen.get(contact.node_id)
            if known is None:
                if contact.node_id not in seen:
                    self._add(contact, depth, candidate)
            elif known.referrer is not None and known.referrer is not candidate and _is_distrusted(known.referrer):
                known.referrer = candidate
        if not is_server:
            self._drop(candidate)

    def failed(self, node_id: bytes) -> None:
        """A node did not answer, or not well: it leaves the result, and whoever named it is trusted less."""
        candidate = self._seen.get(node_id)
        if candidate is None or candidate.state != ASKED:
            return
        self._in_flight.remove(candidate)
        self.failures += 1
        if candidate.referrer is not None:
            candidate.referrer.dead += 1
        self._drop(candidate)

    def holds(self, node_id: bytes, record: CheckedRecord) -> None:
        """A node has this record. Call it before `answered`. Enough equal ones end the lookup.

        In a region lookup a node that is nearer than the first one is expected does not count: whoever ground ids to be asked
        first could otherwise agree with itself on an old version before anybody else is asked.
        """
        candidate = self._seen.get(node_id)
        counts = 1
        if candidate is not None:
            candidate.sequence = record.sequence
            counts = int(candidate.distance * self._settings.bucket_size >= self.radius)
        best = self.best
        if best is None or record.sequence > best.sequence:
            self.best, self._agreeing = record, counts
        elif record.data == best.data:
            self._agreeing += counts
        elif record.sequence == best.sequence and record.data > best.data:
            # Its publisher signed two records with one sequence. Any rule will do as long as all readers have the same one.
            self.best, self._agreeing = record, counts
        if self._quorum and self._agreeing >= self._quorum and not self.is_crowded():
            self.is_over = True

    # --- decisions ---------------------------------------------------------------------------------------------------

    def next(self, now: float = 0.0, patience_seconds: float = inf) -> list[Candidate]:
        """Give whom to ask now. An empty list with nothing more to come sets `is_over`.

        patience_seconds: an ask under way for longer is probably to a dead node and no longer counts towards alpha, though
        its answer does; so dead nodes delay a lookup less than their time-outs. At most FLYING_FACTOR times alpha are under way.
        """
        if self.is_over:
            return []
        flying, alpha = len(self._in_flight), self._settings.alpha
        room = alpha - flying
        if room < alpha and now:
            oldest = now - patience_seconds
            late = sum(1 for candidate in self._in_flight if candidate.asked_at <= oldest)
            room = min(FLYING_FACTOR * alpha - flying, room + late)
        if room <= 0:
            return []
        chosen, is_settled = self._choose(room, skip_distrusted=True)
        if not chosen and is_settled:
            chosen, is_settled = self._choose(room, skip_distrusted=False)
        if not chosen and is_settled:
            self.is_over = True
        for candidate in chosen:
            candidate.state = ASKED
            candidate.asked_at = now
        self._in_flight += chosen
        self.asked += len(chosen)
        return chosen

    def wanted(self, candidate: Candidate) -> int:
        """Give how many contacts to ask a node for: more near a region, to see past a crowd around the key."""
        return CONTACTS_MAX if candidate.distance <= self.radius << SHORE_BANDS else self._settings.bucket_size

    def impatient_at(self, now: float, patience_seconds: float) -> float:
        """Give when `next` may have somebody more to ask although nothing has been answered; inf for never."""
        if self.is_over or len(self._in_flight) >= FLYING_FACTOR * self._settings.alpha:
            return inf
        times = (candidate.asked_at + patience_seconds for candidate in self._in_flight)
        return min((at for at in times if at > now), default=inf)

    def is_crowded(self) -> bool:
        """Say whether far more nodes claim to be near the target than the network's size allows.

        Of those not asked yet, only the share counts that has answered of those asked: after half of a network has lost
        power, the dead that are still named are no crowd. Whoever wants to crowd a place must answer to be believed there.
        """
        limit = CROWD_FACTOR * self._settings.bucket_size
        if not self.radius or (near := bisect_right(self._order, self.radius)) <= limit:
            return False
        answered = sum(self._by_distance[distance].state == ANSWERED for distance in self._order[:near])
        ended = self.asked - len(self._in_flight)
        share = 1.0 - self.failures / ended if ended else 1.0
        return answered + share * (near - answered) > limit

    def _choose(self, room: int, skip_distrusted: bool) -> tuple[list[Candidate], bool]:
        """Walk the candidates from the nearest on; gives whom to ask, and whether nothing that counts is in flight."""
        size, group_max, radius = self._settings.bucket_size, self._settings.result_group_max, self.radius
        may_ask = self.asked < (self._settings.region_asks_max if radius else NEAREST_ASKS_MAX)
        groups: dict[str, int] = {}
        near: list[Candidate] = []
        region: list[Candidate] = []
        counted = 0
        is_settled = True
        by_distance = self._by_distance
        for distance in self._order:
            if counted >= size and distance > radius:
                break
            candidate = by_distance[distance]
            if skip_distrusted and candidate.state == WAITING and candidate.referrer and _is_distrusted(candidate.referrer):
                continue
            group = candidate.group
            if group:
                seen = groups.get(group, 0)
                if seen >= group_max:
                    continue
                groups[group] = seen + 1
            counted += 1
            if candidate.state == ASKED:
                is_settled = False
            elif candidate.state == WAITING and may_ask:
                if counted > size:
                    region.append(candidate)
                else:
                    near.append(candidate)
                    if not radius and len(near) >= room:
                        return near, False
        if radius and may_ask:
            is_settled = self._look_from_shore(near, region) and is_settled
        # From both ends of the region in turn: a crowd at the key takes half of the asks at most.
        chosen: list[Candidate] = []
        near += region
        while near and len(chosen) < room:
            chosen.append(near.pop() if self._far_turn and region else near.pop(0))
            self._far_turn = not self._far_turn
        return chosen, is_settled

    def _look_from_shore(self, near: list[Candidate], region: list[Candidate]) -> bool:
        """Add to `region` whom to ask beyond it, those that our own table knew first; gives whether none is in flight there."""
        is_settled = True
        outer = self.radius
        for _ in range(SHORE_BANDS):
            inner, outer = outer, outer << 1
            low, high = bisect_right(self._order, inner), bisect_right(self._order, outer)
            band = [self._by_distance[distance] for distance in self._order[low:high]]
            flying = sum(1 for candidate in band if candidate.state == ASKED)
            missing = SHORE_ASKS - flying - sum(1 for candidate in band if candidate.state == ANSWERED)
            is_settled = is_settled and not flying
            if missing > 0:
                waiting = [candidate for candidate in band if candidate.state == WAITING and candidate not in near]
                waiting.sort(key=_depth)
                region += waiting[:missing]
        return is_settled

    # --- outcome -----------------------------------------------------------------------------------------------------

    def found(self) -> list[Candidate]:
        """Give those that answered and count: the k nearest, and in a region lookup all within it, nearest first."""
        groups: dict[str, int] = {}
        found: list[Candidate] = []
        for distance in self._order:
            if len(found) >= self._settings.bucket_size and distance > self.radius:
                break
            candidate = self._by_distance[distance]
            if candidate.state == ANSWERED and has_room(groups, candidate.group, self._settings.result_group_max):
                found.append(candidate)
        return found

    def outdated(self) -> list[Contact]:
        """Give those of the k nearest that answered without the best record: they should have it."""
        if self.best is None:
            return []
        near = self.found()[: self._settings.bucket_size]
        return [candidate.contact for candidate in near if candidate.sequence < self.best.sequence]

    def unasked(self) -> list[Contact]:
        """Give the contacts that were named but not asked, nearest first."""
        by_distance = self._by_distance
        return [by_distance[distance].contact for distance in self._order if by_distance[distance].state == WAITING]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _add(self, contact: Contact, depth: int, referrer: Candidate | None) -> None:
        node_id = contact.node_id
        if node_id in self._seen or not contact.addresses:
            return
        group = _usable_group(contact.addresses[0], self._settings.strict_diversity)
        if group is None or (self._accept is not None and not self._accept(node_id)):
            return
        if group:
            same = self._groups.get(group, 0)
            if same >= GROUP_CANDIDATES_MAX:
                return
            self._groups[group] = same + 1
        elif referrer is not None and referrer.group:
            # A node on the internet names an address in a private network: useless, or an attempt to have us knock there.
            return
        distance = place_of(node_id) ^ self._place
        candidate = Candidate(contact, distance, group, depth, referrer)
        self._seen[node_id] = candidate
        self._by_distance[distance] = candidate
        insort(self._order, distance)
        if len(self._order) > CANDIDATES_MAX:
            # Whoever is being asked stays, so that the count of asks in flight remains right.
            self._drop(next(far for far in map(self._by_distance.__getitem__, reversed(self._order)) if far.state != ASKED))

    def _drop(self, candidate: Candidate) -> None:
        del self._by_distance[candidate.distance]
        self._order.pop(bisect_right(self._order, candidate.distance) - 1)
        self._seen[candidate.contact.node_id] = None
        if candidate.group:
            self._groups[candidate.group] -= 1

    def _reached_at(self, candidate: Candidate, address: str) -> None:
        """Count a node to the network it answered from, whatever was said of it."""
        others = tuple(other for other in candidate.contact.addresses if other != address)
        candidate.contact = Contact(candidate.contact.node_id, (address, *others)[:4])
        group = _usable_group(address, self._settings.strict_diversity) or ""
        if group != candidate.group:
            if candidate.group:
                self._groups[candidate.group] -= 1
            if group:
                self._groups[group] = self._groups.get(group, 0) + 1
            candidate.group = group


def _depth(candidate: Candidate) -> int:
    return candidate.depth


def _is_distrusted(referrer: Candidate) -> bool:
    return referrer.dead >= DEAD_REFERRALS_MAX and not referrer.live
