"""The paying side of a bought agreement: its task, its link, receipts in, cheques out.

Order of things for one receipt: signature and arithmetic are checked, receipt and cheque are saved in one transaction, then
the cheque is sent. A receipt that comes again is answered with the same cheque.
"""

from collections import deque
from math import inf
from typing import TYPE_CHECKING, Any, Final

import trio

from p2pnode.errors import P2PNodeError, PeerError, ProtocolViolation, Refused, Unreachable
from p2pnode.market import records
from p2pnode.market.agreements import (
    AskLeaves,
    CallsWithdrawn,
    Effect,
    EndAsked,
    EndConfirmed,
    Event,
    FetchOutputs,
    Finished,
    Forget,
    LeavesArrived,
    LinkDown,
    LinkUp,
    Now,
    Phase,
    ReceiptArrived,
    RefuseReceipt,
    SaveCheque,
    SaveReceipt,
    SendCheque,
    SendEnd,
    StateArrived,
    Terms,
    Tick,
)  # fmt: skip
from p2pnode.market.bell import Bell
from p2pnode.market.bought_agreement import BoughtAgreement, BoughtProgress
from p2pnode.market.cheques import HashChain
from p2pnode.market.lost_calls import LostCalls
from p2pnode.market.receipt_file import write_bundle
from p2pnode.market.way_back import PurchaseSurroundings, WayBack
from p2pnode.reasons import EndReason, Reason
from p2pnode.wire.codec import decode
from p2pnode.wire.envelope import decode_envelope, document_id, encode_envelope, open_envelope, seal
from p2pnode.wire.messages.market import Document, EndAgreement, LeafList, Receipt, SliceReply, SliceRequest
from p2pnode.wire.messages.session import Done
from p2pnode.wire.messages.work import FetchResult

if TYPE_CHECKING:
    from p2pnode.market.buying import ClientAgreement

_INBOX_MAX: Final = 64
_LEAVES_BYTES_MAX: Final = 1 << 20
_RETRY_SECONDS: Final = 0.02
_REPLY_SECONDS: Final = 10.0
_CHEQUES_MAX: Final = 64


class Payments:
    """Drives one bought agreement. link: None while there is no connection or it is not taken up again yet."""

    def __init__(
        self, around: PurchaseSurroundings, terms: Terms, chain: HashChain, progress: BoughtProgress, link: Any,
        calls: "ClientAgreement",
    ) -> None:  # fmt: skip
        self.bell = Bell()
        self.link: Any = None
        self.first_number = progress.first_number
        self.held: set[int] = set()
        # When the task looks whether a call's deadline has come; infinity while none has one.
        self.expires_at = inf
        self._around = around
        self._terms = terms
        self._calls = calls
        settings = around.settings
        self.machine = BoughtAgreement(
            terms, chain, self._now(), settings.cheque_seconds, settings.away_seconds,
            pays_forgotten=settings.pays_forgotten_calls, progress=progress,
        )  # fmt: skip
        self._inbox: deque[tuple[Any, bytes]] = deque()
        self._effects: deque[Effect] = deque()
        self._requests: dict[int, Any] = {}
        self._cheques: dict[int, bytes] = {}
        self._unsaved: SaveReceipt | None = None
        self._slices_saved = progress.slices_paid
        self._unsaved_envelope: dict[int, bytes] = {}
        self._way = WayBack(around, terms)
        self._retry_at = inf
        self._lost: list[int] = []
        self.lost_calls = LostCalls(
            terms.agreement_id, self.machine.calls, self.bell, self._withdrawn, self.broken, self.settle_lost
        )  # fmt: skip
        self._fetches: dict[int, tuple[Any, int]] = {}
        self._breach: P2PNodeError | None = None
        self._is_over = False
        self._changed = trio.Event()
        if link is None:
            self._way.lost(self._now().seconds)
        else:
            self.link = link
            around.pins.hold(link)
            self._happen(LinkUp())

    def _now(self) -> Now:
        clock = self._around.environment.clock
        return Now(clock.monotonic(), clock.wall_ms())

    def _happen(self, event: Event) -> None:
        try:
            self._effects.extend(self.machine.handle(event, self._now()))
        except ProtocolViolation as error:
            self.broken(error)
        self.bell.ring()

    def _withdrawn(self, event: CallsWithdrawn) -> None:
        if event.freed:
            # The provider signs anew what it delivered before; whatever waits here is void.
            for incoming, _ in self._inbox:
                incoming.refuse(Reason.BUSY, "a newer receipt follows")
            for incoming in self._requests.values():
                incoming.refuse(Reason.BUSY, "a newer receipt follows")
            self._inbox.clear()
            self._requests.clear()
            for number in [number for number in self._unsaved_envelope if number >= self.machine.slices_paid]:
                del self._unsaved_envelope[number]
        self._happen(event)
        self._calls.flush(is_after_cheque=True)

    # --- from plain code ----------------------------------------------------------------------------------------------

    def receipt_arrived(self, incoming: Any, data: bytes) -> None:
        """Queue a DeliverReceipt; it is answered once the cheque is saved."""
        if len(self._inbox) >= _INBOX_MAX:
            incoming.refuse(Reason.BUSY, "too many receipts at once")
            return
        self._inbox.append((incoming, data))
        self.bell.ring()

    def attach(self, link: Any) -> None:
        """A link to the provider is there: take the agreement up on it."""
        if link is not self.link and self.machine.phase is not Phase.ENDED:
            self._way.offered = link
            self.bell.ring()

    def detach(self, link: Any) -> None:
        """A link is gone; calls under way on it fail and may be repeated with their numbers."""
        if self._way.offered is link:
            self._way.offered = None
        if self.link is not link:
            return
        self.link = None
        self._around.pins.drop(link)
        self._requests.clear()
        self._fetches.clear()
        self.lost_calls.link_down(self._now().seconds)
        self._happen(LinkDown())
        self._calls.fail_all(Unreachable("the provider's connection was lost; the call may be repeated"), is_ended=False)
        self._way.lost(self._now().seconds)

    def broken(self, error: ProtocolViolation) -> None:
        """The provider broke the agreement: nothing more is paid, its link is dropped."""
        self._around.violated(self.link, error.reason)
        self._effects.extend(self.machine.abandon(EndReason.MISMATCH))
        self._breach = error
        self.bell.ring()

    def settle_lost(self, number: int) -> None:
        """A call was given up: find out whether the provider has executed it."""
        self._lost.append(number)
        self.bell.ring()

    def expire_by(self, deadline: float) -> None:
        """A call has this deadline. It stands until it has come, so that only the first of many quick calls sets it."""
        self.expires_at = deadline
        self.bell.ring()

    def withdraw(self, number: int, after_seconds: float) -> bool:
        """Withdraw a call after this time, if it is not answered; see `LostCalls.add`."""
        return self.lost_calls.add(number, self._now().seconds + after_seconds)

    def retry_soon(self) -> None:
        """The provider has not seen our cheque yet: try again in a moment."""
        self._retry_at = self._now().seconds + _RETRY_SECONDS
        self.bell.ring()

    def end_soon(self, reason: EndReason) -> None:
        """Begin the end; the task sees it through."""
        self.lost_calls.hurry(self._now().seconds)
        self._happen(EndAsked(reason))

    # --- waiting ------------------------------------------------------------------------------------------------------

    async def close(self, reason: EndReason) -> EndReason:
        """See `ClientAgreement.close`."""
        self.end_soon(reason)
        return await self.ended()

    async def ended(self) -> EndReason:
        """Wait until the agreement has ended and that is saved, and say how."""
        while not self._is_over:
            await self._changed.wait()
        return self.machine.end_reason or EndReason.COMPLETED

    async def receipt(self, number: int) -> bytes:
        """See `ClientAgreement.receipt`."""
        while True:
            changed = self._changed
            is_open = number in self.machine.calls.by_number or self.machine.slices_paid > self._slices_saved
            if not is_open or self.machine.phase is Phase.ENDED:
                bundle = await self._around.environment.database.read(
                    lambda connection: records.load_bundle(connection, self._around.network_id, self._terms.agreement_id, number)
                )
                if bundle is None:
                    raise Refused(Reason.UNKNOWN_CALL, f"call {number} has no receipt: the provider lost it before it signed")
                return write_bundle(bundle)
            await changed.wait()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # --- the task -----------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Check, pay and reconnect until the agreement has ended. Cancelled: what is saved stays and is resumed later."""
        task_status.started()
        while True:
            while self._inbox:
                self._open(*self._inbox.popleft())
            self._happen_due()
            while self._effects:
                await self._perform(self._effects.popleft())
            if self.machine.phase is Phase.ENDED:
                break
            await self._connect()
            if self._inbox or self._effects:
                continue
            due_at = min(self.machine.deadline, self._retry_at, self._way.due_at if self.link is None else inf)
            lost_due_at = inf if self.link is None else self.lost_calls.due_at
            await self.bell.heard(min(due_at, self.expires_at, lost_due_at))
        self._around.finished(self._calls)

    def _happen_due(self) -> None:
        now = self._now()
        if now.seconds >= self._retry_at:
            self._retry_at = inf
            self._calls.flush(is_after_cheque=True)
        if now.seconds >= self.expires_at:
            self.expires_at = self._calls.expire(now.seconds)
        if self.link is not None:
            self.lost_calls.tell(self.link, now.seconds)
        if self._lost and self.link is not None:
            lost, self._lost = self._lost, []
            unknown = [self.machine.calls.by_number[number] for number in lost if number in self.machine.calls.by_number]
            self._effects.append(
                FetchOutputs(
                    tuple((call.number, call.input_hash) for call in unknown if not (call.is_answered or call.is_flying))
                )
            )
        try:
            self._effects.extend(self.machine.handle(Tick(), now))
        except ProtocolViolation as error:
            self.broken(error)

    def _open(self, incoming: Any, data: bytes) -> None:
        try:
            envelope = decode_envelope(data)
            receipt = open_envelope(envelope, Receipt, self._around.network_id, self._terms.provider_key)
            document = document_id(envelope)
        except ProtocolViolation as error:
            incoming.refuse(error.reason, error.detail)
            return
        self._requests[receipt.slice] = incoming
        if receipt.slice >= self.machine.slices_paid:
            self._unsaved_envelope[receipt.slice] = bytes(data)
        self._happen(ReceiptArrived(receipt, document))

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case SaveReceipt():
                self._unsaved = effect
            case SaveCheque(cheque, amount):
                await self._save(cheque, amount)
            case SendCheque(slice_number):
                await self._send_cheque(slice_number)
            case RefuseReceipt(slice_number, detail):
                incoming = self._requests.pop(slice_number, None)
                self._unsaved_envelope.pop(slice_number, None)
                if incoming is not None:
                    is_ended = self.machine.phase is Phase.ENDED
                    incoming.refuse(Reason.RECEIPT_MISMATCH if is_ended else Reason.BUSY, detail)
            case AskLeaves(slice_number):
                await self._ask_leaves(slice_number)
            case FetchOutputs(calls):
                self._fetch(calls)
            case SendEnd(reason):
                self._send_end(reason)
            case Forget():
                self._announce()
                self._calls.flush(is_after_cheque=True)
            case Finished(reason, _):
                await self._finish(reason)
            case _:
                pass

    async def _save(self, cheque: Any, amount: int) -> None:
        around, unsaved = self._around, self._unsaved
        self._unsaved = None
        if unsaved is None:
            return
        data = encode_envelope(seal(cheque, around.identity, around.network_id))
        receipt_data = self._unsaved_envelope.pop(cheque.slice)
        now_ms = around.environment.clock.wall_ms()
        provider = self._terms.provider

        def write(connection: Any) -> None:
            records.save_receipt(connection, unsaved.receipt, unsaved.leaves, receipt_data, False, now_ms)
            records.save_cheque(connection, cheque, data, provider, False, now_ms)

        await around.environment.database.write(write)
        self._slices_saved = cheque.slice + 1
        self._cheques[cheque.slice] = data
        self._cheques.pop(cheque.slice - _CHEQUES_MAX, None)
        around.metrics.add("receipts_accepted_total")
        around.metrics.add("cheques_issued_total")
        around.metrics.add("spent_microcredits_total", amount=amount)

    async def _send_cheque(self, slice_number: int) -> None:
        data = self._cheques.get(slice_number)
        if data is None:
            agreement_id = self._terms.agreement_id
            data = await self._around.environment.database.read(
                lambda connection: records.cheque_envelope(connection, agreement_id, slice_number)
            )
        incoming = self._requests.pop(slice_number, None)
        if incoming is not None:
            incoming.reply(Document(data))
            self.machine.calls.cheque_sent(slice_number)
        self._announce()
        self._calls.flush(is_after_cheque=True)

    async def _ask_leaves(self, slice_number: int) -> None:
        link = self.link
        if link is None:
            return
        try:
            with trio.fail_after(_REPLY_SECONDS):
                reply = await link.request(SliceRequest(self._terms.agreement_id, slice_number))
            if not isinstance(reply.message, SliceReply):
                raise ProtocolViolation(Reason.WRONG_TYPE, "a slice is answered with its leaves")
            leaves = decode(LeafList, reply.attachment, _LEAVES_BYTES_MAX).leaves
        except ProtocolViolation as error:
            self.broken(error)
        except (PeerError, trio.TooSlowError):
            return  # The provider delivers the receipt again, and we ask again.
        else:
            self._happen(LeavesArrived(slice_number, leaves))

    def _fetch(self, calls: tuple[tuple[int, bytes], ...]) -> None:
        for number, input_hash in calls:
            link = self.link
            if link is None:
                return
            self.machine.calls.fetching(number)
            message = FetchResult(self._terms.agreement_id, number, input_hash)
            try:
                request = link.request_nowait(message, (), lambda reply, number=number: self._fetched(number, reply))
                self._fetches[number] = (link, request)
            except PeerError:
                self.machine.calls.lost(number)

    def _fetched(self, number: int, reply: Any) -> None:
        self._fetches.pop(number, None)
        self._calls.take_fetched(number, reply)

    def drop_fetch(self, number: int) -> None:
        """The caller asks for this call itself: an answer to our own question would only confuse."""
        link, request = self._fetches.pop(number, (None, 0))
        if link is not None:
            link.cancel(request)

    def _send_end(self, reason: EndReason) -> None:
        if self.link is None:
            return
        try:
            self.link.request_nowait(EndAgreement(self._terms.agreement_id, reason.value), (), self._end_answered)
        except PeerError:
            return  # The link has just ended; the end is asked for again when it is back.

    def _end_answered(self, reply: Any) -> None:
        is_known_nowhere = isinstance(reply, Refused) and reply.reason is Reason.UNKNOWN_AGREEMENT
        if is_known_nowhere or (not isinstance(reply, PeerError) and isinstance(reply.message, Done)):
            self._happen(EndConfirmed())

    async def _finish(self, reason: EndReason) -> None:
        agreement_id, now_ms = self._terms.agreement_id, self._now().wall_ms
        await self._around.environment.database.write(
            lambda connection: records.end_agreement(connection, agreement_id, reason, now_ms)
        )
        for incoming in self._requests.values():
            incoming.refuse(Reason.RECEIPT_MISMATCH if self._breach else Reason.AGREEMENT_ENDED, reason.value)
        self._requests.clear()
        link = self.link
        self._around.pins.drop(link)
        if self._breach is not None and link is not None:
            link.close(Reason.RECEIPT_MISMATCH)
        self._calls.fail_all(self._breach or Refused(Reason.AGREEMENT_ENDED, reason.value), is_ended=True)
        self._is_over = True
        self._announce()

    # --- links --------------------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        """Take the agreement up on a new link, if there is one to be had."""
        try:
            taken = await self._way.take_up(self._now().seconds, self.link is not None)
        except Refused:
            self._effects.extend(self.machine.abandon(EndReason.PEER_LOST))
            self.bell.ring()
            return
        except ProtocolViolation as error:
            self.broken(error)
            return
        if taken is None:
            return
        link, state = taken
        self._around.pins.drop(self.link)
        self._around.pins.hold(link)
        self.link = link
        self._happen(StateArrived(state))
        self._calls.flush(is_after_cheque=True)
