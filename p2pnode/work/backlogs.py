"""The bounded queue: calls that wait for a worker, by model and owner, counted in every way that has a limit."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeAlias

from p2pnode.work.batching import Batcher
from p2pnode.work.calls import WorkTicket
from p2pnode.work.settings import WorkSettings

# (model id, owner key)
BacklogKey: TypeAlias = tuple[bytes, bytes]


class Backlogs:
    """All waiting calls. A call is in at most one backlog; `queued` and `queued_bytes` are exact at any time."""

    def __init__(self, settings: WorkSettings) -> None:
        self.settings = settings
        self.queued = 0
        # Only inputs that lie outside the workers' arenas; those inside are bounded by the arenas.
        self.queued_bytes = 0
        self._by_owner: Counter[bytes] = Counter()
        self._batchers: dict[BacklogKey, Batcher[WorkTicket]] = {}

    def of_owner(self, key: bytes) -> int:
        """How many calls of one owner key wait."""
        return self._by_owner[key]

    def length(self, key: BacklogKey) -> int:
        """How many calls wait for one model's workers of one owner."""
        batcher = self._batchers.get(key)
        return 0 if batcher is None else len(batcher)

    def names(self) -> list[BacklogKey]:
        """Give every backlog that is not empty."""
        return list(self._batchers)

    def tickets(self, key: BacklogKey | None = None) -> list[WorkTicket]:
        """Give the calls of one backlog, or all."""
        if key is not None:
            return self._batchers[key].items() if key in self._batchers else []
        return [ticket for batcher in self._batchers.values() for ticket in batcher.items()]

    def in_place(self, key: BacklogKey) -> list[WorkTicket]:
        """Give the calls of one backlog whose inputs lie in a worker's memory, in the order in which they should run."""
        return sorted((ticket for ticket in self.tickets(key) if ticket.slot is not None), key=_rank)

    def add(self, ticket: WorkTicket, since: float) -> None:
        """Put a call in. since: when it first came, which keeps its place when it is put back."""
        key = (ticket.request.model_id, ticket.key)
        batcher = self._batchers.get(key)
        if batcher is None:
            batcher = self._batchers[key] = Batcher(self.settings)
        batcher.add(ticket.batch_key, ticket, ticket.rows, len(ticket.request.payload), _rank(ticket), since)
        ticket.run_id = 0
        self._count(ticket, 1)

    def remove(self, ticket: WorkTicket) -> bool:
        """Take a call out; False when it is not waiting."""
        key = (ticket.request.model_id, ticket.key)
        batcher = self._batchers.get(key)
        if batcher is None or not batcher.remove(ticket.batch_key, ticket):
            return False
        self._forget_empty(key, batcher)
        self._count(ticket, -1)
        return True

    def first(self, now: float, blocked: set[BacklogKey], is_idle: Callable[[BacklogKey], bool]) -> BacklogKey | None:
        """Give the backlog whose first ready call goes before all others'; those with nothing ready join `blocked`."""
        best, best_rank = None, (1 << 30, 0)
        for key, batcher in self._batchers.items():
            if key in blocked:
                continue
            head = batcher.head(now, idle=is_idle(key))
            if head is None:
                blocked.add(key)
            elif head[0] < best_rank:
                best, best_rank = key, head[0]
        return best

    def head(self, key: BacklogKey, now: float, *, idle: bool) -> WorkTicket | None:
        """Give the first ready call of a backlog without taking it."""
        head = self._batchers[key].head(now, idle=idle)
        return None if head is None else head[1]

    def take(self, key: BacklogKey, now: float, *, idle: bool) -> list[WorkTicket]:
        """Take the first ready call of a backlog and those that run with it."""
        batcher = self._batchers[key]
        tickets = batcher.take(now, idle=idle)
        self._forget_empty(key, batcher)
        for ticket in tickets:
            self._count(ticket, -1)
        return tickets

    def deadline(self, now: float) -> float:
        """When a call expires or a batch becomes ready, whichever is first."""
        expiry = min((ticket.deadline for ticket in self.tickets()), default=float("inf"))
        # A batch that is due but has no worker is woken by the worker's next completion, not by the clock.
        return min([expiry, *(deadline for deadline in self._batch_deadlines() if deadline > now)])

    def _batch_deadlines(self) -> Iterator[float]:
        return (batcher.deadline for batcher in self._batchers.values())

    def _forget_empty(self, key: BacklogKey, batcher: Batcher[WorkTicket]) -> None:
        if not len(batcher):
            del self._batchers[key]

    def _count(self, ticket: WorkTicket, sign: int) -> None:
        self.queued += sign
        if ticket.slot is None:
            self.queued_bytes += sign * len(ticket.request.payload)
        self._by_owner[ticket.key] += sign
        if not self._by_owner[ticket.key]:
            del self._by_owner[ticket.key]


def _rank(ticket: WorkTicket) -> tuple[int, int]:
    return ticket.request.priority, ticket.call_id
