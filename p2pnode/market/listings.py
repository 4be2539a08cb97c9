"""Listings: an offer in a few hundred bytes, which everybody holds of everybody; withdrawals and suspicions of them.

The validator that gossip is given lives here: it turns signed bytes into what gossip needs to know about them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from p2pnode.crypto.keys import Identity, check_puzzle, node_id_of
from p2pnode.discovery.gossip.items import SEQUENCE_MAX, Item, Kind, make_item
from p2pnode.errors import ProtocolViolation
from p2pnode.market.offers import CLOCK_SKEW_MS, OFFER_LIFE_MS_MAX
from p2pnode.reasons import Reason
from p2pnode.wire.codec import decode
from p2pnode.wire.envelope import decode_envelope, encode_envelope, open_envelope, seal
from p2pnode.wire.messages.gossip import DOCUMENT_BYTES_MAX, MODELS_HINTED_MAX, Listing, Suspicion, Withdrawal
from p2pnode.wire.messages.market import Offer
from p2pnode.wire.registry import class_of
from p2pnode.wire.version import PROTOCOL_VERSION

MODEL_HINT_SIZE: Final = 8
ADDRESSES_LISTED: Final = 2
_MEBI: Final = 1 << 20
_PROVIDER_SUFFIX: Final = "ExecutionProvider"


@dataclass(frozen=True, slots=True)
class Listed:
    """A listing that was checked, with its provider's node id."""

    provider: bytes
    listing: Listing


def make_listing(offer: Offer, addresses: tuple[str, ...] | None = None, *, reachable: bool = True) -> Listing:
    """Give an offer in short. addresses: best first, None for what the offer says. reachable: strangers have dialled one."""
    hardware = offer.hardware
    return Listing(
        sequence=offer.sequence,
        expires_ms=offer.expires_ms,
        addresses=tuple((offer.addresses if addresses is None else addresses)[:ADDRESSES_LISTED]),
        cores=hardware.cpu_cores,
        memory_mib=hardware.memory_bytes // _MEBI,
        gpus=tuple(hardware.gpus[:8]),
        gpu_memory_mib=hardware.gpu_memory_bytes // _MEBI,
        gigaops=hardware.operations_per_second // 10**9,
        engines=tuple(engine.removesuffix(_PROVIDER_SUFFIX) for engine in offer.engines[:8]),
        classes=tuple(offer.numeric_classes[:8]),
        sandbox=offer.sandbox,
        models=tuple(model[:MODEL_HINT_SIZE] for model in offer.models[:MODELS_HINTED_MAX]),
        model_count=len(offer.models),
        price=offer.operations_price,
        call_price=offer.call_price,
        region=tuple(offer.region[:8]),
        version=PROTOCOL_VERSION,
        unreached=not reachable,
    )


def seal_listing(listing: Listing, identity: Identity, network_id: bytes) -> bytes:
    """Sign a listing; gives what is spread. Raises ValueError for one beyond the limit, which `make_listing` keeps well below."""
    data = encode_envelope(seal(listing, identity, network_id))
    if len(data) > DOCUMENT_BYTES_MAX:
        raise ValueError(f"a listing of {len(data)} bytes where {DOCUMENT_BYTES_MAX} are allowed")
    return data


def seal_withdrawal(sequence: int, expires_ms: int, identity: Identity, network_id: bytes) -> bytes:
    """Sign that every offer below `sequence` is taken back. expires_ms: when the last of them would have ended."""
    return encode_envelope(seal(Withdrawal(sequence, expires_ms), identity, network_id))


def seal_suspicion(
    publisher: bytes, sequence: int, expires_ms: int, now_ms: int, identity: Identity, network_id: bytes
) -> bytes:  # fmt: skip
    """Sign that this node, a monitor, could not reach the publisher of this offer."""
    return encode_envelope(seal(Suspicion(publisher, sequence, now_ms, expires_ms), identity, network_id))


class DocumentCheck:
    """Checks what gossip carries: kind, signature, times, size, and the signer's key puzzle. Called with (bytes, milliseconds).

    Raises ProtocolViolation: a decoding or signature reason, WRONG_TYPE, WRONG_SIGNER (no puzzle solved), EXPIRED, NOT_YET_VALID.
    """

    def __init__(self, network_id: bytes, puzzle_bits: int = 0) -> None:
        self._network_id = network_id
        self._puzzle_bits = puzzle_bits

    def __call__(self, data: bytes, now_ms: int) -> Item:
        """Give the item behind a document's bytes."""
        if len(data) > DOCUMENT_BYTES_MAX:
            raise ProtocolViolation(Reason.TOO_LARGE, f"a document of {len(data)} bytes")
        envelope = decode_envelope(data)
        kind = class_of(envelope.kind)
        signer = node_id_of(envelope.signer)
        if not check_puzzle(signer, self._puzzle_bits):
            raise ProtocolViolation(Reason.WRONG_SIGNER, "the key puzzle of this network is not solved")
        if kind is Listing:
            listing = open_envelope(envelope, Listing, self._network_id)
            _check_times(listing.sequence, listing.expires_ms, now_ms)
            # Monitors dial only whom strangers have reached before; the others come to them.
            addresses = () if listing.unreached else listing.addresses
            return make_item(
                Kind.OFFER, signer, signer, listing.sequence, listing.sequence, listing.expires_ms, data, tuple(addresses)
            )
        if kind is Withdrawal:
            withdrawal = open_envelope(envelope, Withdrawal, self._network_id)
            _check_times(withdrawal.sequence, withdrawal.expires_ms, now_ms)
            sequence = withdrawal.sequence
            return make_item(Kind.WITHDRAWAL, signer, signer, sequence, sequence, withdrawal.expires_ms, data)
        if kind is Suspicion:
            suspicion = open_envelope(envelope, Suspicion, self._network_id)
            _check_times(suspicion.made_ms, suspicion.expires_ms, now_ms)
            if suspicion.made_ms > now_ms + CLOCK_SKEW_MS:
                raise ProtocolViolation(Reason.NOT_YET_VALID, "a suspicion of the future")
            return make_item(
                Kind.SUSPICION, signer, suspicion.publisher, suspicion.made_ms, suspicion.sequence, suspicion.expires_ms, data
            )
        raise ProtocolViolation(Reason.WRONG_TYPE, f"a document of kind {envelope.kind}")


def listed_of(item: Item) -> Listed:
    """Give the listing behind an item that was checked before."""
    return Listed(item.publisher, decode(Listing, decode_envelope(item.data).body))


class ListingBook:
    """The listings that gossip holds, decoded once. `put` and `remove` follow gossip's `Arrived` and `Gone`."""

    def __init__(self) -> None:
        self._listed: dict[bytes, Listed] = {}

    def __len__(self) -> int:
        return len(self._listed)

    def put(self, item: Item) -> None:
        """Take an item that arrived: a listing is shown, a withdrawal takes it away, a suspicion changes nothing here."""
        if item.kind is Kind.OFFER:
            self._listed[item.publisher] = listed_of(item)
        elif item.kind is Kind.WITHDRAWAL:
            self._listed.pop(item.publisher, None)

    def remove(self, item: Item) -> None:
        """Take an item that is gone."""
        if item.kind is Kind.OFFER:
            self._listed.pop(item.publisher, None)

    def get(self, provider: bytes) -> Listed | None:
        """Give a provider's listing."""
        return self._listed.get(provider)

    def current(self, now_ms: int) -> Iterable[Listed]:
        """Give those whose time is not over, in the order in which they arrived first."""
        return [listed for listed in self._listed.values() if listed.listing.expires_ms > now_ms]


def _check_times(sequence: int, expires_ms: int, now_ms: int) -> None:
    if sequence > SEQUENCE_MAX:
        raise ProtocolViolation(Reason.WRONG_TYPE, "a sequence has 48 bits")
    if expires_ms <= now_ms:
        raise ProtocolViolation(Reason.EXPIRED, "the document")
    if expires_ms > now_ms + OFFER_LIFE_MS_MAX + CLOCK_SKEW_MS:
        raise ProtocolViolation(Reason.NOT_YET_VALID, "the document's times")
