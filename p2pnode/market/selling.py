"""One sold agreement in motion: the machine, the client's link, and a task that saves, signs and delivers.

Calls never wait for it. What a cheque frees is counted the moment the cheque is verified; the row is written right after:
a crash in between costs nothing, because the receipt is then delivered again and answered with the same cheque.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Final

import trio

from p2pnode.crypto.keys import Identity
from p2pnode.environment import Environment
from p2pnode.errors import PeerError, ProtocolViolation, Refused
from p2pnode.market import records
from p2pnode.market.agreements import (
    AnswerWithdrawal,
    ChequeArrived,
    Effect,
    EndAsked,
    Event,
    Finished,
    Forget,
    LinkDown,
    LinkUp,
    Now,
    Phase,
    ReceiptRefused,
    ReplaceReceipts,
    SaveCheque,
    SaveReceipt,
    SendReceipt,
    Terms,
    Tick,
)
from p2pnode.market.bell import Bell
from p2pnode.market.calls import RunningCall
from p2pnode.market.outputs import KeptOutputs
from p2pnode.market.pins import Pins
from p2pnode.market.pricing import CallPricer
from p2pnode.market.settings import MarketSettings
from p2pnode.market.sold_agreement import SoldAgreement, SoldProgress
from p2pnode.metrics import Metrics
from p2pnode.reasons import EndReason, Reason
from p2pnode.wire.codec import encode
from p2pnode.wire.envelope import decode_envelope, encode_envelope, open_envelope, seal
from p2pnode.wire.messages.market import (
    Cheque,
    DeliverReceipt,
    Document,
    Leaf,
    LeafList,
    SliceReply,
    WithdrawnCalls,
)
from p2pnode.wire.messages.session import Done

_RESEND_SECONDS: Final = 5.0
_ENVELOPES_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class SaleSurroundings:
    """What all sales of one node share. finished: told once, when an agreement has ended and that is saved."""

    environment: Environment
    identity: Identity
    network_id: bytes
    settings: MarketSettings
    metrics: Metrics
    outputs: KeptOutputs
    pins: Pins
    violated: Callable[[Any, Reason], None]
    finished: Callable[["Sale"], None]


class Sale:
    """One agreement that this node sold. `run` must be running for receipts to be signed."""

    def __init__(self, around: SaleSurroundings, terms: Terms, progress: SoldProgress | None = None) -> None:
        self.terms = terms
        self.pricer = CallPricer(terms.quote)
        self.bell = Bell()
        self.running: dict[int, RunningCall] = {}
        self.link: Any = None
        self.hashes_first = False
        self._around = around
        settings = around.settings
        self.machine = SoldAgreement(terms, self._now(), settings.cheque_seconds, settings.away_seconds, progress)
        self._effects: deque[Effect] = deque()
        self._enders: list[Any] = []
        self._deliveries: dict[int, tuple[Any, int, float]] = {}
        self._envelopes: dict[int, bytes] = {}
        self._cheque_envelopes: dict[int, bytes] = {}
        self._resend_at: dict[int, float] = {}
        self._withdrawal: Any = None
        self._withdrawn = trio.Event()

    def _now(self) -> Now:
        clock = self._around.environment.clock
        return Now(clock.monotonic(), clock.wall_ms())

    # --- events, from plain code --------------------------------------------------------------------------------------

    def attach(self, link: Any) -> None:
        """Take this link as the way to the client and deliver again what has no cheque."""
        if self.link is link:
            return
        self._drop_deliveries()
        self._around.pins.drop(self.link)
        self._around.pins.hold(link)
        self.link = link
        self._happen(LinkUp())

    def resume(self, incoming: Any) -> None:
        """Answer a client that takes up the agreement, then deliver again what has no cheque."""
        incoming.reply(self.machine.state)
        if self.link is incoming.link:
            self._drop_deliveries()
            self._happen(LinkUp())
        else:
            self.attach(incoming.link)

    def detach(self, link: Any) -> None:
        """The client's link is gone."""
        if self.link is link:
            self._around.pins.drop(link)
            self.link = None
            self._drop_deliveries()
            self._happen(LinkDown())

    def end(self, reason: EndReason, incoming: Any = None) -> None:
        """End the agreement after the last cheque; `incoming` is answered then."""
        if incoming is not None:
            if self.machine.phase is Phase.ENDED:
                incoming.reply(Done((self.machine.end_reason or reason).value))
                return
            self._enders.append(incoming)
        self._happen(EndAsked(reason))

    async def withdraw(self, incoming: Any, numbers: Sequence[int], room: int) -> None:
        """Charge nothing for calls whose answers the client never got, as far as `room` goes; returns when that is saved."""
        if self.machine.phase is Phase.ENDED:
            raise Refused(Reason.AGREEMENT_ENDED, "nothing is charged here any more")
        for number in numbers:
            if (running := self.running.get(number)) is not None:
                running.cancel()
        self._withdrawal, self._withdrawn = incoming, trio.Event()
        self._effects.extend(self.machine.withdraw(numbers, room))
        self.bell.ring()
        await self._withdrawn.wait()

    def _answer_withdrawal(self, freed: tuple[int, ...], charged: tuple[int, ...]) -> None:
        if freed:
            self._drop_deliveries()  # all receipts without a cheque follow the answer, signed anew or not
        if self._withdrawal is not None:
            self._withdrawal.reply(WithdrawnCalls(freed, charged))
            self._withdrawal = None
        self._withdrawn.set()

    def _happen(self, event: Event) -> None:
        self._effects.extend(self.machine.handle(event, self._now()))
        self.bell.ring()

    # --- the task -----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Sign, save and deliver until the agreement has ended. Cancelled: what is saved stays, the rest is unsigned."""
        task_status.started()
        while True:
            self._effects.extend(self.machine.handle(Tick(), self._now()))
            while self._effects:
                await self._perform(self._effects.popleft())
            if self.machine.phase is Phase.ENDED:
                break
            self._resend_due()
            await self.bell.heard(min(self.machine.deadline, self._next_resend()))
        self._around.finished(self)

    async def sign_now(self) -> None:
        """Sign what is executed and unsigned, before this node stops; the receipt is delivered after the next start."""
        self._happen(EndAsked(EndReason.PROVIDER_STOPPED))
        while self._effects:
            await self._perform(self._effects.popleft())

    async def _perform(self, effect: Effect) -> None:
        around, terms = self._around, self.terms
        now_ms = around.environment.clock.wall_ms()
        match effect:
            case SaveReceipt(receipt, _, leaves):
                data = encode_envelope(seal(receipt, around.identity, around.network_id))
                await around.environment.database.write(
                    lambda connection: records.save_receipt(connection, receipt, leaves, data, True, now_ms)
                )
                around.metrics.add("receipts_issued_total")
                self._remember(receipt.slice, data)
            case SendReceipt(slice_number):
                await self._deliver(slice_number)
            case ReplaceReceipts(replaced, amount):
                await self._replace(replaced, amount, now_ms)
            case AnswerWithdrawal(freed, charged):
                self._answer_withdrawal(freed, charged)
            case SaveCheque(cheque, amount):
                data = self._cheque_envelopes.pop(cheque.slice)
                await around.environment.database.write(
                    lambda connection: records.save_cheque(connection, cheque, data, terms.client, True, now_ms)
                )
                around.metrics.add("cheques_accepted_total")
                around.metrics.add("earned_microcredits_total", amount=amount)
                self._envelopes.pop(cheque.slice, None)
            case Forget(numbers):
                around.outputs.drop(terms.agreement_id, numbers)
            case Finished(reason, _):
                await self._finish(reason, now_ms)
            case _:
                pass

    async def _replace(self, replaced: Sequence[SaveReceipt], amount: int, now_ms: int) -> None:
        around = self._around
        signed = [
            (item.receipt, item.leaves, encode_envelope(seal(item.receipt, around.identity, around.network_id)))
            for item in replaced
        ]
        half_life = around.settings.credit_half_life_seconds
        await around.environment.database.write(
            lambda connection: records.replace_receipts(connection, signed, self.terms.client, amount, now_ms, half_life)
        )
        around.metrics.add("written_off_microcredits_total", amount=amount)
        for receipt, _, data in signed:
            self._remember(receipt.slice, data)

    async def _finish(self, reason: EndReason, now_ms: int) -> None:
        agreement_id = self.terms.agreement_id
        await self._around.environment.database.write(
            lambda connection: records.end_agreement(connection, agreement_id, reason, now_ms)
        )
        self._drop_deliveries()
        self._around.outputs.drop_agreement(agreement_id)
        for call in list(self.running.values()):
            call.cancel()
        for incoming in self._enders:
            incoming.reply(Done(reason.value))
        self._enders.clear()
        if self._withdrawal is not None:
            self._withdrawal.refuse(Reason.AGREEMENT_ENDED, reason.value)
            self._withdrawal = None
        self._withdrawn.set()
        self._around.pins.drop(self.link)

    # --- receipts -----------------------------------------------------------------------------------------------------

    async def _deliver(self, slice_number: int) -> None:
        link = self.link
        if link is None or slice_number in self._deliveries or slice_number not in self.machine.unpaid:
            return
        data = self._envelopes.get(slice_number)
        if data is None:
            agreement_id = self.terms.agreement_id
            data = await self._around.environment.database.read(
                lambda connection: records.receipt_envelope(connection, agreement_id, slice_number)
            )
            self._remember(slice_number, data)
        if self.link is not link:
            return
        until = self._around.environment.clock.monotonic() + max(_RESEND_SECONDS, self._around.settings.cheque_seconds / 3)
        try:
            request = link.request_nowait(DeliverReceipt(data), (), lambda reply: self._delivered(slice_number, reply))
        except PeerError:
            self._resend_at[slice_number] = self._around.environment.clock.monotonic() + _RESEND_SECONDS
            return
        if slice_number in self.machine.unpaid:
            self._deliveries[slice_number] = (link, request, until)

    def _delivered(self, slice_number: int, reply: Any) -> None:
        self._deliveries.pop(slice_number, None)
        try:
            if isinstance(reply, PeerError):
                raise reply
            if not isinstance(reply.message, Document):
                raise ProtocolViolation(Reason.WRONG_TYPE, "a receipt is answered with a cheque")
            self._take_cheque(reply.message.envelope)
        except Refused as error:
            if error.reason in (Reason.RECEIPT_MISMATCH, Reason.AGREEMENT_ENDED):
                self._happen(ReceiptRefused())
            else:
                self._again(slice_number)
        except ProtocolViolation as error:
            link = self.link
            self._around.violated(link, error.reason)
            if link is not None:
                link.close(error.reason)
        except PeerError:
            self._again(slice_number)

    def _take_cheque(self, data: bytes) -> None:
        envelope = decode_envelope(data)
        cheque = open_envelope(envelope, Cheque, self._around.network_id, self.terms.client_key)
        self._cheque_envelopes[cheque.slice] = bytes(data)
        slices_paid = self.machine.slices_paid
        try:
            effects = self.machine.handle(ChequeArrived(cheque), self._now())
        except ProtocolViolation:
            del self._cheque_envelopes[cheque.slice]
            raise
        if cheque.slice < slices_paid:
            self._cheque_envelopes.pop(cheque.slice, None)
        self._effects.extend(effects)
        self.bell.ring()

    def _again(self, slice_number: int) -> None:
        if slice_number in self.machine.unpaid:
            self._resend_at[slice_number] = self._around.environment.clock.monotonic() + _RESEND_SECONDS
            self.bell.ring()

    def _resend_due(self) -> None:
        now = self._around.environment.clock.monotonic()
        for slice_number, (link, request, until) in list(self._deliveries.items()):
            if now >= until:
                link.cancel(request)
                del self._deliveries[slice_number]
                self._resend_at[slice_number] = now
        for slice_number, at in list(self._resend_at.items()):
            if now >= at:
                del self._resend_at[slice_number]
                self._effects.append(SendReceipt(slice_number))
                self.bell.ring()

    def _next_resend(self) -> float:
        return min((*self._resend_at.values(), *(until for _, _, until in self._deliveries.values())), default=inf)

    def _drop_deliveries(self) -> None:
        for link, request, _ in self._deliveries.values():
            link.cancel(request)
        self._deliveries.clear()
        self._resend_at.clear()

    def _remember(self, slice_number: int, data: bytes) -> None:
        self._envelopes[slice_number] = data
        while len(self._envelopes) > _ENVELOPES_MAX:
            del self._envelopes[next(iter(self._envelopes))]

    async def answer_leaves(self, slice_number: int, incoming: Any) -> None:
        """Answer a SliceRequest from memory or the store."""
        signed = self.machine.unpaid.get(slice_number)
        leaves: tuple[Leaf, ...]
        if signed is not None:
            leaves = signed.leaves
        else:
            agreement_id = self.terms.agreement_id
            leaves = await self._around.environment.database.read(
                lambda connection: records.slice_leaves(connection, agreement_id, slice_number)
            )
        if not leaves:
            incoming.refuse(Reason.RECEIPT_MISMATCH, f"slice {slice_number} has no receipt")
            return
        incoming.reply(SliceReply(slice_number), (encode(LeafList(leaves)),))
