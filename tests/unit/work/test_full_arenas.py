"""When a worker's memory is full: whatever waits runs as soon as it can, nothing waits for itself, and no newcomer goes first."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio
from onnx import TensorProto, helper

from p2pnode.errors import Refused
from p2pnode.reasons import Reason
from p2pnode.wire import tensors
from p2pnode.work.pool import Handle
from p2pnode.work.service import WorkOutcome, WorkSettings

ALICE, BOB = b"a" * 32, b"b" * 32
ROW = 16
# Inputs of several calls may have twenty rows of these forty.
SMALL = WorkSettings(
    cores=2, batch_size_max=1, worker_calls_max=1, workers_per_model_max=1, arena_bytes=40 * ROW, call_seconds_max=60.0
)


class Client:
    """Calls of a doubling model whose answers are checked and released as they come."""

    def __init__(self, bench: Any, model_id: bytes) -> None:
        self.bench = bench
        self.model_id = model_id
        self.answered: list[str] = []
        self.failed: dict[str, Reason] = {}

    @property
    def worker(self) -> Any:
        return self.bench.runtime.workers[0]

    def reserve(self, rows: int) -> memoryview | None:
        view: memoryview | None = self.bench.service.reserve(self.model_id, rows * ROW, ALICE)
        return view

    def submit(self, name: str, rows: int, view: memoryview | None = None, **more: Any) -> Any:
        values = {"x": np.full((rows, 4), len(self.answered) + len(name), np.float32)}
        request = self.bench.request(self.model_id, values, owner=ALICE, **more)
        if view is not None:
            view[:] = request.payload
            request = replace(request, payload=view)

        def on_done(outcome: WorkOutcome) -> None:
            if outcome.reason is None:
                answer = tensors.decode_values(outcome.headers, outcome.payload)["y"]
                assert np.array_equal(answer, values["x"] * 2)
                self.answered.append(name)
            else:
                self.failed[name] = outcome.reason
            self.bench.service._nursery.start_soon(self.release, tickets)

        tickets: list[Any] = []
        tickets.append(self.bench.service.submit(request, on_done))
        return tickets[0]

    async def release(self, tickets: list[Any]) -> None:
        tickets[0].release()

    async def quiet(self) -> None:
        await self.bench.service.wait_quiet()
        for _ in range(10):
            await trio.lowlevel.checkpoint()


async def client_of(bench: Any, onnx_models: Any) -> Client:
    return Client(bench, await bench.add(onnx_models.double()))


async def test_inputs_in_place_run_when_the_first_call_finds_no_room(
    make_bench: Any, onnx_models: Any, autojump_clock: Any
) -> None:
    async with make_bench(SMALL) as bench:
        alice = await client_of(bench, onnx_models)
        views = [alice.reserve(5) for _ in range(4)]
        alice.submit("first", 10)
        started = len(alice.worker.submitted)
        for number, view in enumerate(views):
            alice.submit(f"in place {number}", 5, view)
        assert len(alice.worker.submitted) == started + 1
        await alice.quiet()
        assert not alice.failed
        # Two of them make the room, and then the first is first again.
        assert alice.answered == ["in place 0", "in place 1", "first", "in place 2", "in place 3"]
        assert alice.worker.taken_bytes == 0


async def test_of_the_inputs_in_place_the_most_urgent_runs_first(make_bench: Any, onnx_models: Any, autojump_clock: Any) -> None:
    async with make_bench(SMALL) as bench:
        alice = await client_of(bench, onnx_models)
        views = [alice.reserve(5) for _ in range(4)]
        alice.worker.is_held = True
        alice.submit("running", 5, views[0])
        alice.submit("first", 20, priority=0)
        alice.submit("later", 5, views[1], priority=5)
        alice.submit("sooner", 5, views[2], priority=1)
        alice.submit("overdue", 5, views[3], priority=1, timeout_seconds=1.0)
        alice.worker.proceed()
        await alice.quiet()
        assert alice.answered == ["running", "sooner", "overdue", "later", "first"]
        assert not alice.failed


async def test_room_that_a_waiting_call_wants_is_not_given_to_newcomers(
    make_bench: Any, onnx_models: Any, autojump_clock: Any
) -> None:
    async with make_bench(SMALL) as bench:
        alice = await client_of(bench, onnx_models)
        alice.worker.is_held = True
        views = [alice.reserve(5) for _ in range(4)]
        ticket = alice.submit("large", 10)
        bench.service.unreserve(views[0])
        assert alice.reserve(5) is None, "five rows are free, and the large call needs ten"
        bench.service.unreserve(views[1])
        assert not bench.service.status()["calls_queued"], "it has its room now"
        bench.service.unreserve(views[2])
        newcomer = alice.reserve(5)
        assert newcomer is not None
        bench.service.unreserve(newcomer)

        ticket = alice.submit("larger", 20)
        alice.worker.proceed()
        await trio.sleep(1)
        assert alice.answered == ["large"]
        assert alice.reserve(1) is None
        ticket.cancel()
        assert alice.failed == {"larger": Reason.CANCELLED}
        assert alice.reserve(1) is not None, "nobody waits any more"


@pytest.mark.parametrize("how", ["given back", "refused", "cancelled"])
async def test_whatever_frees_room_starts_who_waits_for_it(
    make_bench: Any, onnx_models: Any, autojump_clock: Any, how: str
) -> None:
    """All the room is held by inputs that the network is still filling: only their ends make any."""
    async with make_bench(replace(SMALL, queue_max=1 if how == "refused" else 9)) as bench:
        alice = await client_of(bench, onnx_models)
        views = [alice.reserve(5) for _ in range(3)]
        started = len(alice.worker.submitted)
        first = alice.submit("first", 10)
        if how == "cancelled":
            alice.submit("behind it", 5)
        await trio.sleep(1)
        assert len(alice.worker.submitted) == started
        if how == "given back":
            bench.service.unreserve(views[0])
        elif how == "refused":
            with pytest.raises(Refused):
                alice.submit("one too many", 5, views[0])
        else:
            first.cancel()
        assert len(alice.worker.submitted) == started + 1
        await alice.quiet()
        assert alice.answered == ["behind it" if how == "cancelled" else "first"]


async def test_room_that_is_freed_while_calls_are_started_counts_at_once(
    make_bench: Any, onnx_models: Any, autojump_clock: Any
) -> None:
    async with make_bench(SMALL) as bench:
        alice = await client_of(bench, onnx_models)
        views = [alice.reserve(5) for _ in range(4)]
        started = len(alice.worker.submitted)
        alice.submit("first", 10)

        other = await bench.add(onnx_models.linear(), "other.onnx")
        bench.runtime.workers[1].is_held = True
        x = {"x": np.zeros((1, 32), np.float32)}
        bench.service.submit(bench.request(other, x), lambda outcome: None)
        late = bench.request(other, x, timeout_seconds=1.0)
        bench.service.submit(late, lambda outcome: bench.service.unreserve(views[1]))
        # The late call's deadline is noticed by the same look at the queue that has found no room for the first.
        autojump_clock.jump(2)
        bench.service.unreserve(views[0])
        assert len(alice.worker.submitted) == started + 1
        bench.runtime.workers[1].proceed()
        await alice.quiet()


async def test_a_batch_without_room_runs_call_by_call(make_bench: Any, onnx_models: Any, autojump_clock: Any) -> None:
    async with make_bench(replace(SMALL, batch_size_max=16)) as bench:
        alice = await client_of(bench, onnx_models)
        assert bench.service.facts(alice.model_id).batchable
        alice.worker.is_held = True
        view = alice.reserve(10)
        for number in range(4):
            alice.submit(f"call {number}", 5)
        alice.worker.proceed()
        await alice.quiet()
        assert (len(alice.answered), alice.failed) == (4, {})
        bench.service.unreserve(view)


async def test_a_batch_that_was_waited_for_lets_newcomers_in_again(
    make_bench: Any, onnx_models: Any, autojump_clock: Any
) -> None:
    async with make_bench(replace(SMALL, batch_size_max=16)) as bench:
        alice = await client_of(bench, onnx_models)
        alice.worker.is_held = True
        views = [alice.reserve(9), alice.reserve(9)]
        alice.submit("one", 4)
        alice.submit("two", 4)
        assert alice.reserve(1) is None
        bench.service.unreserve(views[0])
        assert bench.metrics.value("batch_items_total") == 2
        assert alice.reserve(1) is not None
        alice.worker.proceed()
        await alice.quiet()
        assert alice.answered == ["one", "two"]


async def test_an_input_in_place_whose_call_is_overdue_is_not_run(make_bench: Any, onnx_models: Any, autojump_clock: Any) -> None:
    async with make_bench(SMALL) as bench:
        alice = await client_of(bench, onnx_models)
        views = [alice.reserve(5), alice.reserve(5)]
        alice.worker.is_held = True
        alice.submit("running", 5, views[0])
        alice.submit("first", 20)
        alice.submit("late", 5, views[1], timeout_seconds=1.0)
        started = len(alice.worker.submitted)
        # The deadline passes, and before the clock is looked at the worker may take another call.
        autojump_clock.jump(2)
        bench.service.apply(replace(SMALL, worker_calls_max=2))
        assert alice.failed == {"late": Reason.DEADLINE}
        assert len(alice.worker.submitted) == started
        alice.worker.proceed()
        await alice.quiet()
        assert alice.answered == ["running", "first"]


async def test_the_first_call_takes_another_worker_that_has_the_room(
    make_bench: Any, onnx_models: Any, autojump_clock: Any
) -> None:
    async with make_bench(SMALL) as bench:
        alice = await client_of(bench, onnx_models)
        view = alice.reserve(20)
        model, limits = bench.store.worker_model(alice.model_id), bench.service._limits()
        other = await bench.runtime.start_worker(model, limits)
        bench.service._pool.add(Handle(other, alice.model_id, 1, 0.0, ALICE))
        alice.submit("first", 5)
        assert len(other.submitted) == 1
        await alice.quiet()
        assert alice.answered == ["first"]
        bench.service.unreserve(view)


async def test_what_no_worker_could_take_is_refused_at_once(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(SMALL) as bench:
        alice = await client_of(bench, onnx_models)
        with pytest.raises(Refused) as caught:
            alice.submit("too large", 41)
        assert caught.value.reason is Reason.TOO_LARGE
        assert bench.service.status()["refusals"] == {"too-large": 1}


async def test_both_runtimes_answer_more_than_their_memory_holds(any_bench: Any, onnx_models: Any) -> None:
    """Outputs as large as inputs; some inputs lie in place, the others in heap memory; readers take a moment."""
    settings = WorkSettings(cores=2, batch_size_max=1, workers_per_model_max=1, arena_bytes=1 << 20, call_seconds_max=10.0)
    async with any_bench(settings) as bench:
        model_id = await bench.add(onnx_models.double())
        service, outcomes, wrong = bench.service, [], []
        answered: dict[int, trio.Event] = {}

        async def read(number: int, rows: int) -> None:
            request = bench.request(model_id, {"x": np.full((rows, 4), number, np.float32)}, owner=ALICE)
            view = service.reserve(model_id, len(request.payload), ALICE)
            if view is not None:
                view[:] = request.payload
                request = replace(request, payload=view)
            await trio.lowlevel.checkpoint()
            answered[number] = trio.Event()

            def on_done(outcome: WorkOutcome) -> None:
                outcomes.append(outcome.reason)
                answered[number].set()
                if outcome.reason is None and outcome.payload != np.full((rows, 4), 2 * number, np.float32).tobytes():
                    wrong.append(number)

            ticket = service.submit(request, on_done)
            await answered[number].wait()
            await trio.sleep(0.001 * (number % 3))
            ticket.release()

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for number in range(40):
                    # 96 to 160 KB each way, in no order.
                    nursery.start_soon(read, number, 6000 + 1000 * (number * 7 % 5))
        assert outcomes == [None] * 40
        assert not wrong


async def test_both_runtimes_leave_room_for_outputs(any_bench: Any, onnx_models: Any) -> None:
    async with any_bench(WorkSettings(cores=2, batch_size_max=1, arena_bytes=1 << 20, call_seconds_max=10.0)) as bench:
        model_id = await bench.add(onnx_models.double())
        service = bench.service
        alone = service.reserve(model_id, 900 << 10, ALICE)
        assert alone is not None
        assert service.reserve(model_id, 4 << 10, ALICE) is None
        service.unreserve(alone)
        views = [service.reserve(model_id, 128 << 10, ALICE) for _ in range(8)]
        assert [view is not None for view in views] == [True] * 4 + [False] * 4
        for view in views[:4]:
            service.unreserve(view)


async def test_both_runtimes_say_when_outputs_can_never_fit(any_bench: Any, onnx_models: Any) -> None:
    async with any_bench(WorkSettings(cores=2, batch_size_max=1, arena_bytes=1 << 20, call_seconds_max=10.0)) as bench:
        model_id = await bench.add(onnx_models.double())
        with trio.fail_after(5):
            assert await bench.call(model_id, {"x": np.ones((40_000, 4), np.float32)}, owner=ALICE) is Reason.OUTPUT_TOO_LARGE
            values = await bench.call(model_id, {"x": np.ones((30_000, 4), np.float32)}, owner=ALICE)
        assert values["y"].sum() == 240_000


async def test_both_runtimes_fail_outputs_that_others_leave_no_room_for(any_bench: Any, onnx_models: Any) -> None:
    value = onnx_models.value
    model = onnx_models.model_of(
        [helper.make_node("ReduceMax", ["x"], ["m"]), helper.make_node("Expand", ["m", "n"], ["y"])],
        [value("x", TensorProto.FLOAT, ["N"]), value("n", TensorProto.INT64, [1])],
        [value("y", TensorProto.FLOAT, [None])],
    )
    async with any_bench(WorkSettings(cores=2, batch_size_max=1, arena_bytes=1 << 20, call_seconds_max=10.0)) as bench:
        model_id = await bench.add(model)
        large = {"x": np.ones(1, np.float32), "n": np.array([170_000])}
        views = [bench.service.reserve(model_id, 132 << 10, ALICE) for _ in range(3)]
        with trio.fail_after(5):
            assert await bench.call(model_id, large, owner=ALICE) is Reason.MEMORY
            for view in views:
                bench.service.unreserve(view)
            assert (await bench.call(model_id, large, owner=ALICE))["y"].sum() == 170_000
