"""The wires of the fast driver: one heap of virtual time, latency, loss, partitions, and links between nodes as plain entries.

A request to a node without an open link first takes the two round trips of a connection and its handshake. Links without use
close after a minute, as the transport's do. Whatever is lost, or meets a node that is gone, is noticed when it times out.
"""

import math
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any, Final

from p2pnode.reasons import Reason
from p2pnode.sim.chance import seeded
from p2pnode.sim.fast_node import LEFT, UP, FastNode, Link
from p2pnode.sim.gossip_swarm import HANDSHAKE_BYTES, IDLE_SECONDS, MESSAGE_OVERHEAD
from p2pnode.sim.latency import LatencyModel
from p2pnode.sim.trace import Trace
from p2pnode.wire.codec import encode
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.registry import Message

# A link whose other end fell silent is given up after a probe and the wait for its answer.
SILENT_LINK_SECONDS: Final = 30.0
SLOW_SECONDS: Final = 0.5
# Two round trips before a request on a new link: TCP's, and that of the handshake whose last message carries the request.
DIAL_ONE_WAYS: Final = 4.0
REFUSAL_BYTES: Final = 30
# What a sender is told of its request: the answer, or None with the reason of a refusal, or twice None for silence.
Answer = Callable[[Message | None, Reason | None], None]


class FastNetwork:
    """Time, wires and links. serve: gives a node's reply to another's message, or the reason why not, or neither: silence.

    on_link, on_unlink: told of each end (node, peer). is_pinned: whether a link is kept without use. bytes: everything sent,
    frames and handshakes included, TCP and IP not.
    """

    def __init__(self, seed: int, latency: LatencyModel, trace: Trace) -> None:
        self.seed = seed
        self.now = 0.0
        self.nodes: list[FastNode] = []
        self.by_id: dict[bytes, FastNode] = {}
        self.chance = seeded(seed, "fast network")
        self.trace = trace
        self.latency = latency
        self.serve: Callable[[FastNode, FastNode, Message], tuple[Message | None, Reason | None]] = _nobody
        self.on_link: Callable[[FastNode, FastNode], None] = _nothing
        self.on_unlink: Callable[[FastNode, FastNode], None] = _nothing
        self.is_pinned: Callable[[FastNode, FastNode], bool] = lambda node, peer: False
        self.loss = 0.0
        self.slow_seconds = SLOW_SECONDS
        self.messages = self.bytes = self.timeouts = self.links_opened = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._ticket = count()
        self._is_symmetric = True
        self._is_split = False
        self._is_sweeping = False

    # --- time ---------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, when: float, action: Callable[..., None], *arguments: Any) -> None:
        """Call a function with arguments at a virtual second."""
        heappush(self._heap, (when, next(self._ticket), action, arguments))

    def run(self, until: float, is_over: Callable[[], bool]) -> None:
        """Let time pass until a virtual second, or until something says that it is over."""
        heap = self._heap
        while heap and heap[0][0] <= until and not is_over():
            self.now, _, action, arguments = heappop(heap)
            action(*arguments)
        self.now = until

    # --- faults -------------------------------------------------------------------------------------------------------

    def partition(self, groups: Sequence[Sequence[int]], *, is_symmetric: bool = True) -> None:
        """Let nothing pass between groups; links across them are given up after a while."""
        self.trace.add(self.now, "f", "-", "-", f"partition {' '.join(str(len(group)) for group in groups)}")
        self._is_split, self._is_symmetric = True, is_symmetric
        for number, group in enumerate(groups):
            for index in group:
                self.nodes[index].group = number
        self.at(self.now + SILENT_LINK_SECONDS, self._cut_links)

    def heal(self) -> None:
        """End all partitions, loss and slowness."""
        self.trace.add(self.now, "f", "-", "-", "heal")
        self._is_split = False
        self.loss = self.slow_seconds = 0.0
        for node in self.nodes:
            node.group = 0

    def set_loss(self, fraction: float) -> None:
        """Lose this share of requests and of replies from now on."""
        self.trace.add(self.now, "f", "-", "-", f"loss {fraction:g}")
        self.loss = fraction

    def passes(self, source: FastNode, target: FastNode) -> bool:
        """Say whether messages get from one node to another."""
        if not self._is_split or source.group == target.group:
            return True
        return not self._is_symmetric and source.group < target.group

    # --- requests -----------------------------------------------------------------------------------------------------

    def send(self, node: FastNode, contact: Contact, message: Message, timeout: float, answer: Answer) -> None:
        """Send a request, over an open link or a new one; `answer` is called once unless the node goes down."""
        now = self.now
        deadline = now + timeout
        self.messages += 1
        self.bytes += MESSAGE_OVERHEAD + len(encode(message))
        target = self.by_id.get(contact.node_id)
        if target is None or (target.contact is not contact and target.contact.addresses != contact.addresses):
            self._no_answer(deadline, node, answer)
            return
        delay = one_way = self.one_way(node, target)
        is_new = not self.is_linked(node, target)
        if is_new:
            delay += DIAL_ONE_WAYS * one_way
            if not target.options.is_reachable or self.is_lost():
                self._no_answer(deadline, node, answer)
                return
        else:
            node.links[target.index].used_at = now
        if self.is_lost():
            self.trace.add(now, "l", node.name, target.name, type(message).__name__)
            self._no_answer(deadline, node, answer)
            return
        self.at(now + delay, self._arrive, node, node.epoch, target, message, one_way, deadline, is_new, answer)

    def _arrive(
        self, node: FastNode, epoch: int, target: FastNode, message: Message, one_way: float, deadline: float, is_new: bool,
        answer: Answer,
    ) -> None:  # fmt: skip
        now = self.now
        if target.state == LEFT:
            # Its machine still runs and says that nobody listens.
            self.at(min(deadline, now + one_way), self._answered, node, epoch, None, Reason.CONNECTION_LOST, answer)
            return
        if target.state != UP or not self.passes(node, target):
            self._no_answer(deadline, node, answer, epoch)
            return
        if is_new and node.epoch == epoch:
            self.link(node, target)
        self.trace.add(now, "q", target.name, node.name, type(message).__name__)
        reply, reason = self.serve(node, target, message)
        self.bytes += MESSAGE_OVERHEAD + (len(encode(reply)) if reply is not None else REFUSAL_BYTES)
        back = now + one_way + (self.slow_seconds if target.options.is_slow else 0.0)
        is_silent = reply is None and reason is None
        if is_silent or back > deadline or self.is_lost() or not self.passes(target, node):
            self._no_answer(deadline, node, answer, epoch)
        else:
            self.at(back, self._answered, node, epoch, reply, reason, answer)

    def _answered(self, node: FastNode, epoch: int, reply: Message | None, reason: Reason | None, answer: Answer) -> None:
        if node.epoch == epoch and node.state == UP:
            self.trace.add(self.now, "n" if reply is None else "r", node.name)
            answer(reply, reason)

    def _no_answer(self, deadline: float, node: FastNode, answer: Answer, epoch: int = -1) -> None:
        self.timeouts += 1
        self.at(deadline, self._answered, node, node.epoch if epoch < 0 else epoch, None, None, answer)

    def one_way(self, node: FastNode, target: FastNode) -> float:
        """Give the delay of one message between two nodes, with its jitter."""
        model = self.latency
        seconds = model.one_way(self.seed, node.contact.addresses[0], node.place, target.contact.addresses[0], target.place)
        return seconds * (1.0 + model.jitter * -math.log(1.0 - self.chance.random())) if model.jitter else seconds

    def is_lost(self) -> bool:
        """Draw whether one message is lost."""
        return self.loss > 0.0 and self.chance.random() < self.loss

    # --- links --------------------------------------------------------------------------------------------------------

    def is_linked(self, node: FastNode, target: FastNode) -> bool:
        """Say whether a link to a node stands, as far as this end knows."""
        link = node.links.get(target.index)
        if link is None:
            return False
        if self.now - link.used_at < IDLE_SECONDS or self.is_pinned(node, target):
            return True
        self.unlink(node, target)
        return False

    def link(self, node: FastNode, target: FastNode) -> None:
        """Open a link between two nodes."""
        if target.index in node.links:
            return
        self.links_opened += 1
        self.bytes += HANDSHAKE_BYTES
        node.links[target.index] = target.links[node.index] = Link(self.now)
        if not self._is_sweeping:
            self._is_sweeping = True
            self.at(self.now + IDLE_SECONDS / 2, self._sweep)
        self.on_link(node, target)
        self.on_link(target, node)

    def unlink(self, node: FastNode, target: FastNode) -> None:
        """Close a link; both ends notice."""
        for one, other in ((node, target), (target, node)):
            if one.links.pop(other.index, None) is not None and one.state == UP:
                self.on_unlink(one, other)

    def forget_links(self, node: FastNode, epoch: int) -> None:
        """Close all links of a node, unless it has started again since."""
        if node.epoch == epoch:
            for index in list(node.links):
                self.unlink(node, self.nodes[index])

    def _cut_links(self) -> None:
        if self._is_split:
            for node in self.nodes:
                for index in list(node.links):
                    if self.nodes[index].group != node.group:
                        self.unlink(node, self.nodes[index])

    def _sweep(self) -> None:
        """Close idle links, so that none is remembered for long."""
        for node in self.nodes:
            if node.links:
                for index in list(node.links):
                    self.is_linked(node, self.nodes[index])
        self.at(self.now + IDLE_SECONDS / 2, self._sweep)


def _nobody(node: FastNode, target: FastNode, message: Message) -> tuple[Message | None, Reason | None]:
    return None, None


def _nothing(node: FastNode, peer: FastNode) -> None:
    return None
