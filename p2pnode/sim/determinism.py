"""Makes one run of trio depend on nothing but its seed.

Trio picks the order of tasks that are runnable at the same time by a generator of its own, breaks ties of equal deadlines by
memory addresses, and keeps the tasks of a cancel scope in sets, so that a cancellation reaches them in the order of their
addresses: what each does when it is told shows in the trace. All three are private; trio's version is pinned, and a test runs the
same worlds in two processes with different hash seeds and compares their traces.
"""

import gc
import random  # noqa: TID251 - only to seed trio's own scheduler
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import heappush
from itertools import count
from operator import attrgetter
from threading import get_ident
from typing import Any

import trio

# A large world holds millions of long-lived objects and little garbage that only a collection finds. So the young ones are
# collected rarely, and the older generations hardly ever: that took a tenth of the time.
_YOUNG_OBJECTS = 500_000
_COLLECTIONS = 100


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """For the block, trio's scheduler in this thread follows the seed, and threads are forbidden to it.

    Virtual time runs on while a thread works, so two runs would differ. Loops of other threads go on as before.
    """
    import trio._core._run as scheduler

    private: Any = scheduler
    former = private._ALLOW_DETERMINISTIC_SCHEDULING, private._r, private.Deadlines.add, trio.to_thread.run_sync
    former_status = private.CancelStatus
    draws, own, ties = random.Random(seed), get_ident(), count()

    class Draws:
        """Trio keeps one generator for the loops of all threads; a draw by another one's loop must not move ours."""

        def __getattr__(self, name: str) -> Any:
            return getattr(draws if get_ident() == own else former[1], name)

    def add(deadlines: Any, deadline: float, scope: Any) -> None:
        heappush(deadlines._heap, (deadline, next(ties), scope))
        deadlines._active += 1

    def run_sync(function: Any, *arguments: Any, **options: Any) -> Any:
        if get_ident() == own:
            raise RuntimeError(f"a simulation has no threads; run {function} through environment.executor")
        return former[3](function, *arguments, **options)

    private._ALLOW_DETERMINISTIC_SCHEDULING = True
    private._r = Draws()
    private.Deadlines.add = add
    private.CancelStatus = _orderly(former_status)
    trio.to_thread.run_sync = run_sync  # type: ignore[assignment]
    thresholds = gc.get_threshold()
    gc.set_threshold(_YOUNG_OBJECTS, _COLLECTIONS, _COLLECTIONS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        private.CancelStatus = former_status
        private._ALLOW_DETERMINISTIC_SCHEDULING, private._r, private.Deadlines.add, trio.to_thread.run_sync = former


def _orderly(cancel_status: Any) -> Any:
    """Give a kind of trio's CancelStatus that tells its tasks of a cancellation from the oldest to the newest."""
    serials = count(1)
    by_age = attrgetter("_counter")

    class OrderlyCancelStatus(cancel_status):  # type: ignore[misc]
        __slots__ = ("serial",)

        def __init__(self, **fields: Any) -> None:
            self.serial = next(serials)
            super().__init__(**fields)

        def recalculate(self) -> None:
            todo = [self]
            while todo:
                current = todo.pop()
                scope = current._scope
                is_parents = current.parent_cancellation_is_visible_to_us
                is_cancelled = scope.cancel_called or is_parents
                if is_cancelled == current.effectively_cancelled:
                    continue
                if scope._cancel_reason is None and is_parents:
                    scope._cancel_reason = current._parent._scope._cancel_reason
                current.effectively_cancelled = is_cancelled
                if is_cancelled:
                    for task in sorted(current._tasks, key=by_age):
                        task._attempt_delivery_of_any_pending_cancel()
                todo.extend(sorted(current._children, key=_serial, reverse=True))

    return OrderlyCancelStatus


def _serial(status: Any) -> int:
    return getattr(status, "serial", 0)  # those of loops in other threads may have none
