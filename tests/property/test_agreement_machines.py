"""Both agreement machines joined by a link that loses everything on a break, reorders, and whose ends crash.

What must hold whatever happens: at most one slice of value is executed and unpaid; no call is paid twice; a cheque never
covers anything but this client's own calls; after the end both sides name the same total.
"""

from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pnode.crypto.hashing import blake3_256
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.market.agreements import (
    AskLeaves,
    ChequeArrived,
    EndAsked,
    EndConfirmed,
    FetchOutputs,
    Finished,
    LeavesArrived,
    LinkDown,
    LinkUp,
    Now,
    Phase,
    ReceiptArrived,
    ReceiptRefused,
    RefuseReceipt,
    SaveCheque,
    SaveReceipt,
    SendCheque,
    SendEnd,
    SendReceipt,
    StateArrived,
    Terms,
    Tick,
)
from p2pnode.market.bought_agreement import BoughtAgreement, BoughtProgress
from p2pnode.market.cheques import HashChain
from p2pnode.market.sold_agreement import SignedSlice, SoldAgreement, SoldProgress
from p2pnode.reasons import EndReason, Reason
from p2pnode.wire.messages.market import Order, Quote

PROVIDER, CLIENT = b"p" * 32, b"c" * 32
SLICE_AMOUNT, SLICE_CALLS, PRICES = 60, 12, (5, 8, 13)
CHAIN = HashChain(b"s" * 32, 500)


def make_terms(amount_max: int = 100_000) -> Terms:
    quote = Quote(CLIENT, b"o" * 32, b"m" * 32, "fast", (), 10, 1, 0, 13, 1, SLICE_AMOUNT, 10**12, bytes(16))
    order = Order(
        b"q" * 32, PROVIDER, b"m" * 32, "fast", amount_max, 10**9, 0, 0, SLICE_CALLS, 20_000, SLICE_AMOUNT, CHAIN.value(0),
        CHAIN.length, b"", True, False, 10**12, bytes(16),
    )  # fmt: skip
    return Terms(b"a" * 32, PROVIDER, CLIENT, b"P" * 32, b"C" * 32, order, quote, 0, amount_max)


def input_hash(number: int) -> bytes:
    return blake3_256(b"input", number.to_bytes(8, "big"))


def output_hash(number: int) -> bytes:
    return blake3_256(b"output", number.to_bytes(8, "big"))


@dataclass
class Disk:
    """What a side has saved."""

    receipts: dict = field(default_factory=dict)
    cheques: dict = field(default_factory=dict)
    ended: EndReason | None = None


class World:
    def __init__(self) -> None:
        self.seconds = 1000.0
        self.terms = make_terms()
        self.provider_disk, self.client_disk = Disk(), Disk()
        self.to_client: list = []
        self.to_provider: list = []
        self.running: list[int] = []
        self.kept: set[int] = set()
        self.delivered: dict[int, bytes] = {}
        self.sent: dict[int, tuple[bytes, int]] = {}
        self.next_number = 0
        self.client_crashes = self.provider_crashes = 0
        self.is_linked = False
        self.sold = SoldAgreement(self.terms, self.now, 30.0, 3600.0)
        self.bought = BoughtAgreement(self.terms, CHAIN, self.now, 30.0, 3600.0)
        self.link()

    @property
    def now(self) -> Now:
        return Now(self.seconds, int(self.seconds * 1000))

    # --- what may happen

    def link(self) -> None:
        if not self.is_linked:
            self.is_linked = True
            if self.sent or self.client_crashes or self.provider_disk.receipts:
                self.to_provider.append(("resume",))
            else:
                self.provider(self.sold.handle(LinkUp(), self.now))
                self.client(self.bought.handle(LinkUp(), self.now))

    def cut(self) -> None:
        self.is_linked = False
        self.to_client.clear()
        self.to_provider.clear()
        for number in self.running:
            self.sold.failed(number)
        self.running.clear()
        self.provider(self.sold.handle(LinkDown(), self.now))
        self.client(self.bought.handle(LinkDown(), self.now))

    def crash_provider(self) -> None:
        self.provider_crashes += 1
        self.is_linked = False
        self.to_client.clear()
        self.to_provider.clear()
        self.running.clear()
        self.kept.clear()
        disk = self.provider_disk
        last = disk.receipts[max(disk.receipts)] if disk.receipts else None
        cheque = disk.cheques[max(disk.cheques)] if disk.cheques else None
        paid_numbers = [leaf.number for number in disk.cheques for leaf in disk.receipts[number].leaves]
        progress = SoldProgress(
            total=last.receipt.total if last else 0,
            slices=len(disk.receipts),
            paid=cheque.total if cheque else 0,
            slices_paid=len(disk.cheques),
            tip=cheque.preimage if cheque else b"",
            last_receipt=last.document if last else b"",
            unpaid=[disk.receipts[number] for number in sorted(disk.receipts) if number not in disk.cheques],
            paid_numbers=paid_numbers,
        )
        self.sold = SoldAgreement(self.terms, self.now, 30.0, 3600.0, progress)
        self.client(self.bought.handle(LinkDown(), self.now))

    def crash_client(self) -> None:
        self.is_linked = False
        self.to_client.clear()
        self.to_provider.clear()
        for number in self.running:
            self.sold.failed(number)
        self.running.clear()
        self.client_crashes += 1
        disk = self.client_disk
        cheque = disk.cheques[max(disk.cheques)] if disk.cheques else None
        last = disk.receipts[max(disk.receipts)] if disk.receipts else None
        self.next_number += 1000
        progress = BoughtProgress(
            paid=cheque.total if cheque else 0,
            slices_paid=len(disk.cheques),
            last_receipt=last.document if last else b"",
            first_number=self.next_number,
            is_restart=True,
            recalled=self.recalled(),
        )
        self.bought = BoughtAgreement(self.terms, CHAIN, self.now, 30.0, 3600.0, progress=progress)
        self.provider(self.sold.handle(LinkDown(), self.now))

    def recalled(self) -> list[tuple[int, bytes, int]]:
        """What the client's disk says of calls whose outputs it lacks; nothing for a client that keeps no such rows."""
        return []

    def call(self, price: int) -> None:
        try:
            if not self.bought.may_send(price):
                return
        except Refused:
            return
        number = self.next_number
        self.next_number += 1
        self.sent[number] = (input_hash(number), price)
        self.bought.calls.sent(number, input_hash(number), price)
        self.to_provider.append(("call", number, price))

    def repeat(self) -> None:
        """The client asks again for a call of unknown fate, with the same number."""
        if not self.bought.is_up or self.bought.phase is not Phase.OPEN:
            return
        for number, call in self.bought.calls.by_number.items():
            if not call.is_answered and not call.is_flying:
                self.bought.calls.sent(number, call.input_hash, call.amount)
                self.to_provider.append(("call", number, call.amount))
                return

    def run_one(self) -> None:
        if self.running:
            number = self.running.pop(0)
            if self.sold.phase is Phase.ENDED:
                self.sold.failed(number)
                return
            place = self.sold.executed(number, output_hash(number), 10, "cpu", self.now)
            self.kept.add(number)
            self.to_client.append(("result", number, place.slice, place.position, place.amount))
            if self.sold.is_due:
                self.provider(self.sold.handle(Tick(), self.now))

    def deliver(self, queue: list, index: int, receive) -> None:
        if queue:
            receive(queue.pop(index % len(queue)))

    def tick(self, seconds: float) -> None:
        self.seconds += seconds
        self.provider(self.sold.handle(Tick(), self.now))
        try:
            self.client(self.bought.handle(Tick(), self.now))
        except ProtocolViolation:
            assert self.provider_crashes
            self.break_off()

    # --- the wires

    def provider_receives(self, message: tuple) -> None:
        match message:
            case ("call", number, price):
                try:
                    known = self.sold.admit(number, input_hash(number), price)
                except Refused as refusal:
                    self.to_client.append(("refused", number, refusal.reason))
                    return
                if known is None:
                    self.running.append(number)
                elif known.position >= 0:
                    # Kept, or executed again without charge: the same answer either way.
                    self.to_client.append(("result", number, known.slice, known.position, known.amount))
            case ("fetch", number):
                known = self.sold.calls.get(number)
                if known is not None and known.position >= 0 and number in self.kept:
                    self.to_client.append(("result", number, known.slice, known.position, known.amount))
                elif known is None:
                    self.to_client.append(("refused", number, Reason.UNKNOWN_CALL))
                elif known.position >= 0:
                    self.to_client.append(("gone", number))
                # A call that still runs answers the fetch when it is done.
            case ("resume",):
                self.to_client.insert(0, ("state", self.sold.state))
                self.provider(self.sold.handle(LinkUp(), self.now))
            case ("again", number):
                self.provider([SendReceipt(number)] if number in self.sold.unpaid else [])
            case ("cheque", cheque):
                self.provider(self.sold.handle(ChequeArrived(cheque), self.now))
            case ("leaves", number):
                if number in self.provider_disk.receipts:
                    self.to_client.append(("leaves", number, self.provider_disk.receipts[number].leaves))
            case ("end", reason):
                self.provider(self.sold.handle(EndAsked(reason), self.now))
                if self.sold.phase is Phase.ENDED:
                    self.to_client.append(("ended",))

    def client_receives(self, message: tuple) -> None:
        try:
            self.client_takes(message)
        except ProtocolViolation:
            # Only a provider that lost signed work in a crash may look like one that charges for nothing.
            assert self.provider_crashes
            self.break_off()

    def break_off(self) -> None:
        self.client(self.bought.abandon(EndReason.MISMATCH))
        self.provider(self.sold.handle(ReceiptRefused(), self.now))

    def client_takes(self, message: tuple) -> None:
        match message:
            case ("gone", number):
                self.bought.calls.gone(number)
            case ("result", number, slice_, position, amount):
                self.bought.calls.answered(number, slice_, position, output_hash(number), amount)
                if number in self.sent:
                    self.delivered[number] = output_hash(number)
                self.client(self.bought.handle(Tick(), self.now))
            case ("refused", number, _):
                self.bought.calls.failed(number)
            case ("state", state):
                self.client(self.bought.handle(StateArrived(state), self.now))
            case ("receipt", signed):
                self.client(self.bought.handle(ReceiptArrived(signed.receipt, signed.document), self.now))
            case ("leaves", number, leaves):
                self.client(self.bought.handle(LeavesArrived(number, leaves), self.now))
            case ("ended",):
                self.client(self.bought.handle(EndConfirmed(), self.now))

    def provider(self, effects: list) -> None:
        for effect in effects:
            match effect:
                case SaveReceipt(receipt, document, leaves):
                    assert receipt.slice == len(self.provider_disk.receipts)
                    self.provider_disk.receipts[receipt.slice] = SignedSlice(receipt, document, leaves)
                case SendReceipt(number) if self.is_linked and number in self.provider_disk.receipts:
                    self.to_client.append(("receipt", self.provider_disk.receipts[number]))
                case SaveCheque(cheque, amount):
                    assert cheque.slice == len(self.provider_disk.cheques)
                    assert amount == self.provider_disk.receipts[cheque.slice].receipt.amount
                    self.provider_disk.cheques[cheque.slice] = cheque
                case Finished(reason, _):
                    self.provider_disk.ended = reason
                    if self.is_linked:
                        self.to_client.append(("ended",))
                case _:
                    pass

    def client(self, effects: list) -> None:
        for effect in effects:
            match effect:
                case SaveReceipt(receipt, document, leaves):
                    assert receipt.slice == len(self.client_disk.receipts)
                    self.client_disk.receipts[receipt.slice] = SignedSlice(receipt, document, leaves)
                case SaveCheque(cheque, _):
                    self.client_disk.cheques[cheque.slice] = cheque
                case SendCheque(number) if self.is_linked:
                    self.to_provider.append(("cheque", self.client_disk.cheques[number]))
                    self.bought.calls.cheque_sent(number)
                case AskLeaves(number) if self.is_linked:
                    self.to_provider.append(("leaves", number))
                case FetchOutputs(calls) if self.is_linked:
                    for number, _ in calls:
                        self.bought.calls.fetching(number)
                        self.to_provider.append(("fetch", number))
                case SendEnd(reason) if self.is_linked:
                    self.to_provider.append(("end", reason))
                case RefuseReceipt(number, _) if self.is_linked and self.bought.phase is not Phase.ENDED:
                    self.to_provider.append(("again", number))
                case Finished(reason, _):
                    self.client_disk.ended = reason
                case _:
                    pass

    # --- what must hold

    def check(self) -> None:
        assert 0 <= self.sold.exposure <= SLICE_AMOUNT
        assert 0 <= self.sold.exposed_calls <= SLICE_CALLS
        paid = [leaf for signed in self.client_disk.receipts.values() for leaf in signed.leaves]
        numbers = [leaf.number for leaf in paid]
        assert len(numbers) == len(set(numbers)), "a call was paid twice"
        for leaf in paid:
            assert self.sent[leaf.number] == (leaf.input_hash, leaf.amount)
        issued = max((cheque.total for cheque in self.client_disk.cheques.values()), default=0)
        assert issued == sum(leaf.amount for leaf in paid)
        received = max((cheque.total for cheque in self.provider_disk.cheques.values()), default=0)
        assert received <= issued, "the provider holds money that was not issued"
        assert issued - received <= 2 * SLICE_AMOUNT

    def settle(self) -> None:
        """A calm ending: the link stands, everything arrives, the client ends the agreement."""
        for _ in range(40):
            self.link()
            for _ in range(200):
                if not (self.to_client or self.to_provider or self.running):
                    break
                self.deliver(self.to_provider, 0, self.provider_receives)
                self.run_one()
                self.deliver(self.to_client, 0, self.client_receives)
                self.check()
            if self.sold.phase is Phase.ENDED and self.bought.phase is Phase.ENDED:
                return
            self.repeat()
            self.client(self.bought.handle(EndAsked(EndReason.COMPLETED), self.now))
            self.tick(1.0)


class MapWorld(World):
    """The client is a map: each call is for an item, on disk before it leaves, and held until its output is stored.

    placed: item -> (number, price), stored: items; both survive the client's crashes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.placed: dict[int, tuple[int, int]] = {}
        self.stored: set[int] = set()
        self.item_of: dict[int, int] = {}

    def recalled(self) -> list[tuple[int, bytes, int]]:
        return [(number, input_hash(number), price) for number, price in self.placed.values()]

    def call(self, price: int) -> None:
        try:
            if not self.bought.may_send(price):
                return
        except Refused:
            return
        item = next(item for item in range(10_000) if item not in self.stored and item not in self.placed)
        number = self.next_number
        self.next_number += 1
        self.placed[item] = (number, price)
        self.item_of[number] = item
        self.sent[number] = (input_hash(number), price)
        self.bought.calls.sent(number, input_hash(number), price, True)
        self.to_provider.append(("call", number, price))

    def repeat(self) -> None:
        """The client asks for the answer of a call of unknown fate, by its number."""
        if not self.bought.is_up or self.bought.phase is Phase.ENDED:
            return
        for number, price in self.placed.values():
            call = self.bought.calls.by_number.get(number)
            if call is not None and not call.is_flying:
                self.bought.calls.sent(number, call.input_hash, price, True)
                self.to_provider.append(("fetch", number))
                return

    def client_takes(self, message: tuple) -> None:
        number, item = message[1] if len(message) > 1 else None, None
        if message[0] in ("result", "refused", "gone"):
            item = self.item_of[number]
            if self.placed.get(item, (None,))[0] != number:
                item = None  # decided before
        if message[0] == "refused" and message[2] is Reason.UNKNOWN_CALL:
            self.bought.disclaimed(number)
        else:
            super().client_takes(message)
        if item is None:
            return
        if message[0] == "result":
            self.stored.add(item)
            self.bought.calls.confirmed(number)
            self.client(self.bought.handle(Tick(), self.now))
        elif message[0] == "gone":
            self.bought.calls.sent(number, input_hash(number), self.sent[number][1], True)
            self.to_provider.append(("call", number, self.sent[number][1]))
            return
        del self.placed[item]

    def check(self) -> None:
        super().check()
        paid = [self.item_of[leaf.number] for signed in self.client_disk.receipts.values() for leaf in signed.leaves]
        assert len(paid) == len(set(paid)), "an item was paid twice"
        assert set(paid) <= self.stored, "an item was paid whose output is not stored"


ACTIONS = st.one_of(
    st.tuples(st.just("call"), st.sampled_from(PRICES)),
    st.tuples(st.just("call"), st.sampled_from(PRICES)),
    st.tuples(st.just("to_provider"), st.integers(0, 5)),
    st.tuples(st.just("to_provider"), st.integers(0, 5)),
    st.tuples(st.just("to_client"), st.integers(0, 5)),
    st.tuples(st.just("to_client"), st.integers(0, 5)),
    st.tuples(st.just("run"), st.just(0)),
    st.tuples(st.just("run"), st.just(0)),
    st.tuples(st.just("tick"), st.sampled_from((0, 3, 11))),
    st.tuples(st.just("repeat"), st.just(0)),
    st.tuples(st.just("cut"), st.just(0)),
    st.tuples(st.just("link"), st.just(0)),
    st.tuples(st.just("link"), st.just(0)),
    st.tuples(st.just("crash_provider"), st.just(0)),
    st.tuples(st.just("crash_client"), st.just(0)),
)


# More of what leaves a client with answers that it has not stored: calls that are executed, and crashes.
MAP_ACTIONS = st.one_of(
    ACTIONS,
    st.sampled_from([("call", 5), ("to_provider", 0), ("run", 0), ("run", 0), ("crash_client", 0), ("link", 0)]),
    st.sampled_from([("call", 13), ("to_provider", 0), ("run", 0), ("to_client", 0), ("tick", 11)]),
)


def act(world: World, name: str, value: int) -> None:
    match name:
        case "call":
            world.call(value)
        case "to_provider":
            world.deliver(world.to_provider, value, world.provider_receives)
        case "to_client":
            world.deliver(world.to_client, value, world.client_receives)
        case "run":
            world.run_one()
        case "tick":
            world.tick(value)
        case _:
            getattr(world, {"cut": "cut", "link": "link", "repeat": "repeat"}.get(name, name))()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ACTIONS, max_size=120))
def test_no_order_of_events_breaks_the_books(actions: list) -> None:
    world = World()
    for name, value in actions:
        act(world, name, value)
        world.check()
    world.settle()
    world.check()
    assert world.sold.phase is Phase.ENDED
    assert world.bought.phase is Phase.ENDED
    assert world.client_disk.ended is world.provider_disk.ended
    if world.client_disk.ended is EndReason.COMPLETED:
        assert world.sold.paid == world.bought.paid == world.sold.total
    else:
        assert world.provider_crashes
        assert world.sold.total - world.sold.paid <= SLICE_AMOUNT


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(MAP_ACTIONS, min_size=10, max_size=120))
def test_no_order_of_events_makes_a_map_pay_an_item_twice(actions: list) -> None:
    world = MapWorld()
    for name, value in actions:
        act(world, name, value)
        world.check()
    world.settle()
    world.check()
    assert world.client_disk.ended is world.provider_disk.ended
    if not world.provider_crashes:
        paid = {world.item_of[leaf.number] for signed in world.client_disk.receipts.values() for leaf in signed.leaves}
        assert paid == world.stored
        assert world.client_disk.ended is EndReason.COMPLETED


def test_a_calm_agreement_pays_every_call_once() -> None:
    world = World()
    for _ in range(100):
        world.call(5)
        world.deliver(world.to_provider, 0, world.provider_receives)
        world.run_one()
        while world.to_client or world.to_provider:
            world.deliver(world.to_client, 0, world.client_receives)
            world.deliver(world.to_provider, 0, world.provider_receives)
        world.check()
    world.settle()
    assert world.sold.paid == world.bought.paid == 500
    assert world.client_disk.ended is world.provider_disk.ended is EndReason.COMPLETED
    assert len(world.client_disk.cheques) > 10


def test_an_honest_client_is_never_refused_for_credit() -> None:
    """Pacing on this side, half-slice receipts on the other: when cheques arrive promptly, `CREDIT` does not occur."""
    world = World()
    refusals = []
    receive = world.client_receives
    world.client_receives = lambda message: refusals.append(message) if message[0] == "refused" else receive(message)
    for _ in range(300):
        world.call(13)
        world.deliver(world.to_provider, 0, world.provider_receives)
        world.run_one()
        world.deliver(world.to_client, 0, world.client_receives)
    assert not refusals
    assert world.bought.paid > 50 * 13
