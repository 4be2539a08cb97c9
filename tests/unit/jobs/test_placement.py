"""Ranking: cheap, fast and reliable first; everybody left out is named with a reason."""

from p2pnode.ids import node_text
from p2pnode.jobs.placement import Candidate, Rejected, is_wanted, place
from p2pnode.jobs.spec import Terms
from p2pnode.reasons import Reason

A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))


def test_the_cheaper_of_equally_fast_wins():
    placement = place([Candidate(A, 200, 0.1), Candidate(B, 100, 0.1)], Terms(), 0.5)
    assert [item.candidate.peer for item in placement.ranked] == [B, A]


def test_measured_latency_counts_and_not_the_promise():
    slow = Candidate(A, 100, expected_seconds=0.01, measured_seconds=2.0)
    honest = Candidate(B, 100, expected_seconds=0.1, measured_seconds=0.1)
    assert place([slow, honest], Terms(), 0.5).best is honest


def test_own_experience_outweighs_a_small_discount():
    bad = Candidate(A, 95, 0.1, accepted=2, failed=8)
    good = Candidate(B, 100, 0.1, accepted=10, failed=0)
    assert place([bad, good], Terms(), 0.5).best is good


def test_latency_weight_zero_looks_at_money_alone():
    assert place([Candidate(A, 99, 50.0), Candidate(B, 100, 0.001)], Terms(), 0.0).best.peer == A


def test_limits_reject_with_their_reason():
    terms = Terms(max_price=100, max_total=150, deadline_seconds=1.0)
    candidates = [Candidate(A, 101, 0.1), Candidate(B, 100, 2.0)]
    placement = place(candidates, terms, 0.5, [Rejected(C, Reason.BUSY)])
    assert placement.best is None
    assert {item.peer: item.reason for item in placement.rejected} == {A: Reason.PRICE, B: Reason.DEADLINE, C: Reason.BUSY}
    assert place([Candidate(A, 160, 0.1)], Terms(max_total=150), 0.5).rejected[0].reason is Reason.BUDGET


def test_provider_and_deny_are_checked_before_anybody_is_asked():
    assert is_wanted(A, Terms()) is None
    assert is_wanted(A, Terms(provider=node_text(A)[:12])) is None
    assert is_wanted(B, Terms(provider=node_text(A)[:12])).reason is Reason.DENIED
    assert is_wanted(A, Terms(deny=(node_text(A)[:12],))).reason is Reason.DENIED


def test_equal_quotes_give_the_same_choice_in_any_order():
    candidates = [Candidate(peer, 100, 0.1) for peer in (C, A, B)]
    placements = [place(order, Terms(), 0.5) for order in (candidates, candidates[::-1])]
    orders = {tuple(item.candidate.peer for item in placement.ranked) for placement in placements}
    assert orders == {(A, B, C)}


def test_the_explanation_names_everything():
    told = place([Candidate(A, 100, 0.1)], Terms(), 0.5, [Rejected(B, Reason.PRICE, "asks 7")]).explanation()
    assert told["chosen"][0]["provider"] == node_text(A)
    assert told["chosen"][0]["score"] == 1.5
    assert told["rejected"] == [{"provider": node_text(B), "reason": "price", "detail": "asks 7"}]
