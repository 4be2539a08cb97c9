"""The book of gossip: what is news, what is bounded, and fingerprints that follow every change."""

import dataclasses

import pytest

from p2pnode.discovery.gossip.items import BUCKETS, ItemStore, Kind, Outcome, make_item, split_entries, split_prefixes
from p2pnode.discovery.gossip.settings import GossipSettings

NOW = 1_790_000_000.0
SETTINGS = GossipSettings(offers_max=4, voices_max=3)


def node(number):
    return bytes([number]) * 32


def offer(number, sequence=1, life=1800.0):
    expires_ms = round((NOW + life) * 1000)
    data = b"offer %d %d" % (number, sequence)
    return make_item(Kind.OFFER, node(number), node(number), sequence, sequence, expires_ms, data, ("80.1.2.3:1",))


def withdrawal(number, sequence):
    return dataclasses.replace(offer(number, sequence), kind=Kind.WITHDRAWAL)


def suspicion(monitor, number, about, made=1):
    return make_item(Kind.SUSPICION, node(monitor), node(number), made, about, round((NOW + 1800) * 1000), b"suspicion")


def test_the_newest_word_of_a_publisher_wins_and_a_withdrawal_is_one():
    store = ItemStore(SETTINGS)
    assert store.put(offer(1, 2), NOW)[0] is Outcome.NEW
    assert store.put(offer(1, 2), NOW)[0] is Outcome.SAME
    assert store.put(offer(1, 1), NOW)[0] is Outcome.OLD
    assert store.put(withdrawal(1, 3), NOW)[0] is Outcome.NEW
    assert store.put(offer(1, 2), NOW)[0] is Outcome.OLD, "a withdrawn offer does not come back"
    assert not list(store.offers())
    assert store.put(offer(1, 4), NOW)[0] is Outcome.NEW


def test_what_is_over_goes_with_all_that_was_said_about_it():
    store = ItemStore(SETTINGS)
    store.put(offer(1, life=10), NOW)
    store.put(suspicion(2, 1, 1), NOW)
    assert store.put(offer(2, life=-1), NOW)[0] is Outcome.OLD
    assert store.next_expiry == NOW + 10
    assert not store.expire(NOW + 9.9)
    assert {item.kind for item in store.expire(NOW + 10)} == {Kind.OFFER, Kind.SUSPICION}
    assert len(store) == 0
    assert store.whole() == bytes(8)


def test_a_full_book_turns_newcomers_away_but_takes_the_place_of_the_unreached():
    store = ItemStore(SETTINGS)
    for number in range(1, 5):
        store.put(offer(number), NOW)
    assert store.put(offer(5), NOW)[0] is Outcome.FULL
    assert store.put(offer(4, 2), NOW)[0] is Outcome.NEW, "those who are in may renew"
    store.put(suspicion(1, 3, 1), NOW)
    assert store.put(offer(5), NOW)[0] is Outcome.FULL, "one voice is not enough"
    store.put(suspicion(2, 3, 1), NOW)
    outcome, dropped = store.put(offer(5), NOW)
    assert outcome is Outcome.NEW
    assert [item.key for item in dropped if item.kind is Kind.OFFER] == [node(3)]
    assert sum(1 for _ in store.offers()) == 4


def test_a_publisher_is_heard_once_in_ten_seconds_after_a_small_burst():
    store = ItemStore(SETTINGS)
    outcomes = [store.put(offer(1, sequence), NOW)[0] for sequence in range(1, 6)]
    assert outcomes == [Outcome.NEW] * 3 + [Outcome.TOO_OFTEN] * 2
    assert store.put(offer(1, 6), NOW + 10)[0] is Outcome.NEW
    assert store.put(offer(1, 7), NOW + 11)[0] is Outcome.TOO_OFTEN


def test_suspicions_are_about_the_present_offer_only_and_few():
    store = ItemStore(SETTINGS)
    assert store.put(suspicion(2, 1, 1), NOW)[0] is Outcome.OLD, "about nobody that is known"
    store.put(offer(1, 5), NOW)
    assert store.put(suspicion(2, 1, 4), NOW)[0] is Outcome.OLD, "about an offer that was replaced"
    outcomes = [store.put(suspicion(monitor, 1, 5), NOW)[0] for monitor in range(2, 7)]
    assert outcomes == [Outcome.NEW] * 3 + [Outcome.FULL] * 2
    _, dropped = store.put(offer(1, 6), NOW)
    assert sum(item.kind is Kind.SUSPICION for item in dropped) == 3, "a newer sequence answers them all"
    assert not list(store.voices(node(1)))


def test_fingerprints_are_those_of_the_contents_whatever_the_way_there():
    one, other = ItemStore(SETTINGS), ItemStore(SETTINGS)
    for item in (offer(1), offer(2, 1), offer(2, 2), offer(200)):
        one.put(item, NOW)
    for item in (offer(200), offer(2, 2), offer(1)):
        other.put(item, NOW)
    assert one.whole() == other.whole() != bytes(8)
    assert one.parts() == other.parts()
    other.put(offer(200, 2), NOW)
    assert one.whole() != other.whole()
    differing = [part for part in range(16) if one.buckets(part) != other.buckets(part)]
    assert differing == [200 // 16]
    assert one.in_buckets(bytes([2, 200])) == {2: [offer(2, 2)], 200: [offer(200)]}


def test_renewals_leave_nothing_behind():
    store = ItemStore(dataclasses.replace(SETTINGS, update_seconds=0.0))
    for sequence in range(1, 500):
        store.put(offer(1, sequence, life=1800 + sequence), NOW)
    assert len(store._expiries) < 100


def test_entries_and_prefixes_are_taken_apart_again():
    items = [offer(1, 7), offer(2, 2**48 - 1)]
    assert list(split_entries(b"".join(item.entry for item in items))) == [(node(1)[:8], 7), (node(2)[:8], 2**48 - 1)]
    assert list(split_entries(items[0].entry + b"rest")) == [(node(1)[:8], 7)]
    assert list(split_prefixes(node(1)[:8] + node(2)[:8] + b"x")) == [node(1)[:8], node(2)[:8]]
    with pytest.raises(ValueError, match="48 bits"):
        offer(1, 2**48)
    assert BUCKETS == 256
