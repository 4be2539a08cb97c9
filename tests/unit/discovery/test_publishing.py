"""A publication is successful only with acknowledgements of at least half the holders, else tried again; it says how many."""

import pytest

from p2pnode.discovery.dht.publishing import PASSING, PublishMachine, PublishSettings, acks_needed
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import Contact

KEY = b"k" * 32


def contacts(count):
    return [Contact(bytes([number]) * 32, (f"20.0.{number}.1:1",)) for number in range(count)]


def machine(count=16, expected=100, uniform=0.0, **settings):
    return PublishMachine(KEY, 7, contacts(count), expected, PublishSettings(**settings), lambda: uniform)


def run(publish, answer, now=0.0):
    """Answer every request at once with `answer(node number, round)`: True, a reason, or None for silence."""
    rounds = {}
    while not publish.is_over:
        asked = publish.next(now)
        if not asked:
            now = publish.deadline
            continue
        for contact in asked:
            node = contact.node_id[0]
            rounds[node] = rounds.get(node, 0) + 1
            outcome = answer(node, rounds[node])
            if outcome is True:
                publish.answered(contact.node_id, now)
            else:
                publish.failed(contact.node_id, outcome, now)
    return publish.publication, now


def test_all_holders_are_asked_a_few_at_a_time():
    publish = machine(parallel=3)
    first = publish.next(0.0)
    assert [contact.node_id[0] for contact in first] == [0, 1, 2]
    assert publish.next(0.0) == []
    publish.answered(first[1].node_id, 0.1)
    assert [contact.node_id[0] for contact in publish.next(0.1)] == [3]
    assert not publish.is_over
    outcome, _ = run(machine(parallel=3), lambda node, attempt: True)
    assert (outcome.acks, outcome.asked, outcome.attempts, outcome.refusals) == (16, 16, 1, ())
    assert (outcome.key, outcome.sequence) == (KEY, 7)


@pytest.mark.parametrize(("acks", "is_stored"), [(16, True), (8, True), (7, False), (0, False)])
def test_half_of_k_must_acknowledge(acks, is_stored):
    outcome, _ = run(machine(), lambda node, attempt: node < acks or Reason.STALE)
    assert outcome.is_stored is is_stored
    assert (outcome.acks, outcome.asked, outcome.needed) == (acks, 16, 8)


def test_reaching_one_holder_of_sixteen_is_no_success():
    """The lookup of a node with a drained table finds one contact; what counts is how many there should be."""
    outcome, _ = run(machine(count=1), lambda node, attempt: True)
    assert (outcome.acks, outcome.asked, outcome.is_stored) == (1, 1, False)


def test_reaching_nobody_is_no_success_and_ends_at_once():
    publish = machine(count=0)
    assert publish.is_over
    assert publish.next(0.0) == []
    assert (publish.publication.asked, publish.publication.attempts, publish.publication.is_stored) == (0, 0, False)


@pytest.mark.parametrize(("expected", "needed"), [(100, 8), (16, 8), (15, 8), (5, 3), (1, 1), (0, 1)])
def test_in_a_network_of_fewer_than_k_half_of_it_must_acknowledge(expected, needed):
    assert acks_needed(PublishSettings(), expected) == needed


def test_a_publication_that_fell_short_asks_the_silent_ones_again_with_backoff():
    outcome, ended = run(machine(uniform=0.5), lambda node, attempt: node < 4 or (True if attempt == 3 else None))
    assert (outcome.acks, outcome.asked, outcome.attempts, outcome.is_stored) == (16, 16, 3, True)
    assert ended == pytest.approx(2.0 * 0.75 + 4.0 * 0.75)


@pytest.mark.parametrize("uniform", [0.0, 0.999])
def test_backoff_has_jitter(uniform):
    publish = machine(count=1, uniform=uniform)
    publish.next(10.0)
    publish.failed(bytes(32), None, 10.0)
    assert publish.deadline == pytest.approx(10.0 + 2.0 * (0.5 + uniform / 2))
    assert publish.next(publish.deadline - 0.001) == []
    assert len(publish.next(publish.deadline)) == 1


def test_retries_end():
    outcome, _ = run(machine(), lambda node, attempt: None)
    assert (outcome.acks, outcome.attempts, outcome.refusals) == (0, 3, ((Reason.TOO_SLOW, 16),))


def test_a_publication_with_enough_acknowledgements_does_not_wait_for_the_rest():
    outcome, ended = run(machine(), lambda node, attempt: node < 8 or None)
    assert (outcome.acks, outcome.attempts, ended) == (8, 1, 0.0)


def test_refusals_are_reported_by_reason_and_those_about_the_record_are_not_retried():
    asked = []

    def answer(node, attempt):
        asked.append(node)
        return Reason.STALE if node < 3 else Reason.RATE

    outcome, _ = run(machine(count=5), answer)
    assert outcome.refusals == ((Reason.RATE, 2), (Reason.STALE, 3))
    assert [asked.count(node) for node in range(5)] == [1, 1, 1, 3, 3]
    only_stale, ended = run(machine(count=5), lambda node, attempt: Reason.STALE)
    assert (only_stale.attempts, ended) == (1, 0.0)


def test_reasons_about_the_record_are_never_taken_as_passing():
    about_the_record = {
        Reason.STALE,
        Reason.TWO_VERSIONS,
        Reason.EXPIRED,
        Reason.LIFETIME,
        Reason.STORE_FULL,
        Reason.BAD_SIGNATURE,
    }
    assert not about_the_record & PASSING


def test_answers_of_strangers_and_second_answers_count_for_nothing():
    publish = machine(count=2)
    publish.next(0.0)
    publish.answered(b"x" * 32, 0.0)
    publish.answered(bytes(32), 0.0)
    publish.answered(bytes(32), 0.0)
    publish.failed(bytes(32), Reason.RATE, 0.0)
    assert (publish.publication.acks, publish.publication.asked, publish.is_over) == (1, 2, False)


def test_a_contact_named_twice_counts_once():
    publish = PublishMachine(KEY, 1, contacts(2) * 2, 2, PublishSettings(), lambda: 0.0)
    assert len(publish.next(0.0)) == 2
