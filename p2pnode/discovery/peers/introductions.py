"""What peers say of themselves and of us when asked: addresses, role, the time on their clock, and where they see us.

Asked once per link, and only on links that are kept or needed for dial-back: a link that is opened for one request has no use
for a second one.
"""

from collections.abc import Callable
from statistics import median
from typing import Final, TypeVar

import trio

from p2pnode.discovery.addresses import claimed_addresses
from p2pnode.discovery.peers.entry import SOURCE_BOOK, Heard
from p2pnode.discovery.peers.roles import Roles
from p2pnode.environment import Clock
from p2pnode.errors import PeerError
from p2pnode.ids import NodeId
from p2pnode.reasons import Reason
from p2pnode.transport.link import Link
from p2pnode.wire.messages.discovery import Introduction, WhoAreYou

INTRODUCTION_SECONDS: Final = 5.0
SKEWS_MAX: Final = 64


class Introductions:
    """Asks and remembers. skews_seconds: peer -> how far its clock is ahead of ours, half a round trip uncertain.

    mapped_ports: peer -> (the port we sent from, the port it saw), of links that this node dialled.
    """

    def __init__(
        self,
        clock: Clock,
        roles: Roles,
        now: Callable[[], float],
        on_heard: Callable[[Heard], None],
        misbehaved: Callable[[bytes, Reason], None],
    ) -> None:
        self.skews_seconds: dict[NodeId, float] = {}
        self.mapped_ports: dict[NodeId, tuple[str, str]] = {}
        self._clock = clock
        self._roles = roles
        self._now = now
        self._on_heard = on_heard
        self._misbehaved = misbehaved
        self._done: dict[NodeId, None] = {}

    def link_down(self, node_id: NodeId) -> None:
        """The next link with this peer is asked again."""
        self._done.pop(node_id, None)

    async def ask(self, link: Link) -> None:
        """Ask a peer unless its link was asked already; waits at most 5 s, and a peer that says nothing is no error."""
        node_id = link.peer.node_id
        if node_id in self._done:
            return
        self._done[node_id] = None
        with trio.move_on_after(INTRODUCTION_SECONDS) as patience:
            sent = self._clock.monotonic()
            try:
                answer = (await link.request(WhoAreYou())).message
            except PeerError:
                return
            if not isinstance(answer, Introduction) or answer.node_id != node_id:
                self._misbehaved(node_id, Reason.WRONG_PEER)
                return
            if answer.time_ms:
                middle = self._clock.wall_ms() - (self._clock.monotonic() - sent) * 500
                _keep(self.skews_seconds, node_id, (answer.time_ms - middle) / 1000)
            if not link.peer.inbound:
                ports = (link.local_address.rpartition(":")[2], answer.seen_address.rpartition(":")[2])
                _keep(self.mapped_ports, node_id, ports)
            self._roles.observed(link.peer.seen_address, answer.seen_address, self._now())
            self._on_heard(Heard(node_id, claimed_addresses(answer.addresses, link.peer.seen_address), SOURCE_BOOK))
        if patience.cancelled_caught:
            self._done.pop(node_id, None)

    @property
    def skew_seconds(self) -> float | None:
        """How far most peers' clocks are ahead of ours: the median; None before anybody has said."""
        return median(self.skews_seconds.values()) if self.skews_seconds else None


Value = TypeVar("Value")


def _keep(into: dict[NodeId, Value], node_id: NodeId, value: Value) -> None:
    into.pop(node_id, None)
    if len(into) >= SKEWS_MAX:
        del into[next(iter(into))]
    into[node_id] = value
