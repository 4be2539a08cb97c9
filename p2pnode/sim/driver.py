"""What an experiment may do to a simulated network, whichever way that network is run.

Two drivers keep this Protocol. `fast_driver.FastDriver` steps the pure discovery machines from one heap, without trio, for
thousands of nodes; `world_driver.WorldDriver` runs real `Node`s with sessions, limits and databases, for hundreds. An
experiment is written once, in callbacks: nothing in it waits, so neither driver has to pretend to be the other.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.registry import Message

# What `put` lets a record live by default, and thereby how often its publisher writes it again (half of it, with jitter).
RECORD_SECONDS = 7200.0


class Adversary(Protocol):
    """A node that does not keep to the protocol. It sits on the same network and is asked like any other node."""

    def begin(self, driver: "Driver", index: int) -> None:
        """Called once when the node is up: whatever it does on its own starts here, with `driver.schedule` and `ask`."""
        ...

    def answer(self, asker: Contact, message: Message, now: float) -> Message | None:
        """Give the answer to a request, or None to stay silent. now: Unix seconds."""
        ...


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How one node differs from the others.

    entry_points: nodes whose contacts it knows at the start. is_reachable: whether others can open a connection to it.
    subnet: nodes of one number share a /24 network; -1 gives the node one of its own. node_id: a chosen id, as somebody has
    who ground keys for it; empty: its key's. offer_bytes: size of the offer it announces; 0 sells nothing.
    is_slow: answers later than most. skew_seconds: how far its wall clock is ahead.
    """

    entry_points: tuple[int, ...] = ()
    is_reachable: bool = True
    subnet: int = -1
    node_id: bytes = b""
    offer_bytes: int = 0
    adversary: Adversary | None = None
    is_slow: bool = False
    skew_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Found:
    """How a lookup or a get ended. contacts: ids of those that answered, nearest first. value: the record's, empty for none.

    hops: referral depth of the nearest node found. asked, failed: requests. seconds: virtual.
    """

    contacts: tuple[bytes, ...]
    value: bytes
    hops: int
    asked: int
    failed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Stored:
    """How a put ended. acknowledgements: nodes that hold the record; is_stored: enough of them, by the protocol's rule."""

    key: bytes
    acknowledgements: int
    asked: int
    is_stored: bool
    seconds: float


class Driver(Protocol):
    """A simulated network. Nodes are numbered from 0 in the order they were added; a number is never used again.

    Callbacks run on the driver's own time and must not wait. Operations of a node that crashes never call back.
    """

    kind: str
    seed: int

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""
        ...

    def schedule(self, delay: float, action: Callable[[], None]) -> None:
        """Call a function after so many virtual seconds."""
        ...

    def add_node(self, options: NodeOptions) -> int:
        """Switch a new node on and give its number; it joins by itself."""
        ...

    def crash(self, index: int) -> None:
        """Cut a node's power: no goodbye, and what it had not saved is lost."""
        ...

    def restart(self, index: int) -> None:
        """Switch a crashed or stopped node on again, with its key and its disk."""
        ...

    def leave(self, index: int) -> None:
        """Stop a node in order: its peers hear a goodbye."""
        ...

    def is_up(self, index: int) -> bool:
        """Say whether a node runs."""
        ...

    def is_server(self, index: int) -> bool:
        """Say whether a node serves the hash table in its own view; false for one that is down."""
        ...

    def contact(self, index: int) -> Contact:
        """Give a node's id and addresses."""
        ...

    def lookup(self, index: int, target: bytes, done: Callable[[Found], None]) -> None:
        """Let a node find the nodes nearest to a target."""
        ...

    def put(self, index: int, salt: bytes, value: bytes, done: Callable[[Stored], None]) -> bytes:
        """Let a node publish a record under its key and a salt, and keep it alive; gives the key."""
        ...

    def get(self, index: int, key: bytes, done: Callable[[Found], None]) -> None:
        """Let a node find a record."""
        ...

    def ask(self, index: int, contact: Contact, message: Message, done: Callable[[Message | None], None]) -> None:
        """Send one request past the node's own machines, as adversaries do; None: no answer or a refusal."""
        ...

    def announce(self, index: int, size_bytes: int) -> None:
        """Let a node publish a new version of its offer."""
        ...

    def withdraw(self, index: int) -> None:
        """Let a node take its offer back."""
        ...

    def buy(self, index: int, done: Callable[[str], None]) -> None:
        """Let a node buy one inference from whoever sells; done gets how it ended. Raises ConfigError without a market."""
        ...

    def books(self) -> Mapping[bytes, sqlite3.Connection]:
        """Give every machine's database by node id, those that are down too; empty on a driver without disks."""
        ...

    def offers(self, index: int) -> Mapping[bytes, int]:
        """Give what a node knows of offers: publisher's id to version."""
        ...

    def offer(self, index: int, publisher: bytes) -> int:
        """Give the version of one publisher's offer that a node would show; 0 for none."""
        ...

    def neighbours(self, index: int) -> Sequence[bytes]:
        """Give the ids of a node's gossip neighbours."""
        ...

    def table(self, index: int) -> Sequence[bytes]:
        """Give the ids in a node's routing table."""
        ...

    def grind(self, key: bytes, within: int) -> bytes:
        """Give a new id at a distance below `within` from a key, as an attacker finds one by making keys until one fits."""
        ...

    def fill_tables(self) -> None:
        """Give every node the table it would have after a long calm. Raises ConfigError where the driver cannot."""
        ...

    def partition(self, groups: Sequence[Sequence[int]], *, is_symmetric: bool = True) -> None:
        """Let nothing pass between groups of nodes. Asymmetric: only from a later group to an earlier one nothing passes."""
        ...

    def heal(self) -> None:
        """End all partitions, loss and slowness."""
        ...

    def set_loss(self, fraction: float) -> None:
        """Lose this share of requests and replies from now on."""
        ...

    def counters(self) -> Mapping[str, float]:
        """Give running totals: `messages`, `bytes`, `gossip_bytes`, `timeouts`, `tasks`."""
        ...

    def fail(self, message: str) -> None:
        """End the run with an error: an experiment found what must never be."""
        ...

    def run(self, experiment: Callable[["Driver"], None], seconds: float) -> str:
        """Start an experiment and let so many virtual seconds pass; gives the digest of everything that happened."""
        ...
