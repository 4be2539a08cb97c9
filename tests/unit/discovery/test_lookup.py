"""One lookup, step by step: rules 5, 9 and the region, with nodes that are only names and distances."""

from math import inf

from p2pnode.discovery.dht.lookup import (
    CANDIDATES_MAX,
    DEAD_REFERRALS_MAX,
    GROUP_CANDIDATES_MAX,
    NEAREST_ASKS_MAX,
    SHORE_ASKS,
    Lookup,
)
from p2pnode.discovery.dht.network_size import OWN_ID_WEIGHT, NetworkSize, radius_for, size_from
from p2pnode.discovery.records.record import CheckedRecord
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.wire.messages.discovery import Contact

TARGET = bytes(32)
OWN = b"\xff" * 32
SETTINGS = KademliaSettings()
FAR = 1 << 255


def node(distance, address=None):
    """A node at this distance from TARGET, in a /24 of its own unless told otherwise."""
    low = distance & 0xFFFF
    return Contact(distance.to_bytes(32, "big"), (address or f"{20 + distance % 97}.{low >> 8}.{low & 255}.1:1",))


def lookup(seeds, radius=0, quorum=0, **options):
    made = Lookup(TARGET, OWN, SETTINGS, radius, quorum, **options)
    made.add_seeds(seeds)
    return made


def drive(made, answers, failing=()):
    """Ask until it is over; answers: node id -> contacts. Gives whom it asked, in order."""
    order = []
    waiting = list(made.next())
    while waiting:
        candidate = waiting.pop(0)
        node_id = candidate.contact.node_id
        order.append(candidate.contact)
        if node_id in failing:
            made.failed(node_id)
        else:
            made.answered(node_id, answers.get(node_id, ()), made.wanted(candidate))
        waiting += made.next()
    assert made.is_over
    return order


def found(made):
    return [candidate.contact for candidate in made.found()]


def record(sequence, data=b"v", key=TARGET):
    return CheckedRecord(key, sequence, 1e12, b"", data, bytes(32), data + bytes([sequence]))


def test_rule_5_alpha_asks_are_kept_in_flight_without_rounds():
    made = lookup([node(number) for number in range(1, 20)])
    first = made.next()
    assert [candidate.contact for candidate in first] == [node(1), node(2), node(3)]
    assert made.next() == []
    made.answered(node(2).node_id, (), 16)
    assert [candidate.contact for candidate in made.next()] == [node(4)], "it does not wait for the others of the first three"


def test_slow_asks_free_their_place_but_not_without_end():
    made = lookup([node(number) for number in range(1, 20)])
    assert len(made.next(100.0, 0.3)) == 3
    assert made.next(100.2, 0.3) == []
    made.answered(node(1).node_id, (), 16)
    assert [candidate.contact for candidate in made.next(100.5, 0.3)] == [node(4), node(5), node(6)]
    assert [candidate.contact for candidate in made.next(101.0, 0.3)] == [node(7)], "six in all"
    assert made.next(109.0, 0.3) == []
    made.answered(node(2).node_id, (), 16)
    assert node(2) in found(made), "late answers count"


def test_it_says_when_asks_will_be_late_so_that_silence_does_not_hold_it_up():
    made = lookup([node(number) for number in range(1, 20)])
    assert made.impatient_at(100.0, 0.3) == inf, "nothing is under way"
    made.next(100.0, 0.3)
    assert made.impatient_at(100.0, 0.3) == 100.3
    assert made.next(100.3, 0.3), "then there is somebody to ask"
    assert made.impatient_at(100.3, 0.3) == inf, "six are under way, more are never"


def test_rule_5_it_is_over_when_the_k_nearest_have_answered_and_never_asks_farther():
    contacts = [node(number) for number in range(1, 40)]
    made = lookup(contacts)
    assert drive(made, {}) == contacts[:16]
    assert found(made) == contacts[:16]


def test_rule_5_failed_ones_leave_the_result_and_the_next_nearest_take_their_place():
    contacts = [node(number) for number in range(1, 40)]
    made = lookup(contacts)
    dead = [contacts[number].node_id for number in (0, 3, 7)]
    asked = drive(made, {}, failing=dead)
    assert found(made) == [contact for contact in contacts if contact.node_id not in dead][:16]
    assert len(asked) == 19
    assert made.failures == 3


def test_rule_5_an_ask_far_away_does_not_hold_up_the_end():
    made = lookup([node(FAR)])
    (slow,) = made.next()
    assert slow.contact == node(FAR)
    made.add_seeds([node(number) for number in range(1, 17)])
    drive(made, {})
    assert len(found(made)) == 16
    made.failed(node(FAR).node_id)
    assert made.failures == 1


def test_rule_5_it_never_asks_itself_nor_anybody_twice():
    own = Contact(OWN, ("8.8.8.8:1",))
    contacts = [node(number) for number in range(1, 20)]
    made = lookup([*contacts, own, *contacts])
    answers = {contact.node_id: (*contacts, own) for contact in contacts}
    asked = drive(made, answers)
    assert own not in asked
    assert len(asked) == len({contact.node_id for contact in asked}) == 16


def test_rule_5_more_contacts_than_asked_for_are_ignored():
    seed = node(FAR)
    made = lookup([seed])
    (first,) = made.next()
    made.answered(seed.node_id, [node(number) for number in range(100, 0, -1)], made.wanted(first))
    named = {candidate.contact for candidate in made.next()} | set(made.unasked())
    assert named == {node(number) for number in range(100, 84, -1)}


def test_answers_that_were_not_asked_for_change_nothing():
    made = lookup([node(1)])
    made.next()
    made.answered(node(1).node_id, [node(2)], 16)
    made.answered(node(1).node_id, [node(3)], 16)
    made.answered(node(99).node_id, [node(4)], 16)
    made.failed(node(99).node_id)
    assert made.unasked() == [node(2)]


def test_bad_contacts_are_not_taken():
    seed = node(FAR)
    made = lookup([seed], is_acceptable=lambda node_id: node_id != node(5).node_id)
    made.next()
    bad = [
        Contact(node(2).node_id, ()),
        node(3, "no port"),
        node(4, "300 spaces in a host:1"),
        node(5),
        node(6, "192.168.0.1:22"),
        node(7, "127.0.0.1:22"),
    ]
    made.answered(seed.node_id, [*bad, node(8)], 16)
    assert made.unasked() == [node(8)]


def test_private_addresses_are_taken_from_a_neighbour_on_the_lan():
    seed = node(FAR, "192.168.0.2:1")
    made = lookup([seed])
    made.next()
    made.answered(seed.node_id, [node(6, "192.168.0.3:1")], 16)
    assert len(made.unasked()) == 1


def test_hops_count_who_named_whom():
    made = lookup([node(FAR)])
    drive(made, {node(FAR).node_id: [node(1 << 200)], node(1 << 200).node_id: [node(7)]})
    assert [(candidate.contact, candidate.depth) for candidate in made.found()] == [
        (node(7), 3), (node(1 << 200), 2), (node(FAR), 1),
    ]  # fmt: skip


def test_a_client_leads_on_but_is_no_result():
    made = lookup([node(FAR)])
    made.next()
    made.answered(node(FAR).node_id, [node(7)], 16, is_server=False)
    drive(made, {})
    assert found(made) == [node(7)]


def test_rule_9_a_crowd_of_one_network_has_two_places_and_few_asks():
    crowd = [node(number, f"8.8.8.{number}:1") for number in range(1, 100)]
    honest = [node(1000 + number) for number in range(20)]
    made = lookup(honest)
    answers = {contact.node_id: crowd[:16] for contact in crowd}
    answers[honest[0].node_id] = crowd[:16]
    asked = drive(made, answers)
    assert found(made) == [*crowd[:2], *honest[:14]]
    assert sum(contact in crowd for contact in asked) == 2


def test_rule_9_a_silent_crowd_costs_a_bounded_number_of_asks():
    crowd = [node(number, f"8.8.8.{number}:1") for number in range(1, 100)]
    honest = [node(1000 + number) for number in range(20)]
    made = lookup([*honest, *crowd])
    asked = drive(made, {}, failing={contact.node_id for contact in crowd})
    assert found(made) == honest[:16]
    assert sum(contact in crowd for contact in asked) <= GROUP_CANDIDATES_MAX


def test_rule_9_a_node_counts_to_the_network_it_answered_from():
    crowd = [node(number) for number in range(1, 20)]
    honest = [node(1000 + number) for number in range(20)]
    made = lookup([*crowd, *honest])
    waiting = made.next()
    while waiting:
        for candidate in waiting:
            number = int.from_bytes(candidate.contact.node_id, "big")
            made.answered(candidate.contact.node_id, (), 16, f"8.8.8.{number}:1" if number < 1000 else "")
        waiting = made.next()
    near = [candidate.contact.node_id for candidate in made.found()]
    assert near == [contact.node_id for contact in (*crowd[:2], *honest[:14])]
    assert made.found()[0].contact.addresses[0] == "8.8.8.1:1"


def test_liars_whose_referrals_are_all_dead_are_asked_last():
    liar, honest = node(FAR), node(FAR + 1)
    ghosts = [node(number) for number in range(1, 17)]
    real = [node(100 + number) for number in range(16)]
    made = lookup([liar, honest])
    answers = {liar.node_id: ghosts, honest.node_id: real}
    asked = drive(made, answers, failing={contact.node_id for contact in ghosts})
    before_real = asked[: asked.index(real[-1])]
    assert sum(contact in ghosts for contact in before_real) <= DEAD_REFERRALS_MAX + SETTINGS.alpha
    assert found(made) == real


def test_what_an_honest_node_names_too_is_not_put_last():
    liar, honest = node(FAR), node(FAR + 1)
    ghosts, shared = [node(number) for number in range(1, 4)], node(4)
    made = lookup([liar])
    made.next()
    made.answered(liar.node_id, [*ghosts, shared], 16)
    for candidate in made.next():
        made.failed(candidate.contact.node_id)
    made.add_seeds([honest])
    (first,) = made.next()
    assert first.contact == honest, "what the liar named waits"
    made.answered(honest.node_id, [shared, node(900)], 16)
    assert [candidate.contact for candidate in made.next()] == [shared, node(900)]


def test_everything_is_bounded():
    made = lookup([node(FAR)])
    number = 1 << 20
    waiting = made.next()
    while waiting:
        candidate = waiting.pop()
        number -= 60
        made.answered(candidate.contact.node_id, [node(number - offset) for offset in range(48)], 48)
        assert len(made.unasked()) <= CANDIDATES_MAX
        waiting += made.next()
    assert made.asked == NEAREST_ASKS_MAX, "a chain of ever nearer nodes ends"


def test_rule_5_three_equal_records_end_a_search():
    made = lookup([node(number) for number in range(1, 40)], quorum=3)
    for position in range(3):
        candidate = made.next()[0]
        assert not made.is_over
        made.holds(candidate.contact.node_id, record(1))
        made.answered(candidate.contact.node_id, (), 16)
        assert made.is_over == (position == 2)
    assert made.next() == []


def test_rule_5_the_highest_sequence_wins_and_starts_the_count_again():
    made = lookup([node(number) for number in range(1, 40)], quorum=3)
    for number, sequence in enumerate((1, 1, 2, 1, 2), 1):
        made.holds(node(number).node_id, record(sequence))
        assert not made.is_over
    made.holds(node(6).node_id, record(2))
    assert made.is_over
    assert made.best == record(2)


def test_rule_5_those_near_that_lack_the_newest_are_named():
    made = lookup([node(number) for number in range(1, 5)])
    for candidate in made.next():
        if candidate.contact != node(2):
            made.holds(candidate.contact.node_id, record(2 if candidate.contact == node(1) else 1))
        made.answered(candidate.contact.node_id, (), 16)
    drive(made, {})
    assert made.outdated() == [node(2), node(3), node(4)]


def test_two_versions_of_one_sequence_are_settled_alike_in_any_order():
    one, other = record(3, b"a"), record(3, b"b")
    for order in ([one, other, one], [other, one, one]):
        made = lookup([node(1)])
        for held in order:
            made.holds(node(1).node_id, held)
        assert made.best == other


def test_the_region_is_asked_whole_though_it_holds_more_than_k():
    radius = 10_000
    inside = [node(100 * number) for number in range(1, 41)]
    outside = [node(20_001 + number) for number in range(40)]
    made = lookup([*inside, *outside], radius)
    asked = drive(made, {})
    assert found(made) == inside
    assert sum(contact in outside for contact in asked) <= 2 * SHORE_ASKS


def test_the_region_limits_networks_too():
    crowd = [node(number, f"8.8.8.{number}:1") for number in range(1, 60)]
    inside = [node(100 + number) for number in range(20)]
    made = lookup([*crowd[:8], *inside], 10_000)
    drive(made, {contact.node_id: crowd for contact in crowd})
    assert found(made) == [*crowd[:2], *inside]


def test_honest_nodes_behind_a_crowd_are_found_from_the_shore():
    """Everybody we know in the region is of the crowd, in as many networks, and they name each other only."""
    radius = 1 << 200
    crowd = [node(number) for number in range(1, 46)]
    inside = [node((1 << 199) + number) for number in range(16)]
    around = [node((1 << 200) + 1 + number) for number in range(8)]
    answers = {contact.node_id: crowd for contact in crowd}
    answers |= {contact.node_id: [*crowd[:20], *inside] for contact in around}
    made = lookup([*crowd[:3], *around], radius)
    drive(made, answers)
    assert set(inside) <= set(found(made))
    plain = lookup([*crowd[:3], *around])
    drive(plain, answers)
    assert not set(inside) & set(found(plain)), "without the region they are not"


def test_a_crowd_at_the_key_takes_half_of_the_asks_at_most():
    radius = 1 << 200
    crowd = [node(number) for number in range(1, 400)]
    inside = [node((1 << 199) + number) for number in range(20)]
    made = lookup([*crowd, *inside], radius)
    asked = drive(made, {})
    assert len(asked) == SETTINGS.region_asks_max
    assert set(inside) <= set(asked)


def test_the_dead_that_are_still_named_are_no_crowd():
    made = lookup([node(number) for number in range(1, 51)], 1 << 200, quorum=3)
    assert made.is_crowded()
    for number in range(16):
        candidate = made.next()[0]
        made.failed(candidate.contact.node_id) if number % 2 else made.answered(candidate.contact.node_id, (), 48)
    assert not made.is_crowded(), "8 of 16 asked were dead: of 34 others 17 may live"


def test_equal_records_prove_nothing_in_a_crowded_region():
    made = lookup([node(number) for number in range(1, 60)], 1 << 200, quorum=3)
    for _ in range(4):
        candidate = made.next()[0]
        made.holds(candidate.contact.node_id, record(1))
        made.answered(candidate.contact.node_id, (), 48)
    assert made.is_crowded()
    assert not made.is_over


def test_nodes_nearer_than_the_first_is_expected_do_not_agree_a_search_to_its_end():
    radius = 1 << 20
    expected = radius // SETTINGS.bucket_size
    ground = [node(number) for number in range(1, 6)]
    honest = [node(expected + number) for number in range(1, 6)]
    made = lookup([*ground, *honest], radius, quorum=3)
    for contact in ground:
        made.holds(contact.node_id, record(1))
        assert not made.is_over, "an old version, on which ids made for this key agree"
    made.holds(honest[0].node_id, record(2))
    made.holds(honest[1].node_id, record(2))
    assert not made.is_over
    made.holds(honest[2].node_id, record(2))
    assert made.is_over
    assert made.best == record(2)


def test_near_a_region_more_contacts_are_asked_for():
    made = lookup([node(1), node(FAR)], radius=1 << 100)
    near, far = made.next()
    assert (made.wanted(near), made.wanted(far)) == (48, 16)
    plain = lookup([node(1)])
    assert plain.wanted(plain.next()[0]) == 16


def test_rule_10_the_size_follows_from_the_distance_of_the_kth():
    step = (1 << 256) // 1000
    assert 950 < size_from([step * number for number in range(1, 17)], 16) < 1050
    assert size_from([step, 2 * step], 16) == 3, "fewer than k are all there are"
    assert size_from([], 16) == 1


def test_rule_10_the_median_of_lookups_withstands_a_crowd_around_our_own_id():
    step = (1 << 256) // 1000
    honest = [step * number for number in range(1, 17)]
    size = NetworkSize()
    for number in range(4):
        size.note(honest, 16, 600.0 * number)
    assert OWN_ID_WEIGHT < 1
    assert 900 < size.estimate(list(range(1, 17)), 16) < 1100


def test_rule_10_newer_lookups_weigh_more():
    size = NetworkSize()
    old, new = ([(1 << 256) // count * number for number in range(1, 17)] for count in (100, 1000))
    for _ in range(3):
        size.note(old, 16, 0.0)
    for number in range(2):
        size.note(new, 16, 7200.0 + number)
    assert size.estimate(new, 16) > 900


def test_a_region_holds_as_many_as_asked_for():
    assert abs(radius_for(16, 1600) / (1 << 256) - 0.01) < 1e-9
    assert radius_for(16, 3) == (1 << 256) - 1
