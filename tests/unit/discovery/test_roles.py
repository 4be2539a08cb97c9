"""Server or client: what answers to dial-back requests make of a node."""

import pytest

from p2pnode.discovery.peers.roles import (
    AGAIN_SECONDS,
    REACHED,
    REFUSED,
    UNREACHABLE,
    AskDialBack,
    Candidate,
    Roles,
    RoleSettings,
    Verdict,
)
from p2pnode.ids import NodeId

NOW = 1_000_000.0
OWN = "10.0.0.5:7000"


def peer(number: int, *, is_server: bool = True, is_linked: bool = True) -> Candidate:
    """Peers of different numbers are in different /16 networks."""
    return Candidate(NodeId(bytes([number]) * 32), f"80.{number}.0.1:7000", is_server, is_linked)


def machine(**settings: float) -> Roles:
    roles = Roles(RoleSettings(**settings), lambda: 0.5)
    roles.set_addresses([OWN], NOW)
    return roles


def verdict(number: int, outcome: str, address: str = OWN) -> Verdict:
    return Verdict(NodeId(bytes([number]) * 32), f"80.{number}.0.1:7000", outcome, address)


def ask_all(roles: Roles, peers: list[Candidate], outcomes: dict[int, str], seconds: float = 120.0) -> list[int]:
    """Let time pass and answer every request; gives who was asked, in order."""
    asked, now = [], NOW
    while now < NOW + seconds:
        for effect in roles.tick(peers, now):
            number = effect.node_id[0]
            asked.append(number)
            roles.verdict(verdict(number, outcomes.get(number, "")), now)
        now += 0.5
    return asked


@pytest.mark.parametrize(
    ("outcomes", "is_server"),
    [
        ({1: REACHED, 2: REACHED, 3: REACHED}, True),
        ({1: REACHED, 2: REACHED, 3: UNREACHABLE}, False),
        ({1: UNREACHABLE, 2: UNREACHABLE, 3: UNREACHABLE}, False),
        ({1: REFUSED, 2: REFUSED, 3: REFUSED}, False),
        ({}, False),
        ({1: REACHED, 2: REFUSED, 3: ""}, False),
    ],
)
def test_three_groups_decide(outcomes, is_server):
    roles = machine()
    ask_all(roles, [peer(1), peer(2), peer(3)], outcomes)
    assert roles.is_server is is_server


def test_it_asks_one_peer_per_group_and_never_the_same_group_at_once():
    roles = machine()
    crowd = [Candidate(NodeId(bytes([n]) * 32), f"80.1.{n}.1:7000", True, True) for n in range(1, 20)]
    assert len(roles.tick(crowd, NOW)) == 1, "nineteen peers of one /16 are one voice"
    assert roles.tick(crowd, NOW + AGAIN_SECONDS) == [], "and that voice is still thinking"


def test_many_voices_of_one_group_are_one_where_others_could_be_asked():
    roles = machine()
    peers = [peer(1), peer(2), peer(3)]
    roles.tick(peers, NOW)
    for n in range(5):
        roles.verdict(Verdict(NodeId(bytes([n]) * 32), f"80.1.{n}.1:7000", REACHED, OWN), NOW)
    assert not roles.is_server
    roles.verdict(verdict(2, REACHED), NOW)
    assert not roles.is_server
    assert roles.verdict(verdict(3, REACHED), NOW)
    assert roles.is_server


def test_servers_and_open_links_are_asked_before_others():
    roles = machine()
    peers = [peer(1, is_server=False), peer(2, is_linked=False), peer(3)]
    assert ask_all(roles, peers, {}, 3)[:2] == [3, 2]


def test_the_first_two_nodes_of_a_network_make_servers_of_each_other():
    roles = machine()
    effects = roles.tick([peer(1, is_server=False)], NOW)
    assert effects == [AskDialBack(NodeId(b"\1" * 32), (OWN,))]
    assert roles.verdict(verdict(1, REACHED), NOW)
    assert roles.is_server, "one group is all there is to ask"


def test_with_nobody_to_ask_it_stays_a_client_and_asks_the_first_it_meets():
    roles = machine()
    assert roles.tick([], NOW) == []
    assert not roles.is_server
    roles.peer_met(NOW + 5)
    assert roles.deadline == NOW + 5
    assert len(roles.tick([peer(1)], NOW + 5)) == 1


def test_a_local_network_believes_one_peer():
    roles = machine(confirmations=1)
    roles.tick([peer(1), peer(2), peer(3)], NOW)
    assert roles.verdict(verdict(2, REACHED), NOW)
    assert roles.confirmed == (OWN,)


def test_a_server_is_tried_again_and_loses_the_role_after_failures_in_a_row():
    roles = machine(confirmations=1, recheck_seconds=1800.0)
    peers = [peer(1), peer(2), peer(3)]
    roles.tick(peers, NOW)
    roles.verdict(verdict(1, REACHED), NOW)
    assert roles.deadline == pytest.approx(NOW + 1800)
    now, asked = roles.deadline, 0
    while roles.is_server and now < NOW + 4000:
        for effect in roles.tick(peers, now):
            asked += 1
            roles.verdict(verdict(effect.node_id[0], UNREACHABLE), now)
        now += 0.5
    assert asked == 3
    assert not roles.is_server
    assert now < NOW + 1830, "a failure is followed up at once, not at the next round"


def test_one_failure_between_successes_costs_nothing():
    roles = machine(confirmations=1)
    roles.tick([peer(1), peer(2), peer(3)], NOW)
    for number, outcome in ((1, REACHED), (2, REACHED), (3, UNREACHABLE), (1, REACHED), (3, UNREACHABLE), (2, REACHED)):
        roles.verdict(verdict(number, outcome), NOW)
    assert roles.is_server


def test_a_client_asks_again_ever_more_seldom():
    roles = machine(retry_seconds=60.0, recheck_seconds=600.0)
    asked = ask_all(roles, [peer(1), peer(2), peer(3)], dict.fromkeys((1, 2, 3), UNREACHABLE), 3600)
    assert 12 <= len(asked) <= 60
    assert not roles.is_server


def test_a_new_address_is_tried_anew_and_an_old_verdict_does_not_count_for_it():
    roles = machine(confirmations=1)
    roles.tick([peer(1)], NOW)
    roles.verdict(verdict(1, REACHED), NOW)
    roles.set_addresses(["10.0.0.9:7000"], NOW + 100)
    assert not roles.is_server
    assert roles.deadline == NOW + 100
    assert roles.tick([peer(1)], NOW + 100) == [AskDialBack(NodeId(b"\1" * 32), ("10.0.0.9:7000",))]


def test_old_verdicts_fade():
    roles = machine(confirmations=1, verdict_seconds=7200.0, recheck_seconds=1e6)
    roles.tick([peer(1)], NOW)
    roles.verdict(verdict(1, REACHED), NOW)
    roles.tick([peer(1)], NOW + 2e6)
    assert not roles.is_server


def test_where_others_see_us_counts_from_three_groups_and_is_tried_first():
    roles = machine()
    roles.tick([peer(1), peer(2), peer(3), peer(4)], NOW)
    roles.observed("80.1.0.1:7000", "203.0.113.9:41000", NOW)
    roles.observed("80.1.7.7:7000", "203.0.113.9:41001", NOW)
    roles.observed("80.2.0.1:7000", "203.0.113.9:41002", NOW)
    assert roles.outer_host == "", "two groups, one of them twice"
    roles.observed("80.3.0.1:7000", "203.0.113.9:41003", NOW)
    assert roles.outer_host == "203.0.113.9"
    assert roles.addresses == ("203.0.113.9:7000", OWN), "the host that they see, with the port that we listen on"


def test_liars_about_our_address_are_outvoted():
    roles = machine()
    roles.tick([peer(n) for n in range(1, 8)], NOW)
    for n in (1, 2, 3, 4):
        roles.observed(f"80.{n}.0.1:7000", "203.0.113.9:7000", NOW)
    for n in (5, 6, 7):
        roles.observed(f"80.{n}.0.1:7000", "198.51.100.66:1", NOW)
    assert roles.outer_host == "203.0.113.9"
    roles.observed("80.8.0.1:7000", "no address", NOW)
    assert len(roles.seen_addresses) == 7


def test_what_peers_say_is_bounded():
    roles = machine()
    for n in range(250):
        for m in range(4):
            roles.observed(f"{40 + m}.{n}.0.1:7000", "203.0.113.9:7000", NOW)
            roles.verdict(Verdict(NodeId(bytes(32)), f"{40 + m}.{n}.0.1:7000", UNREACHABLE, ""), NOW)
    assert len(roles.seen_addresses) <= 64
    assert roles.counts[1] <= 32
