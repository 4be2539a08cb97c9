"""How news travel between neighbours: documents along a tree, entries of them along the other links, slowly, for repair.

After Plumtree (Leitão, Pereira, Rodrigues 2007). At first every link is a tree link. Where a document arrives that was known
already, the link closed a cycle and leaves the tree. Where an entry names a document that is still missing after the tree
should have brought it, the tree is torn: the link is taken into it again and the document fetched. So a document crosses
each tree link once, and the dead cost a few seconds and no state.
"""

from dataclasses import dataclass, field
from math import inf

from p2pnode.discovery.gossip.items import Item
from p2pnode.discovery.gossip.settings import GossipSettings
from p2pnode.wire.messages.gossip import DOCUMENTS_MAX, ENTRIES_MAX, Announce

# What one announcement carries at most, so that it stays within a control message with room to spare.
DOCUMENTS_BYTES_MAX = 48_000


@dataclass(slots=True)
class _Neighbour:
    is_tree: bool = True
    documents: dict[bytes, Item] = field(default_factory=dict)
    documents_at: float = inf
    entries: dict[bytes, Item] = field(default_factory=dict)
    entries_at: float = inf


class Spreading:
    """What each neighbour is still to be told."""

    def __init__(self, settings: GossipSettings) -> None:
        self._settings = settings
        self._neighbours: dict[bytes, _Neighbour] = {}
        # When `due` has something, or a little earlier: kept up rather than computed, because it is asked after every event.
        self.deadline = inf

    def add(self, node_id: bytes) -> None:
        """A new neighbour, on the tree until it proves to close a cycle."""
        self._neighbours.setdefault(node_id, _Neighbour())

    def remove(self, node_id: bytes) -> None:
        """A neighbour is gone."""
        self._neighbours.pop(node_id, None)

    def is_tree(self, node_id: bytes) -> bool:
        """Say whether documents go to this neighbour at once."""
        neighbour = self._neighbours.get(node_id)
        return neighbour is not None and neighbour.is_tree

    def prune(self, node_id: bytes) -> None:
        """This link closes a cycle."""
        neighbour = self._neighbours.get(node_id)
        if neighbour is not None and neighbour.is_tree:
            neighbour.is_tree = False
            for item in list(neighbour.documents.values()):
                neighbour.entries.setdefault(item.key, item)
            if neighbour.entries:
                neighbour.entries_at = min(neighbour.entries_at, neighbour.documents_at + self._settings.digest_seconds)
                self.deadline = min(self.deadline, neighbour.entries_at)
            neighbour.documents.clear()
            neighbour.documents_at = inf

    def graft(self, node_id: bytes) -> None:
        """This link brings what the tree did not."""
        neighbour = self._neighbours.get(node_id)
        if neighbour is not None:
            neighbour.is_tree = True

    def news(self, item: Item, source: bytes | None, now: float) -> None:
        """Queue a new item for everybody but the one it came from."""
        for node_id, neighbour in self._neighbours.items():
            if node_id == source:
                neighbour.documents.pop(item.key, None)
                neighbour.entries.pop(item.key, None)
            elif neighbour.is_tree:
                neighbour.documents[item.key] = item
                neighbour.documents_at = min(neighbour.documents_at, now + self._settings.push_seconds)
                self.deadline = min(self.deadline, neighbour.documents_at)
            else:
                neighbour.entries[item.key] = item
                neighbour.entries_at = min(neighbour.entries_at, now + self._settings.digest_seconds)
                self.deadline = min(self.deadline, neighbour.entries_at)

    def push(self, node_id: bytes, items: list[Item], now: float) -> None:
        """Queue documents for one neighbour that asked for them."""
        neighbour = self._neighbours.get(node_id)
        if neighbour is not None and items:
            for item in items:
                neighbour.documents[item.key] = item
            neighbour.documents_at = now
            self.deadline = min(self.deadline, now)

    def remind(self, node_id: bytes, items: list[Item], now: float) -> None:
        """Queue entries for one neighbour to whom the documents may not have come through."""
        neighbour = self._neighbours.get(node_id)
        if neighbour is not None and items:
            for item in items:
                neighbour.entries[item.key] = item
            neighbour.entries_at = min(neighbour.entries_at, now + self._settings.push_seconds)
            self.deadline = min(self.deadline, neighbour.entries_at)

    def knows(self, node_id: bytes, key: bytes, sequence: int) -> None:
        """This neighbour has named an item itself: it need not be told."""
        neighbour = self._neighbours.get(node_id)
        if neighbour is None:
            return
        for queue in (neighbour.documents, neighbour.entries):
            queued = queue.get(key)
            if queued is not None and queued.sequence <= sequence:
                del queue[key]

    def due(self, now: float) -> list[tuple[bytes, Announce]]:
        """Give what is to be said now, neighbour by neighbour. Entries travel with documents that leave anyway."""
        said = []
        self.deadline = inf
        for node_id, neighbour in self._neighbours.items():
            if neighbour.documents_at > now and neighbour.entries_at > now:
                self.deadline = min(self.deadline, neighbour.documents_at, neighbour.entries_at)
                continue
            documents: list[bytes] = []
            size = 0
            while neighbour.documents and len(documents) < DOCUMENTS_MAX and size < DOCUMENTS_BYTES_MAX:
                item = neighbour.documents.pop(next(iter(neighbour.documents)))
                documents.append(item.data)
                size += len(item.data)
            entries: list[bytes] = []
            while neighbour.entries and len(entries) < ENTRIES_MAX:
                entries.append(neighbour.entries.pop(next(iter(neighbour.entries))).entry)
            neighbour.documents_at = now if neighbour.documents else inf
            neighbour.entries_at = now if neighbour.entries else inf
            self.deadline = min(self.deadline, neighbour.documents_at, neighbour.entries_at)
            if documents or entries:
                said.append((node_id, Announce(b"".join(entries), tuple(documents))))
        return said


def wanted_items(found: list[Item | None]) -> list[Item]:
    """Give those that are there, as many as one message takes."""
    chosen: list[Item] = []
    size = 0
    for item in found:
        if item is not None and len(chosen) < DOCUMENTS_MAX and size < DOCUMENTS_BYTES_MAX:
            chosen.append(item)
            size += len(item.data)
    return chosen
