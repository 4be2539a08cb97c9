"""Warm workers: which there are, whose they are, what they hold, and which must go. Pure; the service starts and kills them.

A worker serves one model. It belongs to nobody (just measured), to one client, or to all clients who may share; it never
changes hands afterwards, because what a model has seen may lie in its process. Workers stay warm while memory allows, the least
recently used idle one goes first; how many run at the same time is another limit, the processor's.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from p2pnode.environment import Worker
from p2pnode.work.settings import WorkSettings

# Owner of workers that all clients may use whose orders allow it; no node id is this short.
SHARED: Final = b"shared"
LOCAL: Final = b"local"
# Until a model was measured.
_SECONDS_GUESS: Final = 0.01
# A further worker pays when the backlog takes longer than starting one.
_START_SECONDS: Final = 0.05


@dataclass(slots=True, eq=False)
class Handle:
    """One worker and what it has to do. running: run id -> the service's record, in the order in which they were handed over."""

    worker: Worker
    model_id: bytes
    memory_bytes: int
    used_at: float
    owner: bytes | None = None
    reserved: int = 0
    guilty: int | None = None
    running: dict[int, Any] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        """Neither running nor being filled with an input."""
        return not self.running and not self.reserved


class Pool:
    """All workers of one node."""

    def __init__(self, settings: WorkSettings) -> None:
        self.settings = settings
        self.busy = 0
        self._handles: list[Handle] = []
        self._owned: dict[tuple[bytes, bytes], list[Handle]] = {}
        self._unclaimed: dict[bytes, list[Handle]] = {}
        self._starting: dict[tuple[bytes, bytes], int] = {}
        self._starting_bytes = 0
        self._seconds: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._handles)

    def __iter__(self) -> Iterator[Handle]:
        return iter(self._handles)

    def pick(self, model_id: bytes, owner: bytes) -> Handle | None:
        """Give the least loaded living worker of a model that this owner may use, claiming one of nobody's if need be."""
        handle = self._pick(model_id, owner)
        while handle is not None and not handle.worker.alive:
            self.remove(handle)
            handle = self._pick(model_id, owner)
        return handle

    def _pick(self, model_id: bytes, owner: bytes) -> Handle | None:
        handles = self._owned.get((model_id, owner))
        if handles:
            return handles[0] if len(handles) == 1 else min(handles, key=_load)
        unclaimed = self._unclaimed.get(model_id)
        if not unclaimed:
            return None
        handle = unclaimed.pop()
        handle.owner = owner
        self._owned.setdefault((model_id, owner), []).append(handle)
        return handle

    def of_owner(self, model_id: bytes, owner: bytes) -> Iterable[Handle]:
        """Give the workers of a model that this owner has claimed."""
        return self._owned.get((model_id, owner), ())

    def models(self) -> frozenset[bytes]:
        """Models with a worker, started or starting."""
        return frozenset(handle.model_id for handle in self._handles) | {model_id for model_id, _ in self._starting}

    def add(self, handle: Handle) -> None:
        """Take in a worker that has loaded its model."""
        self._handles.append(handle)
        if handle.owner is None:
            self._unclaimed.setdefault(handle.model_id, []).append(handle)
        else:
            self._owned.setdefault((handle.model_id, handle.owner), []).append(handle)

    def remove(self, handle: Handle) -> None:
        """Forget a worker that died or is about to be killed. Idempotent."""
        if handle not in self._handles:
            return
        self._handles.remove(handle)
        self.busy -= bool(handle.running)
        places = self._unclaimed if handle.owner is None else None
        if places is not None:
            _drop(places, handle.model_id, handle)
        elif handle.owner is not None:
            _drop(self._owned, (handle.model_id, handle.owner), handle)

    def begin(self, handle: Handle, run_id: int, record: Any) -> None:
        """Note a run that is handed to a worker."""
        if not handle.running:
            self.busy += 1
        handle.running[run_id] = record

    def end(self, handle: Handle, run_id: int, now: float) -> None:
        """Note a run's end."""
        if handle.running.pop(run_id, None) is not None and not handle.running and handle in self._handles:
            self.busy -= 1
        handle.used_at = now

    def learn(self, model_id: bytes, seconds: float) -> None:
        """Note how long a call took: an average that forgets, weight 1/8 for the newest."""
        known = self._seconds.get(model_id)
        self._seconds[model_id] = seconds if known is None else known + (seconds - known) / 8

    def seconds(self, model_id: bytes) -> float:
        """Give the expected seconds of one call."""
        return self._seconds.get(model_id, _SECONDS_GUESS)

    def depth(self, model_id: bytes) -> int:
        """How many calls are handed to one worker at once: short ones in numbers, so that it never waits for the loop."""
        calls = int(self.settings.worker_backlog_seconds / max(self.seconds(model_id), 1e-6))
        return max(1, min(calls, self.settings.worker_calls_max))

    def may_run(self, handle: Handle) -> bool:
        """Whether the processor's cap lets this worker run (further) calls."""
        return bool(handle.running) or self.busy < self.settings.workers_max

    def wants_worker(self, model_id: bytes, owner: bytes, queued: int) -> bool:
        """Whether another worker should be started for this many waiting calls of one owner."""
        count = len(self._owned.get((model_id, owner), ()))
        if (model_id, owner) in self._starting or not queued:
            return False
        if not count:
            return True
        limit = min(self.settings.workers_per_model_max, self.settings.workers_max)
        return count < limit and queued * self.seconds(model_id) > _START_SECONDS * count

    def worker_bytes(self, model_bytes: int) -> int:
        """Memory that a worker of a model of this size counts for."""
        return self.settings.worker_base_bytes + 2 * model_bytes

    def begin_start(self, model_id: bytes, owner: bytes, memory_bytes: int) -> list[Handle] | None:
        """Reserve memory for a new worker; gives the idle workers to kill for it, or None when that would not be enough.

        Followed by `end_start` in any case that gave a list.
        """
        victims = self._victims(memory_bytes)
        if victims is not None:
            self._starting[model_id, owner] = memory_bytes
            self._starting_bytes += memory_bytes
        return victims

    def end_start(self, model_id: bytes, owner: bytes) -> None:
        """The start has succeeded or failed."""
        self._starting_bytes -= self._starting.pop((model_id, owner))

    @property
    def memory_bytes(self) -> int:
        """Memory counted for all workers, starting ones included."""
        return sum(handle.memory_bytes for handle in self._handles) + self._starting_bytes

    def surplus(self, now: float) -> list[Handle]:
        """Give idle workers to kill: unused for too long, or over a budget that has shrunk."""
        old = [h for h in self._handles if h.is_idle and now >= h.used_at + self.settings.worker_idle_seconds]
        over = self._victims(0, ignore=old)
        return old + (over if over is not None else [h for h in self._handles if h.is_idle and h not in old])

    def next_surplus(self) -> float:
        """When the next idle worker is unused for too long; infinity without idle workers."""
        return min((h.used_at for h in self._handles if h.is_idle), default=float("inf")) + self.settings.worker_idle_seconds

    def _victims(self, memory_bytes: int, ignore: Iterable[Handle] = ()) -> list[Handle] | None:
        free = self.settings.memory_bytes - self.memory_bytes - memory_bytes + sum(handle.memory_bytes for handle in ignore)
        victims: list[Handle] = []
        for handle in sorted((h for h in self._handles if h.is_idle and h not in ignore), key=lambda h: h.used_at):
            if free >= 0:
                break
            victims.append(handle)
            free += handle.memory_bytes
        return victims if free >= 0 else None


def _load(handle: Handle) -> int:
    return len(handle.running)


def _drop(places: dict[Any, list[Handle]], key: Any, handle: Handle) -> None:
    places[key].remove(handle)
    if not places[key]:
        del places[key]
