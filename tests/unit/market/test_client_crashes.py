"""A client that dies with calls or orders under way: what it had asked for is decided first, and paid once."""

import numpy as np
import pytest
import trio

from p2pnode.errors import PeerError, Refused, StoreError, Unreachable
from p2pnode.market.negotiation import OrderTerms
from p2pnode.reasons import EndReason, Reason
from p2pnode.store import accounts, jobs
from p2pnode.store.agreements import list_agreements
from p2pnode.wire.messages.market import InputShape
from p2pnode.wire.messages.work import FetchResult

SHAPES = (InputShape("x", (4, 64)),)
TERMS = OrderTerms(amount_max=10_000_000, slice_calls=16, slice_seconds=20.0)


def inputs(seed: int, rows: int = 4) -> dict:
    return {"x": np.random.default_rng(seed).normal(size=(rows, 64)).astype(np.float32)}


async def ordered(world, alice, bob, model_id, terms=TERMS, job=None):
    link = await world.link(bob, alice)
    quote = await bob.market.quote(link, model_id, SHAPES, "fast")
    return await bob.market.order(quote, terms, job)


async def balances(alice, bob) -> tuple[int, int]:
    owes = await alice.database.read(lambda c: accounts.peer_balance(c, bob.identity.node_id).owes)
    owed = await bob.database.read(lambda c: accounts.peer_balance(c, alice.identity.node_id).owed)
    for machine in (alice, bob):
        await machine.database.read(accounts.check_balanced)
    return owes, owed


JOB = b"j" * 32


async def place(bob, agreement, numbers) -> None:
    """Put what a map puts on disk before its calls leave: one item each."""

    def write(connection) -> None:
        jobs.save_job(connection, jobs.JobRow(JOB, "map", "rows", b"m" * 32, b"", "running", 10**9, 0))
        jobs.add_items(connection, JOB, [b""] * len(numbers))
        rows = []
        for position, number in enumerate(numbers):
            input_hash, amount = agreement.described(inputs(number))
            rows.append(
                jobs.ItemRow(JOB, position, "placed", input_hash=input_hash, agreement=agreement.id, call=number, amount=amount)
            )
        jobs.save_items(connection, rows)

    await bob.database.write(write)


async def crash_with_calls_under_way(world, alice, bob, model_id, keep=True):
    """Three answered calls that a map has placed and not stored; gives what bob has after his restart, and the answers."""
    agreement = await ordered(world, alice, bob, model_id, job=JOB)
    numbers = [agreement.next_number() for _ in range(3)]
    await place(bob, agreement, numbers)
    answers = [await agreement.call(inputs(number), number=number, hold=True, keep=keep) for number in numbers]
    await bob.crash()
    await bob.start()
    return bob.market.agreement(agreement.id), numbers, answers


def test_a_client_crash_fetches_instead_of_paying_twice(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        resumed, numbers, answers = await crash_with_calls_under_way(world, alice, bob, model_id)
        await world.link(bob, alice)
        await trio.sleep(29)
        assert resumed.spent == 0, "however long its owner takes, nothing is paid before it is decided"
        executed = len(alice.runtime.workers[-1].submitted)
        again = [await resumed.fetch(number) for number in numbers]
        assert [answer.output_hash for answer in again] == [answer.output_hash for answer in answers]
        assert len(alice.runtime.workers[-1].submitted) == executed, "the outputs were kept, nothing ran again"
        for number in numbers:
            resumed.confirm(number)
        assert await resumed.close() is EndReason.COMPLETED
        assert await balances(alice, bob) == (sum(answer.amount for answer in answers),) * 2

    simulated(scenario)


def test_a_call_that_never_left_costs_nothing_and_may_not_be_charged_later(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id, job=JOB)
        first, never = agreement.next_number(), agreement.next_number()
        await place(bob, agreement, [first, never])
        amount = (await agreement.call(inputs(first), number=first, hold=True)).amount
        await bob.crash()
        await bob.start()
        await world.link(bob, alice)
        resumed = bob.market.agreement(agreement.id)
        with pytest.raises(Refused, match="unknown-call"):
            await resumed.fetch(never)
        assert resumed.at_risk == amount
        resumed.give_up(first)
        assert await resumed.close() is EndReason.COMPLETED
        assert await balances(alice, bob) == (amount, amount), "given up after it was answered: paid, without its answer"

    simulated(scenario)


def test_an_answer_that_was_not_kept_is_made_again_for_nothing_after_a_crash(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        resumed, numbers, answers = await crash_with_calls_under_way(world, alice, bob, model_id, keep=False)
        await world.link(bob, alice)
        for number, answer in zip(numbers, answers, strict=True):
            with pytest.raises(Refused, match="output-gone"):
                await resumed.fetch(number)
            again = await resumed.call(inputs(number), number=number, hold=True)
            assert again.output_hash == answer.output_hash
            resumed.confirm(number)
        assert await resumed.close() is EndReason.COMPLETED
        assert await balances(alice, bob) == (sum(answer.amount for answer in answers),) * 2

    simulated(scenario)


def test_a_fetch_whose_link_breaks_decides_nothing(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        resumed, numbers, answers = await crash_with_calls_under_way(world, alice, bob, model_id)
        with pytest.raises(Unreachable):
            await resumed.fetch(numbers[0])
        link = await world.link(bob, alice)
        world.drops.append(["alice", FetchResult, 3])
        async with trio.open_nursery() as nursery:
            for number in numbers:
                nursery.start_soon(expect_unreachable, resumed, number)
            await trio.sleep(1)
            link.close(Reason.IDLE)
        await trio.sleep(10)
        assert resumed.spent == 0
        for number in numbers:
            await resumed.fetch(number)
            resumed.confirm(number)
        assert await resumed.close() is EndReason.COMPLETED
        assert await balances(alice, bob) == (sum(answer.amount for answer in answers),) * 2

    simulated(scenario)


async def expect_unreachable(agreement, number) -> None:
    with pytest.raises(Unreachable):
        await agreement.fetch(number)


def test_an_order_whose_client_dies_before_the_answer_is_withdrawn(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        # Alice agrees; bob dies while her countersignature is on its way.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_dead, world, alice, bob, model_id)
            while not alice.market.storefront.sales:  # noqa: ASYNC110 - polled on virtual time
                await trio.sleep(0.001)
            await bob.crash()
        await bob.start()
        [row] = await bob.database.read(lambda connection: list_agreements(connection, role="client"))
        assert row.state == "ended", "nothing came of it here"
        await trio.sleep(1)
        assert alice.market.storefront.sales, "she does not know yet"
        await bob.crash()  # and again before he could tell her
        await bob.start()
        await world.link(bob, alice)
        await trio.sleep(1)
        assert not alice.market.storefront.sales, "her credit is free again, long before the order's deadline"
        ends = [[(row.state, row.end_reason) for row in await machine.database.read(list_agreements)] for machine in (alice, bob)]
        assert ends == [[("ended", "client-stopped")]] * 2

    simulated(scenario)


async def expect_dead(world, alice, bob, model_id) -> None:
    with pytest.raises((PeerError, StoreError)):
        await ordered(world, alice, bob, model_id)


def test_an_order_that_is_given_up_is_withdrawn_though_it_is_still_being_saved_there(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        link = await world.link(bob, alice)
        quote = await bob.market.quote(link, model_id, SHAPES, "fast")
        alice.database._commit_seconds = 5.0
        with trio.move_on_after(3):
            await bob.market.order(quote, TERMS)
        await trio.sleep(1)
        assert not alice.market.storefront.sales
        await trio.sleep(20)
        assert not alice.market.storefront.sales
        rows = [await machine.database.read(list_agreements) for machine in (alice, bob)]
        assert [[row.state for row in found] for found in rows] == [["ended"], ["ended"]]

    simulated(scenario)
