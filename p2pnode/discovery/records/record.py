"""Signed, expiring records: their key, making and opening them, and the store of those a node holds for others.

After BEP 44: a record is an envelope over `Record`, kept and passed on as the exact bytes that were signed. Its key is
BLAKE2b-256(node id ‖ salt), so whoever knows a node's id can compute where that node's records lie; the holder learns the
node id from the key that signed (docs/decisions/record-keys-from-node-ids.md). The store is memory only: publishers
republish and readers push, so a restarted holder is refilled without a disk write that strangers could cause.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Final, NoReturn, TypeVar

from p2pnode.crypto.hashing import document_hash
from p2pnode.crypto.keys import Identity, node_id_of
from p2pnode.discovery.diversity import group_of
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.limits import TokenBucket
from p2pnode.wire.codec import decode
from p2pnode.wire.envelope import decode_envelope, encode_envelope, open_envelope, seal
from p2pnode.wire.messages.discovery import RECORD_BYTES_MAX, RECORD_VALUE_BYTES_MAX, Record
from p2pnode.wire.registry import number_of

Counted = TypeVar("Counted", bytes, str)

LIFE_SECONDS_MAX: Final = 86_400.0
# How far a publisher's clock may run ahead of ours. Sequences are Unix milliseconds, so a faster clock shows in them.
CLOCK_SKEW_SECONDS: Final = 600.0
# Pairs of contradicting records that are kept as proof; each proves one publisher's fault, and a handful suffices to act.
CONFLICTS_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class RecordSettings:
    """What a node holds for others. Refusals name the field; all sizes in bytes, times in seconds.

    records_per_publisher_max: of one signer. records_per_network_max: handed over from one /24 (IPv6 /48), so that many
    cheap identities in one network cannot fill the store. keep_seconds: a record that nobody stored again for so long is
    the first to make room, however far away its expiry. puts_per_second, puts_burst: of one peer, and of one network.
    exempt_private: private addresses are not bound by limits per network, since a household or test machine shares them.
    """

    records_max: int = 4096
    record_bytes_max: int = 4 << 20
    records_per_publisher_max: int = 64
    records_per_network_max: int = 256
    keep_seconds: float = 7200.0
    puts_per_second: float = 5.0
    puts_burst: float = 60.0
    put_rates_max: int = 1024
    exempt_private: bool = True


@dataclass(frozen=True, slots=True)
class CheckedRecord:
    """A record whose signature and times were checked. expires: Unix seconds. publisher: node id. data: the exact envelope."""

    key: bytes
    sequence: int
    expires: float
    salt: bytes
    value: bytes
    publisher: bytes
    data: bytes


CheckRecord = Callable[[bytes, float], CheckedRecord]


def record_key(node_id: bytes, salt: bytes) -> bytes:
    """Give the key under which a node's record with this salt lies. node_id: 32 bytes, so no two pairs join to one input."""
    return document_hash(node_id + salt)


def make_record(identity: Identity, network_id: bytes, record: Record) -> CheckedRecord:
    """Sign a record as this identity. Raises ValueError when its value or envelope is larger than any holder accepts."""
    data = encode_envelope(seal(record, identity, network_id))
    if len(record.value) > RECORD_VALUE_BYTES_MAX or len(data) > RECORD_BYTES_MAX:
        raise ValueError(f"a signed record of {len(data)} bytes, or its value of {len(record.value)}, is too large")
    return _checked(record, identity.node_id, data)


def parse_record(data: bytes, now: float) -> CheckedRecord:
    """Give the record in an encoded envelope with everything checked but its signature; `open_record` checks that too.

    Raises ProtocolViolation (TOO_LARGE, WRONG_TYPE or a reason of `codec.decode`) for bytes that no clock makes right, and
    Refused with EXPIRED, LIFETIME (expires more than 24 h from now) or NOT_YET_VALID (signed more than 10 min from now).
    """
    if len(data) > RECORD_BYTES_MAX:
        raise ProtocolViolation(Reason.TOO_LARGE, f"a record of {len(data)} bytes")
    envelope = decode_envelope(data)
    if envelope.kind != number_of(Record):
        raise ProtocolViolation(Reason.WRONG_TYPE, f"a document of kind {envelope.kind} where a record was expected")
    if encode_envelope(envelope) != data:
        # Unknown fields of an envelope are outside the signature: anybody could have holders keep bytes in another's name.
        raise ProtocolViolation(Reason.WRONG_TYPE, "unsigned bytes in a record's envelope")
    record = decode(Record, envelope.body, RECORD_BYTES_MAX)
    if record.expires_ms <= now * 1000:
        raise Refused(Reason.EXPIRED, "the record")
    if record.expires_ms > (now + LIFE_SECONDS_MAX) * 1000:
        raise Refused(Reason.LIFETIME, "a record lives for at most 24 hours")
    if record.sequence > (now + CLOCK_SKEW_SECONDS) * 1000:
        raise Refused(Reason.NOT_YET_VALID, "the record was signed by a clock more than 10 minutes ahead")
    return _checked(record, node_id_of(envelope.signer), bytes(data))


def open_record(data: bytes, network_id: bytes, now: float) -> CheckedRecord:
    """Give the checked record in an encoded envelope; costs one Ed25519 verification, made last.

    Raises what `parse_record` raises, and ProtocolViolation(BAD_SIGNATURE).
    """
    parsed = parse_record(data, now)
    open_envelope(decode_envelope(data), Record, network_id)
    return parsed


def is_same_statement(left: CheckedRecord, right: CheckedRecord) -> bool:
    """Say whether two records of one key and sequence say the same; if not, their publisher signed a contradiction."""
    return left.data == right.data or (left.value == right.value and left.expires == right.expires)


def _checked(record: Record, publisher: bytes, data: bytes) -> CheckedRecord:
    key = record_key(publisher, record.salt)
    return CheckedRecord(key, record.sequence, record.expires_ms / 1000, record.salt, record.value, publisher, data)


class PutRates:
    """How often each peer, and each network, may store something. The longest silent one is forgotten for a new one."""

    __slots__ = ("_buckets", "_burst", "_rate", "_size_max")

    def __init__(self, rate: float, burst: float, size_max: int) -> None:
        self._rate = rate
        self._burst = burst
        self._size_max = size_max
        self._buckets: dict[bytes | str, TokenBucket] = {}

    def take(self, from_node: bytes, network: str, now: float) -> bool:
        """Count one request; False when its peer or its network sends too many. network: empty when it is exempt."""
        return self._take(from_node, now) and (not network or self._take(network, now))

    def _take(self, sender: bytes | str, now: float) -> bool:
        bucket = self._buckets.pop(sender, None)
        if bucket is None:
            if len(self._buckets) >= self._size_max:
                del self._buckets[next(iter(self._buckets))]
            bucket = TokenBucket(self._rate, self._burst, now)
        self._buckets[sender] = bucket  # last again: the order of the dict is the order of use
        return bucket.take(now)


@dataclass(slots=True)
class _Entry:
    """network: charged for the record, that of whoever stored it first. rank: the lowest makes room first."""

    record: CheckedRecord
    network: str
    rank: float


class _Held:
    """Everything a store has once it was given something; an empty store has none of it."""

    __slots__ = ("bytes", "conflicts", "entries", "networks", "publishers", "rates", "soonest")

    def __init__(self, settings: RecordSettings) -> None:
        self.entries: dict[bytes, _Entry] = {}
        self.publishers: dict[bytes, int] = {}
        self.networks: dict[str, int] = {}
        self.conflicts: dict[bytes, tuple[bytes, bytes]] = {}
        self.rates = PutRates(settings.puts_per_second, settings.puts_burst, settings.put_rates_max)
        self.bytes = 0
        self.soonest = inf


class RecordStore:
    """The records this node holds for others: one per key, the highest sequence, within every budget of its settings.

    check: gives the checked record in an envelope at a time, or raises; simulations may inject a cheaper one.
    A record that is no longer near this node is not handed on: its publisher republishes to whoever is near then.
    """

    __slots__ = ("_check", "_held", "_metrics", "_settings")

    def __init__(self, settings: RecordSettings, check: CheckRecord, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._check = check
        self._metrics = metrics
        self._held: _Held | None = None

    def __len__(self) -> int:
        return len(self._held.entries) if self._held else 0

    @property
    def size_bytes(self) -> int:
        """The bytes of all envelopes held."""
        return self._held.bytes if self._held else 0

    @property
    def deadline(self) -> float:
        """When the next record may expire, for `expire`; infinite when nothing is held."""
        return self._held.soonest if self._held else inf

    @property
    def conflicts(self) -> dict[bytes, tuple[bytes, bytes]]:
        """Publisher -> two envelopes it signed with one key and sequence and unlike contents: proof that it equivocates."""
        return dict(self._held.conflicts) if self._held else {}

    def records(self) -> list[CheckedRecord]:
        """Give all records held, longest not stored again first; some may have expired since the last `expire`."""
        return [entry.record for entry in self._held.entries.values()] if self._held else []

    def get(self, key: bytes, now: float) -> CheckedRecord | None:
        """Give the record under a key, unless it has expired."""
        entry = self._held.entries.get(key) if self._held else None
        return entry.record if entry and entry.record.expires > now else None

    def put(self, data: bytes, from_node: bytes, from_address: str, now: float, replaces: int = 0) -> CheckedRecord:
        """Hold a record, or refresh it when the same one is held; gives what is held now.

        from_node, from_address: who hands it over, not who signed it. replaces: unless 0, a record that is held already
        must have this sequence (compare and swap). Raises what `check` raises, and Refused with RATE, STALE (a higher
        sequence is held), TWO_VERSIONS (another record with this sequence is held), CONDITION or STORE_FULL.
        """
        held = self._held
        if held is None:
            held = self._held = _Held(self._settings)
        network = group_of(from_address, not self._settings.exempt_private) if from_address else ""
        if not held.rates.take(from_node, network, now):
            self._refuse(Reason.RATE, "puts_per_second")
        record = self._check(data, now)
        self.expire(now)
        entry = held.entries.get(record.key)
        if entry is not None:
            return self._update(held, entry, record, replaces, now)
        self._check_budgets(held, record, network)
        rank = self._rank(record, now)
        self._make_room(held, record.key, len(record.data), 1, rank)
        held.entries[record.key] = _Entry(record, network, rank)
        held.publishers[record.publisher] = held.publishers.get(record.publisher, 0) + 1
        if network:
            held.networks[network] = held.networks.get(network, 0) + 1
        self._grown(held, record, len(record.data))
        return record

    def expire(self, now: float) -> int:
        """Forget what has expired and give the number; costs nothing before `deadline`."""
        held = self._held
        if held is None or now < held.soonest:
            return 0
        gone = [key for key, entry in held.entries.items() if entry.record.expires <= now]
        for key in gone:
            self._drop(held, key)
        held.soonest = min((entry.record.expires for entry in held.entries.values()), default=inf)
        return len(gone)

    def _update(self, held: _Held, entry: _Entry, record: CheckedRecord, replaces: int, now: float) -> CheckedRecord:
        old = entry.record
        if record.sequence < old.sequence:
            raise Refused(Reason.STALE, f"sequence {old.sequence} is held")
        rank = self._rank(record, now)
        if record.sequence == old.sequence:
            if not is_same_statement(old, record):
                self._note_conflict(held, old, record)
                raise Refused(Reason.TWO_VERSIONS, f"another record with sequence {old.sequence} is held")
            record = old
        elif replaces and replaces != old.sequence:
            raise Refused(Reason.CONDITION, f"sequence {old.sequence} is held, not {replaces}")
        growth = len(record.data) - len(old.data)
        self._make_room(held, record.key, growth, 0, rank)
        # The network that was charged first stays charged: a reader who pushes a newer copy must not pay for it, nor be
        # able to free its own network's budget by having another one store the record again.
        del held.entries[record.key]
        held.entries[record.key] = _Entry(record, entry.network, rank)
        self._grown(held, record, growth)
        return record

    def _check_budgets(self, held: _Held, record: CheckedRecord, network: str) -> None:
        if held.publishers.get(record.publisher, 0) >= self._settings.records_per_publisher_max:
            self._refuse(Reason.STORE_FULL, "records_per_publisher_max")
        if network and held.networks.get(network, 0) >= self._settings.records_per_network_max:
            self._refuse(Reason.STORE_FULL, "records_per_network_max")

    def _make_room(self, held: _Held, key: bytes, growth: int, count: int, rank: float) -> None:
        """Drop those that would go first until the newcomer fits. Raises Refused when the newcomer itself would go first."""
        settings = self._settings
        surplus = len(held.entries) + count - settings.records_max
        surplus_bytes = held.bytes + growth - settings.record_bytes_max
        if surplus <= 0 and surplus_bytes <= 0:
            return
        limit = "records_max" if surplus > 0 else "record_bytes_max"
        victims = []
        # The dict is in order of last storing, so nearly in order of rank, which is what makes this sort linear.
        for other, entry in sorted(held.entries.items(), key=_rank_of):
            if surplus <= 0 and surplus_bytes <= 0:
                break
            if other == key:
                continue
            if entry.rank >= rank:
                self._refuse(Reason.STORE_FULL, limit)
            victims.append(other)
            surplus -= 1
            surplus_bytes -= len(entry.record.data)
        if surplus > 0 or surplus_bytes > 0:
            self._refuse(Reason.STORE_FULL, limit)
        for other in victims:
            self._drop(held, other)

    def _rank(self, record: CheckedRecord, now: float) -> float:
        # Without keep_seconds, records made to live for 24 h would outlast every honest one of two hours.
        return min(record.expires, now + self._settings.keep_seconds)

    def _grown(self, held: _Held, record: CheckedRecord, growth: int) -> None:
        held.bytes += growth
        held.soonest = min(held.soonest, record.expires)
        self._gauge(held)

    def _drop(self, held: _Held, key: bytes) -> None:
        entry = held.entries.pop(key)
        held.bytes -= len(entry.record.data)
        subtract(held.publishers, entry.record.publisher)
        if entry.network:
            subtract(held.networks, entry.network)
        self._gauge(held)

    def _gauge(self, held: _Held) -> None:
        if self._metrics is not None:
            self._metrics.set("records_held", len(held.entries))
            self._metrics.set("record_bytes_held", held.bytes)

    def _note_conflict(self, held: _Held, old: CheckedRecord, new: CheckedRecord) -> None:
        if len(held.conflicts) < CONFLICTS_MAX:
            held.conflicts.setdefault(old.publisher, (old.data, new.data))
        if self._metrics is not None:
            self._metrics.add("record_conflicts_total")

    def _refuse(self, reason: Reason, limit: str) -> NoReturn:
        if self._metrics is not None:
            self._metrics.add("limit_hits_total", limit)
        raise Refused(reason, limit)


def _rank_of(item: tuple[bytes, _Entry]) -> float:
    return item[1].rank


def subtract(counts: dict[Counted, int], key: Counted) -> None:
    """Take one from a count and forget it at zero, so that a table of counts is no larger than what it counts."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
