"""From offer to settled cheque between two machines, with losses, crashes and refusals in between."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import trio

from p2pnode.errors import PeerError, ProtocolViolation, Refused, TooSlow, Unreachable
from p2pnode.market import ledger
from p2pnode.market.negotiation import OrderTerms
from p2pnode.market.receipt_file import is_verified, verify_bundle
from p2pnode.market.settings import MarketSettings
from p2pnode.reasons import EndReason, Reason
from p2pnode.store import accounts
from p2pnode.store.agreements import get_agreement
from p2pnode.transport.limits import Limits
from p2pnode.wire.messages.market import DeliverReceipt, InputShape, Leaf
from p2pnode.wire.messages.work import Call

SHAPES = (InputShape("x", (4, 64)),)
TERMS = OrderTerms(amount_max=10_000_000, slice_calls=16, slice_seconds=20.0)


def inputs(seed: int, rows: int = 4) -> dict:
    return {"x": np.random.default_rng(seed).normal(size=(rows, 64)).astype(np.float32)}


async def ordered(world, alice, bob, model_id, terms=TERMS, job=None, shapes=SHAPES):
    link = await world.link(bob, alice)
    quote = await bob.market.quote(link, model_id, shapes, "fast")
    return await bob.market.order(quote, terms, job)


async def balances(alice, bob) -> tuple[int, int]:
    owes = await alice.database.read(lambda c: accounts.peer_balance(c, bob.identity.node_id).owes)
    owed = await bob.database.read(lambda c: accounts.peer_balance(c, alice.identity.node_id).owed)
    for machine in (alice, bob):
        await machine.database.read(accounts.check_balanced)
    return owes, owed


def test_from_offer_to_cheque(simulated, model_file) -> None:
    session = onnxruntime.InferenceSession(model_file, providers=["CPUExecutionProvider"])

    async def scenario(world, alice, bob, model_id) -> None:
        link = await world.link(bob, alice)
        offers = await bob.market.fetch_offers([link])
        assert offers[alice.identity.node_id].offer.operations_price == alice.settings.operations_price
        agreement = await ordered(world, alice, bob, model_id)
        spent = 0
        for seed in range(40):
            answer = await agreement.call(inputs(seed))
            spent += answer.amount
            np.testing.assert_array_equal(answer.outputs["y"], session.run(None, inputs(seed))[0])
            assert answer.provider == alice.identity.node_id
        bundle_of_first = await agreement.receipt(0)
        assert await agreement.close() is EndReason.COMPLETED
        checks = verify_bundle(bundle_of_first, inputs(0), {"y": session.run(None, inputs(0))[0]})
        assert is_verified(checks), checks
        assert spent > 0
        assert await balances(alice, bob) == (spent, spent)
        for machine in (alice, bob):
            row = await machine.database.read(lambda c: get_agreement(c, agreement.id))
            assert (row.state, row.end_reason, row.total, row.paid) == ("ended", "completed", spent, spent)
            assert await machine.market.receipt(agreement.id, 39)
        assert alice.market.storefront.desk.outputs.size_bytes == 0
        assert not alice.market.storefront.sales
        assert alice.metrics.value("receipts_issued_total") == bob.metrics.value("cheques_issued_total") == 5
        assert not alice.metrics.labels("refusals_total")

    simulated(scenario)


def test_many_calls_at_once_pipeline_within_one_slice(simulated) -> None:
    exposures = []

    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        sale = alice.market.storefront.sales[agreement.id]
        answers = []

        async def one(seed: int) -> None:
            answers.append(await agreement.call(inputs(seed)))
            exposures.append((sale.machine.exposure, sale.machine.exposed_calls))

        async with trio.open_nursery() as nursery:
            for seed in range(200):
                nursery.start_soon(one, seed)
        assert len(answers) == 200
        await agreement.close()
        assert max(calls for _, calls in exposures) <= TERMS.slice_calls
        assert await balances(alice, bob) == (sum(answer.amount for answer in answers),) * 2
        assert not alice.metrics.value("refusals_total", "credit")

    simulated(scenario)


def test_a_smaller_input_costs_less_and_a_larger_one_is_refused(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        large, small = (await agreement.call(inputs(0, 4))).amount, (await agreement.call(inputs(0, 1))).amount
        assert small == -(-large // 4)
        with pytest.raises(Refused) as refusal:
            await agreement.call(inputs(0, 5))
        assert refusal.value.reason is Reason.SHAPE_OVER_QUOTE

    simulated(scenario)


def test_a_lost_link_is_taken_up_again_and_nothing_is_paid_twice(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        number = agreement.next_number()
        first = await agreement.call(inputs(1), number=number, hold=True)
        for link in list(bob.transport.links().values()):
            link.close(Reason.SHUTTING_DOWN)
        await trio.sleep(5)
        again = await agreement.call(inputs(1), number=number)
        assert again.output_hash == first.output_hash
        assert (again.amount, again.number) == (first.amount, number)
        assert alice.runtime.workers[-1].submitted[-1].call_id
        await agreement.call(inputs(2))
        assert await agreement.close() is EndReason.COMPLETED
        assert await balances(alice, bob) == (2 * first.amount,) * 2

    simulated(scenario)


def test_a_lost_receipt_is_delivered_again(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        world.drops.append(["bob", DeliverReceipt, 2])
        for seed in range(40):
            await agreement.call(inputs(seed))
        assert await agreement.close() is EndReason.COMPLETED
        assert bob.metrics.value("cheques_issued_total") == 5

    simulated(scenario)


def test_a_provider_crash_costs_only_its_unsigned_slice(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        amounts = [(await agreement.call(inputs(seed))).amount for seed in range(11)]
        await trio.sleep(1)
        await alice.crash()
        with pytest.raises(PeerError):
            await agreement.call(inputs(11), timeout=0.1)
        await alice.start()
        await trio.sleep(60)
        assert (await agreement.call(inputs(12))).amount == amounts[0]
        assert await agreement.close() is EndReason.COMPLETED
        # Eight calls were receipted before the crash, three were not; the last one came after it.
        assert await balances(alice, bob) == (9 * amounts[0],) * 2
        with pytest.raises(Refused, match="unknown-call"):
            await agreement.receipt(9)

    simulated(scenario)


def test_a_crashed_client_without_a_job_pays_and_closes(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        amount = sum([(await agreement.call(inputs(seed))).amount for seed in range(3)])
        await bob.crash()
        await bob.start()
        await world.link(bob, alice)
        await trio.sleep(60)
        assert bob.market.agreement(agreement.id) is None
        assert await balances(alice, bob) == (amount, amount)

    simulated(scenario)


def test_an_output_that_was_not_kept_runs_again_without_charge(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        number = agreement.next_number()
        first = await agreement.call(inputs(1), number=number, hold=True, keep=False)
        again = await agreement.call(inputs(1), number=number)
        assert again.output_hash == first.output_hash
        await agreement.close()
        assert await balances(alice, bob) == (first.amount, first.amount)

    simulated(scenario)


def test_the_same_number_with_another_input_is_refused(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        await agreement.call(inputs(1), number=agreement.next_number(), hold=True)
        with pytest.raises(Refused) as refusal:
            await agreement.call(inputs(2), number=0)
        assert refusal.value.reason is Reason.CALL_MISMATCH

    simulated(scenario)


def test_a_cancelled_call_leaves_the_books_in_order(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        with trio.move_on_after(0.3) as scope:
            await agreement.call(inputs(1))
        assert scope.cancelled_caught
        answer = await agreement.call(inputs(2))
        assert await agreement.close() is EndReason.COMPLETED
        assert await balances(alice, bob) == (answer.amount, answer.amount)

    simulated(scenario, seconds_of=lambda model_id, headers: 1.0)


def test_limits_of_the_provider_are_named(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        link = await world.link(bob, alice)
        with pytest.raises(Refused) as refusal:
            await bob.market.quote(link, model_id, SHAPES, "exact")
        assert refusal.value.reason is Reason.CLASS
        with pytest.raises(Refused) as refusal:
            await bob.market.quote(link, b"?" * 32, SHAPES, "fast")
        assert refusal.value.reason is Reason.UNKNOWN_MODEL
        quote = await bob.market.quote(link, model_id, SHAPES, "fast")
        await bob.market.order(quote, TERMS)
        with pytest.raises(Refused) as refusal:
            await bob.market.order(quote, TERMS)
        assert refusal.value.reason is Reason.ALREADY_USED
        await trio.sleep(120)
        with pytest.raises(Refused) as refusal:
            await bob.market.order(quote, TERMS)
        assert refusal.value.reason is Reason.EXPIRED
        alice.work.drain()
        with pytest.raises(Refused) as refusal:
            await bob.market.quote(link, model_id, SHAPES, "fast")
        assert refusal.value.reason is Reason.DRAINING
        assert alice.metrics.value("refusals_total", "class") == 1

    simulated(scenario)


def test_a_client_that_never_pays_gets_one_slice_and_the_provider_says_unpaid(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        sale = alice.market.storefront.sales[agreement.id]
        world.drops.append(["bob", DeliverReceipt, 10**6])
        answers = []

        async def one(seed: int) -> None:
            try:
                answers.append(await agreement.call(inputs(seed)))
            except (Refused, Unreachable):
                return

        async with trio.open_nursery() as nursery:
            for seed in range(100):
                nursery.start_soon(one, seed)
        assert len(answers) == TERMS.slice_calls
        assert sale.machine.end_reason is EndReason.UNPAID
        row = await alice.database.read(lambda c: get_agreement(c, agreement.id))
        assert row.end_reason == "unpaid"
        assert row.unpaid == sum(answer.amount for answer in answers)
        with pytest.raises(Refused) as refusal:
            await ordered(world, alice, bob, model_id)
        assert refusal.value.reason is Reason.UNPAID
        await alice.database.write(lambda c: ledger.set_trust(c, bob.identity.node_id, 10_000))
        await ordered(world, alice, bob, model_id)

    simulated(scenario)


def test_strangers_have_one_slice_of_credit_all_agreements_together(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        limit = alice.settings.stranger_slice_amount
        first = await ordered(world, alice, bob, model_id, replace(TERMS, slice_amount=limit - 500))
        second = await ordered(world, alice, bob, model_id, replace(TERMS, slice_amount=10**9))
        assert first.terms.order.slice_amount + second.terms.order.slice_amount <= limit
        with pytest.raises(Refused) as refusal:
            await ordered(world, alice, bob, model_id)
        assert refusal.value.reason is Reason.CREDIT
        await first.close()
        await ordered(world, alice, bob, model_id)

    simulated(scenario)


def test_orders_at_the_same_time_share_the_credit(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        link = await world.link(bob, alice)
        quotes = [await bob.market.quote(link, model_id, SHAPES, "fast") for _ in range(3)]
        whole = replace(TERMS, slice_amount=10**9)
        opened, refused = [], []

        async def one(quote) -> None:
            try:
                opened.append(await bob.market.order(quote, whole))
            except Refused as error:
                refused.append(error.reason)

        async with trio.open_nursery() as nursery:
            for quote in quotes:
                nursery.start_soon(one, quote)
        assert len(opened) == 1
        assert refused == [Reason.CREDIT] * 2

    simulated(scenario)


def test_a_changed_price_touches_new_quotes_only(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        before = (await agreement.call(inputs(1))).amount
        first = await alice.market.own_offer()
        alice.market.apply(MarketSettings(operations_price=200_000_000))
        second = await alice.market.own_offer()
        assert (await agreement.call(inputs(2))).amount == before
        assert second.offer.sequence > first.offer.sequence
        await agreement.close()
        dearer = await ordered(world, alice, bob, model_id)
        assert (await dearer.call(inputs(2))).amount == 2 * before

    simulated(scenario)


def test_a_stopping_provider_signs_and_is_paid_first(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        amount = (await agreement.call(inputs(1))).amount
        await alice.stop()
        assert await balances(alice, bob) == (amount, amount)
        row = await alice.database.read(lambda c: get_agreement(c, agreement.id))
        assert row.end_reason == "provider-stopped"

    simulated(scenario)


def test_a_call_with_false_bytes_is_refused_by_hash(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        from p2pnode.wire.tensors import encode_values

        headers, chunks, _ = encode_values(inputs(1))
        link = await world.link(bob, alice)
        with pytest.raises(Refused) as refusal:
            await link.request(Call(agreement.id, 77, b"h" * 32, headers, ()), chunks)
        assert refusal.value.reason is Reason.WRONG_HASH
        with pytest.raises(Refused) as refusal:
            await link.request(Call(b"x" * 32, 77, b"h" * 32, headers, ()), chunks)
        assert refusal.value.reason is Reason.UNKNOWN_AGREEMENT
        with pytest.raises(Refused) as refusal:
            await link.request(Call(agreement.id, 77, b"h" * 32, headers, ()), chunks[:-1])
        assert refusal.value.reason is Reason.BAD_TENSOR
        sale = alice.market.storefront.sales[agreement.id]
        assert sale.machine.exposure == 0
        executed, sale_runs = sale.machine.executed, []
        sale.machine.executed = lambda *arguments: sale_runs.append(arguments) or executed(*arguments)
        # The first one was at work before its hash was known; from then on this client's calls are hashed first.
        assert sale.hashes_first
        begun = alice.metrics.value("calls_total", "cancelled")
        with pytest.raises(Refused) as refusal:
            await link.request(Call(agreement.id, 78, b"h" * 32, headers, ()), chunks)
        assert refusal.value.reason is Reason.WRONG_HASH
        await trio.sleep(5)
        assert alice.metrics.value("calls_total", "cancelled") == begun
        assert (sale.machine.exposure, sale.machine.exposed_calls, sale.running, sale_runs) == (0, 0, {}, [])
        assert (await agreement.call(inputs(1))).amount > 0

    simulated(scenario, seconds_of=lambda *_: 0.05)


def test_a_large_call_with_false_bytes_never_reaches_a_worker(simulated) -> None:
    """Its hash is known with its last byte."""

    async def scenario(world, alice, bob, model_id) -> None:
        from p2pnode.wire.tensors import encode_values

        agreement = await ordered(world, alice, bob, model_id, shapes=(InputShape(name="x", shape=(1000, 64)),))
        headers, chunks, size = encode_values(inputs(1, rows=1000))
        assert size > Limits().inline_bytes_max
        link = await world.link(bob, alice)
        with pytest.raises(Refused) as refusal:
            await link.request(Call(agreement.id, 77, b"h" * 32, headers, ()), chunks)
        assert refusal.value.reason is Reason.WRONG_HASH
        sale = alice.market.storefront.sales[agreement.id]
        assert alice.metrics.value("calls_total", "cancelled") == 0
        assert (sale.machine.exposure, sale.running) == (0, {})

    simulated(scenario, seconds_of=lambda *_: 0.05)


def test_a_call_that_is_not_answered_by_its_deadline_is_given_up(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        answers, started = [], trio.current_time()

        def note(answer) -> None:
            answers.append((answer, trio.current_time() - started))

        world.drops.append(["alice", Call, 1])
        agreement.call_nowait(inputs(1), on_answer=note, deadline=started + 7)
        agreement.call_nowait(inputs(2), on_answer=note, deadline=started + 8)
        await trio.sleep(20)
        (second, soon), (first, late) = answers
        assert second.amount > 0
        assert soon < 1
        assert isinstance(first, TooSlow)
        assert 7 <= late < 7.1
        agreement.call_nowait(inputs(3), on_answer=note, deadline=trio.current_time() + 1)
        await trio.sleep(20)
        assert answers[2][0].amount > 0, "an answered call has no deadline any more"
        assert await agreement.close() is EndReason.COMPLETED
        assert await balances(alice, bob) == (2 * second.amount,) * 2

    simulated(scenario)


def test_a_lying_provider_is_not_paid_and_both_sides_say_why(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        blamed = []
        bob.market.on_violation = lambda node_id, reason: blamed.append((node_id, reason))
        await agreement.call(inputs(1))
        opened = alice.market.storefront.sales[agreement.id].machine._open
        opened.leaves.append(Leaf(99, b"i" * 32, b"o" * 32, b"", 10))
        opened.amount += 10
        assert await agreement.close() is EndReason.MISMATCH
        await trio.sleep(1)
        assert blamed == [(alice.identity.node_id, Reason.RECEIPT_MISMATCH)]
        assert await balances(alice, bob) == (0, 0)
        row = await alice.database.read(lambda c: get_agreement(c, agreement.id))
        assert row.end_reason == "mismatch"

    simulated(scenario)


def test_a_false_output_is_noticed_by_its_hash(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement = await ordered(world, alice, bob, model_id)
        link = alice.transport.links()[bob.identity.node_id]
        reply = link.answer
        link.answer = lambda incoming, message, attachment, on_sent: reply(
            incoming, message, tuple(bytes(len(part)) for part in attachment), on_sent
        )
        with pytest.raises(ProtocolViolation) as violation:
            await agreement.call(inputs(1))
        assert violation.value.reason is Reason.WRONG_HASH
        assert await agreement.close() is EndReason.MISMATCH
        assert await balances(alice, bob) == (0, 0)

    simulated(scenario)
