"""How much processor time strangers' signatures may take: what was checked is remembered, and the rest has a rate.

One Ed25519 verification takes about 0.1 ms, a thousand times a peer's cost of sending us a record. Documents travel by many
ways, so most arrive again; their hashes are remembered. The rate bounds what is left, for all peers together.
"""

from dataclasses import dataclass
from typing import Final

from p2pnode.crypto.hashing import document_hash
from p2pnode.discovery.records.record import CheckedRecord, open_record, parse_record
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.limits import TokenBucket

REMEMBERED_MAX: Final = 2048


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """checks_per_second, checks_burst: of documents that others send unasked. remembered_max: hashes of documents known good.

    300 a second are 3 % of one core; a holder in a network of ten thousand nodes meets fewer than one a second.
    """

    checks_per_second: float = 300.0
    checks_burst: float = 600.0
    remembered_max: int = REMEMBERED_MAX


class SignatureGuard:
    """Says whether a document must be checked, and whether there is time for it. One for all kinds of documents of a node."""

    __slots__ = ("_bucket", "_metrics", "_remembered", "_settings")

    def __init__(self, settings: GuardSettings, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._bucket: TokenBucket | None = None
        self._remembered: dict[bytes, None] | None = None

    def __len__(self) -> int:
        return len(self._remembered or ())

    def is_known(self, digest: bytes) -> bool:
        """Say whether these exact bytes were checked and found good. digest: BLAKE2b-256 of document and signature."""
        if self._remembered is None or digest not in self._remembered:
            return False
        del self._remembered[digest]
        self._remembered[digest] = None  # last again: the least recently met is forgotten first
        self._count("remembered")
        return True

    def take(self, now: float) -> None:
        """Claim the time for one check of something that came unasked. Raises Refused(BUSY) when there is none left."""
        if self._bucket is None:
            self._bucket = TokenBucket(self._settings.checks_per_second, self._settings.checks_burst, now)
        if not self._bucket.take(now):
            self._count("over-budget")
            if self._metrics is not None:
                self._metrics.add("limit_hits_total", "checks_per_second")
            raise Refused(Reason.BUSY, "checks_per_second")

    def checked(self, digest: bytes, is_good: bool) -> None:
        """Note the outcome of a check. Only good ones are remembered: who sends a bad one loses the link."""
        self._count("good" if is_good else "bad")
        if not is_good:
            return
        if self._remembered is None:
            self._remembered = {}
        if len(self._remembered) >= self._settings.remembered_max:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[digest] = None

    def _count(self, outcome: str) -> None:
        if self._metrics is not None:
            self._metrics.add("signature_checks_total", outcome)


class RecordChecker:
    """Opens records of one network, each signature once.

    `unasked` is what a RecordStore is given: bounded in rate. `asked` is for answers to our own requests, whose number we
    bound ourselves: a flood of stores must not blind this node's own lookups.
    """

    __slots__ = ("_guard", "_network_id")

    def __init__(self, network_id: bytes, guard: SignatureGuard) -> None:
        self._network_id = network_id
        self._guard = guard

    def unasked(self, data: bytes, now: float) -> CheckedRecord:
        """Give the record that a peer wants held. Raises what `open_record` raises, and Refused(BUSY)."""
        return self._open(data, now, is_asked=False)

    def asked(self, data: bytes, now: float) -> CheckedRecord:
        """Give the record in an answer to our own request. Raises what `open_record` raises."""
        return self._open(data, now, is_asked=True)

    def _open(self, data: bytes, now: float, is_asked: bool) -> CheckedRecord:
        parsed = parse_record(data, now)
        digest = document_hash(data)
        if self._guard.is_known(digest):
            return parsed
        if not is_asked:
            self._guard.take(now)
        try:
            record = open_record(data, self._network_id, now)
        except ProtocolViolation:
            self._guard.checked(digest, is_good=False)
            raise
        self._guard.checked(digest, is_good=True)
        return record
