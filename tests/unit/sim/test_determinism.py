"""A run depends on its seed alone, whatever else the process does."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from trio.testing import MockClock

from p2pnode.sim.determinism import deterministic


async def order_of_tasks() -> list[int]:
    """Give the order in which ten tasks run that are always runnable together."""
    order: list[int] = []

    async def run(number: int) -> None:
        for _ in range(200):
            order.append(number)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(run, number)
    return order


def run(seed: int) -> list[int]:
    with deterministic(seed):
        return trio.run(order_of_tasks, clock=MockClock(autojump_threshold=0))


@contextmanager
def another_loop() -> Iterator[None]:
    """Trio runs in another thread, as it does below `p2pnode.connect`, with threads of its own."""
    stop = threading.Event()
    failures: list[BaseException] = []

    async def work() -> None:
        while not stop.is_set():
            await trio.sleep(random.random() / 1e5)
            await trio.to_thread.run_sync(int)

    def loop() -> None:
        try:
            trio.run(work)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failures


def test_the_order_of_tasks_follows_the_seed():
    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_loop_in_another_thread_changes_no_order_and_keeps_its_threads():
    expected = run(1)
    with another_loop():
        assert [run(1) for _ in range(20)] == [expected] * 20


def test_a_simulated_world_has_no_threads():
    async def main() -> None:
        with pytest.raises(RuntimeError, match="has no threads"):
            await trio.to_thread.run_sync(int)

    with deterministic(1):
        trio.run(main)


def test_a_cancellation_reaches_the_oldest_task_first_whatever_its_address():
    """Half of the tasks wait in the cancelled scope itself, the others each in a scope of its own below it."""

    async def main() -> list[int]:
        order: list[int] = []

        async def wait(number: int) -> None:
            def abort(_: object) -> trio.lowlevel.Abort:
                order.append(number)
                return trio.lowlevel.Abort.SUCCEEDED

            if number % 2:
                await trio.lowlevel.wait_task_rescheduled(abort)
            with trio.CancelScope():
                await trio.lowlevel.wait_task_rescheduled(abort)

        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(wait, number)
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        return order

    with deterministic(1):
        assert trio.run(main) == [*range(1, 60, 2), *range(0, 60, 2)]
