"""Which links are kept: every reason has its bound, and anchors are chosen so that an attacker cannot hand them out."""

from p2pnode.discovery.peers.links import ANCHOR_AGE_SECONDS, AnchorCandidate, LinkPlan, Why
from p2pnode.ids import NodeId


def node(number: int) -> NodeId:
    return NodeId(bytes([number]) * 32)


def candidate(number: int, *, known_since: float = 0.0, age: float = 1000.0, address: str = "") -> AnchorCandidate:
    return AnchorCandidate(node(number), address or f"80.{number}.0.1:7000", known_since, age)


def test_a_link_is_kept_while_any_reason_stands():
    plan = LinkPlan(local_max=2, anchors_max=4)
    plan.want(node(1), Why.STATIC)
    plan.want(node(1), Why.GOSSIP)
    plan.release(node(1), Why.STATIC)
    assert plan.reasons(node(1)) == (Why.GOSSIP,)
    plan.release(node(1), Why.GOSSIP)
    plan.release(node(1), Why.GOSSIP)
    assert not plan.is_kept(node(1))
    assert plan.kept() == ()


def test_each_reason_has_its_own_bound():
    plan = LinkPlan(local_max=2, anchors_max=1, entries_max=1)
    assert [plan.want(node(n), Why.LOCAL) for n in (1, 2, 3)] == [True, True, False]
    assert plan.want(node(1), Why.LOCAL), "what is kept already stays"
    assert [plan.want(node(n), Why.ENTRY) for n in (1, 2)] == [True, False]
    assert [plan.want(node(n), Why.GOSSIP) for n in range(20)] == [True] * 20, "gossip bounds its own neighbours"
    plan.release(node(1), Why.LOCAL)
    assert plan.want(node(3), Why.LOCAL)
    assert not plan.has_room(Why.LOCAL)
    plan.limit(Why.LOCAL, 3)
    assert plan.has_room(Why.LOCAL)


def test_anchors_are_long_known_and_from_different_networks():
    plan = LinkPlan(local_max=2, anchors_max=3)
    added = plan.add_anchors([
        candidate(1, known_since=30.0),
        candidate(2, known_since=10.0, address="80.9.0.1:7000"),
        candidate(3, known_since=20.0, address="80.9.7.7:7000"),
        candidate(4, known_since=40.0),
        candidate(5, known_since=50.0),
        candidate(6, known_since=1.0, age=ANCHOR_AGE_SECONDS - 1),
    ])  # fmt: skip
    assert added == [node(2), node(1), node(4)], "3 is in the /16 of 2, 6 is too young, 5 found no room"


def test_a_link_that_is_kept_anyway_costs_nothing_as_an_anchor():
    plan = LinkPlan(local_max=2, anchors_max=1)
    plan.want(node(2), Why.GOSSIP)
    assert plan.add_anchors([candidate(1, known_since=0.0), candidate(2, known_since=99.0)]) == [node(2)]
    assert plan.add_anchors([candidate(1), candidate(3)]) == []
