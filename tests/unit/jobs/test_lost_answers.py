"""Answers that were lost with their provider, which stays away longer than anybody waits: the call is made elsewhere.

A provider that comes back writes off what it did for nobody, within its bounds; both sides' books say the same.
"""

from contextlib import suppress

import numpy as np
import pytest
import trio

from p2pnode.errors import P2PNodeError
from p2pnode.jobs.spec import SessionSpec
from p2pnode.market import ledger

pytestmark = pytest.mark.slow

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)
PRICE = 1000
# One way takes 10 ms: now the provider has answered, and the answer is on its way.
ANSWERED_SECONDS = 0.015


def paid_by_input(world) -> dict[str, int]:
    """What bob's cheques cover, by input."""
    return dict(world.bob.query("SELECT hex(input_hash), sum(amount) FROM calls GROUP BY input_hash"))


def written_off(seller, bob) -> int:
    """What a seller has let go."""
    whole = seller.settings.stranger_slice_amount
    return whole - seller.database.write_now(
        lambda connection: ledger.write_off_room(connection, bob.identity.node_id, seller.settings, 0)
    )


def check_books(world) -> int:
    """Both sides' books agree; gives what was paid in all."""
    paid = world.bob.query("SELECT coalesce(sum(paid), 0) FROM agreements")[0][0]
    earned = sum(seller.query("SELECT coalesce(sum(paid), 0) FROM agreements")[0][0] for seller in world.sellers)
    assert earned == paid == sum(paid_by_input(world).values())
    receipts = {row for seller in world.sellers for row in seller.query("SELECT document, amount, total, calls FROM receipts")}
    assert receipts == set(world.bob.query("SELECT document, amount, total, calls FROM receipts"))
    for machine in (*world.sellers, world.bob):
        totals = machine.query("SELECT total, (SELECT sum(amount) FROM receipts WHERE agreement = id) FROM agreements")
        assert all(total == (amount or 0) for total, amount in totals)
    return paid


def break_off(world) -> None:
    for stream in world.bob.fuse.streams:
        stream.break_off()


async def lose_an_answer(world):
    """Bob's session with one seller, which goes away with an answer; gives both."""
    await world.bob.start(0, world.sellers)
    session = await world.bob.jobs.session(SessionSpec(world.spec.model))
    await session.run(None, {"x": ROWS})
    lost = next(seller for seller in world.sellers if seller.identity.node_id == session.providers[0])
    world.bob.fuse.unreachable.add(lost.address)
    outputs = []

    async def run():
        outputs.extend(await session.run(None, {"x": ROWS + 1}))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.sleep(ANSWERED_SECONDS)
        break_off(world)
    assert np.array_equal(outputs[0], (ROWS + 1) ** 2)
    return session, lost


# Before its receipt is signed, and after.
@pytest.mark.parametrize("away_seconds", [5, 40])
@pytest.mark.parametrize("is_closed_first", [False, True])
def test_a_call_of_a_session_that_was_made_elsewhere_is_paid_there_alone(in_world, away_seconds, is_closed_first):
    async def scenario(world):
        session, lost = await lose_an_answer(world)
        await trio.sleep(away_seconds)
        if is_closed_first:
            await world.bob.jobs.close_session(session)
        world.bob.fuse.unreachable.clear()
        await trio.sleep(60)
        await world.bob.jobs.close_session(session)
        await world.check_nothing_stays()
        assert list(paid_by_input(world).values()) == [PRICE, PRICE]
        assert check_books(world) == 2 * PRICE
        assert lost.query("SELECT sum(calls), sum(amount) FROM receipts") == [(2, PRICE)]
        assert written_off(lost, world.bob) == PRICE

    in_world(scenario)


def test_a_provider_lets_go_so_much_and_no_more(in_world):
    async def scenario(world):
        session, lost = await lose_an_answer(world)
        bob, whole, half_life = world.bob.identity.node_id, lost.settings.stranger_slice_amount, 1e9
        lost.database.write_now(lambda connection: ledger.note_write_off(connection, bob, whole - PRICE // 2, 10**15, half_life))
        world.bob.fuse.unreachable.clear()
        await trio.sleep(60)
        await world.bob.jobs.close_session(session)
        await world.check_nothing_stays()
        assert sorted(paid_by_input(world).values()) == [PRICE, 2 * PRICE]
        assert check_books(world) == 3 * PRICE

    in_world(scenario)


def test_whoever_crashes_meanwhile_the_books_agree(in_world):
    async def scenario(world):
        session, lost = await lose_an_answer(world)
        await trio.sleep(15)
        await lost.crash()
        await lost.start()
        world.bob.fuse.unreachable.clear()
        await trio.sleep(60)
        await world.bob.jobs.close_session(session)
        await world.check_nothing_stays()
        assert check_books(world) == 2 * PRICE

    in_world(scenario)


@pytest.mark.parametrize("milliseconds", range(20, 220, 8))
def test_items_of_a_map_are_paid_once_whenever_a_provider_goes_for_long(in_world, milliseconds):
    async def scenario(world):
        async def part() -> None:
            while not world.bob.identity or not world.bob.query("SELECT 1 FROM items"):  # noqa: ASYNC110 - polled on virtual time
                await trio.sleep(0.001)
            await trio.sleep(milliseconds / 1000)
            lost = world.sellers[milliseconds % len(world.sellers)]
            world.bob.fuse.unreachable.add(lost.address)
            with suppress(KeyError):
                world.bob.transport.links()[lost.identity.node_id]._stream.break_off()
            await trio.sleep(400)
            world.bob.fuse.unreachable.clear()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(part)
            assert await world.run_map()
        await trio.sleep(60)
        await world.check_nothing_stays()
        assert set(paid_by_input(world).values()) == {PRICE}
        assert check_books(world) == 10 * PRICE

    in_world(scenario)


@pytest.mark.parametrize("steps", range(9, 170, 16))
def test_items_of_a_map_that_was_killed_are_paid_once_if_their_provider_stays_away(in_world, steps):
    async def scenario(world):
        if await world.run_map(steps):
            return
        lost = world.sellers[0]
        with suppress(P2PNodeError):
            await world.bob.start(0, ())
        world.bob.fuse.unreachable.add(lost.address)
        for seller in world.sellers:
            world.nursery.start_soon(world.bob._keep_linked, seller, world.bob.fuse)
        done = await world.bob.jobs.wait(await world.bob.jobs.start_map(world.spec))
        assert done["end_reason"] == "completed"
        world.bob.fuse.unreachable.clear()
        await trio.sleep(100)
        await world.check_nothing_stays()
        assert set(paid_by_input(world).values()) == {PRICE}
        assert check_books(world) == 10 * PRICE

    in_world(scenario)
