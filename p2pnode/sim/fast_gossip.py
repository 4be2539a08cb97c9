"""The gossip of offers on the fast driver: real `OfferGossip` machines, stand-ins for documents, modelled links.

Documents are unsigned bytes of the true size (`gossip_swarm.plain_document`), and all nodes share the item behind each; what
signing costs is measured elsewhere. Everything a machine says is sent over the driver's links, with its latency and loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from p2pnode.discovery.gossip.events import (
    Compare,
    Connect,
    Effect,
    Event,
    Failed,
    Learned,
    LinkDown,
    LinkUp,
    NotReached,
    Replied,
    Republish,
    Suspect,
    Tell,
)
from p2pnode.discovery.gossip.gossip import OfferGossip
from p2pnode.discovery.gossip.items import Kind
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.errors import ProtocolViolation, Refused
from p2pnode.reasons import Reason
from p2pnode.sim.fast_network import REFUSAL_BYTES, FastNetwork
from p2pnode.sim.fast_node import LEARN_SECONDS, LEARNED_MAX, OFFER_SECONDS, UP, FastNode
from p2pnode.sim.gossip_swarm import MESSAGE_OVERHEAD, plain_check, plain_document
from p2pnode.wire.codec import encode
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.registry import Message

WITHDRAWAL_BYTES: Final = 200
SUSPICION_BYTES: Final = 215
# The first offers of a network that starts all at once are spread over this time.
FIRST_OFFER_SECONDS: Final = 5.0


class FastGossip:
    """Drives the gossip machine of every node. retick: sees to it that a node ticks when it must.

    bytes: what gossip has sent, its share of the network's total.
    """

    def __init__(self, network: FastNetwork, settings: GossipSettings, retick: Callable[[FastNode], None]) -> None:
        self.bytes = 0
        self._network = network
        self._settings = settings
        self._retick = retick
        network.on_link, network.on_unlink, network.is_pinned = self._linked, self._unlinked, self._pins
        self._check = plain_check()

    # --- a node's life ------------------------------------------------------------------------------------------------

    def start(self, node: FastNode) -> None:
        """Give a node that starts its machine."""
        now, chance = self._network.now, self._network.chance
        node.gossip = OfferGossip(node.hidden, self._settings, chance.random, self._check, now + node.wall)
        node.next_learn = node.role_at + 1.0
        if node.offer_bytes:
            node.next_offer = node.role_at + FIRST_OFFER_SECONDS * chance.random()

    def tick(self, node: FastNode) -> None:
        """Do what is due."""
        machine, network = node.gossip, self._network
        if machine is None:
            return
        now = network.now
        if now >= node.next_learn:
            node.next_learn = now + LEARN_SECONDS * (0.75 + network.chance.random() / 2)
            self._learn(node, machine)
        if now >= node.next_offer:
            self.announce(node)
        if now + node.wall >= machine.deadline:
            self._perform(node, machine.tick(now + node.wall))

    def bye(self, node: FastNode) -> None:
        """Say goodbye: an orderly stop."""
        if node.gossip is not None:
            self._perform(node, node.gossip.bye(self._network.now + node.wall))

    def _learn(self, node: FastNode, machine: OfferGossip) -> None:
        contacts = [entry.contact for entry in node.dht.table.entries()]
        if len(contacts) > LEARNED_MAX:
            contacts = self._network.chance.sample(contacts, LEARNED_MAX)
        if contacts:
            self._perform(node, machine.handle(Learned(tuple(contacts)), self._network.now + node.wall))
        elif not machine.views.active:
            node.next_learn = self._network.now + 1.0

    # --- offers -------------------------------------------------------------------------------------------------------

    def announce(self, node: FastNode) -> None:
        """Let a node sign its offer anew; it will do so again at half of the offer's life."""
        network = self._network
        node.next_offer = network.now + OFFER_SECONDS * (0.45 + 0.1 * network.chance.random())
        self._publish(node, Kind.OFFER, node.offer_bytes)
        self._retick(node)

    def withdraw(self, node: FastNode) -> None:
        """Let a node take its offer back."""
        node.next_offer = float("inf")
        node.offer_bytes = 0
        self._publish(node, Kind.WITHDRAWAL, WITHDRAWAL_BYTES)

    def offers(self, node: FastNode) -> Mapping[bytes, int]:
        """Give publisher -> version of the offers that this node would show: held and not suspected."""
        machine, now = node.gossip, self._network.now + node.wall
        if machine is None:
            return {}
        return {item.publisher: item.sequence for item in machine.store.offers() if not machine.is_suspected(item.publisher, now)}

    def version(self, node: FastNode, publisher: bytes) -> int:
        """Give the version of one offer that this node would show, 0 for none."""
        machine = node.gossip
        item = machine.store.get(publisher) if machine is not None else None
        if machine is None or item is None or item.kind is not Kind.OFFER:
            return 0
        return 0 if machine.is_suspected(publisher, self._network.now + node.wall) else item.sequence

    def neighbours(self, node: FastNode) -> Sequence[bytes]:
        """Give the ids of a node's neighbours."""
        return list(node.gossip.views.active) if node.gossip is not None else []

    def _publish(self, node: FastNode, kind: Kind, size: int) -> None:
        machine = node.gossip
        if machine is None or node.state != UP:
            return
        now = self._network.now + node.wall
        node.offer_sequence = max(node.offer_sequence + 1, round(now * 1000))
        address = node.contact.addresses[0] if node.options.is_reachable and kind is Kind.OFFER else ""
        node_id, sequence = node.contact.node_id, node.offer_sequence
        expires_ms = round((now + OFFER_SECONDS) * 1000)
        data = plain_document(kind, node_id, node_id, sequence, sequence, expires_ms, address, size)
        self._perform(node, machine.publish(data, now))

    # --- links --------------------------------------------------------------------------------------------------------

    def _pins(self, node: FastNode, target: FastNode) -> bool:
        """Say whether gossip keeps the link between two nodes."""
        one, other = node.gossip, target.gossip
        return (one is not None and target.contact.node_id in one.views.active) or (
            other is not None and node.contact.node_id in other.views.active
        )

    def _linked(self, node: FastNode, peer: FastNode) -> None:
        """A link has come up at this end."""
        self._feed(node, LinkUp(peer.shown))

    def _unlinked(self, node: FastNode, peer: FastNode) -> None:
        """A link is gone at this end."""
        self._feed(node, LinkDown(peer.contact.node_id))

    def found_again(self, node: FastNode, contact: Contact) -> None:
        """A lost peer answers again: compare books with it."""
        self._feed(node, Compare(contact.node_id))

    def _connect(self, node: FastNode, effect: Connect) -> None:
        network = self._network
        target = network.by_id.get(effect.node_id)
        if target is not None and network.is_linked(node, target):
            network.at(network.now, self._feed_if, node, node.epoch, LinkUp(target.shown))
            return
        epoch = node.epoch
        timeout = network.now + self._settings.connect_seconds

        def arrive() -> None:
            is_reached = (
                target is not None and target.state == UP and target.options.is_reachable and node.epoch == epoch
                and network.passes(node, target) and network.passes(target, node)
            )  # fmt: skip
            if target is None or not is_reached:
                network.at(timeout, self._feed_if, node, epoch, NotReached(effect.node_id))
            elif target.index in node.links:
                self._feed_if(node, epoch, LinkUp(target.shown))
            else:
                network.link(node, target)

        delay = 3.5 * network.one_way(node, target) if target is not None else 0.0
        network.at(network.now + delay, arrive)

    # --- requests -----------------------------------------------------------------------------------------------------

    def _perform(self, node: FastNode, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Tell():
                    self._tell(node, effect)
                case Connect():
                    self._connect(node, effect)
                case Suspect(publisher, sequence, expires_ms):
                    made = round((self._network.now + node.wall) * 1000)
                    own = node.contact.node_id
                    data = plain_document(Kind.SUSPICION, own, publisher, made, sequence, expires_ms, size=SUSPICION_BYTES)
                    machine = node.gossip
                    if machine is not None:
                        self._perform(node, machine.publish(data, self._network.now + node.wall))
                case Republish(above):
                    node.offer_sequence = max(node.offer_sequence, above)
                    if node.offer_bytes:
                        node.next_offer = self._network.now
        self._retick(node)

    def _tell(self, node: FastNode, tell: Tell) -> None:
        network = self._network
        target = network.by_id.get(tell.node_id)
        self._charge(MESSAGE_OVERHEAD + len(encode(tell.message)))
        network.messages += 1
        if target is None or not network.is_linked(node, target):
            network.at(network.now, self._feed_if, node, node.epoch, Failed(tell.ask_id))
            return
        node.links[target.index].used_at = network.now
        deadline = network.now + tell.timeout_seconds
        one_way = network.one_way(node, target)
        if network.is_lost():
            network.at(deadline, self._feed_if, node, node.epoch, Failed(tell.ask_id))
        else:
            network.at(network.now + one_way, self._arrive, node, node.epoch, target, tell, one_way, deadline)

    def _arrive(self, node: FastNode, epoch: int, target: FastNode, tell: Tell, one_way: float, deadline: float) -> None:
        network = self._network
        machine = target.gossip
        if target.state != UP or machine is None or not network.passes(node, target) or node.index not in target.links:
            network.at(deadline, self._feed_if, node, epoch, Failed(tell.ask_id))
            return
        network.trace.add(network.now, "q", target.name, node.name, type(tell.message).__name__)
        reply: Message | None = None
        reason: Reason | None = None
        effects: list[Effect] = []
        try:
            reply, effects = machine.answer(node.contact.node_id, tell.message, network.now + target.wall)
        except (Refused, ProtocolViolation) as error:
            reason = error.reason
        self._charge(MESSAGE_OVERHEAD + (len(encode(reply)) if reply is not None else REFUSAL_BYTES))
        event: Event = Replied(tell.ask_id, reply) if reply is not None else Failed(tell.ask_id, reason)
        if network.is_lost() or not network.passes(target, node) or network.now + one_way > deadline:
            network.at(deadline, self._feed_if, node, epoch, Failed(tell.ask_id))
        else:
            network.at(network.now + one_way, self._feed_if, node, epoch, event)
        self._perform(target, effects)

    def _charge(self, size: int) -> None:
        self.bytes += size
        self._network.bytes += size

    def _feed_if(self, node: FastNode, epoch: int, event: Event) -> None:
        if node.epoch == epoch:
            self._feed(node, event)

    def _feed(self, node: FastNode, event: Event) -> None:
        if node.gossip is not None and node.state == UP:
            self._perform(node, node.gossip.handle(event, self._network.now + node.wall))
