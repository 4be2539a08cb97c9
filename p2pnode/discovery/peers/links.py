"""Which peers a link is kept with, and why. Pure bookkeeping.

A kept link is probed while idle and dialled again when lost. Each one costs both sides a place among their sessions, so every
reason to keep one has a bound, and everything else — all traffic of the hash table — uses links that are opened on demand and
closed when idle.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from p2pnode.discovery.addresses import wide_group
from p2pnode.ids import NodeId

# A link has shown that it lasts before it may become an anchor.
ANCHOR_AGE_SECONDS: Final = 60.0


class Why(str, Enum):
    """A reason to keep a link."""

    STATIC = "static"  # the owner named the peer
    LOCAL = "local"  # mDNS found it on a small network
    ANCHOR = "anchor"  # outbound, long-lived, kept across restarts: an attacker who fills our inbound places cannot have it
    GOSSIP = "gossip"  # a neighbour through which offers spread
    ENTRY = "entry"  # a bootstrap node, as long as the routing table is nearly empty


@dataclass(frozen=True, slots=True)
class AnchorCandidate:
    """An outbound link to a server. known_since: when the peer was first seen, age_seconds: of this link."""

    node_id: NodeId
    address: str
    known_since: float
    age_seconds: float


class LinkPlan:
    """The reasons for each link, and the bounds on them.

    local_max, anchors_max, entries_max: links kept for LOCAL, ANCHOR and ENTRY.
    """

    def __init__(self, local_max: int, anchors_max: int, entries_max: int = 4) -> None:
        self.needs_entry = False
        self._most = {Why.LOCAL: local_max, Why.ANCHOR: anchors_max, Why.ENTRY: entries_max}
        self._reasons: dict[NodeId, dict[Why, None]] = {}
        self._counts = dict.fromkeys(Why, 0)

    def limit(self, why: Why, most: int) -> None:
        """Change a bound; what is kept already stays until its link ends."""
        self._most[why] = most

    def has_room(self, why: Why) -> bool:
        """Say whether one more link may be kept for this reason."""
        return self._counts[why] < self._most.get(why, self._counts[why] + 1)

    def want(self, node_id: NodeId, why: Why) -> bool:
        """Keep a link for a reason; False when its bound is reached."""
        held = self._reasons.setdefault(node_id, {})
        if why not in held:
            if not self.has_room(why):
                if not held:
                    del self._reasons[node_id]
                return False
            held[why] = None
            self._counts[why] += 1
        return True

    def release(self, node_id: NodeId, why: Why) -> None:
        """A reason is gone; the link with its last reason."""
        held = self._reasons.get(node_id, {})
        if why in held:
            del held[why]
            self._counts[why] -= 1
            if not held:
                del self._reasons[node_id]

    def reasons(self, node_id: NodeId) -> tuple[Why, ...]:
        """Give why a link with this peer is kept; empty when it is not."""
        return tuple(self._reasons.get(node_id, ()))

    def is_kept(self, node_id: NodeId) -> bool:
        """Say whether there is any reason."""
        return node_id in self._reasons

    def kept_for(self, why: Why) -> tuple[NodeId, ...]:
        """Give the peers kept for one reason."""
        return tuple(node_id for node_id, held in self._reasons.items() if why in held)

    def kept(self) -> tuple[NodeId, ...]:
        """Give every peer there is a reason for."""
        return tuple(self._reasons)

    def add_anchors(self, candidates: Iterable[AnchorCandidate]) -> list[NodeId]:
        """Fill the free anchor places and give the new ones: kept links first, then peers known longest, one per /16."""
        groups = {wide_group(each.address) for each in candidates if Why.ANCHOR in self.reasons(each.node_id)}
        fit = [each for each in candidates if each.age_seconds >= ANCHOR_AGE_SECONDS]
        fit.sort(key=lambda each: (not self.is_kept(each.node_id), each.known_since, each.node_id))
        added = []
        for each in fit:
            group = wide_group(each.address)
            if group not in groups and Why.ANCHOR not in self.reasons(each.node_id) and self.want(each.node_id, Why.ANCHOR):
                groups.add(group)
                added.append(each.node_id)
        return added
