"""Agreement machines whose client withdraws calls that it got elsewhere: links break, sides crash, and the books agree.

Unlike in `test_agreement_machines` the link keeps order, as every link does: a receipt that was sent before a withdrawal was
answered arrives before the answer.
"""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pnode.market.agreements import AnswerWithdrawal, CallsWithdrawn, Phase, ReplaceReceipts, Tick
from p2pnode.market.sold_agreement import SignedSlice
from p2pnode.reasons import EndReason
from tests.property.test_agreement_machines import ACTIONS, SLICE_AMOUNT, World, act, input_hash

ROOM = 45


class LostWorld(World):
    """due: withdrawn, and the provider not told. asked: told, and not answered. room: what the provider lets go yet."""

    def __init__(self) -> None:
        self.room = ROOM
        self.due: set[int] = set()
        self.asked: set[int] = set()
        self.freed: set[int] = set()
        super().__init__()

    def deliver(self, queue: list, index: int, receive) -> None:
        super().deliver(queue, 0, receive)

    def withdraw(self) -> None:
        """The client has made every call elsewhere whose fate is unknown since a link broke."""
        for number, call in self.bought.calls.by_number.items():
            if not (call.is_answered or call.is_flying or number in self.asked or number in self.freed):
                self.bought.calls.hold(number)
                self.due.add(number)

    def tell(self) -> None:
        if self.due and not self.asked and self.is_linked and self.bought.is_up and self.bought.phase is not Phase.ENDED:
            self.asked, self.due = self.due & set(self.bought.calls.by_number), set()
            if self.asked:
                self.to_provider.append(("withdraw", sorted(self.asked)))

    def cut(self) -> None:
        super().cut()
        self.due, self.asked = self.due | self.asked, set()

    def crash_provider(self) -> None:
        super().crash_provider()
        self.due, self.asked = self.due | self.asked, set()

    def crash_client(self) -> None:
        super().crash_client()
        self.due, self.asked = set(), set()

    def provider_receives(self, message: tuple) -> None:
        if message[0] != "withdraw":
            super().provider_receives(message)
            return
        for number in message[1]:
            if number in self.running:
                self.running.remove(number)
                self.sold.failed(number)
        if self.sold.phase is not Phase.ENDED:
            self.provider(self.sold.withdraw(message[1], self.room))

    def client_takes(self, message: tuple) -> None:
        if message[0] != "withdrawn":
            super().client_takes(message)
            return
        asked, self.asked = self.asked, set()
        self.client(self.bought.handle(CallsWithdrawn(tuple(asked), message[1], message[2]), self.now))
        for number in message[2]:
            call = self.bought.calls.by_number.get(number)
            if call is not None:
                self.bought.calls.give_up(number)
                self.bought.calls.fetching(number)
                self.to_provider.append(("fetch", number))

    def provider(self, effects: list) -> None:
        for effect in effects:
            match effect:
                case ReplaceReceipts(receipts, amount):
                    self.room -= amount
                    for item in receipts:
                        assert item.receipt.slice not in self.provider_disk.cheques
                        assert item.receipt.amount <= self.provider_disk.receipts[item.receipt.slice].receipt.amount
                        self.provider_disk.receipts[item.receipt.slice] = SignedSlice(item.receipt, item.document, item.leaves)
                case AnswerWithdrawal(freed, charged):
                    self.freed |= set(freed)
                    self.to_client = [message for message in self.to_client if message[0] != "receipt"]
                    self.to_client.append(("withdrawn", frozenset(freed), frozenset(charged)))
                case _:
                    super().provider([effect])

    def settle(self) -> None:
        for _ in range(8):
            self.link()
            for _ in range(60):
                self.tell()
                super().deliver(self.to_provider, 0, self.provider_receives)
                super().deliver(self.to_client, 0, self.client_receives)
                self.check()
            if not (self.due or self.asked):
                break
            self.client(self.bought.handle(Tick(), self.now))
        super().settle()

    def check(self) -> None:
        assert 0 <= self.sold.exposure <= SLICE_AMOUNT
        assert self.room >= 0
        paid = [leaf for signed in self.client_disk.receipts.values() for leaf in signed.leaves]
        numbers = [leaf.number for leaf in paid]
        assert len(numbers) == len(set(numbers)), "a call was paid twice"
        for leaf in paid:
            hashed, price = self.sent[leaf.number]
            assert hashed == leaf.input_hash == input_hash(leaf.number)
            assert leaf.amount == (0 if leaf.number in self.freed else price)
        issued = max((cheque.total for cheque in self.client_disk.cheques.values()), default=0)
        received = max((cheque.total for cheque in self.provider_disk.cheques.values()), default=0)
        assert issued == sum(leaf.amount for leaf in paid)
        assert received <= issued


LOST = st.one_of(
    ACTIONS,
    st.sampled_from([("withdraw", 0), ("tell", 0), ("link", 0), ("to_provider", 0), ("to_client", 0)]),
    st.sampled_from([("call", 5), ("to_provider", 0), ("run", 0), ("cut", 0), ("link", 0), ("withdraw", 0)]),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(LOST, min_size=10, max_size=150))
def test_no_order_of_events_charges_what_was_let_go(actions: list) -> None:
    world = LostWorld()
    for name, value in actions:
        act(world, name, value)
        world.check()
    world.settle()
    world.check()
    assert world.sold.phase is Phase.ENDED
    assert world.bought.phase is Phase.ENDED
    assert world.client_disk.ended is world.provider_disk.ended
    if not world.provider_crashes:
        assert world.client_disk.ended is EndReason.COMPLETED
        assert world.sold.paid == world.bought.paid == world.sold.total
    assert world.sold.total == sum(signed.receipt.amount for signed in world.provider_disk.receipts.values())


def test_an_answer_that_was_lost_is_let_go_whether_it_was_signed_or_not() -> None:
    for wait in (0, 30):
        world = LostWorld()
        for name, value in [("call", 5), ("to_provider", 0), ("run", 0), ("to_client", 0), ("call", 13), ("to_provider", 0)]:
            act(world, name, value)
        world.run_one()
        world.cut()
        world.tick(wait)
        world.withdraw()
        world.settle()
        assert world.sold.paid == world.bought.paid == world.sold.total == 5
        assert world.room == ROOM - 13
        assert world.client_disk.ended is world.provider_disk.ended is EndReason.COMPLETED
