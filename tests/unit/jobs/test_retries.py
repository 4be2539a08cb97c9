"""Retries: whose fault decides, back-off grows with jitter and ends, bans double and are forgiven."""

import pytest

from p2pnode.errors import ProtocolViolation, Refused, TooSlow, Unreachable, WorkError
from p2pnode.jobs.retries import Attempts, BanBook, Cause, Entered, Failed, GiveUp, RetryAt, State, cause_of
from p2pnode.jobs.settings import JobSettings
from p2pnode.reasons import EndReason, Reason

SETTINGS = JobSettings()
PEER = b"p" * 32
MODEL, OTHER = b"m" * 32, b"o" * 32


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (Unreachable("gone"), Cause.UNREACHABLE),
        (TooSlow("late"), Cause.PROVIDER),
        (ProtocolViolation(Reason.BAD_FRAME), Cause.PROVIDER),
        (Refused(Reason.BUSY), Cause.REFUSED),
        (Refused(Reason.PRICE), Cause.REFUSED),
        (Refused(Reason.WORKER_DIED), Cause.PROVIDER),
        (Refused(Reason.WRONG_SHAPE), Cause.INPUT),
        (Refused(Reason.RUN_FAILED), Cause.INPUT),
        (Refused(Reason.SHUTTING_DOWN), Cause.UNREACHABLE),
        (Refused(Reason.BUDGET), Cause.OURS),
        (WorkError(Reason.WRONG_DTYPE), Cause.INPUT),
        (ValueError("a bug"), Cause.OURS),
    ],
)
def test_whose_fault(error, cause):
    assert cause_of(error) is cause


def test_backoff_doubles_up_to_its_cap_and_jitter_spreads_it():
    waits = []
    attempts = Attempts(JobSettings(attempts_max=20, retry_total_seconds=1e9), 0.0)
    for _ in range(12):
        verdict = attempts.handle(Failed(Unreachable("gone"), 0.5), 0.0)
        waits.append(verdict.when)
    assert waits[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert waits[-1] == pytest.approx(SETTINGS.backoff_max_seconds)
    low = Attempts(SETTINGS, 0.0).handle(Failed(Unreachable("gone"), 0.0), 0.0).when
    high = Attempts(SETTINGS, 0.0).handle(Failed(Unreachable("gone"), 1.0), 0.0).when
    assert low == pytest.approx(0.05)
    assert high == pytest.approx(0.15)


def test_attempts_are_bounded_in_number():
    attempts = Attempts(SETTINGS, 0.0)
    verdicts = [attempts.handle(Failed(Refused(Reason.BUSY), 0.5), 0.0) for _ in range(SETTINGS.attempts_max)]
    assert all(isinstance(verdict, RetryAt) for verdict in verdicts[:-1])
    assert verdicts[-1] == GiveUp(EndReason.REFUSED, Reason.BUSY, "busy")


def test_attempts_are_bounded_in_time():
    verdict = Attempts(SETTINGS, 0.0).handle(Failed(Unreachable("gone"), 0.5), SETTINGS.retry_total_seconds)
    assert verdict.end is EndReason.PEER_LOST


def test_the_jobs_own_deadline_ends_it():
    attempts = Attempts(SETTINGS, 0.0, deadline_seconds=1.0)
    assert attempts.deadline == 1.0
    assert attempts.handle(Failed(TooSlow("late"), 0.5), 0.95).end is EndReason.EXPIRED


def test_a_bad_input_is_not_tried_elsewhere():
    verdict = Attempts(SETTINGS, 0.0).handle(Failed(Refused(Reason.WRONG_SHAPE, "rank 2"), 0.5), 0.0)
    assert verdict == GiveUp(EndReason.FAILED, Reason.WRONG_SHAPE, "rank 2")


def test_a_spent_budget_ends_as_budget():
    assert Attempts(SETTINGS, 0.0).handle(Failed(Refused(Reason.BUDGET), 0.5), 0.0).end is EndReason.BUDGET


@pytest.mark.parametrize("state", list(State))
def test_every_state_has_its_own_deadline(state):
    attempts = Attempts(SETTINGS, 0.0)
    attempts.handle(Entered(state), 100.0)
    assert attempts.deadline == 100.0 + getattr(SETTINGS, f"{state.value}_seconds")


def test_bans_double_per_peer_and_cause_and_end():
    book = BanBook(SETTINGS)
    first = book.record(PEER, MODEL, Refused(Reason.INTERNAL), 0.0)
    second = book.record(PEER, MODEL, Refused(Reason.INTERNAL), first.until)
    assert first.until == SETTINGS.ban_fault_seconds
    assert second.until - first.until == 2 * SETTINGS.ban_fault_seconds
    assert book.ban(PEER, MODEL, second.until - 0.1).cause is Cause.PROVIDER
    assert book.ban(PEER, MODEL, second.until) is None
    assert book.record(PEER, MODEL, Refused(Reason.PRICE), 0.0).until == SETTINGS.ban_refused_seconds


@pytest.mark.parametrize("reason", [Reason.BUSY, Reason.RATE, Reason.TOO_MANY_REQUESTS])
def test_a_provider_without_room_is_not_banned(reason):
    book = BanBook(SETTINGS)
    assert book.record(PEER, MODEL, Refused(reason), 0.0) is None
    assert book.ban(PEER, MODEL, 0.0) is None


def test_a_bad_input_bans_nobody_and_success_forgives():
    book = BanBook(SETTINGS)
    assert book.record(PEER, MODEL, Refused(Reason.WRONG_SHAPE), 0.0) is None
    book.record(PEER, MODEL, Unreachable("gone"), 0.0)
    book.forgive(PEER, MODEL)
    assert book.ban(PEER, MODEL, 0.1) is None
    assert book.record(PEER, MODEL, Unreachable("gone"), 0.0).repeats == 0


def test_bans_have_a_largest_length_and_a_bounded_number():
    settings = JobSettings(bans_kept_max=3)
    book = BanBook(settings)
    for number in range(10):
        book.record(bytes([number]) * 32, MODEL, TooSlow("late"), 0.0)
    assert sum(book.ban(bytes([number]) * 32, MODEL, 0.5) is not None for number in range(10)) == 3
    now = 0.0
    for _ in range(30):
        ban = book.record(PEER, MODEL, Refused(Reason.INTERNAL), now)
        assert ban.until - now <= settings.ban_seconds_max
        now = ban.until


@pytest.mark.parametrize(
    "error",
    [
        Refused(Reason.WORKER_DIED),
        Refused(Reason.TIME_LIMIT),
        WorkError(Reason.WORKER_DIED),
        Refused(Reason.MEMORY),
        TooSlow("late"),
    ],
)  # fmt: skip
def test_what_a_model_can_cause_bans_its_provider_for_that_model_alone_and_shortly(error):
    book = BanBook(SETTINGS)
    ban = book.record(PEER, MODEL, error, 0.0)
    assert ban.until == SETTINGS.ban_model_seconds < SETTINGS.ban_fault_seconds
    assert book.ban(PEER, MODEL, 0.5) is ban
    assert book.ban(PEER, OTHER, 0.5) is None
    assert book.record(PEER, MODEL, error, ban.until).until == ban.until + 2 * SETTINGS.ban_model_seconds
    book.forgive(PEER, OTHER)
    assert book.ban(PEER, MODEL, ban.until + 0.5) is not None, "another model's success says nothing about this one"
    book.forgive(PEER, MODEL)
    assert book.ban(PEER, MODEL, ban.until + 0.5) is None


@pytest.mark.parametrize("error", [Unreachable("gone"), ProtocolViolation(Reason.BAD_FRAME), Refused(Reason.WRONG_HASH)])
def test_what_only_the_provider_can_cause_bans_it_for_every_model(error):
    book = BanBook(SETTINGS)
    ban = book.record(PEER, MODEL, error, 0.0)
    assert book.ban(PEER, OTHER, 0.5) is ban
    assert book.ban(PEER, b"", 0.5) is ban
    book.forgive(PEER, OTHER)
    assert book.ban(PEER, MODEL, 0.5) is None, "it delivers again"
