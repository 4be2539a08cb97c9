"""Keeps this node's own records published: saves each version, then stores it near its key, and again before it expires."""

import math
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import trio

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.dht.publishing import Publication
from p2pnode.discovery.dht.republishing import (
    Effect,
    ForgetRecord,
    PublishRecord,
    RepublishSchedule,
    RepublishSettings,
    SaveRecord,
)
from p2pnode.discovery.dht.service import DhtService
from p2pnode.discovery.records.record import make_record
from p2pnode.environment import Environment
from p2pnode.errors import PeerError
from p2pnode.metrics import Metrics
from p2pnode.store import records as record_rows

FLIGHTS_MAX: Final = 4


class OwnRecords:
    """The republishing schedule with a disk and a hash table under it. now: seconds of Unix time that never jump."""

    def __init__(
        self,
        environment: Environment,
        identity: Identity,
        network_id: bytes,
        dht: DhtService,
        metrics: Metrics,
        now: Callable[[], float],
        on_deadline: Callable[[float], None],
    ) -> None:
        self._environment = environment
        self._sign = lambda record: make_record(identity, network_id, record).data
        self._dht = dht
        self._metrics = metrics
        self._now = now
        self._on_deadline = on_deadline
        self._flights = 0
        self._nursery: trio.Nursery | None = None
        self._schedule = self._made([])

    async def load(self) -> None:
        """Take up what earlier runs published."""
        self._schedule = self._made(await self._environment.database.read(record_rows.list_own_records))

    def start(self, nursery: trio.Nursery | None) -> None:
        """Republish in this nursery from now on; None ends that."""
        self._nursery = nursery

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        return self._schedule.deadline if self._flights < FLIGHTS_MAX else math.inf

    def rows(self) -> Sequence[record_rows.OwnRecordRow]:
        """Give every own record, with how its last publication ended."""
        return self._schedule.rows()

    def tick(self) -> None:
        """Publish what is due."""
        now = self._now()
        if self._nursery is not None and now >= self._schedule.deadline and self._flights < FLIGHTS_MAX:
            effects = self._schedule.tick(now)
            if effects:
                self._nursery.start_soon(self._run_quietly, effects)

    async def publish(self, salt: bytes, value: bytes, life_seconds: float | None = None) -> Publication:
        """Publish a value now and keep it published; says how many nodes took it. Raises InputError for what nobody takes.

        Cancelled: the record stays among those that are kept published.
        """
        effects = self._schedule.put(salt, value, self._now(), life_seconds)
        if not effects:
            row = next(row for row in self._schedule.rows() if row.salt == salt)
            effects = [PublishRecord(salt, row.envelope)]
        publication = await self._run(effects)
        assert publication is not None, "putting a value publishes it"
        return publication

    async def publish_quietly(self, salt: bytes, value: bytes) -> None:
        """Publish a value and keep it published; the schedule sees to what goes wrong."""
        with suppress(PeerError):
            await self.publish(salt, value)

    async def _run_quietly(self, effects: Sequence[Effect]) -> None:
        with suppress(PeerError):
            await self._run(effects)

    async def _run(self, effects: Sequence[Effect]) -> Publication | None:
        publication: Publication | None = None
        self._flights += 1
        try:
            for effect in effects:
                match effect:
                    case SaveRecord(row):
                        await self._save(row)
                    case ForgetRecord(salt):
                        await self._environment.database.write(partial(_remove, salt))
                    case PublishRecord():
                        publication = await self._publish(effect)
        finally:
            self._flights -= 1
            self._on_deadline(self._schedule.deadline)
        return publication

    async def _publish(self, effect: PublishRecord) -> Publication:
        publication = await self._dht.publish(effect.data)
        self._metrics.add("publications_total", "stored" if publication.is_stored else "short")
        self._metrics.set("publish_acks", publication.acks)
        for save in self._schedule.ended(effect.salt, publication, self._now()):
            if isinstance(save, SaveRecord):
                await self._save(save.row)
        return publication

    async def _save(self, row: record_rows.OwnRecordRow) -> None:
        await self._environment.database.write(partial(_put, row))

    def _made(self, rows: Sequence[record_rows.OwnRecordRow]) -> RepublishSchedule:
        return RepublishSchedule(self._sign, RepublishSettings(), self._environment.entropy.uniform, rows, self._now())


def _put(row: record_rows.OwnRecordRow, connection: sqlite3.Connection) -> None:
    record_rows.save_own_record(connection, row)


def _remove(salt: bytes, connection: sqlite3.Connection) -> None:
    record_rows.remove_own_record(connection, salt)
