"""When a node's own records are signed anew and published again. A pure machine; its rows survive restarts.

Every version is saved before it is sent, so that no sequence is ever signed twice with different contents. A sequence is the
time of signing in Unix milliseconds, or one more than the last: a node that lost its disk is ahead of its old records all
the same, and a publisher with a fast clock is noticed by the holders.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf
from typing import Final

from p2pnode.discovery.dht.publishing import Publication
from p2pnode.discovery.records.record import LIFE_SECONDS_MAX
from p2pnode.errors import InputError
from p2pnode.reasons import Reason
from p2pnode.store.records import OwnRecordRow
from p2pnode.wire.messages.discovery import RECORD_VALUE_BYTES_MAX, Record

SALT_BYTES_MAX: Final = 64
LIFE_SECONDS_MIN: Final = 60.0
# A version is due again after half of what is left of its life, earlier by up to a tenth, so that holders are not met in step.
DUE_FRACTION: Final = 0.5
DUE_JITTER: Final = 0.1
# Refusals that the same bytes would meet again; a version signed now may not.
OUTDATED: Final = frozenset({
    Reason.STALE, Reason.TWO_VERSIONS, Reason.EXPIRED, Reason.LIFETIME, Reason.NOT_YET_VALID, Reason.CONDITION,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class RepublishSettings:
    """How own records are kept alive.

    life_seconds: of a version, unless the caller says otherwise; addresses change at most a few times a day, and a record
    of a node that is gone misleads for as long.
    backoff_seconds doubles per publication that fell short up to backoff_seconds_max, each times a factor in [0.5, 1).
    restart_seconds: after a restart the first publications are spread over so long. flight_seconds: a publication whose
    end was not reported for so long is taken as failed. records_max: what holders accept of one publisher.
    """

    life_seconds: float = 7200.0
    backoff_seconds: float = 5.0
    backoff_seconds_max: float = 600.0
    restart_seconds: float = 10.0
    flight_seconds: float = 120.0
    records_max: int = 64


@dataclass(frozen=True, slots=True)
class SaveRecord:
    """Keep this row on disk before anything that follows it."""

    row: OwnRecordRow


@dataclass(frozen=True, slots=True)
class ForgetRecord:
    """Remove the row with this salt from disk."""

    salt: bytes


@dataclass(frozen=True, slots=True)
class PublishRecord:
    """Publish this envelope, then report the end with `RepublishSchedule.ended`."""

    salt: bytes
    data: bytes


Effect = SaveRecord | ForgetRecord | PublishRecord


@dataclass(slots=True)
class _Own:
    """due: when to publish next. flying_until: until when a publication counts as in flight, 0 for none."""

    row: OwnRecordRow
    due: float
    flying_until: float = 0.0
    failures: int = 0
    must_sign: bool = False


class RepublishSchedule:
    """Keeps a node's own records published.

    sign: gives the encoded envelope of a record; raises ValueError if it is too large. rows: from disk.
    uniform: a float in [0, 1) each call. now: Unix seconds, here and everywhere.
    """

    __slots__ = ("_own", "_settings", "_sign", "_uniform")

    def __init__(
        self,
        sign: Callable[[Record], bytes],
        settings: RepublishSettings,
        uniform: Callable[[], float],
        rows: Iterable[OwnRecordRow] = (),
        now: float = 0.0,
    ) -> None:
        self._sign = sign
        self._settings = settings
        self._uniform = uniform
        self._own = {row.salt: _Own(row, now + uniform() * settings.restart_seconds) for row in rows}

    def rows(self) -> list[OwnRecordRow]:
        """Give every own record as it stands."""
        return [own.row for own in self._own.values()]

    def put(self, salt: bytes, value: bytes, now: float, life_seconds: float | None = None) -> list[Effect]:
        """Publish a value from now on; nothing is done when this very value is published already.

        Raises InputError for a salt or value that is too large, a life out of range, or too many records.
        """
        life = self._settings.life_seconds if life_seconds is None else life_seconds
        self._check(salt, value, life)
        own = self._own.get(salt)
        life_ms = round(life * 1000)
        if own is not None and (own.row.value, own.row.life_ms) == (value, life_ms):
            return []
        if own is None:
            own = _Own(OwnRecordRow(salt, value, life_ms, 0, 0, b""), now)
        row = self._signed(replace(own.row, value=value, life_ms=life_ms), now)
        self._own[salt] = own
        own.failures = 0
        return self._publish(own, row, now)

    def remove(self, salt: bytes) -> list[Effect]:
        """Publish a record no longer; its holders forget it when it expires."""
        return [ForgetRecord(salt)] if self._own.pop(salt, None) else []

    def ended(self, salt: bytes, publication: Publication, now: float) -> list[Effect]:
        """Take how a publication ended. One of an older version counts for nothing."""
        own = self._own.get(salt)
        if own is None or own.row.sequence != publication.sequence:
            return []
        own.flying_until = 0.0
        own.must_sign = any(reason in OUTDATED for reason, _ in publication.refusals)
        row = replace(own.row, acks=publication.acks, asked=publication.asked)
        if publication.is_stored:
            own.failures = 0
            row = replace(row, stored_ms=round(now * 1000))
            own.due = now + max(0.0, row.expires_ms / 1000 - now) * (DUE_FRACTION - DUE_JITTER * self._uniform())
        else:
            self._back_off(own, now)
        own.row = row
        return [SaveRecord(row)]

    def tick(self, now: float) -> list[Effect]:
        """Give what is due, signing anew whatever has lived through half of its life or was refused as it is."""
        effects: list[Effect] = []
        for own in self._own.values():
            if own.flying_until:
                if now < own.flying_until:
                    continue
                own.flying_until = 0.0
                self._back_off(own, now)
            if now < own.due:
                continue
            row = own.row
            left_ms = row.expires_ms - now * 1000
            if own.must_sign or left_ms <= row.life_ms * (1 - DUE_FRACTION + DUE_JITTER):
                row = self._signed(row, now)
            effects += self._publish(own, row, now)
        return effects

    @property
    def deadline(self) -> float:
        """When `tick` should run next; infinite without records."""
        return min((own.flying_until or own.due for own in self._own.values()), default=inf)

    def _publish(self, own: _Own, row: OwnRecordRow, now: float) -> list[Effect]:
        is_new = row.sequence != own.row.sequence
        own.row = row
        own.must_sign = False
        own.flying_until = now + self._settings.flight_seconds
        saves: list[Effect] = [SaveRecord(row)] if is_new else []
        return [*saves, PublishRecord(row.salt, row.envelope)]

    def _signed(self, row: OwnRecordRow, now: float) -> OwnRecordRow:
        now_ms = round(now * 1000)
        sequence = max(now_ms, row.sequence + 1, 1)
        expires_ms = now_ms + row.life_ms
        try:
            envelope = self._sign(Record(row.salt, sequence, expires_ms, row.value))
        except ValueError as error:
            raise InputError(f"this value cannot be published: {error}") from error
        return replace(row, sequence=sequence, expires_ms=expires_ms, envelope=envelope, stored_ms=0, acks=0, asked=0)

    def _back_off(self, own: _Own, now: float) -> None:
        wait = min(self._settings.backoff_seconds * 2.0 ** min(own.failures, 30), self._settings.backoff_seconds_max)
        own.failures += 1
        own.due = now + wait * (0.5 + self._uniform() / 2)

    def _check(self, salt: bytes, value: bytes, life_seconds: float) -> None:
        if len(salt) > SALT_BYTES_MAX:
            raise InputError(f"a record's salt has at most {SALT_BYTES_MAX} bytes, not {len(salt)}")
        if len(value) > RECORD_VALUE_BYTES_MAX:
            raise InputError(f"a record's value has at most {RECORD_VALUE_BYTES_MAX} bytes, not {len(value)}")
        if not LIFE_SECONDS_MIN <= life_seconds <= LIFE_SECONDS_MAX:
            raise InputError(f"a record lives for {LIFE_SECONDS_MIN:g} to {LIFE_SECONDS_MAX:g} seconds, not {life_seconds:g}")
        if salt not in self._own and len(self._own) >= self._settings.records_max:
            raise InputError(f"a node publishes at most {self._settings.records_max} records: remove one first")
