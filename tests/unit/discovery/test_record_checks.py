"""Strangers' signatures cost this node a bounded time."""

import pytest

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.records import checks as record_checks
from p2pnode.discovery.records.checks import GuardSettings, RecordChecker, SignatureGuard
from p2pnode.discovery.records.record import RecordSettings, RecordStore, make_record, open_record
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import Record

NOW = 1_800_000_000.0
NETWORK = b"n" * 32


def record(sequence, network=NETWORK):
    return make_record(Identity(b"a" * 32), network, Record(b"s", sequence, round((NOW + 60) * 1000), b"v"))


@pytest.fixture
def verified(monkeypatch):
    seen = []

    def counted(data, network_id, now):
        seen.append(data)
        return open_record(data, network_id, now)

    monkeypatch.setattr(record_checks, "open_record", counted)
    return seen


def checker(metrics=None, **settings):
    return RecordChecker(NETWORK, SignatureGuard(GuardSettings(**settings), metrics))


def test_a_signature_is_checked_once(verified):
    metrics = Metrics()
    checks = checker(metrics)
    one = record(1)
    assert checks.unasked(one.data, NOW) == checks.asked(one.data, NOW) == checks.unasked(one.data, NOW) == one
    assert verified == [one.data]
    assert metrics.labels("signature_checks_total") == {"good": 1, "remembered": 2}


def test_a_remembered_record_still_expires():
    checks = checker()
    checks.unasked(record(1).data, NOW)
    with pytest.raises(Refused) as caught:
        checks.unasked(record(1).data, NOW + 61)
    assert caught.value.reason is Reason.EXPIRED


def test_what_is_remembered_is_bounded_and_the_least_recently_met_goes(verified):
    checks = checker(remembered_max=2)
    first, second, third = record(1), record(2), record(3)
    for each in (first, second, first, third, first, second):
        checks.unasked(each.data, NOW)
    assert verified == [first.data, second.data, third.data, second.data]
    assert len(checks._guard) == 2


def test_checks_of_what_comes_unasked_have_a_rate(verified):
    metrics = Metrics()
    checks = checker(metrics, checks_per_second=1.0, checks_burst=2.0)
    store = RecordStore(RecordSettings(), checks.unasked)
    store.put(record(1).data, b"p" * 32, "", NOW)
    store.put(record(2).data, b"p" * 32, "", NOW)
    with pytest.raises(Refused) as caught:
        store.put(record(3).data, b"p" * 32, "", NOW)
    assert caught.value.reason is Reason.BUSY
    assert metrics.value("limit_hits_total", "checks_per_second") == 1
    assert len(verified) == 2
    store.put(record(2).data, b"p" * 32, "", NOW)  # remembered: costs nothing
    store.put(record(3).data, b"p" * 32, "", NOW + 1)


def test_a_flood_of_stores_does_not_blind_our_own_lookups():
    checks = checker(checks_per_second=1.0, checks_burst=0.0)
    with pytest.raises(Refused):
        checks.unasked(record(1).data, NOW)
    assert checks.asked(record(1).data, NOW) == record(1)


def test_bad_signatures_are_counted_and_never_remembered(verified):
    metrics = Metrics()
    checks = checker(metrics)
    forged = record(1, network=b"o" * 32)
    for _ in range(2):
        with pytest.raises(ProtocolViolation) as caught:
            checks.unasked(forged.data, NOW)
        assert caught.value.reason is Reason.BAD_SIGNATURE
    assert len(verified) == 2
    assert metrics.labels("signature_checks_total") == {"bad": 2}
