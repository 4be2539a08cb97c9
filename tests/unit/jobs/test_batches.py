"""The map machine: every item once, bounded in flight, copies for stragglers, and exactly one end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnode.errors import Refused, TooSlow, Unreachable
from p2pnode.jobs.batches import (
    Answered,
    CallFailed,
    CancelCopy,
    Finished,
    GaveUp,
    LaneClosed,
    LaneOpened,
    MapMachine,
    Place,
    Stopped,
)
from p2pnode.jobs.settings import JobSettings
from p2pnode.reasons import EndReason, Reason

A, B = b"a", b"b"
SETTINGS = JobSettings()


def placed(effects):
    return [(effect.position, effect.key) for effect in effects if isinstance(effect, Place)]


def test_items_go_out_as_far_as_lanes_have_room():
    machine = MapMachine(SETTINGS, 10)
    assert machine.tick(0.0) == []
    assert machine.wants_lanes
    assert placed(machine.handle(LaneOpened(A, 3), 0.0)) == [(0, A), (1, A), (2, A)]
    assert placed(machine.handle(Answered(1, A, 5, 0.1), 0.1)) == [(3, A)]
    assert machine.in_flight == 3


def test_the_emptier_lane_is_preferred():
    machine = MapMachine(SETTINGS, 10)
    machine.handle(LaneOpened(A, 2), 0.0)
    assert placed(machine.handle(LaneOpened(B, 2), 0.0)) == [(2, B), (3, B)]


def test_done_items_are_never_sent_again():
    machine = MapMachine(SETTINGS, 4, done=[0, 2])
    assert placed(machine.handle(LaneOpened(A, 9), 0.0)) == [(1, A), (3, A)]
    machine.handle(Answered(1, A, 1, 0.1), 0.1)
    assert machine.handle(Answered(3, A, 1, 0.1), 0.2) == [Finished(EndReason.COMPLETED)]


def test_a_map_whose_items_are_all_done_ends_at_once():
    assert MapMachine(SETTINGS, 2, done=[0, 1]).tick(0.0) == [Finished(EndReason.COMPLETED)]


def test_a_lost_lane_gives_its_items_back():
    machine = MapMachine(SETTINGS, 2)
    machine.handle(LaneOpened(A, 2), 0.0)
    machine.handle(LaneClosed(A), 1.0)
    assert placed(machine.handle(LaneOpened(B, 2), 1.0)) == [(0, B), (1, B)]


def test_a_failed_item_waits_and_goes_elsewhere():
    machine = MapMachine(SETTINGS, 1)
    machine.handle(LaneOpened(A, 1), 0.0)
    machine.handle(LaneOpened(B, 1), 0.0)
    assert machine.handle(CallFailed(0, A, Unreachable("gone"), 0.5), 1.0) == []
    again = machine.deadline(1.0)
    assert 1.0 < again < 2.0
    assert machine.tick(again - 0.01) == []
    assert placed(machine.tick(again)) == [(0, B)]


def test_alone_a_lane_tries_its_failures_again():
    machine = MapMachine(SETTINGS, 1)
    machine.handle(LaneOpened(A, 1), 0.0)
    machine.handle(CallFailed(0, A, Unreachable("gone"), 0.5), 1.0)
    assert placed(machine.tick(machine.deadline(1.0))) == [(0, A)]


def test_a_bad_item_is_given_up_and_the_rest_goes_on():
    machine = MapMachine(SETTINGS, 3)
    machine.handle(LaneOpened(A, 1), 0.0)
    machine.handle(Answered(0, A, 1, 0.1), 0.1)
    effects = machine.handle(CallFailed(1, A, Refused(Reason.WRONG_SHAPE, "rank"), 0.5), 0.2)
    assert GaveUp(1, Reason.WRONG_SHAPE, "rank") in effects
    assert placed(effects) == [(2, A)]
    end = machine.handle(Answered(2, A, 1, 0.1), 0.3)[-1]
    assert (end.end, end.detail) == (EndReason.FAILED, "1 of 3 items failed")


def test_a_model_that_fails_every_item_is_stopped_early():
    machine = MapMachine(SETTINGS, 1000)
    machine.handle(LaneOpened(A, 1), 0.0)
    effects, position = [], 0
    while not any(isinstance(effect, Finished) for effect in effects):
        effects = machine.handle(CallFailed(position, A, Refused(Reason.RUN_FAILED, "no"), 0.5), 0.0)
        position += 1
    assert position == 16


def test_stopping_sends_nothing_more():
    machine = MapMachine(SETTINGS, 5)
    machine.handle(LaneOpened(A, 1), 0.0)
    assert machine.handle(Stopped(EndReason.CANCELLED, Reason.CANCELLED), 0.0) == []
    assert machine.handle(Stopped(EndReason.BUDGET, Reason.BUDGET), 0.0) == [], "the first reason stays"
    assert machine.handle(Answered(0, A, 1, 0.1), 0.1)[-1].end is EndReason.CANCELLED
    assert machine.tick(9.0) == []


def test_a_straggler_gets_a_copy_and_the_loser_is_cancelled():
    machine = MapMachine(SETTINGS, 10)
    machine.handle(LaneOpened(A, 1), 0.0)
    now = 0.0
    for position in range(9):
        now += 0.1
        machine.handle(Answered(position, A, 1, 0.1), now)
    machine.handle(LaneOpened(B, 1), now)
    due = machine.deadline(now)
    assert machine.tick(due - 0.01) == []
    assert machine.tick(due) == [Place(9, B, is_hedge=True)]
    effects = machine.handle(Answered(9, B, 1, 0.1), due + 0.1)
    assert effects == [CancelCopy(9, A)]
    assert machine.handle(CallFailed(9, A, Refused(Reason.CANCELLED), 0.0), due + 0.2) == [Finished(EndReason.COMPLETED)]


def test_an_adopted_item_is_not_placed_a_second_time():
    machine = MapMachine(SETTINGS, 2)
    machine.handle(LaneOpened(A, 0), 0.0)
    machine.adopt(0, A, 0.0)
    assert placed(machine.handle(LaneOpened(B, 5), 0.0)) == [(1, B)]
    assert machine.holds(A)
    machine.handle(Answered(0, A, 1, 0.1), 0.1)
    assert not machine.holds(A)


BUSY = Refused(Reason.BUSY, "no room for the attachment")


def test_an_item_that_found_no_room_waits_until_another_has_ended():
    machine = MapMachine(JobSettings(attempts_max=1), 10)
    machine.handle(LaneOpened(A, 5), 0.0)
    for position in (4, 2, 3):
        assert machine.handle(CallFailed(position, A, BUSY, 0.5), 0.1) == []
    assert machine.wants_lanes, "others may have room"
    assert machine.tick(99.0) == []
    assert placed(machine.handle(Answered(0, A, 1, 0.1), 99.0)) == [(2, A)]
    assert placed(machine.handle(Answered(1, A, 1, 0.1), 99.1)) == [(3, A), (4, A)], "one more than before is tried"
    assert machine.handle(CallFailed(4, A, BUSY, 0.5), 99.2) == []
    assert machine.failed == 0


def test_a_lane_without_room_rests_longer_and_longer_and_is_tried_with_one_item():
    machine = MapMachine(JobSettings(attempts_max=1), 10)
    machine.handle(LaneOpened(A, 3), 0.0)
    now, waits = 0.0, []
    for position in (0, 1, 2, 0, 0, 0):
        assert machine.handle(CallFailed(position, A, BUSY, 0.5), now) == []
        if not machine.in_flight:
            assert machine.wants_lanes
            due = machine.deadline(now)
            assert machine.tick(due - 0.01) == []
            assert placed(machine.tick(due)) == [(0, A)]
            waits.append(due - now)
            now = due
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert placed(machine.handle(Answered(0, A, 1, 0.1), now)) == [(1, A), (2, A)]
    assert machine.failed == 0


def test_what_one_lane_has_no_room_for_goes_to_another():
    machine = MapMachine(JobSettings(attempts_max=1), 3)
    machine.handle(LaneOpened(A, 1), 0.0)
    machine.handle(LaneOpened(B, 1), 0.0)
    assert machine.handle(CallFailed(0, A, BUSY, 0.5), 0.0) == []
    assert placed(machine.handle(Answered(1, B, 1, 0.05), 0.05)) == [(0, B)]


def test_a_map_ends_when_nobody_has_room_for_too_long_and_no_item_has_failed():
    machine = MapMachine(SETTINGS, 5)
    machine.handle(LaneOpened(A, 1), 0.0)
    now, effects = 0.0, []
    while not effects:
        effects = machine.handle(CallFailed(0, A, BUSY, 0.5), now)
        now = min(machine.deadline(now), 1e6)
        machine.tick(now)
    assert SETTINGS.retry_total_seconds < now < SETTINGS.retry_total_seconds + 3 * SETTINGS.backoff_max_seconds
    assert effects == [Finished(EndReason.REFUSED, Reason.BUSY, str(BUSY))]
    assert machine.failed == 0


def test_a_provider_without_room_does_not_end_what_another_works_on():
    machine = MapMachine(JobSettings(hedging=False), 50)
    machine.handle(LaneOpened(A, 1), 0.0)
    machine.handle(LaneOpened(B, 1), 0.0)
    for number in range(49):
        busy = {position for position, key in flying(machine) if key == A}
        for position in busy:
            machine.handle(CallFailed(position, A, BUSY, 0.5), 10.0 * number)
        [(position, key)] = flying(machine)
        assert key == B
        effects = machine.handle(Answered(position, B, 1, 0.1), 10.0 * number)
        assert not any(isinstance(effect, Finished) for effect in effects)
    assert (machine.done, machine.failed) == (49, 0)


def flying(machine):
    return sorted((position, key) for key, lane in machine._lanes.items() for position in lane.holds)


def test_an_item_that_needs_too_much_memory_fails():
    machine = MapMachine(JobSettings(attempts_max=2), 3)
    machine.handle(LaneOpened(A, 2), 0.0)
    error = Refused(Reason.MEMORY, "the model")
    assert machine.handle(CallFailed(0, A, error, 0.5), 0.0) == []
    assert placed(machine.handle(Answered(1, A, 1, 0.1), 1.0)) == [(0, A), (2, A)]
    assert GaveUp(0, Reason.MEMORY, "the model") in machine.handle(CallFailed(0, A, error, 0.5), 1.0)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.data())
def test_whatever_happens_every_item_ends_once(count, data):
    """Random lanes, answers, failures and losses; then everything answers. Each item is done once or given up."""
    machine = MapMachine(SETTINGS, count)
    now, lanes, flying, answered, finished = 0.0, set(), set(), [], []

    def take(effects):
        for effect in effects:
            if isinstance(effect, Place):
                assert (effect.position, effect.key) not in flying
                flying.add((effect.position, effect.key))
            elif isinstance(effect, Finished):
                finished.append(effect)

    for step in range(400):
        now += 0.05
        calm = step > 60
        choice = "answer" if calm else data.draw(st.sampled_from(["open", "close", "answer", "fail", "busy", "tick"]))
        if not lanes and (calm or choice == "open"):
            lanes.add(A)
            take(machine.handle(LaneOpened(A, 2), now))
        elif choice == "open":
            lanes.add(B)
            take(machine.handle(LaneOpened(B, 1), now))
        elif choice == "close" and lanes:
            key = sorted(lanes)[0]
            lanes.discard(key)
            flying = {copy for copy in flying if copy[1] != key}
            take(machine.handle(LaneClosed(key), now))
        elif choice in ("answer", "fail", "busy") and flying:
            position, key = sorted(flying)[0]
            flying.discard((position, key))
            if choice == "answer":
                answered.append(position)
                take(machine.handle(Answered(position, key, 1, 0.05), now))
            elif choice == "busy":
                take(machine.handle(CallFailed(position, key, BUSY, 0.5), now))
            else:
                error = Unreachable("gone") if step % 2 else TooSlow("late")
                take(machine.handle(CallFailed(position, key, error, 0.5), now))
        else:
            now += 1.0
            take(machine.tick(now))
        if finished:
            break
    assert len(finished) == 1
    assert machine.done + machine.failed == count
    assert machine.done == len(set(answered))
