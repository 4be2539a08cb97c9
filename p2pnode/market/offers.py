"""Offers: what a provider sells, signed, for minutes; and the book of those received.

The newest sequence of a provider wins; an older one, an expired one or one signed by somebody else is refused with its reason.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from p2pnode.crypto.keys import node_id_of
from p2pnode.environment import Buffer
from p2pnode.errors import ProtocolViolation
from p2pnode.market.settings import MarketSettings
from p2pnode.reasons import Reason
from p2pnode.wire.envelope import decode_envelope, document_id, open_envelope
from p2pnode.wire.messages.market import Hardware, Offer

# Clocks of strangers differ; an offer from further in the future than this is refused.
CLOCK_SKEW_MS: Final = 120_000
OFFER_LIFE_MS_MAX: Final = 3_600_000
MODELS_LISTED_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class OfferFacts:
    """What the rest of the node knows that belongs into its offer."""

    addresses: tuple[str, ...] = ()
    hardware: Hardware = field(default_factory=lambda: Hardware("", 0, 0, (), 0, 0))
    engines: tuple[str, ...] = ()
    sandbox: str = ""
    models: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class SignedOffer:
    """An offer that was checked. document: its hash; envelope: the bytes as received; provider: node id."""

    offer: Offer
    document: bytes
    envelope: bytes
    provider: bytes


def make_offer(facts: OfferFacts, settings: MarketSettings, sequence: int, now_ms: int) -> Offer:
    """Give the offer of this node, to be signed."""
    return Offer(
        sequence=sequence,
        created_ms=now_ms,
        expires_ms=now_ms + round(settings.offer_seconds * 1000),
        addresses=facts.addresses[:8],
        hardware=facts.hardware,
        engines=facts.engines[:32],
        numeric_classes=settings.numeric_classes,
        sandbox=facts.sandbox[:64],
        models=facts.models[:MODELS_LISTED_MAX],
        operations_price=settings.operations_price,
        call_price=settings.call_price,
        input_bytes_max=settings.input_bytes_max,
        output_bytes_max=settings.output_bytes_max,
        model_bytes_max=settings.model_bytes_max,
        call_ms_max=round(settings.call_seconds_max * 1000),
        region=settings.region,
    )


def open_offer(data: Buffer, network_id: bytes, now_ms: int, provider: bytes | None = None) -> SignedOffer:
    """Give a checked offer from an encoded envelope. provider: the node id that must have signed it, if known.

    Raises ProtocolViolation: a decoding or signature reason, WRONG_SIGNER, EXPIRED or NOT_YET_VALID.
    """
    envelope = decode_envelope(data)
    signer = node_id_of(envelope.signer)
    if provider is not None and signer != provider:
        raise ProtocolViolation(Reason.WRONG_SIGNER, "the offer of another node")
    offer = open_envelope(envelope, Offer, network_id)
    if offer.expires_ms <= now_ms:
        raise ProtocolViolation(Reason.EXPIRED, "the offer")
    if offer.created_ms > now_ms + CLOCK_SKEW_MS or offer.expires_ms > offer.created_ms + OFFER_LIFE_MS_MAX:
        raise ProtocolViolation(Reason.NOT_YET_VALID, "the offer's times")
    return SignedOffer(offer, document_id(envelope), bytes(data), signer)


class OfferBook:
    """The newest offer of every provider, bounded: when full, the one that expires first makes room."""

    def __init__(self, offers_max: int) -> None:
        self._offers_max = offers_max
        self._offers: dict[bytes, SignedOffer] = {}

    def add(self, signed: SignedOffer) -> bool:
        """Keep an offer; False when a newer one of the same provider is known. Raises ProtocolViolation(REPLAYED) for two
        different offers with one sequence.
        """
        known = self._offers.get(signed.provider)
        if known is not None and known.offer.sequence >= signed.offer.sequence:
            if known.offer.sequence == signed.offer.sequence and known.document != signed.document:
                raise ProtocolViolation(Reason.REPLAYED, "two offers with one sequence")
            return known.document == signed.document
        if known is None and len(self._offers) >= self._offers_max:
            del self._offers[min(self._offers.values(), key=lambda entry: entry.offer.expires_ms).provider]
        self._offers[signed.provider] = signed
        return True

    def current(self, now_ms: int) -> Mapping[bytes, SignedOffer]:
        """Give provider -> offer of those that have not expired, forgetting the others."""
        self.remove([provider for provider, signed in self._offers.items() if signed.offer.expires_ms <= now_ms])
        return self._offers

    def remove(self, providers: Iterable[bytes]) -> None:
        """Forget providers."""
        for provider in providers:
            self._offers.pop(provider, None)
