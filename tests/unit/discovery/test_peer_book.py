"""The peer book decides whom to dial, when, and remembers how it went."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.discovery.peers.book import (
    Dial,
    DialFailed,
    Disconnect,
    Entry,
    Forget,
    FoundAgain,
    Heard,
    LinkDown,
    LinkUp,
    Misbehaved,
    PeerBook,
    Save,
)  # fmt: skip
from p2pnode.discovery.peers.links import LinkPlan, Why
from p2pnode.discovery.settings import DiscoverySettings
from p2pnode.ids import NodeId
from p2pnode.reasons import Reason

ME, ALICE, BOB = (NodeId(bytes([number]) * 32) for number in (5, 6, 7))
LOW = NodeId(bytes([1]) * 32)
NOW = 1_000_000.0


def book(entries=(), **settings) -> PeerBook:
    return PeerBook(ME, DiscoverySettings(**settings), lambda: 0.5, entries)


def dials(effects):
    return [effect for effect in effects if isinstance(effect, Dial)]


def test_a_peer_heard_of_is_saved_and_dialled_once():
    machine = book()
    effects = machine.handle(Heard(ALICE, ("10.0.0.1:1",), "mdns"), NOW)
    assert [type(effect) for effect in effects] == [Save]
    assert dials(machine.tick(NOW)) == [Dial(ALICE, ("10.0.0.1:1",))]
    assert dials(machine.tick(NOW + 1)) == [], "a dial under way is not repeated"


def test_of_two_nodes_that_hear_each_other_the_smaller_id_dials_first():
    machine = book()
    machine.handle(Heard(LOW, ("10.0.0.1:1",), "mdns"), NOW)
    assert dials(machine.tick(NOW)) != [] or machine.deadline == NOW + 0.5
    fresh = book(probe_seconds=1e9)
    fresh.tick(NOW)
    fresh.handle(Heard(LOW, ("10.0.0.1:1",), "mdns"), NOW)
    assert dials(fresh.tick(NOW)) == []
    assert dials(fresh.tick(NOW + 0.5)) == [Dial(LOW, ("10.0.0.1:1",))]


def test_it_never_knows_itself():
    machine = book()
    assert machine.handle(Heard(ME, ("10.0.0.1:1",), "mdns"), NOW) == []
    assert machine.tick(NOW) == []
    assert machine.entries() == []


def test_failures_back_off_twice_as_long_each_time_up_to_a_bound():
    machine = book(backoff_seconds=2.0, backoff_seconds_max=10.0, probe_seconds=1e9)
    machine.tick(NOW)
    machine.handle(Heard(ALICE, ("10.0.0.1:1",), "static"), NOW)
    waits, now = [], NOW
    for _ in range(5):
        assert dials(machine.tick(now)) == [Dial(ALICE, ("10.0.0.1:1",))]
        machine.handle(DialFailed(ALICE, "10.0.0.1:1"), now)
        waits.append(machine.deadline - now)
        now = machine.deadline
    assert waits == pytest.approx([1.5, 3.0, 6.0, 7.5, 7.5])


def test_a_new_address_is_a_new_chance():
    machine = book(backoff_seconds=2.0, probe_seconds=1e9)
    machine.tick(NOW)
    machine.handle(Heard(ALICE, ("10.0.0.1:1",), "mdns"), NOW)
    for _ in range(6):
        machine.tick(machine.deadline)
        machine.handle(DialFailed(ALICE, "10.0.0.1:1"), NOW)
    machine.handle(Heard(ALICE, ("10.0.0.2:1",), "mdns"), NOW + 1)
    assert machine.deadline == NOW + 2
    assert dials(machine.tick(NOW + 2))[0].addresses[0] == "10.0.0.2:1"


def test_one_lost_peer_is_probed_whatever_its_backoff_says():
    machine = book(backoff_seconds=600.0, backoff_seconds_max=3600.0, probe_seconds=30.0)
    machine.handle(Heard(ALICE, ("10.0.0.1:1",), "mdns"), NOW)
    machine.tick(NOW)
    machine.handle(DialFailed(ALICE, "10.0.0.1:1"), NOW)
    assert dials(machine.tick(NOW + 1)) == []
    assert machine.deadline == NOW + 30
    assert dials(machine.tick(NOW + 30)) == [Dial(ALICE, ("10.0.0.1:1",))]


def test_linked_peers_are_not_dialled_and_come_back_after_the_link_ends():
    machine = book()
    effects = machine.handle(LinkUp(ALICE, "10.0.0.1:1", ("192.168.0.2:1",)), NOW)
    saved = next(effect.entry for effect in effects if isinstance(effect, Save))
    assert saved.addresses == ("10.0.0.1:1", "192.168.0.2:1"), "the address that worked comes first"
    assert saved.score == 5.0
    assert dials(machine.tick(NOW)) == []
    machine.handle(LinkDown(ALICE, Reason.IDLE), NOW)
    assert dials(machine.tick(NOW + 500)) == [], "nothing asks for a link with her"
    machine.handle(Heard(ALICE, ("10.0.0.1:1",), "static"), NOW + 500)
    assert dials(machine.tick(NOW + 500))[0].node_id == ALICE


def test_dials_at_once_and_links_are_bounded():
    machine = book(dials_max=2, links_max=3)
    for number in range(10, 20):
        machine.handle(Heard(NodeId(bytes([number]) * 32), (f"10.0.0.{number}:1",), "static"), NOW)
    first = dials(machine.tick(NOW))
    assert len(first) == 2
    assert dials(machine.tick(NOW)) == []
    for dial in first:
        machine.handle(LinkUp(dial.node_id, dial.addresses[0], ()), NOW)
    assert len(dials(machine.tick(NOW))) == 1
    assert machine.deadline >= NOW


def test_a_static_address_finds_its_owner_and_retries():
    machine = book(backoff_seconds=2.0)
    machine.add_static("host:1", None, NOW)
    assert dials(machine.tick(NOW)) == [Dial(None, ("host:1",))]
    machine.handle(DialFailed(None, "host:1"), NOW)
    assert dials(machine.tick(NOW)) == []
    assert dials(machine.tick(NOW + 2)) == [Dial(None, ("host:1",))]
    machine.handle(LinkUp(ALICE, "host:1", ()), NOW + 2)
    assert machine.entry(ALICE).sources == ("static",)
    assert dials(machine.tick(NOW + 3)) == []
    machine.handle(LinkDown(ALICE, Reason.IDLE), NOW + 4)
    assert dials(machine.tick(NOW + 60))[0].node_id == ALICE


@pytest.mark.parametrize(("reason", "banned"), [(Reason.BAD_SIGNATURE, True), (Reason.BUSY, False), (Reason.BAD_FRAME, True)])
def test_violations_cost_score_and_some_ban(reason, banned):
    machine = book(ban_seconds=100.0)
    machine.handle(LinkUp(ALICE, "10.0.0.1:1", ()), NOW)
    effects = machine.handle(Misbehaved(ALICE, reason), NOW)
    assert (Disconnect(ALICE, Reason.BANNED) in effects) is banned
    assert machine.is_banned(ALICE, NOW + 99) is banned
    assert machine.score(ALICE, NOW) == -20.0
    machine.handle(LinkDown(ALICE, Reason.BANNED), NOW)
    if banned:
        assert dials(machine.tick(NOW + 90)) == []
        assert machine.entry(ALICE).banned_for == reason.value
    assert not machine.is_banned(ALICE, NOW + 101)


def test_a_second_ban_is_twice_as_long_and_can_be_lifted():
    machine = book(ban_seconds=100.0, ban_seconds_max=150.0)
    machine.handle(LinkUp(ALICE, "10.0.0.1:1", ()), NOW)
    machine.handle(Misbehaved(ALICE, Reason.BAD_FRAME), NOW)
    machine.handle(Misbehaved(ALICE, Reason.BAD_FRAME), NOW + 200)
    assert machine.is_banned(ALICE, NOW + 200 + 149)
    assert not machine.is_banned(ALICE, NOW + 200 + 151)
    machine.unban(ALICE)
    assert not machine.is_banned(ALICE, NOW + 201)


def test_scores_go_half_way_back_in_an_hour():
    machine = book()
    machine.handle(LinkUp(ALICE, "10.0.0.1:1", ()), NOW)
    assert machine.score(ALICE, NOW + 3600) == pytest.approx(2.5)


def test_a_full_book_forgets_the_worst_and_never_a_static_or_linked_peer():
    machine = book(peers_max=3)
    machine.handle(Heard(ALICE, ("10.0.0.1:1",), "static"), NOW)
    machine.handle(LinkUp(BOB, "10.0.0.2:1", ()), NOW)
    third, fourth = (NodeId(bytes([number]) * 32) for number in (30, 31))
    machine.handle(Heard(third, ("10.0.0.3:1",), "mdns"), NOW)
    effects = machine.handle(Heard(fourth, ("10.0.0.4:1",), "mdns"), NOW + 1)
    assert effects[0] == Forget(third)
    assert {entry.node_id for entry in machine.entries()} == {ALICE, BOB, fourth}


def test_peers_not_seen_for_long_are_forgotten():
    old = Entry(ALICE, ("10.0.0.1:1",), ("mdns",), NOW - 100, NOW - 100)
    machine = book([old], forget_seconds=50.0)
    assert machine.tick(NOW) == [Forget(ALICE)]


def test_an_address_where_somebody_else_answers_is_dropped():
    machine = book()
    machine.handle(Heard(ALICE, ("10.0.0.1:1", "10.0.0.2:1"), "mdns"), NOW)
    machine.tick(NOW)
    machine.handle(DialFailed(ALICE, "10.0.0.1:1", Reason.WRONG_PEER), NOW)
    assert machine.entry(ALICE).addresses == ("10.0.0.2:1",)


EVENTS = st.one_of(
    st.builds(Heard, st.sampled_from([ME, ALICE, BOB, LOW]), st.tuples(st.sampled_from(["a:1", "b:2", "c:3"])), st.just("mdns")),
    st.builds(LinkUp, st.sampled_from([ALICE, BOB, LOW]), st.sampled_from(["", "a:1", "s:1"]), st.just(("d:4",))),
    st.builds(LinkDown, st.sampled_from([ALICE, BOB, LOW]), st.sampled_from(list(Reason))),
    st.builds(DialFailed, st.sampled_from([None, ALICE, BOB]), st.sampled_from(["a:1", "s:1"])),
    st.builds(Misbehaved, st.sampled_from([ALICE, BOB, LOW]), st.sampled_from(list(Reason))),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0, 100)), max_size=40))
def test_in_any_order_the_bounds_hold(steps):
    machine, now = book(peers_max=2, dials_max=1, addresses_max=2), NOW
    machine.add_static("s:1", None, now)
    under_way = 0
    for event, pause in steps:
        now += pause
        machine.handle(event, now)
        under_way += len(dials(machine.tick(now)))
        assert len(machine.entries()) <= 2 + 3  # linked peers are kept beyond the bound
        assert all(len(entry.addresses) <= 2 for entry in machine.entries())
        assert all(-100 <= machine.score(entry.node_id, now) <= 100 for entry in machine.entries())
        assert machine.entry(ME) is None
        assert machine.deadline >= 0


def test_only_peers_worth_a_link_are_dialled():
    machine = book(local_links_max=2)
    for number in range(10, 16):
        machine.handle(LinkUp(NodeId(bytes([number]) * 32), f"10.0.0.{number}:1", ()), NOW)
        machine.handle(LinkDown(NodeId(bytes([number]) * 32), Reason.IDLE), NOW)
    assert dials(machine.tick(NOW + 1000)) == [], "known is no reason"
    for number in range(10, 14):
        machine.handle(Heard(NodeId(bytes([number]) * 32), (f"10.0.0.{number}:1",), "mdns"), NOW + 1000)
        machine.handle(LinkUp(NodeId(bytes([number]) * 32), f"10.0.0.{number}:1", ()), NOW + 1000)
    machine.handle(LinkDown(NodeId(bytes([13]) * 32), Reason.CONNECTION_LOST), NOW + 1001)
    machine.handle(LinkDown(NodeId(bytes([14]) * 32), Reason.CONNECTION_LOST), NOW + 1001)
    assert machine.deadline > NOW + 1002, "two local links are kept, the others are not dialled for their own sake"


def test_lost_peers_are_probed_in_turn_and_told_of_when_they_are_back():
    machine = book(probe_seconds=30.0)
    for number in (10, 11):
        machine.handle(LinkUp(NodeId(bytes([number]) * 32), f"10.0.0.{number}:1", ()), NOW)
        machine.handle(LinkDown(NodeId(bytes([number]) * 32), Reason.CONNECTION_LOST), NOW + number)
    probed, now = [], NOW + 11
    for _ in range(4):
        now = machine.deadline
        (dial,) = dials(machine.tick(now))
        probed.append(dial.node_id[0])
        machine.handle(DialFailed(dial.node_id, dial.addresses[0]), now)
    assert sorted(probed[:2]) == [10, 11]
    assert sorted(probed[2:]) == [10, 11], "no dead peer takes the others' turns"
    assert now - NOW >= 90
    back = NodeId(bytes([10]) * 32)
    assert FoundAgain(back) in machine.handle(LinkUp(back, "10.0.0.10:1", ()), now)
    assert FoundAgain(back) not in machine.handle(LinkUp(back, "10.0.0.10:1", ()), now)


def test_bootstrap_nodes_are_dialled_only_while_they_are_needed():
    plan = LinkPlan(16, 4)
    machine = PeerBook(ME, DiscoverySettings(), lambda: 0.5, (), plan)
    machine.add_static("10.0.0.1:1", None, NOW, "bootstrap")
    machine.add_static("10.0.0.2:1", ALICE, NOW, "bootstrap")
    assert dials(machine.tick(NOW)) == []
    plan.needs_entry = True
    assert {dial.addresses[0] for dial in dials(machine.tick(NOW))} == {"10.0.0.1:1", "10.0.0.2:1"}
    machine.handle(LinkUp(ALICE, "10.0.0.2:1", ()), NOW)
    assert plan.reasons(ALICE) == (Why.ENTRY,)


def test_seeds_for_the_next_start_lived_for_five_minutes_and_were_seen_within_five_days():
    def met(number, alive, ago):
        return Entry(NodeId(bytes([number]) * 32), (f"10.0.0.{number}:1",), ("book",), NOW - ago - alive, NOW - ago, NOW - ago)

    entries = [met(10, 60.0, 10.0), met(11, 301.0, 3600.0), met(12, 9999.0, 5 * 86400.0 + 1), met(13, 400.0, 20.0)]
    never = Entry(NodeId(bytes([14]) * 32), ("10.0.0.14:1",), ("mdns",), NOW, NOW)
    machine = book([*entries, never])
    assert [entry.node_id[0] for entry in machine.good_entries(NOW)] == [13, 11, 10]
