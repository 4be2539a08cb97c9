"""Nodes that lie, as plain classes on the same network as everybody else. They know more than a real attacker would.

`Attackers` is what a whole attack shares: who they are, where their victims are (all of them: the worst case), and which keys
they are after. Each class is one node's behaviour; `plan` makes the nodes of one kind of attack.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Final

from p2pnode.crypto.hashing import document_hash
from p2pnode.crypto.keys import node_id_of
from p2pnode.discovery.records.record import record_key
from p2pnode.sim.chance import Random, seeded
from p2pnode.sim.driver import Driver, NodeOptions
from p2pnode.wire.codec import decode
from p2pnode.wire.envelope import decode_envelope, encode_envelope
from p2pnode.wire.messages.discovery import (
    RECORD_BYTES_MAX,
    Closest,
    Contact,
    DialBack,
    DialBackResult,
    FindNode,
    FindProviders,
    FindRecord,
    FoundProviders,
    FoundRecord,
    Record,
    StoreProvider,
    StoreRecord,
)
from p2pnode.wire.messages.session import Done, Envelope
from p2pnode.wire.registry import Message

K: Final = 16
# An attacker speaks to every victim within this time, and again after the next.
ANNOUNCE_SECONDS: Final = 20.0
AGAIN_SECONDS: Final = 240.0
FLOOD_PER_SECOND: Final = 50
# Records and old answers that an attacker remembers.
MEMORY_MAX: Final = 256
# Subnets of attackers begin here, away from those that scenarios give to others.
FIRST_SUBNET: Final = 1000


@dataclass(slots=True)
class Attackers:
    """What one attack's nodes share. victims: gives the contacts to poison now. is_on: False stops everything at once."""

    driver: Driver
    victims: Callable[[], Sequence[Contact]]
    chance: Random
    indices: list[int] = field(default_factory=list)
    is_on: bool = True
    _own: list[Contact] = field(default_factory=list)

    def own(self) -> list[Contact]:
        """Give the attackers' contacts, as far as their machines are up."""
        if len(self._own) < len(self.indices):
            found = [self.driver.contact(index) for index in self.indices]
            self._own = [contact for contact in found if contact.addresses]
        return self._own

    def nearest(self, target: bytes, count: int) -> tuple[Contact, ...]:
        """Give the attackers nearest to a target."""
        place = int.from_bytes(target, "big")
        return tuple(nsmallest(min(count, K), self.own(), key=lambda each: int.from_bytes(each.node_id, "big") ^ place))


class Ring:
    """Claims to be a good server, speaks to everybody, names only its fellows, takes records and drops them.

    With chosen ids it is an eclipse, with random ones a Sybil swarm or a poisoner of tables, by who its fellows are.
    """

    def __init__(self, attackers: Attackers) -> None:
        self.attackers = attackers
        self.index = -1

    def begin(self, driver: Driver, index: int) -> None:
        """Speak to every victim, soon and again."""
        self.index = index
        self._announce()

    def answer(self, asker: Contact, message: Message, now: float) -> Message | None:
        """Answer like a server whose whole world are its fellows."""
        match message:
            case FindNode(target, _, count):
                return Closest(self.named(target, count), True)
            case FindRecord(key, _, count):
                return FoundRecord(self.record(key), self.named(key, count), True)
            case FindProviders(key, _, count):
                return FoundProviders((), self.named(key, count), True)
            case StoreRecord(record):
                self.stored(record)
                return Done()
            case StoreProvider():
                return Done()
            case DialBack(addresses):
                return DialBackResult(addresses[0] if addresses else "", "refused")
        return None

    def named(self, target: bytes, count: int) -> tuple[Contact, ...]:
        """Give the contacts it tells others of."""
        return self.attackers.nearest(target, count)

    def record(self, key: bytes) -> bytes:
        """Give the record it hands out: none."""
        return b""

    def stored(self, record: bytes) -> None:
        """Somebody trusts it with a record: it is dropped."""

    def _announce(self) -> None:
        attackers = self.attackers
        if not attackers.is_on:
            return
        for victim in attackers.victims():
            attackers.driver.schedule(attackers.chance.random() * ANNOUNCE_SECONDS, lambda victim=victim: self._speak(victim))  # type: ignore[misc]
        attackers.driver.schedule(AGAIN_SECONDS, self._announce)

    def _speak(self, victim: Contact) -> None:
        if self.attackers.is_on:
            message = FindNode(victim.node_id, True, K)
            self.attackers.driver.ask(self.index, victim, message, lambda reply: None)


class Poisoner(Ring):
    """Names nodes that do not exist, at addresses of others, near whatever is asked for."""

    def named(self, target: bytes, count: int) -> tuple[Contact, ...]:
        """Make up contacts."""
        attackers = self.attackers
        victims = attackers.victims()
        place = int.from_bytes(target, "big")
        made = []
        for number in range(min(count, K)):
            false_id = (place ^ attackers.chance.getrandbits(240 + number % 8)).to_bytes(32, "big")
            address = victims[int(attackers.chance.random() * len(victims))].addresses
            made.append(Contact(false_id, address))
        return tuple(made)


class Liar(Ring):
    """Names real nodes, but the farthest instead of the nearest, so that lookups lose their way."""

    def named(self, target: bytes, count: int) -> tuple[Contact, ...]:
        """Give honest nodes far from the target."""
        place = int.from_bytes(target, "big")
        victims = self.attackers.victims()
        sample = [victims[int(self.attackers.chance.random() * len(victims))] for _ in range(2 * K)]
        ordered = sorted(sample, key=lambda each: int.from_bytes(each.node_id, "big") ^ place, reverse=True)
        return tuple(dict.fromkeys(ordered[: min(count, K)]))


class Replayer(Ring):
    """Keeps the oldest version of every record it is given and hands it out as if it were the newest."""

    def __init__(self, attackers: Attackers, memory: dict[bytes, bytes]) -> None:
        super().__init__(attackers)
        self.memory = memory

    def stored(self, record: bytes) -> None:
        """Keep the first version."""
        key = _key_of(record)
        if len(self.memory) < MEMORY_MAX:
            self.memory.setdefault(key, record)

    def record(self, key: bytes) -> bytes:
        """Hand out the old version."""
        return self.memory.get(key, b"")


class Forger(Replayer):
    """Hands out records that it has changed, or another key's, under a signature that does not fit."""

    def record(self, key: bytes) -> bytes:
        """Hand out a changed record, or a good one of another key."""
        held = self.memory.get(key)
        if held is None:
            return next(iter(self.memory.values()), b"")
        envelope = decode_envelope(held)
        body = bytearray(envelope.body)
        body[-1] ^= 1
        return encode_envelope(Envelope(envelope.kind, bytes(body), envelope.signer, envelope.signature))


class Silent(Ring):
    """Speaks to everybody, answers the first question of each, which is the check, and then nothing any more."""

    def __init__(self, attackers: Attackers) -> None:
        super().__init__(attackers)
        self._answered: dict[bytes, None] = {}

    def answer(self, asker: Contact, message: Message, now: float) -> Message | None:
        """Answer once."""
        if asker.node_id in self._answered:
            return None
        self._answered[asker.node_id] = None
        return super().answer(asker, message, now)


class Flooder(Ring):
    """Asks everybody as fast as it can, and names its fellows when asked."""

    def begin(self, driver: Driver, index: int) -> None:
        """Begin to flood."""
        super().begin(driver, index)
        self._flood()

    def _flood(self) -> None:
        attackers = self.attackers
        if not attackers.is_on:
            return
        victims = attackers.victims()
        for _ in range(FLOOD_PER_SECOND if victims else 0):
            victim = victims[int(attackers.chance.random() * len(victims))]
            target = attackers.chance.randbytes(32)
            message = FindRecord(target, True, K) if attackers.chance.random() < 0.5 else FindNode(target, True, K)
            attackers.driver.ask(self.index, victim, message, lambda reply: None)
        attackers.driver.schedule(1.0, self._flood)


KINDS: Final[dict[str, str]] = {
    "eclipse": "ids ground to be nearer to a key than any honest node; they take records and drop them",
    "sybil": "random ids that name only each other",
    "poison": "servers that name nodes which do not exist, at addresses of others",
    "liar": "servers that name the farthest nodes they know instead of the nearest",
    "silent": "servers that answer the first question of each node and then nothing",
    "replay": "ids ground to a key that hand out the first version of its record for ever",
    "forge": "ids ground to a key that hand out changed records",
    "flood": f"servers that ask {FLOOD_PER_SECOND} questions a second each",
}
GROUND: Final = ("eclipse", "replay", "forge")


def plan(
    kind: str, driver: Driver, victims: Callable[[], Sequence[Contact]], count: int, subnets: int, key: bytes, within: int
) -> tuple[Attackers, list[NodeOptions]]:
    """Give an attack and the options of its nodes. kind: one of KINDS. subnets: /24 networks that they are spread over.

    key, within: those with ground ids stand nearer to the key than `within`, which is the nearest honest node's distance.
    """
    attackers = Attackers(driver, victims, seeded(driver.seed, f"attack/{kind}/{key.hex()}"))
    memory: dict[bytes, bytes] = {}
    first = FIRST_SUBNET + int.from_bytes(document_hash(key)[:1], "big") * 100
    options = []
    for number in range(count):
        adversary = _adversary(kind, attackers, memory)
        node_id = driver.grind(key, within) if kind in GROUND else b""
        options.append(NodeOptions(subnet=first + number % subnets, node_id=node_id, adversary=adversary))
    return attackers, options


def _adversary(kind: str, attackers: Attackers, memory: dict[bytes, bytes]) -> Ring:
    if kind == "replay":
        return Replayer(attackers, memory)
    if kind == "forge":
        return Forger(attackers, memory)
    classes = {"poison": Poisoner, "liar": Liar, "silent": Silent, "flood": Flooder}
    return classes.get(kind, Ring)(attackers)


def _key_of(record: bytes) -> bytes:
    envelope = decode_envelope(record)
    return record_key(node_id_of(envelope.signer), decode(Record, envelope.body, RECORD_BYTES_MAX).salt)
