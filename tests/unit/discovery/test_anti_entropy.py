"""Two books are made equal, cheaply where they nearly are, and nobody can make the other side work for long."""

import pytest

from p2pnode.discovery.gossip.anti_entropy import QUESTIONS_MAX, Answering, Comparison
from p2pnode.discovery.gossip.items import ItemStore, Kind, make_item
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.reasons import Reason
from p2pnode.wire.codec import encode
from p2pnode.wire.messages.gossip import Announce, Differences, Reconcile

NOW = 1_790_000_000.0
SETTINGS = GossipSettings(offers_max=20_000)
PEER = b"p" * 32


def item(number, sequence=1):
    publisher = (number * 2654435761 % 2**32).to_bytes(4, "big") + bytes(28)
    return make_item(
        Kind.OFFER, publisher, publisher, sequence, sequence, round((NOW + 1800) * 1000), b"%d/%d" % (number, sequence)
    )


def store(*items):
    held = ItemStore(SETTINGS)
    for each in items:
        held.put(each, NOW)
    return held


def reconcile(own, other):
    """Run one comparison to its end; gives the bytes that went over and the number of questions."""
    by_data = {each.data: each for held in (own, other) for each in held.items()}
    comparison, answering = Comparison(PEER, own), Answering(other, SETTINGS)
    question, size, count = comparison.first(), 0, 0
    while question is not None:
        size, count = size + len(encode(question)), count + 1
        answer = None
        if isinstance(question, Announce):
            for data in question.documents:
                other.put(by_data[data], NOW)
        else:
            answer = answering.answer(PEER, question, NOW)
            size += len(encode(answer))
            for data in answer.documents:
                own.put(by_data[data], NOW)
        question = comparison.next(question, answer)
    return size, count


@pytest.mark.parametrize("count", [0, 10, 1000])
def test_equal_books_cost_a_few_bytes_however_large(count):
    items = [item(number) for number in range(count)]
    size, questions = reconcile(store(*items), store(*items))
    assert questions == 1
    assert size < 40


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(range(50), range(0)), (range(0), range(50)), (range(300), range(200, 500)), (range(0, 700, 2), range(1, 700, 2))],
    ids=["we have all", "they have all", "overlapping", "disjoint"],
)
def test_after_a_comparison_both_hold_everything(ours, theirs):
    own, other = store(*map(item, ours)), store(*map(item, theirs))
    reconcile(own, other)
    assert own.whole() == other.whole()
    assert len(own) == len(other) == len(set(ours) | set(theirs))


def test_the_newer_of_two_wins_on_both_sides():
    own, other = store(item(1, 2), item(2, 1)), store(item(1, 1), item(2, 2))
    reconcile(own, other)
    assert own.whole() == other.whole()
    assert [own.get(item(number).key).sequence for number in (1, 2)] == [2, 2]


def test_one_difference_in_a_thousand_costs_little():
    items = [item(number) for number in range(1000)]
    size, questions = reconcile(store(*items[:-1]), store(*items))
    assert questions == 3, "the whole, the buckets, the document"
    assert size < 600


@pytest.mark.slow
def test_ten_thousand_come_over_in_one_comparison():
    own = store()
    _, questions = reconcile(own, store(*map(item, range(10_000))))
    assert len(own) == 10_000
    assert questions < QUESTIONS_MAX


def test_a_peer_may_begin_two_comparisons_a_minute():
    answering = Answering(store(item(1)), SETTINGS)
    start = Reconcile(fingerprints=bytes(8))
    answering.answer(PEER, start, NOW)
    answering.answer(PEER, start, NOW)
    with pytest.raises(Refused) as refused:
        answering.answer(PEER, start, NOW + 1)
    assert refused.value.reason is Reason.RATE
    answering.answer(b"q" * 32, start, NOW + 1)
    answering.forget(PEER)
    with pytest.raises(Refused):
        answering.answer(PEER, start, NOW + 2)
    answering.answer(PEER, start, NOW + 31)


def test_questions_beyond_a_comparison_are_refused():
    answering = Answering(store(item(1)), SETTINGS)
    with pytest.raises(Refused):
        answering.answer(PEER, Reconcile(buckets=b"\0"), NOW)
    answering.answer(PEER, Reconcile(fingerprints=bytes(8)), NOW)
    for _ in range(QUESTIONS_MAX):
        answering.answer(PEER, Reconcile(buckets=b"\0"), NOW)
    with pytest.raises(Refused):
        answering.answer(PEER, Reconcile(buckets=b"\0"), NOW)


@pytest.mark.parametrize(
    "question",
    [
        Reconcile(), Reconcile(fingerprints=bytes(16)), Reconcile(buckets=b"\1\1"), Reconcile(parts=b"\1"),
        Reconcile(parts=b"\2\1", fingerprints=bytes(256)), Reconcile(parts=b"\x10", fingerprints=bytes(128)),
    ],
)  # fmt: skip
def test_senseless_questions_are_violations(question):
    answering = Answering(store(item(1)), SETTINGS)
    answering.answer(PEER, Reconcile(fingerprints=bytes(8)), NOW)
    with pytest.raises(ProtocolViolation) as violation:
        answering.answer(PEER, question, NOW)
    assert violation.value.reason is Reason.WRONG_TYPE


@pytest.mark.parametrize(
    "answer", [Differences(fingerprints=bytes(8)), Differences(buckets=b"\0"), Differences(buckets=b"\2\1", covered=2)]
)
def test_senseless_answers_are_violations(answer):
    comparison = Comparison(PEER, store(item(1)))
    with pytest.raises(ProtocolViolation):
        comparison.next(comparison.first(), answer)


def test_a_peer_that_promises_what_it_does_not_have_ends_the_comparison():
    comparison = Comparison(PEER, store())
    question = comparison.next(comparison.first(), Differences(buckets=b"\0", covered=1, entries=bytes(8) + b"\0\0\0\0\0\5"))
    assert question == Reconcile(wanted=bytes(8))
    assert comparison.next(question, Differences()) is None
