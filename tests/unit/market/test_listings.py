"""Listings, withdrawals and suspicions: small, signed, and checked before anything else is done with them."""

import pytest

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.gossip.items import Kind
from p2pnode.errors import ProtocolViolation
from p2pnode.market.listings import (
    DocumentCheck,
    ListingBook,
    listed_of,
    make_listing,
    seal_listing,
    seal_suspicion,
    seal_withdrawal,
)
from p2pnode.market.offers import OfferFacts, make_offer
from p2pnode.market.settings import MarketSettings
from p2pnode.reasons import Reason
from p2pnode.wire.envelope import decode_envelope, encode_envelope, seal
from p2pnode.wire.messages.gossip import Listing
from p2pnode.wire.messages.market import Hardware

ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
NETWORK, NOW = b"test network", 1_790_000_000_000
FACTS = OfferFacts(
    addresses=("203.0.113.7:9470", "[2001:db8::1]:9470", "10.0.0.1:9470"),
    hardware=Hardware("Intel(R) Xeon(R) CPU @ 2.20GHz", 8, 16 << 30, ("NVIDIA GeForce RTX 3090",), 24 << 30, 10**12),
    engines=("CPUExecutionProvider", "CUDAExecutionProvider"),
    sandbox="gpu",
    models=(b"m" * 32, b"n" * 32),
)
SETTINGS = MarketSettings(operations_price=1000, region=("eu", "de"))
CHECK = DocumentCheck(NETWORK)


def listing(sequence=12, facts=FACTS, settings=SETTINGS, now=NOW):
    return make_listing(make_offer(facts, settings, sequence, now))


def sealed(identity=ALICE, network=NETWORK, **about):
    return seal_listing(listing(**about), identity, network)


def test_an_offer_in_short_says_what_searches_need_in_400_bytes():
    short = listing()
    assert (short.cores, short.memory_mib, short.gpus, short.gpu_memory_mib) == (
        8,
        16 << 10,
        ("NVIDIA GeForce RTX 3090",),
        24 << 10,
    )
    assert (short.engines, short.models, short.model_count) == (("CPU", "CUDA"), (b"m" * 8, b"n" * 8), 2)
    assert short.addresses == FACTS.addresses[:2]
    assert len(sealed()) <= 400
    plain = OfferFacts(("203.0.113.7:9470",), Hardware("", 8, 16 << 30, (), 0, 10**11), ("CPUExecutionProvider",), "full")
    assert len(sealed(facts=plain)) <= 280


def test_monitors_are_told_no_address_of_what_nobody_has_dialled():
    hidden = make_listing(make_offer(FACTS, SETTINGS, 1, NOW), reachable=False)
    assert hidden.addresses == FACTS.addresses[:2]
    assert CHECK(seal_listing(hidden, ALICE, NETWORK), NOW).addresses == ()


def test_the_largest_listing_still_fits():
    facts = OfferFacts(
        ("x" * 255 + ":65535",) * 8, Hardware("c" * 64, 2**53, 2**53, ("g" * 64,) * 32, 2**53, 2**53), ("e" * 64,) * 32,
        "s" * 64, (b"m" * 32,) * 256,
    )  # fmt: skip
    settings = MarketSettings(operations_price=2**62, call_price=2**62, region=("r" * 64,) * 32, numeric_classes=("n" * 64,) * 32)
    short = make_listing(make_offer(facts, settings, 1, NOW))
    assert CHECK(seal_listing(short, ALICE, NETWORK), NOW).kind is Kind.OFFER
    assert short.model_count == 256


def test_gossip_is_told_what_it_needs():
    item = CHECK(sealed(), NOW)
    assert (item.kind, item.publisher, item.subject, item.sequence) == (Kind.OFFER, ALICE.node_id, ALICE.node_id, 12)
    assert item.key == ALICE.node_id
    assert item.addresses == FACTS.addresses[:2]
    assert listed_of(item).listing == listing()
    gone = CHECK(seal_withdrawal(13, NOW + 1000, ALICE, NETWORK), NOW)
    assert (gone.kind, gone.key, gone.sequence) == (Kind.WITHDRAWAL, item.key, 13)
    doubt = CHECK(seal_suspicion(ALICE.node_id, 12, NOW + 1000, NOW, BOB, NETWORK), NOW)
    assert (doubt.kind, doubt.publisher, doubt.subject, doubt.about) == (Kind.SUSPICION, BOB.node_id, ALICE.node_id, 12)
    assert doubt.key not in (ALICE.node_id, BOB.node_id)
    assert doubt.sequence == NOW


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (sealed(network=b"other"), Reason.BAD_SIGNATURE),
        (sealed()[:-1] + b"?", Reason.BAD_SIGNATURE),
        (sealed()[:-1], Reason.TRUNCATED),
        (sealed(now=NOW - 1_800_000), Reason.EXPIRED),
        (sealed(now=NOW + 2_000_000), Reason.NOT_YET_VALID),
        (sealed(sequence=2**48), Reason.WRONG_TYPE),
        (seal_withdrawal(1, NOW, ALICE, NETWORK), Reason.EXPIRED),
        (seal_suspicion(ALICE.node_id, 1, NOW + 1000, NOW + 200_000, BOB, NETWORK), Reason.NOT_YET_VALID),
        (encode_envelope(seal(make_offer(FACTS, SETTINGS, 1, NOW), ALICE, NETWORK)), Reason.WRONG_TYPE),
        (bytes(5000), Reason.TOO_LARGE),
        (b"", Reason.TRUNCATED),
    ],
    ids=["network", "altered", "cut", "expired", "future", "sequence", "over", "early", "kind", "large", "empty"],
)
def test_a_false_document_is_refused_with_its_reason(data, reason):
    with pytest.raises(ProtocolViolation) as violation:
        CHECK(data, NOW)
    assert violation.value.reason is reason


def test_a_signature_for_one_kind_is_none_for_another():
    envelope = decode_envelope(seal_withdrawal(1, NOW + 1000, ALICE, NETWORK))
    disguised = type(envelope)(47, envelope.body, envelope.signer, envelope.signature)
    with pytest.raises(ProtocolViolation) as violation:
        CHECK(encode_envelope(disguised), NOW)
    assert violation.value.reason is Reason.BAD_SIGNATURE


def test_a_publisher_must_have_solved_the_networks_puzzle():
    bits = 0
    while DocumentCheck(NETWORK, bits + 1)._puzzle_bits and _passes(bits + 1):
        bits += 1
    with pytest.raises(ProtocolViolation) as violation:
        DocumentCheck(NETWORK, bits + 1)(sealed(), NOW)
    assert violation.value.reason is Reason.WRONG_SIGNER


def _passes(bits):
    try:
        return DocumentCheck(NETWORK, bits)(sealed(), NOW) is not None
    except ProtocolViolation:
        return False


def test_the_book_follows_what_arrives_and_goes():
    book = ListingBook()
    first, second = CHECK(sealed(), NOW), CHECK(sealed(sequence=13), NOW)
    book.put(first)
    book.put(second)
    assert [listed.listing.sequence for listed in book.current(NOW)] == [13]
    book.put(CHECK(seal_suspicion(ALICE.node_id, 13, NOW + 1000, NOW, BOB, NETWORK), NOW))
    assert book.get(ALICE.node_id) is not None, "suspicion deletes nothing"
    assert not book.current(NOW + 1_800_000)
    book.put(CHECK(seal_withdrawal(14, NOW + 1000, ALICE, NETWORK), NOW))
    assert len(book) == 0
    book.put(CHECK(sealed(BOB), NOW))
    book.remove(CHECK(sealed(BOB), NOW))
    assert len(book) == 0


def test_a_listing_leaves_out_what_is_as_usual():
    assert len(encode_envelope(seal(Listing(1, NOW + 1000), ALICE, NETWORK))) < 170
