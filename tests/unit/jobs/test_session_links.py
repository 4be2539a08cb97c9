"""A session whose link breaks under a call: the call is asked for again under its number, so it is paid once."""

import numpy as np
import pytest
import trio

from p2pnode.errors import P2PNodeError
from p2pnode.jobs.sessions import is_worth_another_try
from p2pnode.jobs.spec import SessionSpec

pytestmark = pytest.mark.slow

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)
# One way takes 10 ms: now the provider has answered, and the answer is on its way.
ANSWERED_SECONDS = 0.015


async def open_session(world):
    """Bob and a session that has an agreement with one seller."""
    await world.bob.start(0, world.sellers)
    session = await world.bob.jobs.session(SessionSpec(world.spec.model))
    await session.run(None, {"x": ROWS})
    return session


async def break_link_under(world, call):
    """Run a call and break the link when its answer has left and not arrived."""
    result = []

    async def run():
        result.append(await call())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.sleep(ANSWERED_SECONDS)
        for stream in world.bob.fuse.streams:
            stream.break_off()
    return result[0]


def charged(world) -> list[int]:
    """How many calls each seller's receipts charge."""
    return [seller.query("SELECT coalesce(sum(calls), 0) FROM receipts")[0][0] for seller in world.sellers]


def test_a_call_whose_link_broke_is_answered_once_and_paid_once(in_world):
    async def scenario(world):
        session = await open_session(world)
        [y] = await break_link_under(world, lambda: session.run(None, {"x": ROWS + 1}))
        assert np.array_equal(y, (ROWS + 1) ** 2)
        [y] = await session.run(None, {"x": ROWS + 2})
        await world.bob.jobs.close_session(session)
        await trio.sleep(5)
        assert sorted(charged(world)) == [0, 3]
        assert len(world.bob.query("SELECT 1 FROM agreements")) == 1, "the agreement outlives its link"
        await world.check_nothing_stays()

    in_world(scenario)


def test_a_call_without_waiting_finds_its_answer_when_it_is_made_again(in_world):
    async def scenario(world):
        session = await open_session(world)
        values = {"x": ROWS + 1}

        async def call():
            answered, box = trio.Event(), []

            def on_answer(answer):
                box.append(answer)
                answered.set()

            assert session.call_nowait(values, ("y",), on_answer)
            await answered.wait()
            assert isinstance(box[0], P2PNodeError)
            assert is_worth_another_try(box[0])
            return await session.call(values, ("y",))

        answer = await break_link_under(world, call)
        assert np.array_equal(answer.outputs["y"], (ROWS + 1) ** 2)
        await world.bob.jobs.close_session(session)
        await trio.sleep(5)
        assert sorted(charged(world)) == [0, 2]
        await world.check_nothing_stays()

    in_world(scenario)


def test_a_provider_that_stays_away_is_replaced_after_a_moment(in_world):
    async def scenario(world):
        session = await open_session(world)
        lost = next(seller for seller in world.sellers if seller.identity.node_id == session.providers[0])
        world.bob.fuse.unreachable.add(lost.address)

        started = trio.current_time()
        [y] = await break_link_under(world, lambda: session.run(None, {"x": ROWS + 1}))
        assert np.array_equal(y, (ROWS + 1) ** 2)
        assert trio.current_time() - started < 6
        assert session.providers[0] != lost.identity.node_id
        world.bob.fuse.unreachable.clear()
        await trio.sleep(60)
        await world.bob.jobs.close_session(session)
        await world.check_nothing_stays()

    in_world(scenario)
