"""The work service on the inline runtime: real models, real outputs, no processes. `make_bench` stands in conftest."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import trio

from p2pnode.errors import Refused, WorkError
from p2pnode.reasons import Reason
from p2pnode.sim.runtime import InlineRuntime
from p2pnode.wire import tensors
from p2pnode.work.service import WorkOutcome, WorkSettings

ALICE, BOB = b"a" * 32, b"b" * 32
BASE = WorkSettings(cores=2, batch_size_max=1)
X = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}


def refused(function: Any, *arguments: Any) -> Reason:
    with pytest.raises(Refused) as caught:
        function(*arguments)
    return caught.value.reason


def only_worker(bench: Any, index: int = -1) -> Any:
    return bench.runtime.workers[index]


async def settle() -> None:
    for _ in range(30):
        await trio.lowlevel.checkpoint()


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110 - virtual time, and the condition is plain data
        await trio.sleep(0.1)


def collect() -> tuple[list[WorkOutcome], Any]:
    outcomes: list[WorkOutcome] = []
    return outcomes, outcomes.append


async def test_a_call_gives_the_model_s_answer(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench() as bench:
        model_id = await bench.add(onnx_models.linear())
        x = np.random.default_rng(0).random((3, 32), np.float32)
        outcome = await bench.call(model_id, {"x": x}, owner=ALICE)
        weights = np.arange(1024, dtype=np.float32).reshape(32, 32) / 1024
        np.testing.assert_allclose(outcome["y"], x @ weights, rtol=1e-5)
        assert bench.metrics.value("calls_total", "completed") == 1


async def test_prepare_measures_once_and_leaves_a_warm_worker(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(runtime=InlineRuntime(lambda model, headers: 0.002)) as bench:
        model_id = await bench.add(onnx_models.linear(), prepare=False)
        assert bench.service.facts(model_id) is None
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(bench.service.prepare, model_id)
        facts = bench.service.facts(model_id)
        assert len(bench.runtime.workers) == 1
        assert facts.seconds_per_call == pytest.approx(0.002)
        assert (facts.inputs[0].name, facts.size_bytes > 4096, facts.random_operators) == ("x", True, False)
        assert await facts.operations({"x": (3, 32)}) == 2 * 96 * 32
        assert bench.service.status()["models_warm"] == [model_id.hex()]


async def test_a_warm_call_reaches_the_worker_before_submit_returns(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench() as bench:
        model_id = await bench.add(onnx_models.double())
        outcomes, on_done = collect()
        before = len(only_worker(bench).submitted)
        ticket = bench.service.submit(bench.request(model_id, X, owner=ALICE), on_done)
        assert len(only_worker(bench).submitted) == before + 1
        assert outcomes == []
        await settle()
        assert len(outcomes) == 1
        assert outcomes[0].engine.startswith("onnxruntime ")
        values = tensors.decode_values(outcomes[0].headers, outcomes[0].payload)
        assert np.array_equal(values["y"], X["x"] * 2)
        assert only_worker(bench).taken_bytes > 0
        ticket.release()
        ticket.release()
        assert only_worker(bench).taken_bytes == 0


async def test_a_reserved_input_is_used_in_place(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench() as bench:
        model_id = await bench.add(onnx_models.double())
        request = bench.request(model_id, X, owner=ALICE)
        for slice_again in (False, True):
            view = bench.service.reserve(model_id, len(request.payload), ALICE)
            view[:] = request.payload
            payload = view[:] if slice_again else view
            outcome = await bench.service.execute(replace(request, payload=payload))
            assert np.array_equal(tensors.decode_values(outcome.headers, outcome.payload)["y"], X["x"] * 2)
            call = only_worker(bench).submitted[-1]
            assert np.shares_memory(np.frombuffer(call.slot.view, np.uint8), np.frombuffer(view, np.uint8))
        assert only_worker(bench).taken_bytes == 0


async def test_reserved_room_is_never_another_owner_s(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench() as bench:
        model_id = await bench.add(onnx_models.double())
        view = bench.service.reserve(model_id, 32, ALICE)
        assert view is not None
        assert bench.service.reserve(model_id, 32, BOB) is None
        assert bench.service.reserve(model_id, 1 << 40, ALICE) is None
        assert bench.service.reserve(b"?" * 32, 32, ALICE) is None
        bench.service.unreserve(view)
        bench.service.unreserve(view)
        assert only_worker(bench).taken_bytes == 0


async def test_a_refused_call_gives_its_reserved_room_back(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench() as bench:
        model_id = await bench.add(onnx_models.double())
        request = bench.request(model_id, X, owner=ALICE)
        view = bench.service.reserve(model_id, len(request.payload), ALICE)
        bench.service.pause()
        assert refused(bench.service.submit, replace(request, payload=view), None) is Reason.PAUSED
        assert only_worker(bench).taken_bytes == 0


async def test_two_clients_share_a_worker_only_if_both_and_the_owner_agree(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench() as bench:
        model_id = await bench.add(onnx_models.double())
        for owner, share, workers in ((ALICE, True, 1), (BOB, True, 1), (BOB, False, 2), (ALICE, False, 3)):
            assert np.array_equal((await bench.call(model_id, X, owner=owner, share=share))["y"], X["x"] * 2)
            assert len(bench.runtime.workers) == workers
        bench.service.apply(replace(BASE, share_workers=False))
        carol = b"c" * 32
        await bench.call(model_id, X, owner=carol, share=True)
        assert len(bench.runtime.workers) == 4
        owners = {worker["owner"] for worker in bench.service.status()["workers"]}
        assert owners == {"shared", ALICE.hex(), BOB.hex(), carol.hex()}


async def test_the_queue_is_bounded_and_served_by_priority_then_age(make_bench: Any, onnx_models: Any) -> None:
    settings = replace(BASE, queue_max=4, workers_per_model_max=1, worker_calls_max=1)
    async with make_bench(settings) as bench:
        model_id = await bench.add(onnx_models.double())
        only_worker(bench).is_held = True
        order: list[str] = []

        def submit(name: str, priority: int) -> None:
            bench.service.submit(bench.request(model_id, X, owner=ALICE, priority=priority), lambda outcome: order.append(name))

        for name, priority in (("running", 9), ("old", 5), ("late", 9), ("new", 5), ("urgent", 0)):
            submit(name, priority)
        assert bench.service.status()["calls_queued"] == 4
        with pytest.raises(Refused) as caught:
            submit("too many", 0)
        assert caught.value.reason is Reason.BUSY
        only_worker(bench).proceed()
        await settle()
        assert order == ["running", "urgent", "old", "new", "late"]
        assert bench.service.why()[0][0] is Reason.BUSY


async def test_one_client_cannot_take_the_whole_queue(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(replace(BASE, queue_per_owner_max=2, workers_per_model_max=1, worker_calls_max=1)) as bench:
        model_id = await bench.add(onnx_models.double())
        only_worker(bench).is_held = True
        for _ in range(3):
            bench.service.submit(bench.request(model_id, X, owner=ALICE), lambda outcome: None)
        assert refused(bench.service.submit, bench.request(model_id, X, owner=ALICE), None) is Reason.BUSY
        bench.service.submit(bench.request(model_id, X, owner=BOB), lambda outcome: None)


async def test_a_queued_call_ends_at_its_deadline(make_bench: Any, onnx_models: Any, autojump_clock: Any) -> None:
    async with make_bench(replace(BASE, workers_per_model_max=1, worker_calls_max=1)) as bench:
        model_id = await bench.add(onnx_models.double())
        only_worker(bench).is_held = True
        outcomes, on_done = collect()
        bench.service.submit(bench.request(model_id, X, owner=ALICE, timeout_seconds=90.0), on_done)
        bench.service.submit(bench.request(model_id, X, owner=ALICE, timeout_seconds=5.0), on_done)
        start = trio.current_time()
        await until(lambda: outcomes)
        assert outcomes[0].reason is Reason.DEADLINE
        assert trio.current_time() - start == pytest.approx(5.0, abs=0.6)
        assert bench.service.status()["calls_queued"] == 0


async def test_a_call_that_runs_too_long_is_killed_and_others_do_not_notice(
    make_bench: Any, onnx_models: Any, autojump_clock: Any
) -> None:
    # Calls with 7 rows never end in time.
    runtime = InlineRuntime(lambda model, headers: 1000.0 if headers[0].shape[0] == 7 else 0.001)
    async with make_bench(replace(BASE, call_seconds_max=2.0), runtime) as bench:
        model_id = await bench.add(onnx_models.double())
        bad, good = collect(), collect()
        slow = {"x": np.zeros((7, 4), np.float32)}
        bench.service.submit(bench.request(model_id, slow, owner=ALICE), bad[1])
        for _ in range(3):
            bench.service.submit(bench.request(model_id, X, owner=ALICE, timeout_seconds=60.0), good[1])
        await until(lambda: len(good[0]) == 3)
        assert [outcome.reason for outcome in bad[0]] == [Reason.TIME_LIMIT]
        assert [outcome.reason for outcome in good[0]] == [None, None, None]
        assert len(runtime.workers) == 2
        assert bench.metrics.total("workers_died_total") == 1


async def test_calls_behind_one_that_killed_the_worker_are_run_again(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(replace(BASE, workers_per_model_max=1)) as bench:
        model_id = await bench.add(onnx_models.double())
        outcomes, on_done = collect()
        only_worker(bench).is_held = True
        for _ in range(3):
            bench.service.submit(bench.request(model_id, X, owner=ALICE), on_done)
        only_worker(bench).kill()
        await settle()
        # Only the first was running when the worker died; the others are done by the next one.
        assert [outcome.reason for outcome in outcomes] == [Reason.WORKER_DIED] + [None] * 2


async def test_cancelling_queued_and_running_calls(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(replace(BASE, workers_per_model_max=1, worker_calls_max=1)) as bench:
        model_id = await bench.add(onnx_models.double())
        only_worker(bench).is_held = True
        running, queued = collect(), collect()
        first = bench.service.submit(bench.request(model_id, X, owner=ALICE), running[1])
        second = bench.service.submit(bench.request(model_id, X, owner=ALICE), queued[1])
        second.cancel()
        second.cancel()
        assert [outcome.reason for outcome in queued[0]] == [Reason.CANCELLED]
        assert bench.service.status()["calls_queued"] == 0
        first.cancel()
        await settle()
        assert [outcome.reason for outcome in running[0]] == [Reason.CANCELLED]
        only_worker(bench).proceed()
        assert "y" in await bench.call(model_id, X, owner=ALICE)
        assert only_worker(bench).taken_bytes == 0


async def test_a_cancelled_execute_cancels_its_call(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench() as bench:
        model_id = await bench.add(onnx_models.double())
        only_worker(bench).is_held = True
        with trio.move_on_after(0):
            await bench.service.execute(bench.request(model_id, X, owner=ALICE))
        await settle()
        assert bench.service.status()["calls_running"] == 0


async def test_workers_that_died_while_idle_are_replaced(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench() as bench:
        model_id = await bench.add(onnx_models.double())
        only_worker(bench).kill()
        assert np.array_equal((await bench.call(model_id, X, owner=ALICE))["y"], X["x"] * 2)
        assert len(bench.runtime.workers) == 2


async def test_wrong_inputs_fail_the_call_and_nothing_else(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench() as bench:
        model_id = await bench.add(onnx_models.double())
        cases = [
            ({"z": X["x"]}, Reason.MISSING_INPUT),
            ({"x": X["x"].astype(np.float64)}, Reason.WRONG_DTYPE),
            ({"x": np.zeros((2, 5), np.float32)}, Reason.WRONG_SHAPE),
            ({"x": np.zeros(4, np.float32)}, Reason.WRONG_SHAPE),
        ]
        for values, reason in cases:
            assert await bench.call(model_id, values, owner=ALICE) is reason
            fault = bench.service.facts(model_id).fault(bench.request(model_id, values).headers, ())
            assert fault is not None
            assert fault[0] is reason
        assert await bench.call(model_id, X, owner=ALICE, outputs=["nope"]) in (Reason.UNKNOWN_OUTPUT, Reason.RUN_FAILED)
        truncated = replace(bench.request(model_id, X, owner=ALICE), payload=memoryview(b"1234"))
        assert (await bench.service.execute(truncated)).reason is Reason.BAD_TENSOR
        assert "y" in await bench.call(model_id, X, owner=ALICE)
        assert len(bench.runtime.workers) == 1


async def test_refusals_that_come_at_once(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench() as bench:
        service = bench.service
        model_id = await bench.add(onnx_models.double())
        request = bench.request(model_id, X, owner=ALICE)
        assert refused(service.submit, replace(request, model_id=b"?" * 32), None) is Reason.UNKNOWN_MODEL
        service.apply(replace(BASE, deny_clients=frozenset({ALICE})))
        assert refused(service.submit, request, None) is Reason.DENIED
        assert refused(service.check, ALICE, model_id) is Reason.DENIED
        service.apply(replace(BASE, deny_models=frozenset({model_id})))
        assert refused(service.submit, request, None) is Reason.MODEL_DENIED
        service.apply(BASE)
        service.drain()
        assert refused(service.submit, request, None) is Reason.DRAINING
        service.resume()
        assert "y" in await bench.call(model_id, X, owner=ALICE)
        assert service.status()["refusals"] == {"denied": 2, "model-denied": 1, "draining": 1, "unknown-model": 1}


async def test_a_pause_refuses_what_waits_and_lets_end_what_runs(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(replace(BASE, workers_per_model_max=1, worker_calls_max=1)) as bench:
        model_id = await bench.add(onnx_models.double())
        only_worker(bench).is_held = True
        running, queued = collect(), collect()
        bench.service.submit(bench.request(model_id, X, owner=ALICE), running[1])
        bench.service.submit(bench.request(model_id, X, owner=ALICE), queued[1])
        bench.service.pause(60.0)
        assert [outcome.reason for outcome in queued[0]] == [Reason.PAUSED]
        assert bench.service.status()["is_paused"]
        assert bench.service.status()["paused_for_seconds"] == pytest.approx(60.0, abs=1)
        only_worker(bench).proceed()
        with trio.fail_after(1):
            await bench.service.wait_quiet()
        assert [outcome.reason for outcome in running[0]] == [None]


async def test_draining_finishes_everything(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(replace(BASE, workers_per_model_max=1, worker_calls_max=1)) as bench:
        model_id = await bench.add(onnx_models.double())
        outcomes, on_done = collect()
        for _ in range(5):
            bench.service.submit(bench.request(model_id, X, owner=ALICE), on_done)
        bench.service.drain()
        with trio.fail_after(1):
            await bench.service.wait_quiet()
        assert [outcome.reason for outcome in outcomes] == [None] * 5


async def test_bandwidth_is_capped(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(replace(BASE, bandwidth_bytes_per_second=40)) as bench:
        model_id = await bench.add(onnx_models.double())
        await bench.call(model_id, X, owner=ALICE)  # 32 bytes in, 32 out: the bucket is in debt now
        assert refused(bench.service.submit, bench.request(model_id, X, owner=ALICE), None) is Reason.BANDWIDTH


async def test_a_model_that_is_only_stored_is_loaded_for_its_first_call(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench() as bench:
        model_id = await bench.add(onnx_models.double(), prepare=False)
        assert np.array_equal((await bench.call(model_id, X, owner=ALICE))["y"], X["x"] * 2)


async def test_a_model_that_does_not_load_fails_its_calls_and_is_left_alone(make_bench: Any, onnx_models: Any) -> None:
    class Broken(InlineRuntime):
        async def start_worker(self, model: Any, limits: Any) -> Any:
            self.attempts = getattr(self, "attempts", 0) + 1
            raise WorkError(Reason.MEMORY, "it allocates too much")

    runtime = Broken()
    async with make_bench(runtime=runtime) as bench:
        model_id = await bench.add(onnx_models.double(), prepare=False)
        assert await bench.call(model_id, X, owner=ALICE) is Reason.MEMORY
        assert refused(bench.service.submit, bench.request(model_id, X, owner=ALICE), None) is Reason.MEMORY
        assert runtime.attempts == 1
        with pytest.raises(WorkError):
            await bench.service.prepare(model_id)
        assert bench.service.status()["memory_bytes"] == 0


async def test_models_share_memory_by_last_use(make_bench: Any, onnx_models: Any) -> None:
    settings = replace(BASE, memory_bytes=150 << 20, worker_base_bytes=70 << 20)
    async with make_bench(settings) as bench:
        ids = [await bench.add(onnx_models.linear(scale=float(number)), f"{number}.onnx") for number in range(3)]
        assert bench.service.status()["models_warm"] == sorted(model_id.hex() for model_id in ids[1:])
        values = {"x": np.ones((1, 32), np.float32)}
        await bench.call(ids[0], values, owner=ALICE)
        assert bench.service.status()["models_warm"] == sorted(model_id.hex() for model_id in (ids[0], ids[2]))
        assert bench.service.status()["memory_bytes"] <= 150 << 20
        bench.service.apply(replace(settings, memory_bytes=80 << 20))
        assert bench.service.status()["models_warm"] == [ids[0].hex()]
        bench.service.apply(replace(settings, memory_bytes=1 << 20))
        assert await bench.call(ids[1], values, owner=ALICE) is Reason.MEMORY


async def test_idle_workers_end(make_bench: Any, onnx_models: Any, autojump_clock: Any) -> None:
    async with make_bench(replace(BASE, worker_idle_seconds=10.0)) as bench:
        await bench.add(onnx_models.double())
        await trio.sleep(9.0)
        assert only_worker(bench).alive
        await trio.sleep(2.0)
        assert not only_worker(bench).alive
        assert bench.service.status()["workers"] == []


async def test_the_processor_cap_bounds_running_workers_and_lets_no_model_starve(
    make_bench: Any, onnx_models: Any, autojump_clock: Any
) -> None:
    runtime = InlineRuntime(lambda model, headers: 0.03)
    async with make_bench(replace(BASE, cores=1), runtime) as bench:
        ids = [await bench.add(onnx_models.linear(scale=float(number)), f"{number}.onnx") for number in range(2)]
        done: list[int] = []
        values = {"x": np.ones((1, 32), np.float32)}
        for _ in range(5):
            for number in range(2):
                bench.service.submit(
                    bench.request(ids[number], values, owner=ALICE), lambda outcome, number=number: done.append(number)
                )
        most = 0
        while len(done) < 10:
            await trio.sleep(0.01)
            most = max(most, bench.service.status()["workers_busy"])
        assert most == 1
        assert done == [0, 1] * 5


async def test_more_workers_come_when_calls_pile_up(make_bench: Any, onnx_models: Any, autojump_clock: Any) -> None:
    runtime = InlineRuntime(lambda model, headers: 1.0)
    async with make_bench(replace(BASE, cores=8, workers_per_model_max=3), runtime) as bench:
        model_id = await bench.add(onnx_models.double())
        outcomes, on_done = collect()
        start = trio.current_time()
        for _ in range(9):
            bench.service.submit(bench.request(model_id, X, owner=ALICE), on_done)
        await until(lambda: len(outcomes) == 9)
        assert len(runtime.workers) == 3
        assert trio.current_time() - start < 4.5


BATCHING = replace(BASE, batch_size_max=4, workers_per_model_max=1)


async def test_waiting_calls_are_joined_and_answered_apart(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(BATCHING) as bench:
        model_id = await bench.add(onnx_models.double(("N", 4)))
        facts = bench.service.facts(model_id)
        assert facts.batchable
        assert facts.batch_exact
        worker = only_worker(bench)
        before, worker.is_held = len(worker.submitted), True
        answers: dict[int, Any] = {}

        def keep(number: int) -> Any:
            def on_done(outcome: WorkOutcome) -> None:
                answers[number] = tensors.decode_values(outcome.headers, outcome.payload)["y"]

            return on_done

        inputs = [np.full((1 + number % 2, 4), number, np.float32) for number in range(6)]
        tickets = [
            bench.service.submit(bench.request(model_id, {"x": array}, owner=ALICE), keep(number))
            for number, array in enumerate(inputs)
        ]
        worker.proceed()
        await settle()
        for number, array in enumerate(inputs):
            assert np.array_equal(answers[number], array * 2)
        # 1 alone, then at most four rows each: 2+1, 2+1, 2.
        assert len(worker.submitted) - before == 4
        assert bench.metrics.value("batch_items_total") == 4
        for ticket in tickets:
            ticket.release()
        assert worker.taken_bytes == 0


async def test_a_model_that_looks_at_batch_mates_is_never_batched(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(BATCHING) as bench:
        model_id = await bench.add(onnx_models.batch_mean())
        assert not bench.service.facts(model_id).batchable
        only_worker(bench).is_held = True
        outcomes, on_done = collect()
        for _ in range(4):
            bench.service.submit(bench.request(model_id, X, owner=ALICE), on_done)
        only_worker(bench).proceed()
        await settle()
        assert bench.metrics.value("batches_total") == 0
        wanted = X["x"] - X["x"].mean(axis=0)
        assert all(np.array_equal(tensors.decode_values(o.headers, o.payload)["y"], wanted) for o in outcomes)


async def test_exact_orders_and_different_owners_are_never_joined(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(BATCHING) as bench:
        model_id = await bench.add(onnx_models.double())
        only_worker(bench).is_held = True
        outcomes, on_done = collect()
        for _ in range(4):
            bench.service.submit(bench.request(model_id, X, owner=ALICE, exact=True), on_done)
        bench.service.submit(bench.request(model_id, X, owner=BOB), on_done)
        only_worker(bench).proceed()
        await settle()
        assert len(outcomes) == 5
        assert bench.metrics.value("batches_total") == 0


async def test_a_batch_that_fails_is_run_again_call_by_call(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(BATCHING) as bench:
        model_id = await bench.add(onnx_models.double())
        worker = only_worker(bench)
        compute, worker.is_held = worker._compute, True

        def fail_batches(call: Any, seconds: float) -> Any:
            outcome = compute(call, seconds)
            if tensors.parse_headers(call.headers)[0].shape[0] > 2:
                return replace(outcome, reason=Reason.RUN_FAILED.value, headers=b"")
            return outcome

        worker._compute = fail_batches
        outcomes, on_done = collect()
        for _ in range(3):
            bench.service.submit(bench.request(model_id, X, owner=ALICE), on_done)
        worker.proceed()
        await settle()
        assert [outcome.reason for outcome in outcomes] == [None] * 3


async def test_a_call_cancelled_inside_a_batch_leaves_the_others_alone(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(BATCHING) as bench:
        model_id = await bench.add(onnx_models.double())
        worker = only_worker(bench)
        worker.is_held = True
        outcomes, on_done = collect()
        tickets = [bench.service.submit(bench.request(model_id, X, owner=ALICE), on_done) for _ in range(3)]
        worker._finish(worker._queue[0], worker._compute(worker._queue[0], 0.0))
        assert bench.metrics.value("batch_items_total") == 2
        tickets[1].cancel()
        assert outcomes[-1].reason is Reason.CANCELLED
        worker.proceed()
        await settle()
        assert [outcome.reason for outcome in outcomes] == [None, Reason.CANCELLED, None]


async def test_stopping_ends_what_waits_and_every_worker(make_bench: Any, onnx_models: Any) -> None:
    outcomes, on_done = collect()
    async with make_bench(replace(BASE, workers_per_model_max=1, worker_calls_max=1)) as bench:
        model_id = await bench.add(onnx_models.double())
        only_worker(bench).is_held = True
        for _ in range(2):
            bench.service.submit(bench.request(model_id, X, owner=ALICE), on_done)
    assert sorted(outcome.reason for outcome in outcomes) == [Reason.SHUTTING_DOWN, Reason.WORKER_DIED]
    assert not only_worker(bench).alive
    assert refused(bench.service.submit, bench.request(model_id, X), None) is Reason.SHUTTING_DOWN


async def test_random_models_say_so(make_bench: Any, onnx_models: Any) -> None:
    async with make_bench(BATCHING) as bench:
        model_id = await bench.add(onnx_models.random())
        facts = bench.service.facts(model_id)
        assert facts.random_operators
        assert not facts.batchable


async def test_both_runtimes_give_the_engine_s_answers(any_bench: Any, onnx_models: Any) -> None:
    async with any_bench() as bench:
        model_id = await bench.add(onnx_models.linear())
        facts = bench.service.facts(model_id)
        assert facts.seconds_per_call >= 0
        assert await facts.operations({"x": (3, 32)}) == 2 * 96 * 32
        x = np.random.default_rng(0).random((3, 32), np.float32)
        weights = np.arange(1024, dtype=np.float32).reshape(32, 32) / 1024
        request = bench.request(model_id, {"x": x}, owner=ALICE)
        view = bench.service.reserve(model_id, len(request.payload), ALICE)
        view[:] = request.payload
        for payload in (view, request.payload):
            outcome = await bench.service.execute(replace(request, payload=payload))
            assert outcome.reason is None
            answer = tensors.decode_values(outcome.headers, outcome.payload)["y"]
            np.testing.assert_allclose(answer, x @ weights, rtol=1e-5)


async def test_both_runtimes_fail_bad_inputs_alike(any_bench: Any, onnx_models: Any) -> None:
    async with any_bench() as bench:
        model_id = await bench.add(onnx_models.double())
        for values, reason in (
            ({"z": X["x"]}, Reason.MISSING_INPUT),
            ({"x": X["x"].astype(np.float64)}, Reason.WRONG_DTYPE),
            ({"x": np.zeros((2, 5), np.float32)}, Reason.WRONG_SHAPE),
        ):
            assert await bench.call(model_id, values, owner=ALICE) is reason
        assert np.array_equal((await bench.call(model_id, X, owner=ALICE))["y"], X["x"] * 2)


async def test_both_runtimes_batch_and_give_every_call_its_own(any_bench: Any, onnx_models: Any) -> None:
    async with any_bench(BATCHING) as bench:
        model_id = await bench.add(onnx_models.double())
        answers: dict[int, Any] = {}
        tickets = []
        for number in range(20):

            def keep(outcome: WorkOutcome, number: int = number) -> None:
                answers[number] = bytes(outcome.payload)

            values = {"x": np.full((1, 4), number, np.float32)}
            tickets.append(bench.service.submit(bench.request(model_id, values, owner=ALICE), keep))
        with trio.fail_after(10):
            await bench.service.wait_quiet()
        for number in range(20):
            assert answers[number] == np.full(4, 2 * number, np.float32).tobytes()
        assert bench.metrics.value("batch_items_total") > 10
        for ticket in tickets:
            ticket.release()


async def test_both_runtimes_replace_a_killed_worker(any_bench: Any, onnx_models: Any) -> None:
    async with any_bench() as bench:
        model_id = await bench.add(onnx_models.double())
        outcomes, on_done = collect()
        for _ in range(3):
            bench.service.submit(bench.request(model_id, X, owner=ALICE), on_done)
        next(iter(bench.service._pool)).worker.kill()
        with trio.fail_after(10):
            await bench.service.wait_quiet()
        reasons = [outcome.reason for outcome in outcomes]
        assert len(reasons) == 3
        assert reasons.count(Reason.WORKER_DIED) <= 1
        assert np.array_equal((await bench.call(model_id, X, owner=ALICE))["y"], X["x"] * 2)


async def test_both_runtimes_refuse_bad_models_in_the_child(any_bench: Any, onnx_models: Any, tmp_path: Any) -> None:
    async with any_bench() as bench:
        for name, content, reason in (
            ("junk.onnx", b"no model at all", Reason.NOT_ONNX),
            ("deep.onnx", onnx_models.nested_if(500), Reason.TOO_DEEP),
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(WorkError) as caught:
                await bench.store.add_file(tmp_path / name)
            assert caught.value.reason is reason
