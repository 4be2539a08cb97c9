"""A `.receipt` file: everything that proves one call, verified from the file alone.

The bundle holds the signed quote, order, agreement, receipt and cheque, the call's leaf with its Merkle path, and the
network id; the agreement's parties are named by the keys that signed. What it proves: this provider signed that for this
input it gave this output, at a price that both had signed, and whether the client acknowledged it. What it cannot
prove: that the output is right. That is what audits are for.
"""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from p2pnode.crypto import merkle
from p2pnode.crypto.keys import node_id_of
from p2pnode.environment import Buffer
from p2pnode.errors import PeerError, ProtocolViolation
from p2pnode.ids import short
from p2pnode.market.cheques import check_preimage
from p2pnode.market.pricing import largest_amount
from p2pnode.market.slices import leaf_bytes
from p2pnode.units import format_credits
from p2pnode.wire.codec import decode, encode
from p2pnode.wire.envelope import decode_envelope, document_id, open_envelope
from p2pnode.wire.messages.fields import Body, Count, Hash32
from p2pnode.wire.messages.market import Agreement, Cheque, Leaf, Order, Quote, Receipt
from p2pnode.wire.messages.session import Envelope
from p2pnode.wire.tensors import Value, encode_values, values_hash

BUNDLE_BYTES_MAX = 1 << 20


class ReceiptBundle(Struct, frozen=True):
    """The contents of a `.receipt` file. cheque may be empty while the slice is unpaid. format: 1."""

    format: Annotated[int, Meta(ge=1, le=1)]
    network_id: Annotated[bytes, Meta(min_length=1, max_length=32)]
    quote: Body
    order: Body
    agreement: Body
    receipt: Body
    cheque: Body
    leaf: Leaf
    position: Count
    path: Annotated[tuple[Hash32, ...], Meta(max_length=16)]


class Check(NamedTuple):
    """One verified statement: its name, whether it holds, and what was found."""

    name: str
    ok: bool
    detail: str


def write_bundle(bundle: ReceiptBundle) -> bytes:
    """Give a bundle's bytes: canonical msgpack."""
    return encode(bundle)


def read_bundle(data: Buffer) -> ReceiptBundle:
    """Give the bundle in a file. Raises ProtocolViolation when it is not one."""
    return decode(ReceiptBundle, data, BUNDLE_BYTES_MAX)


def verify_bundle(
    data: Buffer, inputs: Mapping[str, Value] | None = None, outputs: Mapping[str, Value] | None = None
) -> list[Check]:
    """Give every check of a `.receipt` file, in order, using the file alone; a check that cannot be made fails.

    inputs, outputs: tensors to compare with the hashes in the receipt, if the caller has them.
    """
    try:
        bundle = read_bundle(data)
    except ProtocolViolation as error:
        return [Check("file", False, str(error))]
    checks = [Check("file", True, f"{len(data)} bytes")]
    return checks + _Verifier(bundle).checks(inputs, outputs)


class _Verifier:
    def __init__(self, bundle: ReceiptBundle) -> None:
        self.bundle = bundle
        self.results: list[Check] = []

    def checks(self, inputs: Mapping[str, Value] | None, outputs: Mapping[str, Value] | None) -> list[Check]:
        bundle = self.bundle
        quote = self._open("quote", bundle.quote, Quote)
        order = self._open("order", bundle.order, Order)
        agreement = self._open("agreement", bundle.agreement, Agreement)
        receipt = self._open("receipt", bundle.receipt, Receipt)
        if quote and order and agreement and receipt:
            self._terms(quote, order, agreement, receipt)
            self._call(quote, receipt)
            self._cheque(order, receipt)
        if inputs is not None:
            self._tensors("input", inputs, bundle.leaf.input_hash)
        if outputs is not None:
            self._tensors("output", outputs, bundle.leaf.output_hash)
        return self.results

    def _check(self, name: str, ok: bool, detail: str) -> None:
        self.results.append(Check(name, ok, detail))

    def _open(self, name: str, data: bytes, cls: type) -> tuple[Envelope, object] | None:
        try:
            envelope = decode_envelope(data)
            document: object = open_envelope(envelope, cls, self.bundle.network_id)
        except PeerError as error:
            self._check(f"{name} signature", False, str(error))
            return None
        self._check(f"{name} signature", True, f"signed by {short(node_id_of(envelope.signer))}")
        return envelope, document

    def _terms(
        self, quote: tuple[Envelope, object], order: tuple[Envelope, object], agreement: tuple[Envelope, object],
        receipt: tuple[Envelope, object],
    ) -> None:  # fmt: skip
        (quoted, q), (ordered, o), (agreed, a), (receipted, r) = quote, order, agreement, receipt
        assert isinstance(q, Quote) and isinstance(o, Order) and isinstance(a, Agreement) and isinstance(r, Receipt)  # noqa: PT018
        provider, client = quoted.signer, ordered.signer
        keys = agreed.signer == receipted.signer == provider
        self._check("one provider", keys and o.provider == node_id_of(provider), short(node_id_of(provider)))
        self._check("one client", a.client == q.client == node_id_of(client), short(node_id_of(client)))
        fits = o.quote == document_id(quoted) and o.model_id == q.model_id and o.numeric_class == q.numeric_class
        self._check("order takes the quote", fits, f"model {short(o.model_id)}, class {o.numeric_class}")
        self._check("agreement is for the order", a.order == document_id(ordered), short(a.order))
        self._check("receipt is for the agreement", r.agreement == a.order, f"slice {r.slice}")
        limits = r.calls <= o.slice_calls and r.amount <= o.slice_amount and r.amount <= r.total <= o.amount_max
        detail = f"{format_credits(r.amount)} of {format_credits(o.slice_amount)} credits in the slice"
        self._check("receipt is within the order", limits and r.numeric_class == o.numeric_class, detail)

    def _call(self, quote: tuple[Envelope, object], receipt: tuple[Envelope, object]) -> None:
        q, r = quote[1], receipt[1]
        assert isinstance(q, Quote) and isinstance(r, Receipt)  # noqa: PT018
        bundle, leaf = self.bundle, self.bundle.leaf
        covered = bundle.position < r.calls and merkle.verify_path(
            r.root, leaf_bytes(leaf), bundle.position, r.calls, bundle.path
        )
        self._check("receipt covers the call", covered, f"call {leaf.number}, position {bundle.position} of {r.calls}")
        try:
            ok = q.call_price <= leaf.amount <= largest_amount(q)
        except PeerError:
            ok = False
        self._check("price is the quote's", ok and leaf.amount <= r.amount, f"{format_credits(leaf.amount)} credits")

    def _cheque(self, order: tuple[Envelope, object], receipt: tuple[Envelope, object]) -> None:
        if not self.bundle.cheque:
            self._check("cheque", False, "none yet: the slice is unpaid")
            return
        opened = self._open("cheque", self.bundle.cheque, Cheque)
        if opened is None:
            return
        (ordered, o), (receipted, r), (signed, c) = order, receipt, opened
        assert isinstance(o, Order) and isinstance(r, Receipt) and isinstance(c, Cheque)  # noqa: PT018
        fits = (c.agreement, c.provider, c.slice) == (r.agreement, o.provider, r.slice)
        fits = fits and c.receipt == document_id(receipted) and c.total == r.total and signed.signer == ordered.signer
        self._check("cheque pays the receipt", fits, f"{format_credits(c.total)} credits in all")
        self._check("cheque opens the hash chain", c.slice < o.chain_length and _opens(c, o), f"value {c.slice + 1}")

    def _tensors(self, name: str, values: Mapping[str, Value], expected: bytes) -> None:
        try:
            headers, chunks, _ = encode_values(values)
            ok = values_hash(headers, chunks) == expected
        except (PeerError, ValueError, TypeError) as error:
            self._check(f"{name} matches", False, str(error))
            return
        self._check(f"{name} matches", ok, "same hash" if ok else "another hash")


def _opens(cheque: Cheque, order: Order) -> bool:
    try:
        check_preimage(cheque.preimage, cheque.slice, order.chain_anchor, 0)
    except ProtocolViolation:
        return False
    return True


def is_verified(checks: list[Check]) -> bool:
    """Say whether every check holds."""
    return bool(checks) and all(check.ok for check in checks)
