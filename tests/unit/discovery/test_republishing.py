"""Own records live on: republished at half their life, after failures, after restarts, never with a sequence used before."""

import pytest

from p2pnode.discovery.dht.publishing import Publication
from p2pnode.discovery.dht.republishing import ForgetRecord, PublishRecord, RepublishSchedule, RepublishSettings, SaveRecord
from p2pnode.errors import InputError
from p2pnode.reasons import Reason
from p2pnode.store.database import memory
from p2pnode.store.records import list_own_records, remove_own_record, save_own_record
from p2pnode.wire.codec import decode, encode
from p2pnode.wire.messages.discovery import Record

NOW = 1_800_000_000.0
LIFE = 7200.0


def schedule(rows=(), now=NOW, uniform=0.0, sign=encode, **settings):
    return RepublishSchedule(sign, RepublishSettings(**settings), lambda: uniform, rows, now)


def only(effects, kind):
    found = [effect for effect in effects if isinstance(effect, kind)]
    assert len(found) == 1, effects
    return found[0]


def sent(effects):
    return decode(Record, only(effects, PublishRecord).data)


def outcome(sequence, acks=16, refusals=()):
    return Publication(b"k" * 32, sequence, acks, 16, 8, 1, refusals)


def stored(own, salt, now):
    row = next(row for row in own.rows() if row.salt == salt)
    return own.ended(salt, outcome(row.sequence), now)


def test_a_new_value_is_saved_before_it_is_published():
    effects = schedule().put(b"s", b"v", NOW)
    assert [type(effect) for effect in effects] == [SaveRecord, PublishRecord]
    assert effects[0].row.envelope == effects[1].data
    assert sent(effects) == Record(b"s", round(NOW * 1000), round((NOW + LIFE) * 1000), b"v")


def test_the_default_life_is_two_hours_and_a_caller_may_choose():
    own = schedule()
    assert sent(own.put(b"a", b"v", NOW)).expires_ms == round((NOW + 7200) * 1000)
    assert sent(own.put(b"b", b"v", NOW, 600.0)).expires_ms == round((NOW + 600) * 1000)


def test_the_same_value_again_is_nothing_to_do_and_another_gets_a_higher_sequence():
    own = schedule()
    first = sent(own.put(b"s", b"v", NOW))
    assert own.put(b"s", b"v", NOW) == []
    second = sent(own.put(b"s", b"w", NOW))
    assert (second.sequence, second.value) == (first.sequence + 1, b"w")


@pytest.mark.parametrize(("uniform", "fraction"), [(0.0, 0.5), (0.999, 0.4)])
def test_republished_at_half_the_life_with_jitter(uniform, fraction):
    own = schedule(uniform=uniform)
    first = sent(own.put(b"s", b"v", NOW))
    assert only(stored(own, b"s", NOW + 1), SaveRecord).row.acks == 16
    due = NOW + 1 + (LIFE - 1) * fraction
    assert own.deadline == pytest.approx(due, abs=1)
    assert own.tick(own.deadline - 0.1) == []
    effects = own.tick(own.deadline)
    again = sent(effects)
    assert only(effects, SaveRecord).row.sequence == again.sequence > first.sequence
    assert again.expires_ms == pytest.approx((due + LIFE) * 1000, abs=1000)


def test_a_publication_that_fell_short_is_tried_again_with_doubling_backoff_and_jitter():
    own = schedule(uniform=0.5, backoff_seconds=4.0, backoff_seconds_max=10.0)
    sequence = sent(own.put(b"s", b"v", NOW)).sequence
    now, waits = NOW, []
    for _ in range(4):
        row = only(own.ended(b"s", outcome(sequence, acks=7), now), SaveRecord).row
        assert (row.acks, row.asked, row.stored_ms) == (7, 16, 0)
        waits.append(own.deadline - now)
        now = own.deadline
        assert sent(own.tick(now)).sequence == sequence  # the same bytes: nothing was wrong with them
    assert waits == pytest.approx([3.0, 6.0, 7.5, 7.5])


def test_success_resets_the_backoff():
    own = schedule(backoff_seconds=4.0)
    sequence = sent(own.put(b"s", b"v", NOW)).sequence
    own.ended(b"s", outcome(sequence, acks=0), NOW)
    own.tick(own.deadline)
    stored(own, b"s", NOW)
    sequence = sent(own.tick(own.deadline)).sequence
    own.ended(b"s", outcome(sequence, acks=0), NOW + LIFE)
    assert own.deadline - (NOW + LIFE) == pytest.approx(2.0)


@pytest.mark.parametrize("reason", [Reason.STALE, Reason.TWO_VERSIONS, Reason.EXPIRED, Reason.NOT_YET_VALID])
def test_a_record_refused_as_it_is_is_signed_anew(reason):
    own = schedule()
    sequence = sent(own.put(b"s", b"v", NOW)).sequence
    own.ended(b"s", outcome(sequence, acks=0, refusals=((reason, 16),)), NOW)
    effects = own.tick(own.deadline)
    assert sent(effects).sequence > sequence
    assert only(effects, SaveRecord).row.sequence == sent(effects).sequence


def test_the_end_of_an_older_version_counts_for_nothing():
    own = schedule()
    first = sent(own.put(b"s", b"v", NOW)).sequence
    own.put(b"s", b"w", NOW)
    assert own.ended(b"s", outcome(first), NOW) == []
    assert own.ended(b"gone", outcome(first), NOW) == []


def test_a_publication_that_never_ends_is_given_up():
    own = schedule(flight_seconds=30.0)
    own.put(b"s", b"v", NOW)
    assert own.deadline == NOW + 30
    assert own.tick(NOW + 29) == []
    assert own.tick(NOW + 30) == []  # backs off first
    assert len(own.tick(own.deadline)) == 1


def restarted(connection, now, **settings):
    return schedule(list_own_records(connection), now, **settings)


def saved(connection, effects):
    for effect in effects:
        if isinstance(effect, SaveRecord):
            save_own_record(connection, effect.row)
        elif isinstance(effect, ForgetRecord):
            remove_own_record(connection, effect.salt)
    return effects


@pytest.fixture
def connection():
    connection = memory()
    yield connection
    connection.close()


def test_after_a_restart_a_fresh_record_is_published_again_as_it_is(connection):
    own = schedule()
    first = only(saved(connection, own.put(b"s", b"v", NOW)), PublishRecord)
    saved(connection, stored(own, b"s", NOW))
    after = restarted(connection, NOW + 60, uniform=0.5, restart_seconds=10.0)
    assert after.deadline == NOW + 65
    assert after.tick(NOW + 65) == [first]


def test_after_a_long_stop_a_record_is_published_with_a_higher_sequence(connection):
    own = schedule()
    first = sent(saved(connection, own.put(b"s", b"v", NOW)))
    later = NOW + 3 * LIFE
    again = sent(restarted(connection, later).tick(later))
    assert (again.value, again.sequence) == (b"v", round(later * 1000))
    assert again.sequence > first.sequence
    assert again.expires_ms == round((later + LIFE) * 1000)


def test_a_crash_before_sending_never_leads_to_two_versions_of_one_sequence(connection):
    own = schedule()
    first = sent(saved(connection, own.put(b"s", b"v", NOW)))  # saved; the crash comes before it is sent
    second = sent(restarted(connection, NOW).put(b"s", b"other", NOW))
    assert second.sequence > first.sequence


def test_sequences_grow_although_the_clock_was_set_back(connection):
    own = schedule()
    first = sent(saved(connection, own.put(b"s", b"v", NOW)))
    assert sent(restarted(connection, NOW - 500).put(b"s", b"w", NOW - 500)).sequence == first.sequence + 1


def test_a_lost_disk_still_gives_higher_sequences():
    assert sent(schedule().put(b"s", b"v", NOW + 5)).sequence > sent(schedule().put(b"s", b"v", NOW)).sequence


def test_a_removed_record_is_published_no_more_and_leaves_the_disk(connection):
    own = schedule()
    saved(connection, own.put(b"s", b"v", NOW))
    assert saved(connection, own.remove(b"s")) == [ForgetRecord(b"s")]
    assert own.remove(b"s") == []
    assert list_own_records(connection) == []
    assert own.tick(NOW + LIFE) == []
    assert own.deadline == float("inf")


@pytest.mark.parametrize(
    ("salt", "value", "life"),
    [(b"s" * 65, b"v", LIFE), (b"s", b"v" * 1001, LIFE), (b"s", b"v", 59.0), (b"s", b"v", 86_401.0), (b"new", b"v", LIFE)],
)
def test_what_holders_would_refuse_is_not_begun(salt, value, life):
    own = schedule(records_max=1)
    own.put(b"s", b"first", NOW)
    with pytest.raises(InputError):
        own.put(salt, value, NOW, life)
    assert [row.value for row in own.rows()] == [b"first"]


def test_a_record_that_cannot_be_signed_is_the_callers_error():
    def too_large(record):
        raise ValueError("too large")

    own = schedule(sign=too_large)
    with pytest.raises(InputError, match="too large"):
        own.put(b"s", b"v", NOW)
    assert own.rows() == []
