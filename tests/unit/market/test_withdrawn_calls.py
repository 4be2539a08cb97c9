"""Calls that a client got elsewhere: what the provider frees, what it signs anew, and what the client makes of it."""

import numpy as np
import pytest
import trio

from p2pnode.crypto.hashing import document_hash
from p2pnode.errors import LedgerError, ProtocolViolation, Unreachable
from p2pnode.market import ledger
from p2pnode.market.agreements import (
    AnswerWithdrawal,
    AskLeaves,
    CallsWithdrawn,
    ChequeArrived,
    EndAsked,
    LeavesArrived,
    LinkUp,
    Now,
    ReceiptArrived,
    ReplaceReceipts,
    SaveCheque,
    SaveReceipt,
    SendReceipt,
    Terms,
    Tick,
)
from p2pnode.market.bought_agreement import BoughtAgreement
from p2pnode.market.cheques import HashChain
from p2pnode.market.negotiation import OrderTerms
from p2pnode.market.settings import MarketSettings
from p2pnode.market.slices import check_leaves
from p2pnode.market.sold_agreement import SoldAgreement
from p2pnode.reasons import EndReason, Reason
from p2pnode.store import accounts, agreements
from p2pnode.store.agreements import ReceiptRow, replace_receipts
from p2pnode.wire.codec import encode
from p2pnode.wire.messages.market import Cheque, InputShape, Leaf, Order, Quote, WithdrawCalls

CHAIN = HashChain(b"s" * 32, 9)
PROVIDER = b"p" * 32
SHAPES = (InputShape("x", (4, 64)),)


def at(seconds: float) -> Now:
    return Now(seconds, int(seconds * 1000))


def terms() -> Terms:
    quote = Quote(b"c" * 32, bytes(32), b"m" * 32, "fast", (), 1, 1, 0, 10, 1, 100, 10**12, bytes(16))
    order = Order(
        bytes(32), PROVIDER, b"m" * 32, "fast", 1000, 1_000_000, 0, 0, 8, 20_000, 100, CHAIN.value(0), 9, b"", True, False,
        10**12, bytes(16),
    )  # fmt: skip
    return Terms(b"a" * 32, PROVIDER, b"c" * 32, b"P" * 32, b"C" * 32, order, quote, 0, 1000)


def seller(*numbers: int) -> SoldAgreement:
    """A provider that has executed these calls, two a slice and the last ones unsigned."""
    sold = SoldAgreement(terms(), at(0), 30.0, 3600.0)
    sold.handle(LinkUp(), at(0))
    for index, number in enumerate(numbers):
        sold.admit(number, bytes([number]) * 32, 10)
        sold.executed(number, bytes([100 + number]) * 32, 5, "cpu", at(index // 2 * 11))
        if index % 2:
            sold.handle(Tick(), at(index // 2 * 11 + 10.5))
    return sold


def test_receipts_are_signed_anew_from_the_first_that_shrinks() -> None:
    sold = seller(1, 2, 3, 4, 5, 6, 7)
    before = {number: signed.receipt for number, signed in sold.unpaid.items()}
    replace, answer, *sends = sold.withdraw([4, 7, 99], 1000)
    assert isinstance(replace, ReplaceReceipts)
    assert (replace.amount, answer) == (20, AnswerWithdrawal((4, 7), ()))
    assert sends == [SendReceipt(0), SendReceipt(1), SendReceipt(2)]
    assert [item.receipt.slice for item in replace.receipts] == [1, 2]
    previous, total = document_hash(encode(before[0])), 20
    for item in replace.receipts:
        total += item.receipt.amount
        assert (item.receipt.previous, item.receipt.total, item.receipt.calls) == (previous, total, 2)
        check_leaves(item.leaves, item.receipt.root, item.receipt.amount)
        previous = item.document
    assert [leaf.amount for leaf in replace.receipts[0].leaves] == [10, 0]
    assert sold.total == total == 50
    assert sold.exposure == 50
    assert sold.exposed_calls == 7, "freed calls keep their places"
    *_, saved = [effect for effect in sold.handle(EndAsked(EndReason.COMPLETED), at(33)) if isinstance(effect, SaveReceipt)]
    assert (saved.receipt.amount, saved.receipt.total, saved.receipt.previous) == (0, 50, previous)
    assert sold.withdraw([4], 0) == [AnswerWithdrawal((4,), ()), *(SendReceipt(number) for number in range(4))], "said again"


def test_only_so_much_is_let_go_and_nothing_that_is_paid() -> None:
    sold = seller(1, 2, 3, 4)
    receipt = sold.unpaid[0]
    cheque = Cheque(b"a" * 32, PROVIDER, 0, receipt.document, 20, CHAIN.value(1), 1)
    sold.handle(ChequeArrived(cheque), at(22))
    replace, answer, *_ = sold.withdraw([1, 3, 4], 15)
    assert (replace.amount, answer) == (10, AnswerWithdrawal((3,), (1, 4)))
    assert (sold.total, sold.paid) == (30, 20)
    assert sold.withdraw([4], 9) == [AnswerWithdrawal((), (4,))]


def buyer() -> BoughtAgreement:
    bought = BoughtAgreement(terms(), CHAIN, at(0), 30.0, 3600.0)
    bought.handle(LinkUp(), at(0))
    for number, position in ((1, 0), (2, None)):
        bought.calls.sent(number, bytes([number]) * 32, 10)
        if position is not None:
            bought.calls.answered(number, 0, position, bytes([100 + number]) * 32, 10)
    bought.calls.hold(2)
    bought.calls.lost(2)
    return bought


def leaves(second_amount: int) -> tuple[Leaf, ...]:
    return tuple(Leaf(n, bytes([n]) * 32, bytes([100 + n]) * 32, b"", 10 if n == 1 else second_amount) for n in (1, 2))


def receipt_of(sold: SoldAgreement) -> ReceiptArrived:
    return ReceiptArrived(sold.unpaid[0].receipt, sold.unpaid[0].document)


def test_a_freed_call_costs_nothing_and_its_neighbours_are_paid() -> None:
    bought, sold = buyer(), seller(1, 2)
    assert bought.handle(receipt_of(sold), at(1)) == [AskLeaves(0)]
    assert bought.handle(LeavesArrived(0, leaves(10)), at(1)) == [], "not paid before the provider has said"
    sold.withdraw([2], 1000)
    assert bought.handle(CallsWithdrawn((2,), frozenset({2}), frozenset()), at(2)) == []
    assert bought.calls.outstanding == 10
    assert bought.handle(receipt_of(sold), at(2)) == [AskLeaves(0)]
    paid = bought.handle(LeavesArrived(0, leaves(0)), at(2))
    assert [effect.cheque.total for effect in paid if isinstance(effect, SaveCheque)] == [10]
    assert (bought.calls.outstanding, dict(bought.calls.by_number)) == (0, {})


@pytest.mark.parametrize("freed", [True, False])
def test_a_provider_that_charges_what_it_let_go_is_not_paid(freed: bool) -> None:
    bought, sold = buyer(), seller(1, 2)
    bought.handle(CallsWithdrawn((2,), frozenset({2} if freed else ()), frozenset()), at(2))
    bought.handle(receipt_of(sold), at(2))
    with pytest.raises(ProtocolViolation) as violation:
        bought.handle(LeavesArrived(0, leaves(10)), at(2))
    assert violation.value.reason is Reason.RECEIPT_MISMATCH


def inputs(seed: int) -> dict:
    return {"x": np.random.default_rng(seed).normal(size=(4, 64)).astype(np.float32)}


async def lost_call(world, alice, bob, model_id):
    """An agreement of bob's with one answered call and one whose answer is lost; gives it and the price."""
    link = await world.link(bob, alice)
    quote = await bob.market.quote(link, model_id, SHAPES, "fast")
    agreement = await bob.market.order(quote, OrderTerms(amount_max=10_000_000, slice_calls=16, slice_seconds=20.0))
    price = (await agreement.call(inputs(1))).amount
    number = agreement.next_number()
    async with trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(Unreachable):
                await agreement.call(inputs(2), number=number, hold=True)

        nursery.start_soon(call)
        await trio.sleep(0.015)
        link.close(Reason.SHUTTING_DOWN)
    return agreement, number, price


async def owed(alice, bob) -> tuple[int, int]:
    owes = await alice.database.read(lambda c: accounts.peer_balance(c, bob.identity.node_id).owes)
    return owes, await bob.database.read(lambda c: accounts.peer_balance(c, alice.identity.node_id).owed)


def test_a_withdrawn_call_is_written_off_and_remembered(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement, number, price = await lost_call(world, alice, bob, model_id)
        agreement.withdraw(number)
        await trio.sleep(5)
        assert await agreement.close() is EndReason.COMPLETED
        assert await owed(alice, bob) == (price, price)
        assert alice.metrics.value("written_off_microcredits_total") == price
        now_ms = alice.market._environment.clock.wall_ms()
        room = await alice.database.read(lambda c: ledger.write_off_room(c, bob.identity.node_id, alice.settings, now_ms))
        assert room == alice.settings.stranger_slice_amount - price
        month = round(1000 * alice.settings.credit_half_life_seconds)
        later = await alice.database.read(
            lambda c: ledger.write_off_room(c, bob.identity.node_id, alice.settings, now_ms + month)
        )
        assert later == alice.settings.stranger_slice_amount - price // 2

    simulated(scenario)


def test_a_call_that_is_taken_back_in_time_is_answered_and_paid(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement, number, price = await lost_call(world, alice, bob, model_id)
        agreement.withdraw(number, 3.0)
        await trio.sleep(1)
        assert agreement.hold(number)
        assert (await agreement.call(inputs(2), number=number)).amount == price
        agreement.confirm(number)
        assert await agreement.close() is EndReason.COMPLETED
        assert await owed(alice, bob) == (2 * price, 2 * price)

    simulated(scenario)


def test_a_provider_that_knows_no_withdrawals_is_paid(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        del alice.market._in_a_task[WithdrawCalls]
        agreement, number, price = await lost_call(world, alice, bob, model_id)
        agreement.withdraw(number)
        await trio.sleep(5)
        assert not agreement.hold(number) or agreement.give_up(number) is None
        assert await agreement.close() is EndReason.COMPLETED
        assert await owed(alice, bob) == (2 * price, 2 * price)

    simulated(scenario)


def test_a_withdrawal_that_was_not_heard_is_told_again(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        world.drops.append(["alice", WithdrawCalls, 1])
        agreement, number, price = await lost_call(world, alice, bob, model_id)
        agreement.withdraw(number)
        await trio.sleep(5)
        for link in list(bob.transport.links().values()):
            link.close(Reason.SHUTTING_DOWN)
        await trio.sleep(5)
        assert await agreement.close() is EndReason.COMPLETED
        assert await owed(alice, bob) == (price, price)

    simulated(scenario)


def test_others_agreements_are_no_business_of_a_client(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement, number, price = await lost_call(world, alice, bob, model_id)
        carol = world.machine("carol", 3, MarketSettings(selling=False))
        await carol.start()
        link = await world.link(carol, alice)
        with pytest.raises(Exception, match="no open agreement") as refusal:
            await link.request(WithdrawCalls(agreement.id, (number,)))
        assert refusal.value.reason is Reason.UNKNOWN_AGREEMENT
        agreement.give_up(number)
        assert await agreement.close() is EndReason.COMPLETED
        assert await owed(alice, bob) == (2 * price, 2 * price)

    simulated(scenario)


def test_a_receipt_is_never_replaced_by_a_dearer_one_or_after_its_cheque(simulated) -> None:
    async def scenario(world, alice, bob, model_id) -> None:
        agreement, number, _ = await lost_call(world, alice, bob, model_id)
        agreement.give_up(number)
        assert await agreement.close() is EndReason.COMPLETED
        row: ReceiptRow = (await alice.database.read(agreements.list_receipts))[0]
        with pytest.raises(LedgerError):
            await alice.database.write(lambda c: replace_receipts(c, [row]))

    simulated(scenario)
