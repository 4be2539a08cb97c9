"""Whose workers they are, how many, and which must go."""

from types import SimpleNamespace
from typing import Any

import pytest

from p2pnode.work.pool import SHARED, Handle, Pool
from p2pnode.work.settings import WorkSettings

A, B, MODEL, OTHER = b"a" * 32, b"b" * 32, b"m" * 32, b"o" * 32
MIB = 1 << 20


def handle(model: bytes = MODEL, owner: bytes | None = None, used: float = 0.0, size: int = 100 * MIB) -> Handle:
    worker: Any = SimpleNamespace(alive=True)
    return Handle(worker, model, size, used, owner)


def pool_of(*handles: Handle, **settings: Any) -> Pool:
    pool = Pool(WorkSettings(cores=4, **settings))
    for each in handles:
        pool.add(each)
    return pool


def test_a_worker_of_nobody_is_claimed_once_and_for_ever() -> None:
    fresh = handle()
    pool = pool_of(fresh)
    assert pool.pick(OTHER, A) is None
    assert pool.pick(MODEL, A) is fresh
    assert fresh.owner == A
    assert pool.pick(MODEL, B) is None
    assert pool.pick(MODEL, SHARED) is None
    assert pool.pick(MODEL, A) is fresh


def test_the_least_loaded_worker_goes_first() -> None:
    first, second = handle(owner=A), handle(owner=A)
    pool = pool_of(first, second)
    pool.begin(first, 1, "call")
    assert pool.pick(MODEL, A) is second
    pool.begin(second, 2, "call")
    pool.begin(second, 3, "call")
    assert pool.pick(MODEL, A) is first


def test_busy_workers_are_counted_through_every_end() -> None:
    one, two = handle(owner=A), handle(owner=B)
    pool = pool_of(one, two, cpu_fraction=0.25)
    assert pool.settings.workers_max == 1
    pool.begin(one, 1, "call")
    pool.begin(one, 2, "call")
    assert pool.busy == 1
    assert pool.may_run(one)
    assert not pool.may_run(two)
    pool.end(one, 1, 5.0)
    assert pool.busy == 1
    pool.end(one, 2, 6.0)
    assert (pool.busy, one.used_at) == (0, 6.0)
    pool.begin(one, 3, "call")
    pool.remove(one)
    pool.remove(one)
    assert pool.busy == 0
    pool.end(one, 3, 7.0)
    assert pool.busy == 0
    assert pool.pick(MODEL, A) is None


def test_short_calls_are_handed_over_in_numbers_long_ones_singly() -> None:
    pool = pool_of(worker_calls_max=8, worker_backlog_seconds=0.02)
    pool.learn(MODEL, 0.0001)
    assert pool.depth(MODEL) == 8
    pool.learn(OTHER, 0.005)
    assert pool.depth(OTHER) == 4
    pool.learn(A, 3.0)
    assert pool.depth(A) == 1
    for _ in range(100):
        pool.learn(A, 0.001)
    assert pool.seconds(A) == pytest.approx(0.001, rel=0.01)


def test_workers_follow_the_queue_up_to_a_limit() -> None:
    pool = pool_of(workers_per_model_max=2)
    pool.learn(MODEL, 0.1)
    assert not pool.wants_worker(MODEL, A, 0)
    assert pool.wants_worker(MODEL, A, 1)
    assert pool.begin_start(MODEL, A, MIB) == []
    assert not pool.wants_worker(MODEL, A, 100)
    pool.end_start(MODEL, A)
    pool.add(handle(owner=A))
    assert pool.wants_worker(MODEL, A, 1)
    pool.add(handle(owner=A))
    assert not pool.wants_worker(MODEL, A, 100)
    assert pool.wants_worker(MODEL, B, 1)
    pool.learn(OTHER, 0.0001)
    pool.add(handle(OTHER, A))
    assert not pool.wants_worker(OTHER, A, 10)  # ten short calls are done before another worker has started


def test_memory_is_made_from_the_longest_idle() -> None:
    old, new, busy = handle(used=1.0), handle(used=2.0), handle(owner=A, used=0.0)
    pool = pool_of(old, new, busy, memory_bytes=350 * MIB)
    pool.begin(busy, 1, "call")
    assert pool.begin_start(OTHER, A, 50 * MIB) == []
    pool.end_start(OTHER, A)
    assert pool.begin_start(OTHER, A, 100 * MIB) == [old]
    pool.end_start(OTHER, A)
    assert pool.begin_start(OTHER, A, 250 * MIB) == [old, new]
    pool.end_start(OTHER, A)
    assert pool.begin_start(OTHER, A, 251 * MIB) is None
    assert pool.memory_bytes == 300 * MIB
    new.reserved = 1  # the network is writing into its memory
    assert pool.begin_start(OTHER, A, 200 * MIB) is None


def test_a_start_under_way_holds_its_memory() -> None:
    pool = pool_of(memory_bytes=100 * MIB)
    assert pool.begin_start(MODEL, A, 60 * MIB) == []
    assert pool.begin_start(OTHER, A, 60 * MIB) is None
    assert pool.models() == {MODEL}
    pool.end_start(MODEL, A)
    assert pool.begin_start(OTHER, A, 60 * MIB) == []


def test_idle_workers_end_in_time_and_under_a_smaller_budget() -> None:
    old, new = handle(used=0.0), handle(used=50.0)
    pool = pool_of(old, new, worker_idle_seconds=100.0)
    assert pool.surplus(99.0) == []
    assert pool.next_surplus() == 100.0
    assert pool.surplus(pool.next_surplus()) == [old]
    pool.settings = WorkSettings(cores=4, memory_bytes=100 * MIB, worker_idle_seconds=100.0)
    assert pool.surplus(60.0) == [old]
    pool.settings = WorkSettings(cores=4, memory_bytes=1)
    assert pool.surplus(60.0) == [old, new]


def test_a_model_s_size_counts_twice() -> None:
    assert pool_of(worker_base_bytes=10).worker_bytes(1000) == 2010
