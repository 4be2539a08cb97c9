"""Jobs: the budget is a hard stop, done items stay done."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnode.errors import LedgerError, StoreError
from p2pnode.ids import JOB, id_text
from p2pnode.store import jobs
from p2pnode.store.database import commit_group, memory
from p2pnode.store.jobs import ItemRow, JobRow

JOB_ID, ORDER = b"j" * 32, b"o" * 32


def job(identifier=JOB_ID, created_ms=1):
    return JobRow(identifier, "map", "sentences", b"m" * 32, b"spec", "running", 100, created_ms)


@pytest.fixture
def connection():
    connection = memory()
    jobs.save_job(connection, job())
    yield connection
    connection.close()


def test_jobs_are_kept_listed_and_ended_once(connection):
    assert not jobs.save_job(connection, job())
    jobs.save_job(connection, job(b"k" * 32, 2))
    assert [row.id for row in jobs.list_jobs(connection)] == [b"k" * 32, JOB_ID]
    assert jobs.find_jobs(connection, id_text(JOB, JOB_ID)[:8]) == [job()]
    jobs.set_job_state(connection, JOB_ID, "running", "busy")
    assert jobs.get_job(connection, JOB_ID).waits_for == "busy"
    assert jobs.end_job(connection, JOB_ID, "completed", 9)
    assert not jobs.end_job(connection, JOB_ID, "failed", 10)
    assert jobs.get_job(connection, JOB_ID).end_reason == "completed"
    assert [row.id for row in jobs.list_jobs(connection, is_ended=False)] == [b"k" * 32]


def test_the_budget_is_a_hard_stop(connection):
    assert jobs.reserve(connection, JOB_ID, ORDER, 80)
    assert jobs.reserve(connection, JOB_ID, ORDER, 80)
    assert not jobs.reserve(connection, JOB_ID, b"x" * 32, 21)
    jobs.spend(connection, JOB_ID, ORDER, 50)
    with pytest.raises(LedgerError, match="more than it reserved"):
        jobs.spend(connection, JOB_ID, ORDER, 31)
    assert not jobs.set_budget(connection, JOB_ID, 79)
    assert jobs.list_reservations(connection, JOB_ID) == {ORDER: 30}
    assert jobs.release(connection, JOB_ID, ORDER) == 30
    assert jobs.release(connection, JOB_ID, ORDER) == 0
    row = jobs.get_job(connection, JOB_ID)
    assert (row.spent, row.reserved) == (50, 0)
    assert jobs.reserve(connection, JOB_ID, b"x" * 32, 50)
    with pytest.raises(StoreError):
        commit_group(connection, [lambda c: c.execute("UPDATE jobs SET spent = spent + 1")])[0].unwrap()


def test_an_ended_job_reserves_nothing(connection):
    jobs.end_job(connection, JOB_ID, "cancelled", 1)
    assert not jobs.reserve(connection, JOB_ID, ORDER, 1)


steps = st.lists(st.tuples(st.sampled_from(["reserve", "spend", "release"]), st.integers(0, 3), st.integers(0, 60)), max_size=30)


@settings(max_examples=40, deadline=None)
@given(steps)
def test_spent_and_reserved_never_exceed_the_budget(steps):
    connection = memory()
    jobs.save_job(connection, job())
    for verb, holder, amount in steps:
        holder_id = bytes([holder]) * 32
        arguments = (connection, JOB_ID, holder_id) if verb == "release" else (connection, JOB_ID, holder_id, amount)
        try:
            getattr(jobs, verb)(*arguments)
        except LedgerError:
            pass
        row = jobs.get_job(connection, JOB_ID)
        assert row.spent + row.reserved <= 100
        assert row.reserved == sum(jobs.list_reservations(connection, JOB_ID).values())
    connection.close()


def test_items_are_appended_and_done_ones_stay_done(connection):
    assert jobs.add_items(connection, JOB_ID, [b"a" * 32, b"b" * 32]) == 0
    assert jobs.add_items(connection, JOB_ID, [b"c" * 32]) == 2
    placed = [
        ItemRow(JOB_ID, n, "placed", 1, h * 32, provider=b"p" * 32, agreement=ORDER, call=n) for n, h in ((0, b"a"), (1, b"b"))
    ]
    jobs.save_items(connection, placed)
    assert jobs.restart_items(connection, JOB_ID) == placed
    jobs.save_items(connection, [ItemRow(JOB_ID, 0, "done", 1, b"a" * 32, b"r" * 32, "part-0", b"p" * 32, ORDER, 0, 7)])
    jobs.save_items(connection, [jobs.rewind_item(row, "busy", 3) for row in placed])
    assert jobs.count_items(connection, JOB_ID) == {"done": 1, "waiting": 2}
    assert jobs.list_items(connection, JOB_ID, state="done")[0].amount == 7
    assert [row.position for row in jobs.list_items(connection, JOB_ID, after=0)] == [1, 2]
    assert jobs.list_items(connection, JOB_ID, after=0)[0].call == -1
    assert jobs.get_job(connection, JOB_ID).items == 3
    with pytest.raises(LedgerError):
        jobs.add_items(connection, b"?" * 32, [b""])


def test_calls_under_way_are_those_of_unfinished_maps_with_all_that_is_needed_to_recall_them(connection):
    map_id = b"M" * 32
    jobs.save_job(connection, job(map_id))
    jobs.add_items(connection, map_id, [b""] * 4)
    common = {"agreement": ORDER, "amount": 7}
    jobs.save_items(
        connection,
        [
            ItemRow(map_id, 0, "placed", input_hash=b"a" * 32, call=5, **common),
            ItemRow(map_id, 1, "done", input_hash=b"b" * 32, call=6, **common),
            ItemRow(map_id, 2, "placed", call=7, **common),
            ItemRow(map_id, 3, "placed", input_hash=b"d" * 32, call=4, **common),
        ],
    )
    assert jobs.placed_calls(connection, map_id, ORDER) == [(4, b"d" * 32, 7), (5, b"a" * 32, 7)]
    assert jobs.placed_calls(connection, map_id, b"?" * 32) == []
    jobs.end_job(connection, map_id, "cancelled", 1)
    assert jobs.placed_calls(connection, map_id, ORDER) == []


def test_history_and_removal(connection):
    jobs.append_event(connection, JOB_ID, 1, "placed", "bob")
    jobs.append_event(connection, JOB_ID, 2, "done")
    assert [(event.sequence, event.kind) for event in jobs.list_events(connection, JOB_ID)] == [(1, "placed"), (2, "done")]
    assert len(jobs.list_events(connection, JOB_ID, after=1)) == 1
    jobs.add_items(connection, JOB_ID, [b""])
    jobs.reserve(connection, JOB_ID, ORDER, 5)
    jobs.end_job(connection, JOB_ID, "failed", 5, "why")
    assert jobs.remove_jobs(connection, 10) == 0
    jobs.release(connection, JOB_ID, ORDER)
    assert jobs.remove_jobs(connection, 10) == 1
    assert jobs.get_job(connection, JOB_ID) is None
