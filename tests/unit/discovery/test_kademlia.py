"""The whole hash table as one machine: single nodes spoken to by hand. Networks of them: test_kademlia_networks.py."""

import itertools
import random

import pytest

from p2pnode.crypto.keys import Identity, check_puzzle
from p2pnode.discovery.dht import routing_table
from p2pnode.discovery.dht.kademlia import PUSHES_MAX, Answered, Ask, Ended, Failed, Kademlia, Met, NeedContacts
from p2pnode.discovery.dht.routing_table import place_of
from p2pnode.discovery.dht.upkeep import CHECK_JITTER_SECONDS, CHECKS_IN_FLIGHT_MAX, CHECKS_MAX, NEED_SECONDS, STALE_SECONDS
from p2pnode.discovery.records.checks import GuardSettings, RecordChecker, SignatureGuard
from p2pnode.discovery.records.record import RecordSettings, RecordStore, make_record
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import (
    Closest,
    Contact,
    FindNode,
    FindProviders,
    FindRecord,
    FoundProviders,
    FoundRecord,
    Record,
    StoreProvider,
    StoreRecord,
    WhoAreYou,
)
from p2pnode.wire.messages.session import Done

NOW = 1_790_000_000.0
NETWORK = bytes(32)
OWN = bytes(32)
ALICE = Identity(b"a" * 32)


def contact(number, bucket=256):
    distance = (1 << (bucket - 1)) + number
    return Contact(distance.to_bytes(32, "big"), (f"{30 + bucket % 60}.{number >> 8}.{number & 255}.1:1",))


def server(**settings):
    checker = RecordChecker(NETWORK, SignatureGuard(GuardSettings()))
    store = RecordStore(RecordSettings(), checker.unasked)
    own = Contact(OWN, ("8.8.8.8:1",))
    made = Kademlia(own, KademliaSettings(**settings), random.Random(1).random, store, NOW, checker.asked)
    made.is_server = True
    return made


def asks(effects):
    return [effect for effect in effects if isinstance(effect, Ask)]


def ended(effects):
    return [effect.outcome for effect in effects if isinstance(effect, Ended)]


def knowing(contacts, **settings):
    made = server(**settings)
    for each in contacts:
        made.table.answered(each, NOW)
    return made


def run(made, effects, reply, now=NOW, seconds=0.1):
    """Answer every ask by `reply(ask)` (a message, or None for silence) so long after it was sent; gives what ended."""
    done, waiting, asked = ended(effects), [(now, ask) for ask in asks(effects)], []
    while waiting:
        sent, ask = waiting.pop(0)
        asked.append(ask)
        message = reply(ask)
        now = sent + seconds
        event = Failed(ask.ask_id) if message is None else Answered(ask.ask_id, message)
        effects = [*made.handle(event, now), *(made.tick(now) if made.deadline <= now else ())]
        done += ended(effects)
        waiting += [(now, ask) for ask in asks(effects)]
    return done, asked


def nobody(ask):
    return {FindNode: Closest((), True), FindRecord: FoundRecord(b"", (), True), FindProviders: FoundProviders((), (), True)}.get(
        type(ask.message), Done()
    )


def record(sequence=1, identity=ALICE):
    made = make_record(identity, NETWORK, Record(b"", sequence, int((NOW + 3600) * 1000), b"value %d" % sequence))
    return made


def tick_until(made, now, end):
    """Tick whenever something is due; gives (when, ask) of all asks, each of which stays unanswered for ever."""
    seen = []
    while made.deadline <= end:
        now = max(now, made.deadline)
        seen += [(now, ask) for ask in asks(made.tick(now))]
    return seen


# --- rule 3: checked before added ---------------------------------------------------------------------------------------


def test_rule_3_a_peer_that_speaks_to_us_is_checked_later_and_added_only_when_it_answered():
    made = server()
    bob = contact(1)
    assert asks(made.handle(Met(bob, True), NOW)) == []
    (when, ask), *_ = [item for item in tick_until(made, NOW, NOW + 5) if item[1].contact == bob]
    assert NOW <= when <= NOW + CHECK_JITTER_SECONDS
    assert isinstance(ask.message, FindNode)
    assert bob.node_id not in made.table
    made.handle(Answered(ask.ask_id, Closest((), True)), when + 0.1)
    assert bob.node_id in made.table


def test_rule_3_a_peer_that_does_not_answer_the_check_stays_out():
    made = server()
    made.handle(Met(contact(1), True), NOW)
    ((when, ask), *_) = tick_until(made, NOW, NOW + 2)
    made.handle(Failed(ask.ask_id, Reason.TOO_SLOW), when + 3)
    assert len(made.table) == 0


def test_rule_3_an_answer_that_is_none_does_not_count():
    made = server()
    made.handle(Met(contact(1), True), NOW)
    ((when, ask), *_) = tick_until(made, NOW, NOW + 2)
    made.handle(Answered(ask.ask_id, Done()), when)
    made.handle(Met(contact(2), True), NOW + 2)
    ((when, ask), *_) = tick_until(made, NOW + 2, NOW + 4)
    made.handle(Answered(ask.ask_id, WhoAreYou()), when)
    assert len(made.table) == 0


def test_rule_3_a_flood_of_strangers_fills_a_bounded_queue_and_starts_a_bounded_number_of_checks():
    made = server()
    for number in range(1000):
        made.handle(Met(contact(number, 200 + number % 50), True), NOW)
    started = tick_until(made, NOW, NOW + 3)
    assert len(started) <= CHECKS_IN_FLIGHT_MAX + 1
    assert len({when for when, _ in started}) >= CHECKS_IN_FLIGHT_MAX, "spread over time"
    for when, ask in started:
        made.handle(Failed(ask.ask_id), when)
    rest = drive(made, NOW + 3, NOW + 100, lambda ask: None)
    assert len(started) + len(rest) == CHECKS_MAX
    assert len(made.table) == 0


def test_rule_3_requests_make_candidates_and_are_answered_from_checked_entries_only():
    made = knowing([contact(5)])
    answer = made.answer(contact(6), contact(6).addresses[0], FindNode(contact(6).node_id, True), NOW)
    assert answer == Closest((contact(5),), True)
    assert contact(6).node_id not in made.table
    assert contact(6) in [ask.contact for _, ask in tick_until(made, NOW, NOW + 2)]
    again = made.answer(contact(5), contact(5).addresses[0], FindNode(contact(5).node_id, True), NOW)
    assert again == Closest((), True), "nobody is told about itself"


def test_clients_are_not_checked_and_a_server_that_becomes_one_leaves():
    made = knowing([contact(5)])
    made.answer(contact(6), contact(6).addresses[0], FindNode(OWN, False), NOW)
    made.handle(Met(contact(5), False), NOW)
    assert len(made.table) == 0
    assert made.why(contact(5).node_id) == routing_table.CLIENT
    made.handle(Met(contact(5), None), NOW)
    assert tick_until(made, NOW, NOW + 2) == []
    made.handle(Met(contact(5), True), NOW)
    assert [ask.contact for _, ask in tick_until(made, NOW, NOW + 4)] == [contact(5)], "until it says otherwise"


def test_a_client_that_answers_leads_on_but_is_not_added():
    made = server()
    effects = made.bootstrap([contact(1)], NOW)
    run(made, effects, lambda ask: Closest((contact(2),), ask.contact == contact(2)))
    assert [entry.contact for entry in made.table.entries()] == [contact(2)]


def test_lookups_count_as_checks():
    made = server()
    run(made, made.bootstrap([contact(1)], NOW), lambda ask: Closest((contact(2), contact(3)), True))
    assert sorted(entry.contact.node_id for entry in made.table.entries()) == [contact(number).node_id for number in (1, 2, 3)]


def test_an_unsolved_puzzle_is_neither_asked_nor_added():
    bits = 4
    solving = [number for number in range(200) if check_puzzle(contact(number).node_id, bits)]
    failing = [number for number in range(200) if not check_puzzle(contact(number).node_id, bits)]
    made = server(puzzle_bits=bits)
    named = tuple(contact(number) for number in (*failing[:10], solving[1]))
    _, asked = run(made, made.bootstrap([contact(solving[0])], NOW), lambda ask: Closest(named, True))
    assert {ask.contact for ask in asked} == {contact(solving[0]), contact(solving[1])}


# --- rule 1: strikes ----------------------------------------------------------------------------------------------------


def test_rule_1_an_old_entry_is_checked_every_ten_seconds():
    contacts = [contact(number) for number in range(8)]
    made = knowing(contacts)
    made.table.get(contacts[3].node_id).last_answer = NOW - 1000
    times = []
    now = NOW
    while now < NOW + 120:
        now = max(now, made.deadline)
        for ask in asks(made.tick(now)):
            times.append((now, ask.contact))
            made.handle(Answered(ask.ask_id, Closest((), True)), now)
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(times)]
    assert times[0][1] == contacts[3], "the oldest first"
    assert max(gaps) <= 10.0
    assert 9 <= len(times) <= 18


def test_rule_1_a_silent_entry_is_asked_again_soon_and_replaced_after_three_strikes():
    contacts = [contact(number) for number in range(16)]
    siblings = [contact(number, 100) for number in range(16)]
    made = knowing([*siblings, *contacts])
    newcomer = contact(99)
    made.handle(Met(newcomer, True), NOW)
    now, silent, strikes = NOW, contacts[0].node_id, 0
    made.table.get(silent).last_answer = NOW - 1000
    while silent in made.table and now < NOW + 300:
        now = max(now, made.deadline)
        for ask in asks(made.tick(now)):
            strikes += ask.contact.node_id == silent
            answer = Failed(ask.ask_id, Reason.TOO_SLOW) if ask.contact.node_id == silent else None
            made.handle(answer or Answered(ask.ask_id, Closest((), True)), now)
    assert strikes == 3
    for when, ask in tick_until(made, now, now + 2):
        assert newcomer.node_id not in made.table
        made.handle(Answered(ask.ask_id, Closest((), True)), when)
    assert newcomer.node_id in made.table, "checked before it counts"


@pytest.mark.parametrize("reason", [Reason.BUSY, Reason.RATE, Reason.TOO_MANY_REQUESTS])
def test_a_refusal_under_load_is_no_strike(reason):
    made = knowing([contact(1)])
    _, effects = made.find_node(contact(1).node_id, NOW)
    made.handle(Failed(asks(effects)[0].ask_id, reason), NOW)
    assert made.table.get(contact(1).node_id).strikes == 0


def test_another_node_at_its_address_is_proof_that_it_is_gone():
    made = knowing([contact(1), contact(2)])
    _, effects = made.find_node(contact(1).node_id, NOW)
    made.handle(Failed(asks(effects)[0].ask_id, Reason.WRONG_PEER), NOW)
    assert made.why(contact(1).node_id) == routing_table.WRONG_NODE


def test_our_own_outage_does_not_empty_the_table():
    contacts = [contact(number) for number in range(10)]
    made = knowing(contacts)
    now = NOW
    for _ in range(8):
        _, effects = made.find_node(contact(1).node_id, now)
        run(made, effects, lambda ask: None, now)
        now += 60
    assert len(made.table) == 10
    assert made.needs_bootstrap, "but it knows that it is cut off"
    _, effects = made.find_node(contact(1).node_id, now)
    run(made, effects, nobody, now)
    assert not made.needs_bootstrap


# --- rule 5: lookups ------------------------------------------------------------------------------------------------------


def test_rule_5_the_time_allowed_follows_what_was_measured():
    contacts = [contact(number) for number in range(40)]
    made = knowing(contacts, timeout_seconds_min=0.5)
    assert made.timeout_seconds == 3.0, "cautious at first"
    _, effects = made.find_node(contact(1).node_id, NOW)
    run(made, effects, nobody, seconds=0.4)
    assert 0.7 < made.timeout_seconds < 0.9
    _, effects = made.find_node(contact(1).node_id, NOW)
    assert asks(effects)[0].timeout_seconds == made.timeout_seconds
    for _ in range(3):
        _, effects = made.find_node(contact(1).node_id, NOW)
        run(made, effects, nobody, seconds=0.01)
    assert made.timeout_seconds == 0.5
    _, effects = made.find_node(contact(1).node_id, NOW)
    run(made, effects, lambda ask: None)
    assert made.timeout_seconds == 3.0, "many failures in a row may mean that everything is slower now"


def test_rule_5_a_lookup_ends_after_thirty_seconds_with_what_it_has():
    """Every answer takes long and names one node that is nearer still."""
    made = knowing([contact(1)])
    target = contact(0).node_id
    names = iter([contact(3000 - number) for number in range(100)])
    _, effects = made.find_node(target, NOW)
    done, asked = run(made, effects, lambda ask: Closest((next(names, contact(1)),), True), seconds=2.9)
    mine = [outcome for outcome in done if outcome.target == target]
    assert 30 <= mine[0].seconds < 33
    assert 10 <= len(mine[0].contacts) <= 11
    assert len(asked) >= len(mine[0].contacts)
    assert len(mine) == 1, "late answers change nothing"


def test_rule_5_the_outcome_tells_the_tale():
    made = knowing([contact(1)])
    target = contact(7).node_id
    operation, effects = made.find_node(target, NOW)
    replies = {contact(1).node_id: Closest((contact(7), contact(3)), True), contact(7).node_id: Closest((), True)}
    now_effects = effects
    done, _ = run(made, now_effects, lambda ask: replies.get(ask.contact.node_id), seconds=0.5)
    (outcome,) = done
    assert (outcome.target, outcome.contacts) == (target, (contact(7), contact(1)))
    assert (outcome.hops, outcome.asked, outcome.failed, outcome.seconds) == (2, 3, 1, pytest.approx(1.0))
    assert operation > 0


def test_a_lookup_without_anybody_to_ask_ends_at_once():
    made = server()
    operation, effects = made.find_node(contact(1).node_id, NOW)
    assert effects[0].operation_id == operation
    assert ended(effects)[0].contacts == ()


def test_lookups_at_once_are_bounded():
    made = knowing([contact(1)], operations_max=3)
    begun = [made.find_node(contact(1).node_id, NOW)[0] for _ in range(3)]
    with pytest.raises(Refused) as refused:
        made.find_node(contact(1).node_id, NOW)
    assert refused.value.reason is Reason.BUSY
    made.cancel(begun[0])
    made.find_node(contact(1).node_id, NOW)


def test_an_ask_whose_end_is_never_reported_counts_as_failed():
    made = knowing([contact(1), contact(2)])
    made.handle(Met(contact(3), True), NOW)
    assert any(ask.contact == contact(3) for _, ask in tick_until(made, NOW, NOW + 2))
    tick_until(made, NOW + 2, NOW + 60)
    assert len(made._asks) < 8


# --- rules 5, 6 and 7: records and providers ------------------------------------------------------------------------------


def holders(made, held, count=10):
    """Neighbours of which each holds what `held` says: node -> encoded record."""
    contacts = [contact(number) for number in range(count)]
    for each in contacts:
        made.table.answered(each, NOW)
    return (
        contacts,
        lambda ask: (
            FoundRecord(held.get(ask.contact.node_id, b""), (), True) if isinstance(ask.message, FindRecord) else nobody(ask)
        ),
    )


def test_rule_5_the_newest_record_is_returned_and_handed_to_those_that_lack_it():
    old, new = record(1), record(2)
    made = server()
    contacts, reply = holders(made, held := {})
    held.update({each.node_id: old.data for each in contacts[:2]})
    held[contacts[8].node_id] = new.data
    _, effects = made.find_record(new.key, NOW, region=False)
    done, asked = run(made, effects, reply)
    pushed = [ask for ask in asked if isinstance(ask.message, StoreRecord)]
    assert done[0].record == new.data
    assert len(pushed) == PUSHES_MAX
    assert all(ask.message.record == new.data and ask.contact != contacts[8] for ask in pushed)


def test_rule_5_three_that_agree_are_enough_and_nearer_ones_without_it_get_it():
    made = server()
    contacts, reply = holders(made, held := {})
    key = record().key
    near = sorted(contacts, key=lambda each: place_of(each.node_id) ^ place_of(key))
    held.update({each.node_id: record().data for each in near[1:]})
    _, effects = made.find_record(key, NOW)
    done, asked = run(made, effects, reply)
    assert done[0].record == record().data
    assert sum(isinstance(ask.message, FindRecord) for ask in asked) <= 6
    assert [ask.contact for ask in asked if isinstance(ask.message, StoreRecord)] == [near[0]]


@pytest.mark.parametrize("forgery", ["garbage", "other key", "bad signature"])
def test_a_node_that_sends_a_wrong_record_leaves_result_and_table(forgery):
    good = record()
    bad = {
        "garbage": b"no envelope",
        "other key": record(1, Identity(b"b" * 32)).data,
        "bad signature": good.data[:-1] + bytes([good.data[-1] ^ 1]),
    }[forgery]
    made = server()
    contacts, reply = holders(made, held := {})
    held.update({contacts[0].node_id: bad, contacts[1].node_id: good.data})
    _, effects = made.find_record(good.key, NOW)
    done, _ = run(made, effects, reply)
    assert done[0].record == good.data
    assert contacts[0] not in done[0].contacts
    assert made.why(contacts[0].node_id) == routing_table.WRONG_RECORD


def test_an_expired_record_is_as_good_as_none():
    made = server()
    contacts, reply = holders(made, held := {})
    held[contacts[0].node_id] = record().data
    _, effects = made.find_record(record().key, NOW + 7200)
    done, _ = run(made, effects, reply, NOW + 7200)
    assert done[0].record == b""
    assert contacts[0] in done[0].contacts


def test_what_this_node_holds_itself_is_found():
    made = server()
    made.answer(contact(1), contact(1).addresses[0], StoreRecord(record().data, True), NOW)
    _, effects = made.find_record(record().key, NOW)
    assert ended(effects)[0].record == record().data


def test_rule_6_a_publication_stores_near_the_key_and_counts_the_acknowledgements():
    made = server()
    contacts, _ = holders(made, {})
    deaf = contacts[0].node_id

    def reply(ask):
        return None if ask.contact.node_id == deaf and isinstance(ask.message, StoreRecord) else nobody(ask)

    operation, effects = made.publish(record().data, NOW)
    done, asked = run(made, effects, reply)
    assert done[0].is_stored
    assert (done[0].acks, done[0].asked) == (9, 10)
    assert {ask.contact for ask in asked if isinstance(ask.message, StoreRecord)} == set(contacts)
    assert operation > 0
    found = made.answer(contact(1), contact(1).addresses[0], FindRecord(record().key, True), NOW)
    assert found.record == record().data, "a server near the key holds it too"


def test_rule_6_too_few_acknowledgements_are_tried_again_and_then_reported():
    made = server()
    holders(made, {})

    def refuse(ask):
        return None if isinstance(ask.message, StoreRecord) else nobody(ask)

    _, effects = made.publish(record().data, NOW)
    done, _asked = run(made, effects, refuse)
    rounds, now = 1, NOW + 10
    while not done and rounds < 10:
        now = max(now, made.deadline)
        more, again = run(made, made.tick(now), refuse, now)
        rounds += any(isinstance(ask.message, StoreRecord) for ask in again)
        done += [outcome for outcome in more if hasattr(outcome, "acks")]
    assert not done[0].is_stored
    assert (done[0].acks, done[0].attempts, rounds) == (0, 3, 3)


def test_a_record_nobody_would_take_is_refused_before_it_is_sent():
    made = server()
    holders(made, {})
    with pytest.raises(ProtocolViolation):
        made.publish(b"no envelope", NOW)
    with pytest.raises(Refused):
        made.publish(record().data, NOW + 7200)


def test_rule_7_providing_and_finding_providers():
    made = server()
    contacts, _ = holders(made, {})
    key = b"k" * 32
    _, effects = made.provide(key, NOW)
    done, asked = run(made, effects, nobody)
    notices = [ask.message for ask in asked if isinstance(ask.message, StoreProvider)]
    assert notices == [StoreProvider(key, ("8.8.8.8:1",), True)] * 10
    assert done[0].is_stored
    named = Contact(b"p" * 32, ("9.9.9.9:1",))
    _, effects = made.find_providers(key, NOW)
    done, _ = run(
        made,
        effects,
        lambda ask: FoundProviders((named, Contact(b"q" * 32, ())), (), True) if ask.contact == contacts[3] else nobody(ask),
    )
    assert {each.node_id for each in done[0].providers} == {named.node_id, OWN}


def test_rule_7_a_provider_is_who_asks_whatever_it_says():
    made = server()
    bob = contact(1)
    assert made.answer(bob, bob.addresses[0], StoreProvider(b"k" * 32, ("9.9.9.9:7",), True), NOW) == Done()
    answer = made.answer(contact(2), contact(2).addresses[0], FindProviders(b"k" * 32, True), NOW)
    assert answer.providers == (Contact(bob.node_id, ("9.9.9.9:7",)),)


def test_a_message_that_is_no_request_of_the_table_is_a_violation():
    with pytest.raises(ProtocolViolation):
        server().answer(contact(1), contact(1).addresses[0], WhoAreYou(), NOW)


# --- rule 8: refresh and entering ------------------------------------------------------------------------------------------


def drive(made, now, end, reply):
    """Let time pass with every ask answered; gives (when, ask) of all of them."""
    seen = []
    while made.deadline <= end:
        now = max(now, made.deadline)
        waiting = asks(made.tick(now))
        while waiting:
            ask = waiting.pop(0)
            seen.append((now, ask))
            message = reply(ask)
            waiting += asks(made.handle(Failed(ask.ask_id) if message is None else Answered(ask.ask_id, message), now))
    return seen


def test_rule_8_entering_begins_with_a_lookup_of_our_own_id_and_repeats_it_every_ten_minutes():
    made = server()
    effects = made.bootstrap([contact(1)], NOW)
    assert [(ask.contact, ask.message.target) for ask in asks(effects)] == [(contact(1), OWN)]
    assert contact(1).node_id not in made.table, "entry points are asked, never believed"
    others = tuple(contact(number, 256 - number % 20) for number in range(2, 60))
    run(made, effects, lambda ask: Closest(others[:16], True))
    seen = drive(made, NOW + 10, NOW + 2000, lambda ask: Closest((), True))
    own = [when for when, ask in seen if ask.message.target == OWN]
    # A lookup asks the k nearest in one go, a check of a sibling asks one.
    bursts = [when for when in dict.fromkeys(own) if own.count(when) >= 10]
    gaps = [later - earlier for earlier, later in zip([NOW, *bursts], bursts, strict=False)]
    assert len(bursts) == 3
    assert all(500 < gap < 680 for gap in gaps)


def test_rule_8_joining_fills_only_the_buckets_that_need_it():
    siblings = tuple(contact(number, 200) for number in range(16))
    far = {bucket: tuple(contact(number, bucket) for number in range(40)) for bucket in range(201, 257)}
    made = server()

    def reply(ask):
        place = place_of(ask.message.target)
        known = far.get(place.bit_length(), siblings)
        return Closest(tuple(sorted(known, key=lambda each: place_of(each.node_id) ^ place)[:16]), True)

    _, asked = run(made, made.bootstrap(siblings[:3], NOW), reply)
    sizes = {index: len(bucket.entries) for index, bucket in made.table.buckets()}
    fill = KademliaSettings().fill
    assert sizes[200] == 16
    assert all(fill <= sizes[bucket] <= fill + 1 for bucket in range(201, 257))
    assert len(asked) <= 16 + 56 * (fill + 1), "every ask but the first in each bucket is the check of an entry"


def test_rule_8_an_idle_bucket_is_refreshed_within_an_hour_or_so():
    contacts = [contact(number, 250) for number in range(4)] + [contact(number, 100) for number in range(16)]
    made = knowing(contacts, self_lookup_seconds=1e9)
    seen = drive(made, NOW, NOW + 3600 + 600, lambda ask: Closest((), True))
    into = [when for when, ask in seen if place_of(ask.message.target).bit_length() == 250]
    bursts = [when for when in dict.fromkeys(into) if into.count(when) >= 4]
    assert len(bursts) == 1
    assert bursts[0] >= NOW + 3600


def test_rule_8_with_fewer_than_a_quarter_of_k_it_asks_for_ways_in_ever_less_often():
    made = knowing([contact(number) for number in range(3)])
    assert made.needs_bootstrap
    times, now = [], NOW
    while now < NOW + 300:
        now = max(now, made.deadline)
        effects = made.tick(now)
        times += [now for effect in effects if isinstance(effect, NeedContacts)]
        for ask in asks(effects):
            made.handle(Answered(ask.ask_id, Closest((), True)), now)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == NOW
    assert gaps[:4] == pytest.approx([NEED_SECONDS, 2 * NEED_SECONDS, 4 * NEED_SECONDS, 8 * NEED_SECONDS], abs=0.01)
    assert max(gaps) == pytest.approx(60, abs=0.01)
    made.table.answered(contact(50), now)
    assert not made.needs_bootstrap
    assert not [effect for effect in made.tick(now + 100) if isinstance(effect, NeedContacts)]


def test_rule_8_more_entry_points_join_the_lookup_under_way():
    made = server()
    made.bootstrap([contact(1)], NOW)
    assert [ask.contact for ask in asks(made.bootstrap([contact(1), contact(2)], NOW))] == [contact(2)]


def test_becoming_a_server_tells_the_neighbourhood():
    made = knowing([contact(1)])
    made.is_server = False
    made.is_server = True
    assert made.deadline <= NOW
    assert next((ask.contact, ask.message.is_server) for ask in asks(made.tick(NOW))) == (contact(1), True)


def test_unknown_neighbours_that_checks_name_are_checked_but_hearsay_of_far_nodes_does_not_set_the_pace():
    siblings = [contact(number, 100) for number in range(16)]
    made = knowing(siblings)
    made.handle(Met(contact(1), True), NOW)
    ((when, ask), *_) = tick_until(made, NOW, NOW + 1.5)
    near, far = contact(1, 90), [contact(100 + number) for number in range(10)]
    made.handle(Answered(ask.ask_id, Closest((near, *far), True)), when)
    assert near in [ask.contact for _, ask in tick_until(made, when, when + 1.2)]
    assert not [ask for _, ask in tick_until(made, when, when + 1.2) if ask.contact in far]


def test_what_checks_name_before_the_first_lookup_of_our_own_id_is_left_to_that_lookup():
    made, others = server(), [contact(100 + number) for number in range(10)]
    made.handle(Met(contact(1), True), NOW)
    ((when, ask),) = tick_until(made, NOW, NOW + 1.5)
    made.handle(Answered(ask.ask_id, Closest(tuple(others), True)), when)
    assert not tick_until(made, when, when + 1.2)
    run(made, made.bootstrap([contact(1)], when), lambda ask: Closest(tuple(others), True), when)
    assert all(each.node_id in made.table for each in others)


# --- rule 10 ----------------------------------------------------------------------------------------------------------------


def test_rule_10_the_size_comes_from_lookups_that_nobody_else_aimed():
    made = server()
    step = (1 << 256) // 500
    ring = [Contact((step * number).to_bytes(32, "big"), (f"40.{number >> 8}.{number & 255}.1:1",)) for number in range(1, 500)]

    def reply(ask):
        place = place_of(ask.message.target)
        return Closest(tuple(sorted(ring, key=lambda each: place_of(each.node_id) ^ place)[:16]), True)

    run(made, made.bootstrap(ring[:1], NOW), reply)
    before = made.network_size()
    assert 250 < before < 1000
    _, effects = made.find_node(ring[250].node_id, NOW)
    run(made, effects, reply)
    assert made.network_size() == before, "a target that somebody chose says nothing"


def test_silence_alone_moves_a_lookup_on():
    made = knowing([contact(number) for number in range(12)])
    for _ in range(5):
        made._asks.round_trips.answered(0.3)
    _, effects = made.find_node(OWN, NOW)
    assert len(asks(effects)) == KademliaSettings().alpha
    assert NOW < made.deadline < NOW + 1, "long before the asks are given up"
    later = asks(made.tick(made.deadline))
    assert len(later) == KademliaSettings().alpha
    assert not {ask.contact.node_id for ask in later} & {ask.contact.node_id for ask in asks(effects)}


def test_what_is_left_of_a_lookup_among_the_dead_is_not_the_size_of_the_network():
    contacts = [contact(number) for number in range(40)]
    made = knowing(contacts)
    before = made.network_size()
    alive = {each.node_id for each in contacts[:5]}
    made._upkeep._next_random = NOW
    run(made, made.tick(NOW), lambda ask: Closest((), True) if ask.contact.node_id in alive else None)
    assert made._size._samples == []
    assert made.network_size() >= before / 4


def test_when_many_are_dead_the_whole_table_is_checked_in_half_a_minute():
    made = knowing([contact(number, bucket) for bucket in (254, 255, 256) for number in range(14)])
    made._upkeep.answered(contact(1), True, NOW + STALE_SECONDS)
    asked, now = {}, NOW + STALE_SECONDS
    end = now + 45
    flying = []
    while now < end:
        for ask in asks(made.tick(now)):
            asked.setdefault(ask.contact.node_id, now)
            flying.append((now + (0.1 if ask.contact.node_id[-1] % 3 else ask.timeout_seconds), ask))
        flying.sort(key=lambda each: each[0])
        now = min(max(now, made.deadline), flying[0][0] if flying else end)
        while flying and flying[0][0] <= now:
            ask = flying.pop(0)[1]
            is_alive = ask.contact.node_id[-1] % 3
            made.handle(Answered(ask.ask_id, Closest((), True)) if is_alive else Failed(ask.ask_id), now)
    assert len(asked) > 38, "a calm table of 42 takes seven minutes"
