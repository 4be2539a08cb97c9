"""The market's documents and the requests that carry them. Documents travel and are stored as encoded Envelopes."""

from typing import Annotated

from msgspec import Meta, Struct

from p2pnode.wire.messages.fields import (
    Addresses,
    Amount,
    Body,
    Count,
    Hash32,
    Hashes,
    Label,
    Labels,
    MaybeHash32,
    Nonce,
    PartsPerMillion,
    TimeMs,
)  # fmt: skip
from p2pnode.wire.messages.work import Shape, TensorName
from p2pnode.wire.registry import message


class Hardware(Struct, frozen=True):
    """What a provider has, as its system declares it and as it measured itself.

    operations_per_second: measured on the CPU (or best GPU) with a float32 matrix product.
    """

    cpu_model: Label
    cpu_cores: Count
    memory_bytes: Count
    gpus: Labels
    gpu_memory_bytes: Count
    operations_per_second: Count


class InputShape(Struct, frozen=True):
    """The largest shape of one input that a quote covers."""

    name: TensorName
    shape: Shape


@message(40)
class Offer(Struct, frozen=True):
    """What a provider sells, for minutes. Signed by the provider; the newest sequence wins.

    operations_price: micro-credits per 10^9 operations; call_price: micro-credits per call.
    """

    sequence: Count
    created_ms: TimeMs
    expires_ms: TimeMs
    addresses: Addresses
    hardware: Hardware
    engines: Labels
    numeric_classes: Labels
    sandbox: Label
    models: Hashes
    operations_price: Amount
    call_price: Amount
    input_bytes_max: Count
    output_bytes_max: Count
    model_bytes_max: Count
    call_ms_max: Count
    region: Labels


@message(41)
class Quote(Struct, frozen=True):
    """A binding price for one model, up to a largest input, for one client, for about a minute. Signed by the provider.

    A call with e input elements costs call_price + ceil(operations_price * operations * e / (elements * 10^9)) where
    `operations` and `elements` are those of the largest input.
    """

    client: Hash32
    offer: Hash32
    model_id: Hash32
    numeric_class: Label
    shapes: Annotated[tuple[InputShape, ...], Meta(max_length=64)]
    operations: Count
    elements: Count
    operations_price: Amount
    call_price: Amount
    expected_us: Count
    slice_amount_max: Amount
    expires_ms: TimeMs
    nonce: Nonce


@message(42)
class Order(Struct, frozen=True):
    """A client's signed wish to buy at a quote's price. Its document hash is the agreement's id.

    amount_max: what all calls together may cost. deadline_ms: the agreement ends then; expires_ms: the order must be
    countersigned before. slice_calls, slice_ms, slice_amount: how much may be executed and not yet covered by a cheque;
    the provider signs a receipt at half of any of them. chain_anchor: end of the client's hash chain; the cheque for
    slice n, counted from 0, opens value n + 1 of the chain, whose value 0 is the anchor.
    auditor_root: may be empty until audits exist.
    """

    quote: Hash32
    provider: Hash32
    model_id: Hash32
    numeric_class: Label
    amount_max: Amount
    deadline_ms: TimeMs
    audit_ppm: PartsPerMillion
    auditors: Count
    slice_calls: Annotated[int, Meta(ge=1, le=4096)]
    slice_ms: Annotated[int, Meta(ge=100, le=3_600_000)]
    slice_amount: Amount
    chain_anchor: Hash32
    chain_length: Annotated[int, Meta(ge=1, le=1_000_000)]
    auditor_root: MaybeHash32
    share_worker: bool
    accept_tolerance: bool
    expires_ms: TimeMs
    nonce: Nonce


@message(43)
class Agreement(Struct, frozen=True):
    """The provider's countersignature under an order: the terms are frozen. Signed by the provider."""

    order: Hash32
    client: Hash32
    agreed_ms: TimeMs


@message(44)
class Receipt(Struct, frozen=True):
    """One slice of calls, signed by the provider.

    slice: counted from 0 without gaps. root: Merkle root over the encoded leaves in order of position. operations: of the
    graph-cost model. amount: of this slice; total: of all slices so far. previous: document hash of the receipt before,
    empty for the first.
    """

    agreement: Hash32
    slice: Count
    calls: Annotated[int, Meta(ge=1, le=4096)]
    root: Hash32
    operations: Count
    amount: Amount
    total: Amount
    engine: Label
    numeric_class: Label
    started_ms: TimeMs
    ended_ms: TimeMs
    previous: MaybeHash32


@message(45)
class Cheque(Struct, frozen=True):
    """The client owes the provider `total` micro-credits on this agreement. Only grows. Signed by the client.

    slice, receipt: the last receipt that it covers. preimage: value number `slice` + 1 of the hash chain.
    """

    agreement: Hash32
    provider: Hash32
    slice: Count
    receipt: Hash32
    total: Amount
    preimage: Hash32
    issued_ms: TimeMs


class Leaf(Struct, frozen=True):
    """What a receipt's root commits to for one call: its encoded bytes are one leaf of the tree.

    probe_hash: may be empty until audits exist. amount: micro-credits.
    """

    number: Count
    input_hash: Hash32
    output_hash: Hash32
    probe_hash: MaybeHash32
    amount: Amount


@message(46)
class LeafList(Struct, frozen=True):
    """The leaves of one slice in order of position. Travels as an attachment and is stored beside its receipt."""

    leaves: Annotated[tuple[Leaf, ...], Meta(max_length=4096)]


@message(50)
class OfferRequest(Struct, frozen=True):
    """Ask a peer for its current offer. Answered by Document."""


@message(51)
class Document(Struct, frozen=True):
    """One encoded Envelope."""

    envelope: Body


@message(52)
class QuoteRequest(Struct, frozen=True):
    """Ask for a binding price. Answered by Document (Quote). The provider fetches the model first if it lacks it."""

    model_id: Hash32
    numeric_class: Label
    shapes: Annotated[tuple[InputShape, ...], Meta(max_length=64)]


@message(53)
class PlaceOrder(Struct, frozen=True):
    """Send a signed order. Answered by Document (Agreement)."""

    order: Body


@message(54)
class DeliverReceipt(Struct, frozen=True):
    """The provider delivers a slice's receipt. Answered by Document (Cheque)."""

    receipt: Body


@message(55)
class EndAgreement(Struct, frozen=True):
    """Ask for the last receipt and the end. Answered by Done after the last cheque."""

    agreement: Hash32
    reason: Label


@message(56)
class ResumeAgreement(Struct, frozen=True):
    """Take up an agreement again after a lost connection or a restart. Answered by AgreementState.

    The provider then delivers again every receipt for which it has no cheque.
    """

    agreement: Hash32


@message(57)
class AgreementState(Struct, frozen=True):
    """Where the provider stands. What lies at or beyond (slice, position) is lost without charge: run it again.

    slice: number of the open slice. position: calls in it. total: of all receipts signed. paid: of the last cheque.
    ended: text of an `EndReason`, or empty while the agreement lives.
    """

    agreement: Hash32
    slice: Count
    position: Count
    total: Amount
    paid: Amount
    ended: Label


@message(58)
class SliceRequest(Struct, frozen=True):
    """Ask for the leaves behind a receipt. Answered by SliceReply."""

    agreement: Hash32
    slice: Count


@message(70)
class WithdrawCalls(Struct, frozen=True):
    """Ask not to be charged for calls whose answers were lost with a connection, and that were made elsewhere since.

    Answered by WithdrawnCalls. Whatever receipts without a cheque charge them are then signed anew and delivered again.
    """

    agreement: Hash32
    numbers: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=4096)]


@message(71)
class WithdrawnCalls(Struct, frozen=True):
    """What became of withdrawn calls. freed: executed, and charged nothing. charged: they stay charged.

    All others were not executed, or are forgotten, and will not be charged.
    """

    freed: Annotated[tuple[Count, ...], Meta(max_length=4096)]
    charged: Annotated[tuple[Count, ...], Meta(max_length=4096)]


@message(59)
class SliceReply(Struct, frozen=True):
    """The encoded LeafList of a slice follows as the attachment."""

    slice: Count
