"""Any order of puts, refreshes, forgeries, contradictions and expiries: every bound holds, the highest sequence wins,
nothing forged is ever held.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.diversity import group_of
from p2pnode.discovery.records.checks import GuardSettings, RecordChecker, SignatureGuard
from p2pnode.discovery.records.record import RecordSettings, RecordStore, make_record, open_record, record_key
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.reasons import Reason
from p2pnode.wire.envelope import decode_envelope, encode_envelope
from p2pnode.wire.messages.discovery import Record
from p2pnode.wire.messages.session import Envelope

START = 1_800_000_000.0
NETWORK = b"n" * 32
PUBLISHERS = [Identity(bytes([number]) * 32) for number in range(5)]
SALTS = [b"", b"a", b"b"]
PEERS = [(bytes([number]) * 32, f"20.0.{number // 3}.{number}:1") for number in range(9)]
BOUNDS = RecordSettings(
    records_max=7, record_bytes_max=2400, records_per_publisher_max=2, records_per_network_max=4, keep_seconds=300.0,
    puts_per_second=2.0, puts_burst=6.0, put_rates_max=6,
)  # fmt: skip
GUARD = GuardSettings(checks_per_second=3.0, checks_burst=20.0, remembered_max=8)
BUDGET_REASONS = {Reason.RATE, Reason.STORE_FULL, Reason.BUSY}

publishers = st.sampled_from(PUBLISHERS)
salts = st.sampled_from(SALTS)
peers = st.sampled_from(PEERS)
sequences = st.integers(1, 4)
values = st.sampled_from([b"", b"one", b"two", b"x" * 600])
lives = st.sampled_from([5.0, 60.0, 400.0, 3600.0, 86_400.0])


class Puts(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.now = START
        self.store = RecordStore(BOUNDS, RecordChecker(NETWORK, SignatureGuard(GUARD)).unasked)
        self.genuine = {}
        self.charged = {}
        self.before = {}

    def put(self, data, peer, replaces=0):
        """Put bytes, keep account of whose network pays, and give the refusal's reason or None."""
        node_id, address = peer
        # What has expired is gone before anything is added; its network no longer pays for it.
        live = {record.key for record in self.store.records() if record.expires > self.now}
        try:
            record = self.store.put(data, node_id, address, self.now, replaces)
        except (Refused, ProtocolViolation) as error:
            self.forget_gone()
            return error.reason
        self.charged = {key: network for key, network in self.charged.items() if key in live}
        self.forget_gone()
        self.charged.setdefault(record.key, group_of(address))
        return None

    def forget_gone(self):
        held = {record.key for record in self.store.records()}
        self.charged = {key: network for key, network in self.charged.items() if key in held}

    def present(self, key):
        return self.store.get(key, self.now)

    @rule(publisher=publishers, salt=salts, sequence=sequences, value=values, life=lives, peer=peers, replaces=st.integers(0, 4))
    def put_genuine(self, publisher, salt, sequence, value, life, peer, replaces):
        key = record_key(publisher.node_id, salt)
        # Whole seconds since the start, so that equal statements come up and not only contradictions.
        expires_ms = round((START + life) * 1000)
        record = make_record(publisher, NETWORK, Record(salt, sequence, expires_ms, value))
        self.genuine[record.data] = record
        before = self.present(key)
        reason = self.put(record.data, peer, replaces)
        if record.expires <= self.now:
            assert reason in {Reason.EXPIRED, Reason.RATE}
            return
        if reason is None:
            assert self.present(key) == record
            assert before is None or before.data == record.data or before.sequence < sequence
        elif before is None:
            assert reason in BUDGET_REASONS
        elif before.sequence > sequence:
            assert reason in {Reason.STALE} | BUDGET_REASONS
        elif before.sequence == sequence:
            assert reason in {Reason.TWO_VERSIONS} | BUDGET_REASONS
            assert reason is not Reason.TWO_VERSIONS or (before.value, before.expires) != (value, record.expires)
        else:
            assert reason in {Reason.CONDITION} | BUDGET_REASONS
            assert reason is not Reason.CONDITION or replaces not in (0, before.sequence)

    @precondition(lambda self: self.genuine)
    @rule(pick=st.integers(0), peer=peers)
    def put_an_old_one_again(self, pick, peer):
        data = list(self.genuine)[pick % len(self.genuine)]
        self.put(data, peer)

    @precondition(lambda self: self.genuine)
    @rule(pick=st.integers(0), peer=peers, kind=st.sampled_from(["signer", "body", "bit", "network", "far", "future"]))
    def put_a_bad_one(self, pick, peer, kind):
        good = list(self.genuine.values())[pick % len(self.genuine)]
        envelope = decode_envelope(good.data)
        thief = next(other for other in PUBLISHERS if other.public_key != envelope.signer)
        owner = next(other for other in PUBLISHERS if other.public_key == envelope.signer)
        if kind == "signer":
            bad = encode_envelope(Envelope(30, envelope.body, thief.public_key, envelope.signature))
        elif kind == "body":
            other = decode_envelope(make_record(thief, NETWORK, Record(good.salt, 9, round((self.now + 60) * 1000), b"!")).data)
            bad = encode_envelope(Envelope(30, other.body, envelope.signer, other.signature))
        elif kind == "bit":
            bad = good.data[:-1] + bytes([good.data[-1] ^ 1])
        elif kind == "network":
            bad = make_record(owner, b"o" * 32, Record(good.salt, 9, round((self.now + 60) * 1000), b"!")).data
        elif kind == "far":
            bad = make_record(owner, NETWORK, Record(good.salt, 9, round((self.now + 86_401) * 1000), b"!")).data
        else:
            ahead = round((self.now + 601) * 1000)
            bad = make_record(owner, NETWORK, Record(good.salt, ahead, round((self.now + 60) * 1000), b"!")).data
        assert self.put(bad, peer) is not None
        assert all(record.data != bad for record in self.store.records())

    @rule(seconds=st.sampled_from([0.1, 1.0, 30.0, 300.0, 4000.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def expire(self):
        self.store.expire(self.now)
        assert self.store.deadline > self.now
        assert all(record.expires > self.now for record in self.store.records())
        self.forget_gone()

    @invariant()
    def every_bound_holds(self):
        records = self.store.records()
        assert len(records) == len(self.store) <= BOUNDS.records_max
        assert sum(len(record.data) for record in records) == self.store.size_bytes <= BOUNDS.record_bytes_max
        for publisher in PUBLISHERS:
            mine = [record for record in records if record.publisher == publisher.node_id]
            assert len(mine) <= BOUNDS.records_per_publisher_max
        for network in {group_of(address) for _, address in PEERS}:
            assert list(self.charged.values()).count(network) <= BOUNDS.records_per_network_max
        assert len({record.key for record in records}) == len(records)
        assert all(self.store.deadline <= record.expires for record in records)

    @invariant()
    def nothing_forged_is_held(self):
        for record in self.store.records():
            assert self.genuine[record.data] == record
            assert open_record(record.data, NETWORK, record.expires - 1) == record

    @invariant()
    def nothing_expired_is_given(self):
        for record in self.store.records():
            found = self.present(record.key)
            assert found == (record if record.expires > self.now else None)

    @invariant()
    def a_held_sequence_never_falls(self):
        live = {record.key: record for record in self.store.records() if record.expires > self.now}
        for key, old in self.before.items():
            # One that was dropped to make room, or expired, may come back in any version.
            if key in live and old.expires > self.now:
                assert live[key].sequence >= old.sequence
        self.before = live


class CountsStayExact(Puts):
    """The store's own tallies against a recount; apart, because it looks inside."""

    @invariant()
    def tallies_match(self):
        held = self.store._held
        if held is None:
            return
        counts = {}
        for entry in held.entries.values():
            counts[entry.record.publisher] = counts.get(entry.record.publisher, 0) + 1
        assert held.publishers == counts
        assert sum(held.networks.values()) == len(held.entries)
        assert {key: entry.network for key, entry in held.entries.items()} == self.charged
        assert len(held.rates._buckets) <= BOUNDS.put_rates_max


TestPuts = pytest.mark.slow(Puts.TestCase)
TestPuts.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCountsStayExact = pytest.mark.slow(CountsStayExact.TestCase)
TestCountsStayExact.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
