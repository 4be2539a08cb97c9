"""A provider with memory for a few calls' inputs gets many more at once from one client: every call is answered all the same."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import trio
from onnx import TensorProto, helper

from p2pnode.jobs.spec import MapSpec, SessionSpec
from p2pnode.sim.options import WorldOptions
from p2pnode.sim.world import run_world

pytestmark = pytest.mark.slow

CALLS = 16
# A megabyte each; the provider has two for what workers read and write, and two for what waits.
ROWS = np.zeros((65536, 4), np.float32)
MEMORY = {"provide.call_price": "0.001", "provide.batch_max": "1", "limits.buffers": "2MiB"}
ARENA_BYTES = 2 << 20
CALL_SECONDS = 3.0
OPTIONS = WorldOptions(
    seconds_of=lambda model, headers: CALL_SECONDS if headers[0].size >= ROWS.nbytes else 0.001,
    bandwidth_bytes_per_second=50e6,
)


@pytest.fixture
def square(tmp_path):
    """A model that squares rows of four numbers."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "square", [x], [y])
    path = tmp_path / "square.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


@pytest.fixture
def items(tmp_path):
    """A folder with one input per file."""
    folder = tmp_path / "items"
    folder.mkdir()
    for number in range(CALLS):
        np.save(folder / f"{number:02}.npy", ROWS + number)
    return str(folder)


async def start(world):
    """Alice with little memory, and bob, who only buys."""
    alice = await world.start("alice", MEMORY)
    alice.work.apply(replace(alice.work._settings, arena_bytes=ARENA_BYTES))
    bob = await world.start("bob", {"provide.enabled": "false", "client.in_flight": str(CALLS)}, knows=["alice"])
    await world.settle(lambda: bob.transport.links())
    return alice, bob


def check_nobody_is_blamed(bob):
    assert not bob.jobs.suppliers.bans._bans
    assert all(not record.failed for record in bob.jobs.suppliers.records().values())


def test_every_call_of_a_session_is_answered(square):
    async def scenario(world):
        alice, bob = await start(world)
        session = await bob.jobs.session(SessionSpec(square))
        await session.run(None, {"x": ROWS})
        started, squares = world.now, {}

        async def call(number):
            [y] = await session.run(None, {"x": ROWS + number})
            squares[number] = y[0, 0]

        async with trio.open_nursery() as nursery:
            for number in range(CALLS):
                nursery.start_soon(call, number)
        assert squares == {number: number * number for number in range(CALLS)}
        assert alice.metrics.value("refusals_total", "busy") >= CALLS / 2
        assert world.now - started < 1.1 * CALLS * CALL_SECONDS, "the provider has always something to do"
        check_nobody_is_blamed(bob)
        await bob.jobs.close_session(session)
        assert alice.transport.buffered_bytes == 0

    run_world(scenario, options=OPTIONS)


def test_every_item_of_a_map_is_done(square, items, tmp_path):
    async def scenario(world):
        _, bob = await start(world)
        job = await bob.jobs.wait(await bob.jobs.start_map(MapSpec(square, items, str(tmp_path / "out"))))
        assert (job["end_reason"], job["items_by_state"]) == ("completed", {"done": CALLS})
        assert job["history"] == []
        check_nobody_is_blamed(bob)

    run_world(scenario, options=OPTIONS)


def test_a_map_waits_until_its_only_provider_is_done_with_others_work(square, items, tmp_path):
    async def scenario(world):
        alice, bob = await start(world)
        job = await bob.jobs.start_map(MapSpec(square, items, str(tmp_path / "out")))
        await trio.sleep(5)
        budget, limit, reserve = alice.transport._around.budget, alice.transport._around.budget.limit, alice.work.reserve
        budget.limit, alice.work.reserve = 0, lambda *arguments: None
        await trio.sleep(90)
        assert (await bob.jobs.describe(job))["state"] == "running"
        budget.limit, alice.work.reserve = limit, reserve
        ended = await bob.jobs.wait(job)
        assert (ended["end_reason"], ended["items_by_state"]) == ("completed", {"done": CALLS})
        assert ended["history"] == []
        check_nobody_is_blamed(bob)

    run_world(scenario, options=OPTIONS)
