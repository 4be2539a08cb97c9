"""Where offers come from, as the market sees it: everybody's at once by gossip, or some by topic in a large network."""

from collections.abc import Sequence
from typing import Protocol

from p2pnode.discovery.gossip.events import Effect, Event
from p2pnode.wire.registry import Message


class OfferSource(Protocol):
    """A pure machine that spreads this node's offer and finds those of others; `gossip.OfferGossip`, `topics.TopicAdverts`."""

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        ...

    def publish(self, data: bytes, now: float, topics: Sequence[bytes] = ()) -> list[Effect]:
        """Spread a signed offer, or a withdrawal, under these topics. Raises ProtocolViolation when nobody would take it."""
        ...

    def search(self, topics: Sequence[bytes], now: float) -> tuple[int, list[Effect]]:
        """Begin to look for offers under these topics, the rarest first; ends with `Found`, maybe at once."""
        ...

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event."""
        ...

    def tick(self, now: float) -> list[Effect]:
        """Do what is due."""
        ...

    def answer(self, asker: bytes, message: Message, now: float) -> tuple[Message, list[Effect]]:
        """Answer a peer's request. Raises Refused, ProtocolViolation."""
        ...
