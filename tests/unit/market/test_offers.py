import pytest

from p2pnode.crypto.keys import Identity
from p2pnode.errors import ProtocolViolation
from p2pnode.market.offers import OfferBook, OfferFacts, make_offer, open_offer
from p2pnode.market.settings import MarketSettings
from p2pnode.reasons import Reason
from p2pnode.wire.envelope import encode_envelope, seal

ALICE, BOB, NETWORK, NOW = Identity(b"a" * 32), Identity(b"b" * 32), b"net", 1_1_900_000_000_000
SETTINGS = MarketSettings(operations_price=5, call_price=2, region=("eu",))


def sealed(identity=ALICE, sequence=1, network=NETWORK, now=NOW, settings=SETTINGS) -> bytes:
    return encode_envelope(seal(make_offer(OfferFacts(), settings, sequence, now), identity, network))


def test_an_offer_says_what_the_owner_set() -> None:
    signed = open_offer(sealed(), NETWORK, NOW, ALICE.node_id)
    assert (signed.offer.operations_price, signed.offer.call_price, signed.offer.region) == (5, 2, ("eu",))
    assert signed.provider == ALICE.node_id
    assert signed.offer.expires_ms == NOW + 1_800_000


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (sealed(identity=BOB), Reason.WRONG_SIGNER),
        (sealed(network=b"other"), Reason.BAD_SIGNATURE),
        (sealed(now=NOW - 1_900_000), Reason.EXPIRED),
        (sealed(now=NOW + 1_900_000), Reason.NOT_YET_VALID),
        (sealed(settings=MarketSettings(offer_seconds=90_000)), Reason.NOT_YET_VALID),
        (sealed()[:-1], Reason.TRUNCATED),
        (sealed()[:-1] + b"?", Reason.BAD_SIGNATURE),
    ],
    ids=["signer", "network", "expired", "future", "long life", "truncated", "altered"],
)
def test_a_false_offer_is_refused_with_its_reason(data: bytes, reason: Reason) -> None:
    with pytest.raises(ProtocolViolation) as violation:
        open_offer(data, NETWORK, NOW, ALICE.node_id)
    assert violation.value.reason is reason


def test_the_newest_sequence_wins_and_expired_offers_go() -> None:
    book = OfferBook(10)
    old, new = (open_offer(sealed(sequence=number), NETWORK, NOW) for number in (1, 2))
    assert book.add(new)
    assert not book.add(old)
    assert book.current(NOW)[ALICE.node_id].offer.sequence == 2
    assert not book.current(NOW + 1_800_000)


def test_two_offers_with_one_sequence_are_a_violation() -> None:
    book = OfferBook(10)
    book.add(open_offer(sealed(), NETWORK, NOW))
    with pytest.raises(ProtocolViolation) as violation:
        book.add(open_offer(sealed(settings=MarketSettings(operations_price=9)), NETWORK, NOW))
    assert violation.value.reason is Reason.REPLAYED


def test_a_full_book_gives_up_what_expires_first() -> None:
    book = OfferBook(2)
    for index in range(3):
        identity = Identity(bytes([index + 1]) * 32)
        book.add(open_offer(sealed(identity=identity, now=NOW - 1000 * (index == 1)), NETWORK, NOW))
    assert Identity(b"\2" * 32).node_id not in book.current(NOW)
    assert len(book.current(NOW)) == 2
