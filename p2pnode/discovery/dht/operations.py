"""What the hash table is in the middle of: a lookup, what shall follow it, and the storing that may. Pure data with few verbs."""

from dataclasses import dataclass
from typing import Final

from p2pnode.discovery.dht.asks import LookupOutcome
from p2pnode.discovery.dht.lookup import Candidate, Lookup
from p2pnode.discovery.dht.publishing import PublishMachine
from p2pnode.discovery.dht.routing_table import place_of
from p2pnode.discovery.dht.upkeep import BACKGROUND, CHECKED, FILL
from p2pnode.wire.messages.discovery import CONTACTS_MAX, FindNode, FindProviders, FindRecord
from p2pnode.wire.registry import Message

Question = type[FindNode] | type[FindRecord] | type[FindProviders]


@dataclass(frozen=True, slots=True)
class Errand:
    """What to do with the nodes that a lookup finds: send each this message. sequence: of the record, 0 for a provider."""

    key: bytes
    sequence: int
    message: Message


class LookupOperation:
    """A lookup under way. question: the class of its asks. errand: what follows. is_own: of our own id or a random one,
    so that its result may tell the size of the network. is_self: of our own id."""

    __slots__ = (
        "deadline", "errand", "is_own", "is_self", "is_server", "lookup", "messages", "operation_id", "question", "started",
    )  # fmt: skip

    def __init__(
        self, operation_id: int, question: Question, lookup: Lookup, is_server: bool, started: float, deadline: float
    ) -> None:
        self.operation_id = operation_id
        self.question = question
        self.lookup = lookup
        self.is_server = is_server
        self.started = started
        self.deadline = deadline
        self.errand: Errand | None = None
        self.is_own = False
        self.is_self = False
        self.messages: dict[int, Message] = {}

    def message(self, candidate: Candidate) -> tuple[Message, int]:
        """Give what to ask a candidate, and for how many contacts; one message object serves all asks alike."""
        count = min(CONTACTS_MAX, self.lookup.wanted(candidate))
        message = self.messages.get(count)
        if message is None:
            message = self.messages[count] = self.question(self.lookup.target, self.is_server, count)
        return message, count

    def outcome(self, now: float) -> LookupOutcome:
        """Give the lookup's result as it stands."""
        lookup = self.lookup
        found = lookup.found()
        return LookupOutcome(
            target=lookup.target,
            contacts=tuple(candidate.contact for candidate in found),
            record=lookup.best.data if lookup.best is not None else b"",
            providers=tuple(lookup.providers.values()),
            hops=found[0].depth if found else 0,
            asked=lookup.asked,
            failed=lookup.failures,
            seconds=now - self.started,
        )

    def distances(self) -> list[int]:
        """Give the distances from the target of those found, nearest first."""
        place = place_of(self.lookup.target)
        return [place_of(candidate.contact.node_id) ^ place for candidate in self.lookup.found()]


class PublishOperation:
    """Storing under way."""

    __slots__ = ("errand", "machine", "operation_id")

    def __init__(self, operation_id: int, errand: Errand, machine: PublishMachine) -> None:
        self.operation_id = operation_id
        self.errand = errand
        self.machine = machine


class CheckOperation:
    """A check under way; one object for all of a kind. kind: of `upkeep`, or PUSH."""

    __slots__ = ("kind",)

    def __init__(self, kind: int) -> None:
        self.kind = kind


# A record handed on to a node that should hold it.
PUSH: Final = 3
CHECKS: Final = tuple(CheckOperation(kind) for kind in (CHECKED, BACKGROUND, FILL, PUSH))
Operation = LookupOperation | PublishOperation | CheckOperation
