"""The market's transactions: which rows belong together so that no crash leaves half a deal.

Plain functions of a connection, to be run by `environment.database.write` and `.read`. Every one may be repeated.
"""

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from p2pnode.market.agreements import Terms
from p2pnode.market.bought_agreement import BoughtProgress
from p2pnode.market.ledger import note_write_off, post_cheque
from p2pnode.market.receipt_file import ReceiptBundle
from p2pnode.market.slices import leaf_path
from p2pnode.market.sold_agreement import SignedSlice, SoldProgress
from p2pnode.reasons import EndReason
from p2pnode.store import accounts, agreements, documents, jobs
from p2pnode.store.database import recall, remember
from p2pnode.wire.codec import decode
from p2pnode.wire.envelope import decode_envelope, document_id
from p2pnode.wire.messages.market import Agreement, Cheque, Leaf, Order, Quote, Receipt
from p2pnode.wire.registry import number_of

# How many call numbers one run of a client takes at a time; a restart goes on beyond them.
NUMBERS_PER_RUN: Final = 1 << 32
_PAID_NUMBERS_MAX: Final = 16_384


@dataclass(frozen=True, slots=True)
class StoredAgreement:
    """An agreement as read from the store: its row and the documents under it."""

    row: agreements.AgreementRow
    order: Order
    order_envelope: bytes
    quote: Quote
    provider_key: bytes
    client_key: bytes
    agreed_ms: int


def save_envelope(connection: sqlite3.Connection, data: bytes, is_own: bool, agreement: bytes | None, now_ms: int) -> bytes:
    """Store a signed document, in the log too when it is our own, and give its id."""
    envelope = decode_envelope(data)
    row = documents.DocumentRow(document_id(envelope), envelope.kind, envelope.signer, agreement, now_ms, data)
    (documents.save_own_document if is_own else documents.save_document)(connection, row)
    return row.id


def save_order(
    connection: sqlite3.Connection, terms: Terms, quote: bytes, order: bytes, is_provider: bool, job: bytes | None,
    chain_seed: bytes | None, now_ms: int,
) -> None:  # fmt: skip
    """Store an order with its quote, and the agreement's row in state `ordered`."""
    agreement_id = terms.agreement_id
    save_envelope(connection, quote, is_provider, agreement_id, now_ms)
    save_envelope(connection, order, not is_provider, agreement_id, now_ms)
    agreements.save_agreement(
        connection,
        agreements.AgreementRow(
            id=agreement_id,
            role="provider" if is_provider else "client",
            peer=terms.client if is_provider else terms.provider,
            model_id=terms.order.model_id,
            quote=terms.order.quote,
            job=job,
            state="ordered",
            amount_max=terms.order.amount_max,
            slice_amount=terms.order.slice_amount,
            chain_anchor=terms.order.chain_anchor,
            chain_length=terms.order.chain_length,
            chain_seed=chain_seed,
            opened_ms=now_ms,
            deadline_ms=terms.order.deadline_ms,
            chain_tip=terms.order.chain_anchor,
            next_call=0 if is_provider else NUMBERS_PER_RUN,
        ),
    )


def save_agreement(connection: sqlite3.Connection, agreement_id: bytes, agreement: bytes, is_provider: bool, now_ms: int) -> None:
    """Store the countersignature: the agreement is open."""
    save_envelope(connection, agreement, is_provider, agreement_id, now_ms)
    agreements.set_agreement_state(connection, agreement_id, "open")


def save_receipt(
    connection: sqlite3.Connection, receipt: Receipt, leaves: Sequence[Leaf], envelope: bytes, is_own: bool, now_ms: int
) -> None:
    """Store a slice's receipt and leaves."""
    agreements.save_receipt(connection, _save_slice(connection, receipt, leaves, envelope, is_own, now_ms))


def replace_receipts(
    connection: sqlite3.Connection, receipts: Sequence[tuple[Receipt, Sequence[Leaf], bytes]], peer: bytes, written_off: int,
    now_ms: int, half_life_seconds: float,
) -> None:  # fmt: skip
    """Store receipts (with leaves and envelope) of ours that charge less than those before them, and what that cost us."""
    note_write_off(connection, peer, written_off, now_ms, half_life_seconds)
    rows = [_save_slice(connection, receipt, leaves, envelope, True, now_ms) for receipt, leaves, envelope in receipts]
    agreements.replace_receipts(connection, rows)


def _save_slice(
    connection: sqlite3.Connection, receipt: Receipt, leaves: Sequence[Leaf], envelope: bytes, is_own: bool, now_ms: int
) -> agreements.ReceiptRow:
    agreement_id = receipt.agreement
    document = save_envelope(connection, envelope, is_own, agreement_id, now_ms)
    agreements.save_calls(
        connection,
        (
            agreements.CallRow(
                agreement_id,
                leaf.number,
                receipt.slice,
                position,
                leaf.input_hash,
                leaf.output_hash,
                leaf.probe_hash,
                leaf.amount,
                "receipted",
            )
            for position, leaf in enumerate(leaves)
        ),
    )
    return agreements.ReceiptRow(
        agreement_id,
        receipt.slice,
        document,
        receipt.calls,
        receipt.root,
        receipt.operations,
        receipt.amount,
        receipt.total,
        receipt.engine,
        receipt.ended_ms,
    )


def save_cheque(
    connection: sqlite3.Connection, cheque: Cheque, envelope: bytes, peer: bytes, is_provider: bool, now_ms: int
) -> int:
    """Store a slice's cheque, post what it adds, and give that amount; 0 when it was stored before."""
    document = save_envelope(connection, envelope, not is_provider, cheque.agreement, now_ms)
    row = agreements.ChequeRow(
        cheque.agreement, cheque.slice, document, cheque.receipt, cheque.total, cheque.preimage, cheque.issued_ms
    )
    amount = agreements.save_cheque(connection, row)
    post_cheque(connection, document, peer, amount, is_provider, cheque.agreement, now_ms)
    return amount


def end_agreement(connection: sqlite3.Connection, agreement_id: bytes, reason: EndReason, now_ms: int) -> None:
    """Store how an agreement ended."""
    agreements.end_agreement(connection, agreement_id, reason.value, now_ms)


def end_unsigned(
    connection: sqlite3.Connection, role: agreements.Role, signed: Sequence[bytes], reason: EndReason, now_ms: int
) -> None:
    """End the orders of a role that were never countersigned: nothing flowed on them, nothing is owed."""
    for row in agreements.list_agreements(connection, role=role, is_ended=False, limit=10_000):
        if row.id not in signed:
            agreements.end_agreement(connection, row.id, reason.value, now_ms)


def withdrawn_orders(connection: sqlite3.Connection, reason: EndReason, now_ms: int) -> list[tuple[bytes, bytes]]:
    """Give (order, provider) of our orders that ended for this reason without a countersignature and may stand there yet."""
    return [
        (row.id, row.peer)
        for row in agreements.list_agreements(connection, role="client", is_ended=True)
        if row.end_reason == reason.value and row.deadline_ms > now_ms and not countersignature(connection, row.id)
    ]


def countersignature(connection: sqlite3.Connection, agreement_id: bytes) -> bytes:
    """Give the signed agreement of an order, empty if there is none."""
    rows = documents.list_documents(connection, kind=number_of(Agreement), agreement=agreement_id, limit=1)
    return rows[0].envelope if rows else b""


def check_books(connection: sqlite3.Connection) -> None:
    """Prove the ledger. Raises LedgerError naming what does not fit."""
    accounts.check_balanced(connection)


def next_offer_sequence(connection: sqlite3.Connection) -> int:
    """Give a sequence above every one that this node has used, after a restart too."""
    value = int.from_bytes(recall(connection, "offer-sequence") or b"", "big") + 1
    remember(connection, "offer-sequence", value.to_bytes(8, "big"))
    return value


def raise_offer_sequence(connection: sqlite3.Connection, above: int) -> None:
    """Let the next offer's sequence be greater than `above`: others have seen that one already."""
    value = max(int.from_bytes(recall(connection, "offer-sequence") or b"", "big"), above)
    remember(connection, "offer-sequence", value.to_bytes(8, "big"))


def load_open(role: agreements.Role) -> Callable[[sqlite3.Connection], list[StoredAgreement]]:
    """Give a query for every agreement of a role that has not ended."""

    def query(connection: sqlite3.Connection) -> list[StoredAgreement]:
        rows = agreements.list_agreements(connection, role=role, is_ended=False, limit=10_000)
        return [stored for row in rows if (stored := load_agreement(connection, row)) is not None]

    return query


def load_agreement(connection: sqlite3.Connection, row: agreements.AgreementRow) -> StoredAgreement | None:
    """Give an agreement with its documents, or None when it was never countersigned."""
    found = {
        document.kind: decode_envelope(document.envelope)
        for document in documents.list_documents(connection, agreement=row.id, limit=3)
    }
    order, quote, agreed = (found.get(number_of(cls)) for cls in (Order, Quote, Agreement))
    order_row = documents.get_document(connection, row.id)
    if order is None or quote is None or agreed is None or order_row is None:
        return None
    return StoredAgreement(
        row=row, order=decode(Order, order.body), order_envelope=order_row.envelope, quote=decode(Quote, quote.body),
        provider_key=quote.signer, client_key=order.signer, agreed_ms=decode(Agreement, agreed.body).agreed_ms,
    )  # fmt: skip


def sold_progress(connection: sqlite3.Connection, row: agreements.AgreementRow) -> SoldProgress:
    """Give what a provider's machine needs to go on after a restart."""
    unpaid = [_signed_slice(connection, row.id, number) for number in range(row.slices_paid, row.slices)]
    last = agreements.get_receipt(connection, row.id, row.slices - 1) if row.slices else None
    numbers = connection.execute(
        "SELECT number FROM calls WHERE agreement = ? AND slice < ? ORDER BY number DESC LIMIT ?",
        (row.id, row.slices_paid, _PAID_NUMBERS_MAX),
    )
    return SoldProgress(
        total=row.total, slices=row.slices, paid=row.paid, slices_paid=row.slices_paid, tip=row.chain_tip,
        last_receipt=last.document if last else b"", unpaid=unpaid, paid_numbers=[number for (number,) in numbers],
    )  # fmt: skip


def bought_progress(connection: sqlite3.Connection, row: agreements.AgreementRow) -> BoughtProgress:
    """Give what a client's machine needs to go on after a restart, setting its next call numbers aside."""
    first = agreements.take_call_numbers(connection, row.id, NUMBERS_PER_RUN)
    last = agreements.get_receipt(connection, row.id, row.slices_paid - 1) if row.slices_paid else None
    return BoughtProgress(
        paid=row.paid,
        slices_paid=row.slices_paid,
        last_receipt=last.document if last else b"",
        first_number=first,
        is_restart=True,
        recalled=jobs.placed_calls(connection, row.job, row.id) if row.job is not None else (),
    )


def slice_leaves(connection: sqlite3.Connection, agreement_id: bytes, slice_number: int) -> tuple[Leaf, ...]:
    """Give the leaves of a slice in order of position."""
    return tuple(
        Leaf(call.number, call.input_hash, call.output_hash, call.probe_hash, call.amount)
        for call in agreements.list_calls(connection, agreement_id, slice_number=slice_number)
    )


def receipt_envelope(connection: sqlite3.Connection, agreement_id: bytes, slice_number: int) -> bytes:
    """Give the signed receipt of a slice, empty if there is none."""
    row = agreements.get_receipt(connection, agreement_id, slice_number)
    return _envelope(connection, row.document) if row else b""


def cheque_envelope(connection: sqlite3.Connection, agreement_id: bytes, slice_number: int) -> bytes:
    """Give the signed cheque of a slice, empty if there is none."""
    row = agreements.get_cheque(connection, agreement_id, slice_number)
    return _envelope(connection, row.document) if row else b""


def _envelope(connection: sqlite3.Connection, document: bytes) -> bytes:
    row = documents.get_document(connection, document)
    return row.envelope if row else b""


def _signed_slice(connection: sqlite3.Connection, agreement_id: bytes, slice_number: int) -> SignedSlice:
    envelope = decode_envelope(receipt_envelope(connection, agreement_id, slice_number))
    leaves = slice_leaves(connection, agreement_id, slice_number)
    return SignedSlice(decode(Receipt, envelope.body), document_id(envelope), leaves)


def load_bundle(connection: sqlite3.Connection, network_id: bytes, agreement_id: bytes, number: int) -> ReceiptBundle | None:
    """Give what proves a call, or None while it has no receipt."""
    call = agreements.get_call(connection, agreement_id, number)
    row = agreements.get_agreement(connection, agreement_id)
    receipt = receipt_envelope(connection, agreement_id, call.slice) if call else b""
    if call is None or row is None or not receipt:
        return None
    leaves = slice_leaves(connection, agreement_id, call.slice)
    agreed = countersignature(connection, agreement_id)
    if not agreed:
        return None
    return ReceiptBundle(
        format=1,
        network_id=network_id,
        quote=_envelope(connection, row.quote),
        order=_envelope(connection, agreement_id),
        agreement=agreed,
        receipt=receipt,
        cheque=cheque_envelope(connection, agreement_id, call.slice),
        leaf=leaves[call.position],
        position=call.position,
        path=leaf_path(leaves, call.position),
    )
