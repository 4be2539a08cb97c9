"""Rule 6 of the hash table: what a record is, which ones are held, and within which budgets."""

import hashlib
from dataclasses import replace

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.records import record as records
from p2pnode.discovery.records.record import (
    CheckedRecord,
    PutRates,
    RecordSettings,
    RecordStore,
    make_record,
    open_record,
    parse_record,
    record_key,
)
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.wire.codec import encode
from p2pnode.wire.envelope import decode_envelope, encode_envelope, seal
from p2pnode.wire.messages.discovery import RECORD_BYTES_MAX, Record
from p2pnode.wire.messages.session import Envelope, Goodbye

NOW = 1_800_000_000.0
NETWORK = b"n" * 32
ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
HOUR = 3600.0


def signed(identity=ALICE, *, sequence=1, salt=b"s", value=b"v", life=2 * HOUR, now=NOW, network=NETWORK):
    return make_record(identity, network, Record(salt, sequence, round((now + life) * 1000), value))


def check(data, now):
    return open_record(data, NETWORK, now)


def store(metrics=None, checking=check, **settings):
    return RecordStore(RecordSettings(**settings), checking, metrics)


def put(held, record, now=NOW, *, node=b"p" * 32, address="20.0.0.1:7470", replaces=0):
    return held.put(record.data, node, address, now, replaces)


def reason_of(action, error=Refused):
    with pytest.raises(error) as caught:
        action()
    return caught.value.reason


def fake(number, *, sequence=1, publisher=None, salt=b"", life=2 * HOUR, size=100, now=NOW):
    """Make a record as a simulation's check gives it: `data` names an entry of FAKES, nothing is signed."""
    node = publisher or hashlib.blake2b(b"publisher %d" % number, digest_size=32).digest()
    data = (b"%d %d %s %f " % (number, sequence, salt, life)).ljust(size, b".")
    return CheckedRecord(record_key(node, salt), sequence, now + life, salt, b"v", node, data)


class FakeCheck:
    def __init__(self):
        self.known = {}

    def __call__(self, data, now):
        return self.known[data]

    def put(self, held, record, now=NOW, *, node=None, address="20.0.0.1:1", replaces=0):
        self.known[record.data] = record
        return held.put(record.data, node or record.publisher, address, now, replaces)


# --- what a record is ---------------------------------------------------------------------------------------------------


def test_key_is_the_hash_of_node_id_and_salt_so_an_id_alone_finds_the_record():
    node_id = hashlib.blake2b(ALICE.public_key, digest_size=32).digest()
    assert signed(salt=b"addresses").key == hashlib.blake2b(node_id + b"addresses", digest_size=32).digest()
    assert signed(salt=b"addresses").key == record_key(ALICE.node_id, b"addresses")
    assert len({signed(salt=b"").key, signed(salt=b"x").key, signed(BOB, salt=b"x").key}) == 3


def test_a_record_is_opened_from_exactly_the_bytes_that_were_signed():
    record = signed(value=b"hello", sequence=7)
    opened = check(record.data, NOW)
    assert opened == record
    assert (opened.publisher, opened.value, opened.sequence, opened.expires) == (ALICE.node_id, b"hello", 7, NOW + 2 * HOUR)


def test_fields_of_a_newer_version_stay_inside_the_signed_bytes():
    fields = {"salt": b"s", "sequence": 1, "expires_ms": round((NOW + 60) * 1000), "value": b"v", "zzz_new": 5}
    body = msgpack.packb(fields)
    data = encode_envelope(Envelope(30, body, ALICE.public_key, ALICE.sign("record", NETWORK, body)))
    held = store()
    held.put(data, b"p" * 32, "", NOW)
    assert held.get(record_key(ALICE.node_id, b"s"), NOW).data == data


def test_a_record_written_from_the_page_is_held():
    """docs/reference/protocol.md section 15, with no code of p2pnode: hashlib, msgpack and any Ed25519."""

    def blake(data):
        return hashlib.blake2b(data, digest_size=32).digest()

    key = Ed25519PrivateKey.from_private_bytes(b"z" * 32)
    signer = key.public_key().public_bytes_raw()
    value = msgpack.packb({"addresses": ["192.0.2.7:7470"], "role": "client"})
    expires_ms = round((NOW + 7200) * 1000)
    body = msgpack.packb({"salt": b"addresses", "sequence": round(NOW * 1000), "expires_ms": expires_ms, "value": value})
    signature = key.sign(b"p2pnode/1 record".ljust(32, b"\0") + NETWORK + blake(body))
    data = msgpack.packb({"kind": 30, "body": body, "signer": signer, "signature": signature})
    held = store()
    held.put(data, b"p" * 32, "", NOW)
    found = held.get(blake(blake(signer) + b"addresses"), NOW)
    assert (found.data, found.value, found.publisher) == (data, value, blake(signer))


@pytest.mark.parametrize("part", ["body", "signature", "signer"])
def test_a_forged_record_is_a_violation(part):
    envelope = decode_envelope(signed().data)
    if part == "body":
        forged = Envelope(
            envelope.kind, encode(Record(b"s", 2, round((NOW + 60) * 1000), b"w")), envelope.signer, envelope.signature
        )
    elif part == "signature":
        forged = Envelope(envelope.kind, envelope.body, envelope.signer, bytes(64))
    else:
        forged = Envelope(envelope.kind, envelope.body, BOB.public_key, envelope.signature)
    held = store()
    violation = reason_of(lambda: held.put(encode_envelope(forged), b"p" * 32, "", NOW), ProtocolViolation)
    assert violation is Reason.BAD_SIGNATURE
    assert len(held) == 0


def test_a_record_of_another_network_is_a_violation():
    assert reason_of(lambda: check(signed(network=b"o" * 32).data, NOW), ProtocolViolation) is Reason.BAD_SIGNATURE


def test_another_kind_of_document_is_a_violation():
    data = encode_envelope(Envelope(3, encode(Goodbye("bye")), ALICE.public_key, bytes(64)))
    assert reason_of(lambda: check(data, NOW), ProtocolViolation) is Reason.WRONG_TYPE


def test_unsigned_bytes_cannot_ride_in_anothers_envelope():
    fields = msgpack.unpackb(signed().data) | {"zz_smuggled": b"x" * 300}
    assert reason_of(lambda: check(msgpack.packb(fields), NOW), ProtocolViolation) is Reason.WRONG_TYPE


def test_values_are_at_most_1000_bytes():
    assert len(check(signed(value=b"x" * 1000, salt=b"s" * 64).data, NOW).value) == 1000
    body = msgpack.packb({"salt": b"s", "sequence": 1, "expires_ms": round((NOW + 60) * 1000), "value": b"x" * 1001})
    data = encode_envelope(Envelope(30, body, ALICE.public_key, ALICE.sign("record", NETWORK, body)))
    assert reason_of(lambda: check(data, NOW), ProtocolViolation) is Reason.WRONG_TYPE


def test_envelopes_are_at_most_as_large_as_the_wire_carries():
    too_large = bytes(RECORD_BYTES_MAX + 1)
    assert reason_of(lambda: check(too_large, NOW), ProtocolViolation) is Reason.TOO_LARGE
    largest = signed(value=b"x" * 1000, salt=b"s" * 64, sequence=2**50)
    assert len(largest.data) <= RECORD_BYTES_MAX


@pytest.mark.parametrize("too_large", [{"value": b"x" * 1001}, {"salt": b"x" * 400, "value": b"x" * 1000}])
def test_a_record_too_large_for_holders_is_not_signed(too_large):
    with pytest.raises(ValueError, match="too large"):
        signed(**too_large)


# --- times --------------------------------------------------------------------------------------------------------------


def test_an_expiry_more_than_24_hours_away_is_refused():
    assert check(signed(life=24 * HOUR).data, NOW)
    assert reason_of(lambda: check(signed(life=24 * HOUR + 1).data, NOW)) is Reason.LIFETIME


def test_an_expired_record_is_refused():
    record = signed(life=60)
    assert check(record.data, NOW + 59.9)
    assert reason_of(lambda: check(record.data, NOW + 60)) is Reason.EXPIRED


def test_a_publishers_clock_more_than_10_minutes_ahead_is_refused():
    assert check(signed(sequence=round((NOW + 600) * 1000)).data, NOW)
    assert reason_of(lambda: check(signed(sequence=round((NOW + 601) * 1000)).data, NOW)) is Reason.NOT_YET_VALID


def test_a_publisher_cannot_lock_itself_out_with_the_last_sequence():
    assert reason_of(lambda: check(signed(sequence=2**53).data, NOW)) is Reason.NOT_YET_VALID


def test_times_are_checked_before_the_costly_signature(monkeypatch):
    monkeypatch.setattr(records, "open_envelope", lambda *_: pytest.fail("the signature was checked first"))
    assert reason_of(lambda: check(signed(life=-1).data, NOW)) is Reason.EXPIRED


def test_without_its_signature_a_record_is_checked_the_same():
    record = signed()
    assert parse_record(record.data, NOW) == record
    assert reason_of(lambda: parse_record(record.data, NOW + 3 * HOUR)) is Reason.EXPIRED


# --- sequences ----------------------------------------------------------------------------------------------------------


def test_the_higher_sequence_wins():
    held = store()
    old, new = signed(sequence=1, value=b"old"), signed(sequence=2, value=b"new")
    put(held, old)
    assert put(held, new) == new
    assert held.get(old.key, NOW) == new
    assert len(held) == 1


def test_a_lower_sequence_is_refused():
    held = store()
    put(held, signed(sequence=2))
    assert reason_of(lambda: put(held, signed(sequence=1))) is Reason.STALE
    assert held.get(signed().key, NOW).sequence == 2


def test_the_same_bytes_again_are_a_refresh():
    held = store()
    record = signed()
    put(held, record)
    assert put(held, record, NOW + 10) == record
    assert len(held) == 1
    assert held.size_bytes == len(record.data)


def test_one_statement_signed_twice_is_no_contradiction():
    checks, held = FakeCheck(), None
    held = store(checking=checks)
    first = fake(1)
    again = replace(first, data=first.data + b"another signature")
    checks.put(held, first)
    assert checks.put(held, again) == first
    assert held.conflicts == {}


def test_two_different_records_with_one_sequence_are_refused_and_kept_as_evidence():
    metrics = Metrics()
    held = store(metrics)
    one, other = signed(value=b"one"), signed(value=b"other")
    put(held, one)
    assert reason_of(lambda: put(held, other)) is Reason.TWO_VERSIONS
    assert held.get(one.key, NOW) == one
    assert held.conflicts == {ALICE.node_id: (one.data, other.data)}
    assert metrics.value("record_conflicts_total") == 1


def test_evidence_is_bounded(monkeypatch):
    monkeypatch.setattr(records, "CONFLICTS_MAX", 2)
    checks = FakeCheck()
    held = store(checking=checks)
    for number in range(4):
        checks.put(held, fake(number))
        other = replace(fake(number), value=b"other", data=b"other %d" % number)
        assert reason_of(lambda other=other: checks.put(held, other)) is Reason.TWO_VERSIONS
    assert len(held.conflicts) == 2


def test_compare_and_swap_is_optional_and_refuses_another_present_version():
    held = store()
    put(held, signed(sequence=1), replaces=9)  # nothing is held: there is nothing to compare with
    put(held, signed(sequence=5))
    assert reason_of(lambda: put(held, signed(sequence=6), replaces=1)) is Reason.CONDITION
    assert held.get(signed().key, NOW).sequence == 5
    put(held, signed(sequence=6), replaces=5)
    put(held, signed(sequence=6), replaces=5)  # the same again is a refresh, as after a lost answer
    assert held.get(signed().key, NOW).sequence == 6


def test_an_expired_record_makes_way_for_any_live_one():
    held = store()
    put(held, signed(sequence=9, life=60))
    late = signed(sequence=3, life=2 * HOUR)
    assert put(held, late, NOW + 61) == late
    assert len(held) == 1


# --- expiry -------------------------------------------------------------------------------------------------------------


def test_an_expired_record_is_not_given_and_forgotten_at_the_deadline():
    held = store()
    short, long = signed(life=60), signed(BOB, life=HOUR)
    put(held, long)
    put(held, short)
    assert held.deadline == NOW + 60
    assert held.expire(NOW + 59) == 0
    assert held.get(short.key, NOW + 59) == short
    assert held.get(short.key, NOW + 60) is None
    assert held.expire(NOW + 60) == 1
    assert (len(held), held.deadline, held.size_bytes) == (1, NOW + HOUR, len(long.data))
    assert held.expire(NOW + HOUR) == 1
    assert (len(held), held.deadline, held.size_bytes) == (0, float("inf"), 0)


def test_an_empty_store_costs_next_to_nothing():
    held = store()
    assert held._held is None
    assert (len(held), held.size_bytes, held.deadline, held.records(), held.conflicts) == (0, 0, float("inf"), [], {})
    assert held.get(b"k" * 32, NOW) is None
    assert held.expire(NOW) == 0


# --- budgets ------------------------------------------------------------------------------------------------------------


def test_one_record_per_key():
    checks = FakeCheck()
    held = store(checking=checks)
    for sequence in range(1, 20):
        checks.put(held, fake(1, sequence=sequence))
    assert len(held) == 1


def test_a_budget_per_publisher():
    checks, metrics = FakeCheck(), Metrics()
    held = store(metrics, checks, records_per_publisher_max=3)
    for number in range(3):
        checks.put(held, fake(1, salt=b"%d" % number), node=b"n%d" % number)
    assert reason_of(lambda: checks.put(held, fake(1, salt=b"more"))) is Reason.STORE_FULL
    assert metrics.value("limit_hits_total", "records_per_publisher_max") == 1
    checks.put(held, fake(1, salt=b"0", sequence=2))  # a newer version takes no new place
    checks.put(held, fake(2))
    held.expire(NOW + 2 * HOUR)
    checks.put(held, fake(1, salt=b"more", life=4 * HOUR), NOW + 2 * HOUR)


def test_a_budget_per_24_of_the_storing_peer():
    checks, metrics = FakeCheck(), Metrics()
    held = store(metrics, checks, records_per_network_max=3)
    for number in range(3):
        checks.put(held, fake(number), address=f"20.0.0.{number}:1")
    assert reason_of(lambda: checks.put(held, fake(3), address="20.0.0.99:1")) is Reason.STORE_FULL
    assert metrics.value("limit_hits_total", "records_per_network_max") == 1
    checks.put(held, fake(3), address="20.0.1.99:1")
    # Stored again from elsewhere, a record stays charged to the network that brought it: the full one frees nothing.
    checks.put(held, fake(0), address="30.0.0.1:1")
    assert reason_of(lambda: checks.put(held, fake(4), address="20.0.0.99:1")) is Reason.STORE_FULL


def test_a_budget_per_48_of_an_ipv6_peer():
    checks = FakeCheck()
    held = store(checking=checks, records_per_network_max=1)
    checks.put(held, fake(0), address="[2a00:db8:1:1::1]:1")
    assert reason_of(lambda: checks.put(held, fake(1), address="[2a00:db8:1:2::1]:1")) is Reason.STORE_FULL
    checks.put(held, fake(1), address="[2a00:db8:2::1]:1")


@pytest.mark.parametrize("strict", [True, False])
def test_private_addresses_are_exempt_unless_diversity_is_strict(strict):
    checks = FakeCheck()
    held = store(checking=checks, records_per_network_max=1, exempt_private=not strict)
    checks.put(held, fake(0), address="192.168.1.5:1")
    if not strict:
        checks.put(held, fake(1), address="192.168.1.6:1")
    else:
        assert reason_of(lambda: checks.put(held, fake(1), address="192.168.1.6:1")) is Reason.STORE_FULL


def test_when_full_the_record_that_expires_first_makes_room():
    checks = FakeCheck()
    held = store(checking=checks, records_max=3)
    for number, life in enumerate((900.0, 300.0, 600.0)):
        checks.put(held, fake(number, life=life))
    checks.put(held, fake(3, life=500.0))
    assert [record.expires - NOW for record in held.records()] == [900.0, 600.0, 500.0]


def test_when_full_a_record_that_would_go_first_is_refused():
    checks, metrics = FakeCheck(), Metrics()
    held = store(metrics, checks, records_max=2)
    checks.put(held, fake(0, life=900.0))
    checks.put(held, fake(1, life=600.0))
    assert reason_of(lambda: checks.put(held, fake(2, life=600.0))) is Reason.STORE_FULL
    assert metrics.value("limit_hits_total", "records_max") == 1
    assert len(held) == 2


def test_a_far_expiry_that_nobody_refreshes_does_not_crowd_out_others():
    checks = FakeCheck()
    held = store(checking=checks, records_max=2)
    checks.put(held, fake(0, life=24 * HOUR))
    checks.put(held, fake(1, life=24 * HOUR))
    later = NOW + 60
    checks.put(held, fake(1, life=24 * HOUR), later)
    newcomer = fake(2, life=2 * HOUR, now=later)
    checks.put(held, newcomer, later)
    assert [record.key for record in held.records()] == [fake(1).key, newcomer.key]


def test_bytes_are_capped_and_a_refusal_drops_nothing():
    checks, metrics = FakeCheck(), Metrics()
    held = store(metrics, checks, record_bytes_max=1000)
    for number in range(5):
        checks.put(held, fake(number, life=100.0 + number, size=200))
    assert held.size_bytes == 1000
    assert reason_of(lambda: checks.put(held, fake(5, life=100.5, size=400))) is Reason.STORE_FULL
    assert (len(held), held.size_bytes) == (5, 1000)
    assert metrics.value("limit_hits_total", "record_bytes_max") == 1
    checks.put(held, fake(6, life=900.0, size=400))
    assert (len(held), held.size_bytes) == (4, 1000)
    assert (metrics.value("records_held"), metrics.value("record_bytes_held")) == (4, 1000)


def test_a_newer_version_that_grew_makes_room_elsewhere_although_its_old_one_would_go_first():
    checks = FakeCheck()
    held = store(checking=checks, record_bytes_max=400)
    checks.put(held, fake(0, life=90.0, size=200))
    checks.put(held, fake(1, life=100.0, size=200))
    checks.put(held, fake(0, life=110.0, size=300, sequence=2))
    assert [(record.sequence, record.expires) for record in held.records()] == [(2, NOW + 110.0)]
    assert reason_of(lambda: checks.put(held, fake(0, life=110.0, size=401, sequence=3))) is Reason.STORE_FULL
    assert held.size_bytes == 300


def test_what_has_expired_makes_room_before_any_budget_is_asked():
    checks = FakeCheck()
    held = store(checking=checks, records_max=2, records_per_network_max=2)
    checks.put(held, fake(0, life=60.0))
    checks.put(held, fake(1, life=HOUR))
    checks.put(held, fake(2, life=30.0 * 60, now=NOW + 60), NOW + 60)
    assert [record.key for record in held.records()] == [fake(1).key, fake(2).key]


# --- rates --------------------------------------------------------------------------------------------------------------


def test_five_puts_a_second_per_peer():
    checks, metrics = FakeCheck(), Metrics()
    held = store(metrics, checks, puts_burst=5.0)
    flooder = b"f" * 32
    for number in range(5):
        checks.put(held, fake(number), node=flooder, address="")
    assert reason_of(lambda: checks.put(held, fake(5), node=flooder, address="")) is Reason.RATE
    assert metrics.value("limit_hits_total", "puts_per_second") == 1
    checks.put(held, fake(6), node=b"o" * 32, address="")
    for number in range(5):
        checks.put(held, fake(10 + number), NOW + 1, node=flooder, address="")
    assert reason_of(lambda: checks.put(held, fake(5), NOW + 1, node=flooder, address="")) is Reason.RATE


def test_five_puts_a_second_per_network_whoever_sends_them():
    checks = FakeCheck()
    held = store(checking=checks, puts_burst=5.0)
    for number in range(5):
        checks.put(held, fake(number), address=f"20.0.0.{number}:1")
    assert reason_of(lambda: checks.put(held, fake(5), address="20.0.0.9:1")) is Reason.RATE
    checks.put(held, fake(5), address="20.0.1.9:1")


def test_a_flood_is_refused_before_anything_is_checked():
    held = store(checking=lambda data, now: pytest.fail("checked"), puts_burst=0.0)
    assert reason_of(lambda: held.put(b"x", b"p" * 32, "", NOW)) is Reason.RATE


def test_rates_remember_a_bounded_number_of_peers():
    rates = PutRates(1.0, 1.0, 2)
    assert rates.take(b"a", "", 0.0)
    assert rates.take(b"b", "", 0.0)
    assert not rates.take(b"a", "", 0.0)
    assert rates.take(b"c", "", 0.0)  # b was silent for longest
    assert not rates.take(b"a", "", 0.0)
    assert len(rates._buckets) == 2


def test_signing_uses_the_record_domain():
    record = Record(b"s", 1, round((NOW + 60) * 1000), b"v")
    assert decode_envelope(make_record(ALICE, NETWORK, record).data) == seal(record, ALICE, NETWORK)
