"""Storing one record on the nodes a lookup found, counting who took it, trying again where it helps. A pure machine.

"Published" means that at least half of the nodes that should hold the record said so. Without that count, a publication that
reached one holder of sixteen looks like any other until somebody does not find the record.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import Contact

# Reasons that a second try, moments later, may not meet again. Every other one is about the record itself.
PASSING: Final = frozenset({
    Reason.RATE, Reason.BUSY, Reason.TOO_MANY_REQUESTS, Reason.TOO_MANY_CONNECTIONS, Reason.TOO_SLOW, Reason.DEADLINE,
    Reason.CONNECTION_LOST, Reason.IDLE, Reason.DUPLICATE_SESSION, Reason.SHUTTING_DOWN, Reason.INTERNAL,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class PublishSettings:
    """How a record is stored.

    holders: k, how many nodes should hold a record. parallel: requests in flight at once. attempts_max: rounds over those
    that did not answer; the wait before each doubles from backoff_seconds, times a random factor in [0.5, 1).
    """

    holders: int = 16
    parallel: int = 8
    attempts_max: int = 3
    backoff_seconds: float = 2.0


@dataclass(frozen=True, slots=True)
class Publication:
    """How a publication ended. asked: nodes that were asked to hold it; acks: those that said yes; needed: for success.

    attempts: rounds that were made. refusals: (reason, how many nodes) of those that did not take it, by reason;
    `too-slow` stands for no answer at all.
    """

    key: bytes
    sequence: int
    acks: int
    asked: int
    needed: int
    attempts: int
    refusals: tuple[tuple[Reason, int], ...] = ()

    @property
    def is_stored(self) -> bool:
        """Whether enough nodes hold the record for it to be found."""
        return self.acks >= self.needed


def acks_needed(settings: PublishSettings, holders_expected: int) -> int:
    """Give how many must acknowledge: half of k, or half of all nodes that could hold it where these are fewer; at least one.

    holders_expected: other servers in the network, by the size estimate. Never the number of contacts that a lookup found:
    a node with a drained table finds one, stores on one, and must not call that a success.
    """
    return max(1, (min(settings.holders, holders_expected) + 1) // 2)


class PublishMachine:
    """One publication. The caller sends a StoreRecord to every contact that `next` gives, and reports each one's end.

    contacts: those of the lookup, nearest first, already spread over networks. uniform: a float in [0, 1) each call.
    """

    __slots__ = ("_acked", "_attempts", "_failures", "_flying", "_key", "_needed", "_retry_at", "_sequence", "_settings",
                 "_uniform", "_waiting")  # fmt: skip

    def __init__(
        self,
        key: bytes,
        sequence: int,
        contacts: Sequence[Contact],
        holders_expected: int,
        settings: PublishSettings,
        uniform: Callable[[], float],
    ) -> None:
        self._key = key
        self._sequence = sequence
        self._settings = settings
        self._uniform = uniform
        self._needed = acks_needed(settings, holders_expected)
        self._waiting = deque({contact.node_id: contact for contact in contacts}.values())
        self._flying: dict[bytes, Contact] = {}
        self._acked: dict[bytes, None] = {}
        self._failures: dict[bytes, tuple[Contact, Reason]] = {}
        self._attempts = 1 if self._waiting else 0
        self._retry_at = inf

    def next(self, now: float) -> list[Contact]:
        """Give the contacts to ask now. Call it at the start, after each end of a request, and at `deadline`."""
        if now >= self._retry_at:
            self._retry_at = inf
            again = [contact for contact, reason in self._failures.values() if reason in PASSING]
            for contact in again:
                del self._failures[contact.node_id]
            self._waiting.extend(again)
            self._attempts += 1
        asked = []
        while self._waiting and len(self._flying) < self._settings.parallel:
            contact = self._waiting.popleft()
            self._flying[contact.node_id] = contact
            asked.append(contact)
        return asked

    def answered(self, node_id: bytes, now: float) -> None:
        """A node said that it holds the record."""
        if self._flying.pop(node_id, None) is not None:
            self._acked[node_id] = None
            self._settle(now)

    def failed(self, node_id: bytes, reason: Reason | None, now: float) -> None:
        """A node refused, with a reason, or did not answer (None)."""
        contact = self._flying.pop(node_id, None)
        if contact is not None:
            self._failures[node_id] = (contact, reason or Reason.TOO_SLOW)
            self._settle(now)

    @property
    def deadline(self) -> float:
        """When `next` may give contacts without a request having ended; infinite when it will not."""
        return self._retry_at

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be asked."""
        return not self._waiting and not self._flying and self._retry_at == inf

    @property
    def publication(self) -> Publication:
        """How it stands, or once `is_over`, how it ended."""
        counts: dict[Reason, int] = {}
        for _, reason in self._failures.values():
            counts[reason] = counts.get(reason, 0) + 1
        refusals = tuple(sorted(counts.items(), key=lambda item: item[0].value))
        acks = len(self._acked)
        asked = acks + len(self._failures) + len(self._flying) + len(self._waiting)
        return Publication(self._key, self._sequence, acks, asked, self._needed, self._attempts, refusals)

    def _settle(self, now: float) -> None:
        """At the end of a round that fell short, wait for another one if some of the failures may pass."""
        if self._waiting or self._flying or len(self._acked) >= self._needed or self._attempts >= self._settings.attempts_max:
            return
        if any(reason in PASSING for _, reason in self._failures.values()):
            backoff = self._settings.backoff_seconds * 2.0 ** (self._attempts - 1)
            self._retry_at = now + backoff * (0.5 + self._uniform() / 2)
