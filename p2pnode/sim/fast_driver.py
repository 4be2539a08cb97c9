"""The fast driver: thousands of discovery machines stepped from one heap, without trio, sessions or sockets.

The machines are the ones that real nodes run; what lies between them is modelled (`fast_network`). Messages pass by reference:
their bodies are encoded for their size alone, and each is charged the constant bytes of its frame. A process holds 100 000 nodes.
"""

import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from p2pnode.crypto.hashing import blake3_256
from p2pnode.crypto.keys import Identity
from p2pnode.discovery.dht.asks import Answered, Ask, Effect, Ended, Failed, LookupOutcome, NeedContacts
from p2pnode.discovery.dht.kademlia import Kademlia
from p2pnode.discovery.dht.publishing import Publication
from p2pnode.discovery.dht.republishing import Effect as RecordEffect
from p2pnode.discovery.dht.republishing import PublishRecord, SaveRecord
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.discovery.records.checks import GuardSettings, RecordChecker, SignatureGuard
from p2pnode.discovery.records.providers import ProviderSettings, ProviderStore
from p2pnode.discovery.records.record import RecordSettings, RecordStore, parse_record, record_key
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.errors import ConfigError, PeerError, ProtocolViolation, Refused
from p2pnode.reasons import Reason
from p2pnode.sim.census import Census
from p2pnode.sim.clock import EPOCH_MS
from p2pnode.sim.driver import RECORD_SECONDS, Driver, Found, NodeOptions, Stored
from p2pnode.sim.fast_gossip import FastGossip
from p2pnode.sim.fast_network import SILENT_LINK_SECONDS, FastNetwork
from p2pnode.sim.fast_node import AGAIN_SECONDS, CRASHED, LEFT, PROBE_SECONDS, ROLE_SECONDS, UP, FastNode
from p2pnode.sim.latency import LatencyModel, flat
from p2pnode.sim.trace import Trace
from p2pnode.wire.messages.discovery import Contact, FindNode
from p2pnode.wire.registry import Message

PORT: Final = 7470
NETWORK_ID: Final = b"simulated network".ljust(32, b"\0")


class FastDriver:
    """`driver.Driver` on one heap. settings: of every node's hash table.

    has_offers: nodes gossip. record_seconds: life of a record. trace: takes every event; without one only the digest is kept.
    """

    kind = "fast"

    def __init__(
        self,
        seed: int,
        latency: LatencyModel | None = None,
        settings: KademliaSettings | None = None,
        *,
        gossip: GossipSettings | None = None,
        has_offers: bool = False,
        record_seconds: float = RECORD_SECONDS,
        trace: Trace | None = None,
    ) -> None:
        self.seed = seed
        self.settings = settings or KademliaSettings(strict_diversity=True)
        self.network = network = FastNetwork(seed, latency or flat(0.01), trace or Trace("messages"))
        self.nodes = network.nodes
        self.chance = network.chance
        self.gossip: FastGossip | None = None
        self._record_seconds = record_seconds
        self._subnets: dict[int, int] = {}
        self._error: str | None = None
        network.serve = self._serve
        if has_offers:
            self.gossip = FastGossip(network, gossip or GossipSettings(), self.retick)
        # One memory of good signatures for all nodes: what one has checked costs the others a look.
        self._checker = RecordChecker(NETWORK_ID, SignatureGuard(GuardSettings(math.inf, math.inf, 1 << 16)))
        self._record_settings = RecordSettings(exempt_private=False)
        self._provider_settings = ProviderSettings(exempt_private=False)

    # --- time ---------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""
        return self.network.now

    def schedule(self, delay: float, action: Callable[[], None]) -> None:
        """Call a function after so many virtual seconds."""
        self.network.at(self.network.now + delay, action)

    def fail(self, message: str) -> None:
        """End the run with an error."""
        self._error = message

    def run(self, experiment: Callable[[Driver], None], seconds: float) -> str:
        """Start an experiment and let so many virtual seconds pass; gives the digest of all events.

        Raises RuntimeError with the message of `fail`.
        """
        experiment(self)
        self.network.run(seconds, lambda: self._error is not None)
        if self._error is not None:
            raise RuntimeError(self._error)
        self.network.trace.close()
        return self.network.trace.digest()

    # --- nodes --------------------------------------------------------------------------------------------------------

    def add_node(self, options: NodeOptions) -> int:
        """Switch a new node on and give its number."""
        index = len(self.nodes)
        seed = blake3_256(b"simulated identity", f"{self.seed}/n{index}".encode())
        node_id = options.node_id or Identity(seed).node_id
        address = self._address(index, options.subnet)
        contact = Contact(node_id, (address,))
        node = FastNode(index, options, contact, seed, self.network.latency.place(self.seed, address), EPOCH_MS / 1000)
        node.entry_points = tuple(self.nodes[known].contact for known in options.entry_points)
        self.nodes.append(node)
        self.network.by_id[node_id] = node
        self._start(node)
        return index

    def _address(self, index: int, subnet: int) -> str:
        if subnet < 0:
            return f"{60 + (index >> 16)}.{index >> 8 & 255}.{index & 255}.1:{PORT}"
        place = self._subnets[subnet] = self._subnets.get(subnet, 0) + 1
        return f"185.{subnet >> 8}.{subnet & 255}.{place % 254 + 1}:{PORT}"

    def _start(self, node: FastNode) -> None:
        node.reset()
        node.state = UP
        node.epoch += 1
        self.network.trace.add(self.network.now, "+", node.name)
        if node.options.adversary is not None:
            node.options.adversary.begin(self, node.index)
            return
        now, uniform = self.network.now + node.wall, self.chance.random
        records = RecordStore(self._record_settings, self._checker.unasked)
        providers = ProviderStore(self._provider_settings, uniform)
        node.dht = Kademlia(node.contact, self.settings, uniform, records, now, self._checker.asked, providers)
        node.role_at = self.network.now + ROLE_SECONDS * (0.5 + uniform())
        node.next_probe = self.network.now + PROBE_SECONDS * (0.5 + uniform())
        node.need_entry(node.role_at)
        if node.rows:
            node.records(uniform, NETWORK_ID, self._record_seconds, self.network.now)
        if self.gossip is not None:
            self.gossip.start(node)
        self.retick(node)

    def crash(self, index: int) -> None:
        """Cut a node's power; its peers notice when their probes stay unanswered."""
        node = self.nodes[index]
        self.network.trace.add(self.network.now, "x", node.name, "-", "silent")
        self._go(node, CRASHED)
        delay = SILENT_LINK_SECONDS * (0.67 + self.chance.random() / 3)
        self.network.at(self.network.now + delay, self.network.forget_links, node, node.epoch)

    def leave(self, index: int) -> None:
        """Stop a node in order."""
        node = self.nodes[index]
        self.network.trace.add(self.network.now, "-", node.name)
        if self.gossip is not None and node.options.adversary is None:
            self.gossip.bye(node)
        self._go(node, LEFT)
        self.network.at(self.network.now + 0.1, self.network.forget_links, node, node.epoch)

    def _go(self, node: FastNode, state: int) -> None:
        node.state = state
        node.epoch += 1
        node.callbacks.clear()

    def restart(self, index: int) -> None:
        """Switch a node on again."""
        node = self.nodes[index]
        self.network.forget_links(node, node.epoch)
        self._start(node)

    def is_up(self, index: int) -> bool:
        """Say whether a node runs."""
        return self.nodes[index].state == UP

    def is_server(self, index: int) -> bool:
        """Say whether a node serves the hash table."""
        return self.nodes[index].is_server

    def contact(self, index: int) -> Contact:
        """Give a node's id and addresses."""
        return self.nodes[index].contact

    def table(self, index: int) -> Sequence[bytes]:
        """Give the ids in a node's routing table."""
        node = self.nodes[index]
        return [entry.contact.node_id for entry in node.dht.table.entries()] if node.state == UP else []

    def grind(self, key: bytes, within: int) -> bytes:
        """Make up an id: finding a key for it is left out here."""
        distance = 1 + int(self.chance.random() * (within - 1)) if within < 1 << 52 else self.chance.randrange(1, within)
        return (int.from_bytes(key, "big") ^ distance).to_bytes(32, "big")

    def fill_tables(self) -> None:
        """Give every node its k nearest and k random nodes of each farther bucket, as a long calm would."""
        census = Census()
        census.refill((node.contact.node_id, node.index) for node in self.nodes if node.state == UP and node.options.is_reachable)
        k = self.settings.bucket_size
        for node in self.nodes:
            if node.state == UP and node.options.adversary is None:
                entries = census.perfect_table(node.contact.node_id, k, k, self.chance)
                contacts = [self.nodes[index].contact for index in entries]
                node.dht.is_server = node.options.is_reachable
                node.role_at, node.wants_entry = math.inf, False
                for contact in contacts:
                    node.dht.table.answered(contact, self.network.now + node.wall)
                self.retick(node)

    # --- operations ---------------------------------------------------------------------------------------------------

    def lookup(self, index: int, target: bytes, done: Callable[[Found], None]) -> None:
        """Let a node find the nodes nearest to a target."""
        node = self.nodes[index]
        operation, effects = node.dht.find_node(target, self.network.now + node.wall)
        node.callbacks[operation] = lambda outcome: done(self._found(node, outcome))
        self.perform(node, effects)

    def get(self, index: int, key: bytes, done: Callable[[Found], None]) -> None:
        """Let a node find a record."""
        node = self.nodes[index]
        operation, effects = node.dht.find_record(key, self.network.now + node.wall)
        node.callbacks[operation] = lambda outcome: done(self._found(node, outcome))
        self.perform(node, effects)

    def put(self, index: int, salt: bytes, value: bytes, done: Callable[[Stored], None]) -> bytes:
        """Let a node publish a record and keep it alive; gives its key."""
        node = self.nodes[index]
        schedule = node.records(self.chance.random, NETWORK_ID, self._record_seconds, self.network.now)
        self._keep(node, schedule.put(salt, value, self.network.now + node.wall), done)
        self.retick(node)
        return record_key(Identity(node.identity_seed).node_id, salt)

    def ask(self, index: int, contact: Contact, message: Message, done: Callable[[Message | None], None]) -> None:
        """Send one request past the node's own machines."""
        self.network.send(self.nodes[index], contact, message, 3.0, lambda reply, reason: done(reply))

    def announce(self, index: int, size_bytes: int) -> None:
        """Let a node publish a new version of its offer."""
        if self.gossip is not None:
            self.nodes[index].offer_bytes = size_bytes
            self.gossip.announce(self.nodes[index])

    def withdraw(self, index: int) -> None:
        """Let a node take its offer back."""
        if self.gossip is not None:
            self.gossip.withdraw(self.nodes[index])

    def buy(self, index: int, done: Callable[[str], None]) -> None:
        """Not here: there is no market. Raises ConfigError."""
        raise ConfigError("only the world driver has a market")

    def books(self) -> Mapping[bytes, sqlite3.Connection]:
        """Nothing: there are no disks."""
        return {}

    def offers(self, index: int) -> Mapping[bytes, int]:
        """Give publisher -> version of the offers that a node would show."""
        return self.gossip.offers(self.nodes[index]) if self.gossip is not None else {}

    def offer(self, index: int, publisher: bytes) -> int:
        """Give the version of one offer that a node would show; 0 for none."""
        return self.gossip.version(self.nodes[index], publisher) if self.gossip is not None else 0

    def neighbours(self, index: int) -> Sequence[bytes]:
        """Give the ids of a node's gossip neighbours."""
        return self.gossip.neighbours(self.nodes[index]) if self.gossip is not None else []

    def counters(self) -> Mapping[str, float]:
        """Give running totals."""
        network = self.network
        gossip = self.gossip.bytes if self.gossip is not None else 0
        return {
            "messages": network.messages, "bytes": network.bytes, "gossip_bytes": gossip, "timeouts": network.timeouts,
            "links_opened": network.links_opened, "tasks": len(network),
        }  # fmt: skip

    # --- faults -------------------------------------------------------------------------------------------------------

    def partition(self, groups: Sequence[Sequence[int]], *, is_symmetric: bool = True) -> None:
        """Let nothing pass between groups; links across them are given up after a while."""
        self.network.partition(groups, is_symmetric=is_symmetric)

    def heal(self) -> None:
        """End all partitions and loss."""
        self.network.heal()

    def set_loss(self, fraction: float) -> None:
        """Lose this share of requests and of replies from now on."""
        self.network.set_loss(fraction)

    # --- machines -----------------------------------------------------------------------------------------------------

    def _serve(self, node: FastNode, target: FastNode, message: Message) -> tuple[Message | None, Reason | None]:
        adversary = target.options.adversary
        if adversary is not None:
            return adversary.answer(node.contact, message, self.network.now + target.wall), None
        try:
            reply = target.dht.answer(node.contact, node.contact.addresses[0], message, self.network.now + target.wall)
        except (Refused, ProtocolViolation) as error:
            return None, error.reason
        self.retick(target)
        return reply, None

    def perform(self, node: FastNode, effects: Sequence[Effect]) -> None:
        """Do what a node's hash table asks for."""
        for effect in effects:
            if isinstance(effect, Ask):
                self._ask(node, effect)
            elif isinstance(effect, Ended):
                callback = node.callbacks.pop(effect.operation_id, None)
                if callback is not None:
                    callback(effect.outcome)
            elif isinstance(effect, NeedContacts):
                node.need_entry(self.network.now)
        self.retick(node)

    def _ask(self, node: FastNode, ask: Ask) -> None:
        contact = ask.contact

        def answer(reply: Message | None, reason: Reason | None) -> None:
            now = self.network.now + node.wall
            if reply is None:
                if reason is None:
                    node.missed(contact)
                self.perform(node, node.dht.handle(Failed(ask.ask_id, reason), now))
                return
            node.met(contact)
            self.perform(node, node.dht.handle(Answered(ask.ask_id, reply, contact.addresses[0]), now))

        self.network.send(node, contact, ask.message, ask.timeout_seconds, answer)

    def retick(self, node: FastNode) -> None:
        """See to it that the node ticks when it must."""
        due = node.deadline()
        if due < node.tick_at:
            node.tick_at = due = max(due, self.network.now)
            self.network.at(due, self._tick, node, node.epoch, due)

    def _tick(self, node: FastNode, epoch: int, due: float) -> None:
        if node.epoch != epoch or node.tick_at != due:
            return
        node.tick_at = math.inf
        now, wall = self.network.now, node.wall
        if now >= node.role_at:
            self.perform(node, node.role_is_known(now))
        if node.wants_entry and now >= node.next_entry:
            self.perform(node, node.enter(now))
        if now + wall >= node.dht.deadline:
            self.perform(node, node.dht.tick(now + wall))
        if node.schedule is not None and now + wall >= node.schedule.deadline:
            self._keep(node, node.schedule.tick(now + wall), None)
        if now >= node.next_probe:
            node.next_probe = now + PROBE_SECONDS * (0.75 + self.chance.random() / 2)
            self._probe(node)
        if self.gossip is not None:
            self.gossip.tick(node)
        self.retick(node)

    def _probe(self, node: FastNode) -> None:
        """Try one peer that was lost; if it answers, find the part of the network that it is in."""
        lost = node.lost_peer(self.chance.random())
        if lost is None:
            return

        def answer(reply: Message | None, reason: Reason | None) -> None:
            if reply is None:
                return
            node.met(lost)
            if self.network.now >= node.last_again + AGAIN_SECONDS:
                node.last_again = self.network.now
                self.perform(node, node.dht.bootstrap([lost], self.network.now + node.wall))
            if self.gossip is not None:
                self.gossip.found_again(node, lost)

        self.network.send(node, lost, FindNode(node.contact.node_id, node.dht.is_server), 3.0, answer)

    def _keep(self, node: FastNode, effects: Sequence[RecordEffect], done: Callable[[Stored], None] | None) -> None:
        schedule = node.schedule
        assert schedule is not None, "effects come from a schedule"
        for effect in effects:
            if isinstance(effect, SaveRecord):
                node.save(effect.row)
            elif isinstance(effect, PublishRecord):
                began, salt = self.network.now, effect.salt

                def ended(outcome: Publication, salt: bytes = salt, began: float = began) -> None:
                    self._keep(node, schedule.ended(salt, outcome, self.network.now + node.wall), None)
                    if done is not None:
                        done(Stored(outcome.key, outcome.acks, outcome.asked, outcome.is_stored, self.network.now - began))

                operation, asks = node.dht.publish(effect.data, self.network.now + node.wall)
                node.callbacks[operation] = ended
                self.perform(node, asks)

    def _found(self, node: FastNode, outcome: LookupOutcome) -> Found:
        value = b""
        if outcome.record:
            try:
                value = parse_record(outcome.record, self.network.now + node.wall).value
            except PeerError:
                value = b""
        contacts = tuple(contact.node_id for contact in outcome.contacts)
        return Found(contacts, value, outcome.hops, outcome.asked, outcome.failed, outcome.seconds)
