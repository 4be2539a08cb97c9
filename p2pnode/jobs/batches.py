"""The machine of a map: which item goes to which provider next, when a copy is hedged, when it is over.

Pure: `handle(event, now)` and `tick(now)` give effects, the service performs them. Each item is waiting, placed (with one or
two providers), done or failed. Each provider is a lane with a bounded number of calls in flight; a lane without room gets
nothing, so a slow provider takes less and a lost one returns what it held. A provider that has no room for more gets fewer at
once, and rests where it holds nothing; its items did not fail.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from p2pnode.jobs.back_pressure import PASSING_REASONS, Ceiling, is_back_pressure
from p2pnode.jobs.hedging import Latencies
from p2pnode.jobs.retries import Cause, backoff_seconds, cause_of, reason_of
from p2pnode.jobs.settings import JobSettings
from p2pnode.reasons import EndReason, Reason

# A model that fails this many items before any succeeds is not worth its price.
_FAILURES_WITHOUT_SUCCESS_MAX = 16


@dataclass(frozen=True, slots=True)
class LaneOpened:
    """An agreement with a provider stands. key: whatever names it."""

    key: bytes
    capacity: int


@dataclass(frozen=True, slots=True)
class LaneClosed:
    """A provider is gone; what it held is placed again."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Answered:
    """An item's outputs are stored. amount in micro-credits; seconds of the whole call, None for one from before a restart."""

    position: int
    key: bytes
    amount: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A copy of an item failed. jitter in [0, 1) for the back-off."""

    position: int
    key: bytes
    error: Exception
    jitter: float


@dataclass(frozen=True, slots=True)
class Stopped:
    """The owner wants the job to end, or its deadline passed."""

    end: EndReason
    reason: Reason


Event = LaneOpened | LaneClosed | Answered | CallFailed | Stopped


@dataclass(frozen=True, slots=True)
class Place:
    """Send this item to this lane. is_hedge: a second copy."""

    position: int
    key: bytes
    is_hedge: bool = False


@dataclass(frozen=True, slots=True)
class CancelCopy:
    """The other copy won: stop this one if it still can be."""

    position: int
    key: bytes


@dataclass(frozen=True, slots=True)
class GaveUp:
    """This item failed for good."""

    position: int
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing is in flight and nothing more will be: the one end reason."""

    end: EndReason
    reason: Reason | None = None
    detail: str = ""


Effect = Place | CancelCopy | GaveUp | Finished


@dataclass(slots=True)
class _Lane:
    """One provider. refusals: for lack of room while it held nothing, in a row, the first of them at refused_since."""

    capacity: int
    holds: set[int] = field(default_factory=set)
    ceiling: Ceiling = field(default_factory=Ceiling)
    refusals: int = 0
    refused_since: float = 0.0
    rests_until: float = 0.0

    @property
    def limit(self) -> int:
        return min(self.capacity, self.ceiling.calls)

    def has_room(self, now: float) -> bool:
        return len(self.holds) < self.limit and now >= self.rests_until

    def answered(self) -> None:
        self.ceiling.answered()
        self.refusals = 0
        self.rests_until = 0.0


@dataclass(slots=True)
class _Copies:
    sent: dict[bytes, float]
    hedged: bool = False


class MapMachine:
    """Items 0 to count-1 over changing lanes. done: positions whose outputs were stored before a restart."""

    def __init__(self, settings: JobSettings, count: int, done: Iterable[int] = ()) -> None:
        self._settings = settings
        self.count = count
        self._finished = bytearray(count)
        for position in done:
            self._finished[position] = 1
        self.done = sum(self._finished)
        self.failed = 0
        self.latencies = Latencies(settings)
        self._lanes: dict[bytes, _Lane] = {}
        self._placed: dict[int, _Copies] = {}
        self._failures: dict[int, int] = {}
        self._avoid: dict[int, bytes] = {}
        self._cursor = 0
        self._ready: list[int] = []
        self._later: list[tuple[float, int]] = []
        self._ending: Finished | None = None
        self._over = False

    @property
    def in_flight(self) -> int:
        """Copies being executed now."""
        return sum(len(lane.holds) for lane in self._lanes.values())

    @property
    def wants_lanes(self) -> bool:
        """True while items wait and no lane has room for them."""
        waiting = self.count - self.done - self.failed - len(self._placed)
        if self._ending is not None or waiting <= 0:
            return False
        return all(lane.refusals or len(lane.holds) >= lane.limit for lane in self._lanes.values())

    def holds(self, key: bytes) -> bool:
        """Say whether a lane has calls in flight."""
        return key in self._lanes and bool(self._lanes[key].holds)

    def adopt(self, position: int, key: bytes, now: float) -> None:
        """Take over an item that was placed before a restart: no copy is made before it is known what became of its call."""
        self._lanes[key].holds.add(position)
        self._placed[position] = _Copies({key: now}, hedged=True)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event and say what to do."""
        effects: list[Effect] = []
        match event:
            case LaneOpened(key, capacity):
                self._lanes.setdefault(key, _Lane(capacity)).capacity = capacity
            case LaneClosed(key):
                self._close(key)
            case Answered():
                effects += self._answered(event)
            case CallFailed():
                effects += self._failed(event, now)
            case Stopped(end, reason):
                self._ending = self._ending or Finished(end, reason)
        return effects + self.tick(now)

    def tick(self, now: float) -> list[Effect]:
        """Place what can be placed at this time."""
        if self._over:
            return []
        effects: list[Effect] = []
        while self._later and self._later[0][0] <= now:
            heapq.heappush(self._ready, heapq.heappop(self._later)[1])
        if self._ending is None:
            effects += self._place(now)
            effects += self._hedge(now)
        if (self._ending is not None or self.done + self.failed == self.count) and not self.in_flight:
            self._over = True
            effects.append(self._end())
        return effects

    def deadline(self, now: float) -> float:
        """When the next tick is due without an event; infinity when only events matter."""
        times = [self._later[0][0]] if self._later else []
        times += [lane.rests_until for lane in self._lanes.values()]
        wait = self.latencies.hedge_after_seconds()
        if wait is not None and self._ending is None and len(self._lanes) > 1:
            times += [time + wait for copies in self._placed.values() if not copies.hedged for time in copies.sent.values()]
        return min((time for time in times if time > now), default=float("inf"))

    def _place(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        unfit: set[bytes] = set()
        while (key := self._roomiest(now, unfit)) is not None:
            position = self._next(key)
            if position is None:
                unfit.add(key)
            else:
                effects.append(self._send(position, key, now, is_hedge=False))
        return effects

    def _send(self, position: int, key: bytes, now: float, *, is_hedge: bool) -> Place:
        copies = self._placed.setdefault(position, _Copies({}))
        copies.sent[key] = now
        copies.hedged = copies.hedged or is_hedge
        self._lanes[key].holds.add(position)
        return Place(position, key, is_hedge)

    def _hedge(self, now: float) -> list[Effect]:
        wait = self.latencies.hedge_after_seconds()
        # A copy costs money, so it is made only when no fresh item wants the room.
        if wait is None or self._ready or self._cursor < self.count:
            return []
        effects: list[Effect] = []
        for position, copies in sorted(self._placed.items()):
            if copies.hedged or not copies.sent or now < min(copies.sent.values()) + wait:
                continue
            key = self._roomiest(now, set(copies.sent))
            if key is not None:
                effects.append(self._send(position, key, now, is_hedge=True))
        return effects

    def _roomiest(self, now: float, excluded: set[bytes]) -> bytes | None:
        free = [
            (len(lane.holds) / lane.limit, key) for key, lane in self._lanes.items() if key not in excluded and lane.has_room(now)
        ]
        return min(free)[1] if free else None

    def _next(self, key: bytes) -> int | None:
        avoided: list[int] = []
        found: int | None = None
        while self._ready and found is None:
            position = heapq.heappop(self._ready)
            if self._finished[position] or position in self._placed:
                continue
            # Somebody else should try what this provider failed, where there is somebody else.
            if self._avoid.get(position) == key and self._has_other(key):
                avoided.append(position)
            else:
                found = position
        for position in avoided:
            heapq.heappush(self._ready, position)
        if found is not None:
            return found
        while self._cursor < self.count:
            position, self._cursor = self._cursor, self._cursor + 1
            if not self._finished[position] and position not in self._placed:
                return position
        return None

    def _has_other(self, key: bytes) -> bool:
        return any(lane.capacity for other, lane in self._lanes.items() if other != key)

    def _answered(self, event: Answered) -> list[Effect]:
        self._release(event.position, event.key)
        if event.key in self._lanes:
            self._lanes[event.key].answered()
        copies = self._placed.pop(event.position, None)
        if self._finished[event.position]:
            return []
        self._finished[event.position] = 1
        self.done += 1
        if event.seconds is not None:
            self.latencies.add(event.seconds)
        self._failures.pop(event.position, None)
        # Copies stay in their lanes until the provider answers the cancellation: their room is not free before that.
        return [CancelCopy(event.position, key) for key in (copies.sent if copies else ())]

    def _failed(self, event: CallFailed, now: float) -> list[Effect]:
        self._release(event.position, event.key)
        is_to_wait = self._has_no_room(event, now)
        copies = self._placed.get(event.position)
        if self._finished[event.position] or (copies is not None and copies.sent):
            return []
        self._placed.pop(event.position, None)
        cause = cause_of(event.error)
        if cause is Cause.OURS or is_to_wait:
            heapq.heappush(self._ready, event.position)
            return []
        failures = self._failures[event.position] = self._failures.get(event.position, 0) + 1
        detail = getattr(event.error, "detail", "") or str(event.error)
        if cause is Cause.INPUT or failures >= self._settings.attempts_max:
            return self._give_up(event.position, reason_of(event.error), detail)
        self._avoid[event.position] = event.key
        heapq.heappush(self._later, (now + backoff_seconds(self._settings, failures, event.jitter), event.position))
        return []

    def _has_no_room(self, event: CallFailed, now: float) -> bool:
        """Note a refusal for lack of room; says whether the item merely waits for it, which is no failure.

        A provider that holds something will have room when that has ended. One that holds nothing is full of others' work: it
        is tried less and less often, with one item; when nobody else is left, for so long and no longer.
        """
        is_to_wait, lane = is_back_pressure(event.error), self._lanes.get(event.key)
        if lane is None or reason_of(event.error) not in PASSING_REASONS:
            return is_to_wait
        lane.ceiling.refused(len(lane.holds))
        if is_to_wait and not lane.holds:
            lane.refused_since = lane.refused_since if lane.refusals else now
            lane.refusals += 1
            lane.rests_until = now + backoff_seconds(self._settings, lane.refusals, event.jitter)
            oldest = now - self._settings.retry_total_seconds
            open_lanes = [each for each in self._lanes.values() if each.capacity]
            if open_lanes and all(each.refusals and each.refused_since < oldest for each in open_lanes):
                self._ending = self._ending or Finished(EndReason.REFUSED, reason_of(event.error), str(event.error))
        return is_to_wait

    def _give_up(self, position: int, reason: Reason, detail: str) -> list[Effect]:
        self._finished[position] = 2
        self.failed += 1
        if not self.done and self.failed >= min(_FAILURES_WITHOUT_SUCCESS_MAX, self.count):
            self._ending = self._ending or Finished(EndReason.FAILED, reason, detail)
        return [GaveUp(position, reason, detail)]

    def _close(self, key: bytes) -> None:
        lane = self._lanes.pop(key, None)
        for position in sorted(lane.holds) if lane else ():
            self._take_back(position, key)

    def _take_back(self, position: int, key: bytes) -> None:
        self._release(position, key)
        copies = self._placed.get(position)
        if copies is not None and not copies.sent:
            del self._placed[position]
            if not self._finished[position]:
                heapq.heappush(self._ready, position)

    def _release(self, position: int, key: bytes) -> None:
        lane = self._lanes.get(key)
        if lane is not None:
            lane.holds.discard(position)
        copies = self._placed.get(position)
        if copies is not None:
            copies.sent.pop(key, None)

    def _end(self) -> Finished:
        if self.done == self.count:
            return Finished(EndReason.COMPLETED)
        if self._ending is not None:
            return self._ending
        return Finished(EndReason.FAILED, Reason.RUN_FAILED, f"{self.failed} of {self.count} items failed")
