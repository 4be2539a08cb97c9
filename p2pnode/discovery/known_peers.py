"""What all sources together know of peers: the open links, the routing table, the book, and what layers above have heard."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from p2pnode.discovery.dht.kademlia import Kademlia
from p2pnode.discovery.dht.service import CONTACT_ADDRESSES_MAX, contact_of
from p2pnode.discovery.peers.book import PeerBook
from p2pnode.discovery.peers.roles import Candidate
from p2pnode.ids import NodeId
from p2pnode.transport.service import TransportService
from p2pnode.wire.messages.discovery import Contact

CANDIDATES_MAX: Final = 64
CONTACTS_MAX: Final = 32


class KnownPeers:
    """Looks in every source. book: gives the present one. hints: more addresses of a peer."""

    def __init__(
        self,
        transport: TransportService,
        dht: Kademlia,
        book: Callable[[], PeerBook],
        now: Callable[[], float],
        hints: Callable[[NodeId], Iterable[str]],
    ) -> None:
        self._links = transport.links()
        self._table = dht.table
        self._book = book
        self._now = now
        self._hints = hints

    def addresses(self, node_id: NodeId) -> tuple[str, ...]:
        """Give where a peer may be, best first."""
        entry, known = self._book().entry(node_id), self._table.get(node_id)
        found = (*(entry.addresses if entry else ()), *(known.contact.addresses if known else ()), *self._hints(node_id))
        return tuple(dict.fromkeys(found))

    def contacts(self) -> list[Contact]:
        """Give peers to enter the network by: open links and good peers of the book in turns, never one source alone."""
        linked = [contact_of(link) for link in self._links.values()]
        good = [Contact(each.node_id, each.addresses[:CONTACT_ADDRESSES_MAX]) for each in self._book().good_entries(self._now())]
        mixed: dict[bytes, Contact] = {}
        for position in range(min(CONTACTS_MAX, max(len(linked), len(good)))):
            for source in (linked, good):
                for contact in source[position : position + 1]:
                    mixed.setdefault(contact.node_id, contact)
        return list(mixed.values())

    def servers(self) -> Sequence[Contact]:
        """Give peers that have answered and can probably be dialled."""
        return [each.contact for each in self._table.entries() if each.contact.addresses][:CONTACTS_MAX]

    def candidates(self) -> list[Candidate]:
        """Give whom this node could ask for a dial-back: peers with a link, the routing table, and the book."""
        found: dict[NodeId, Candidate] = {}
        for node_id, link in self._links.items():
            found[node_id] = Candidate(node_id, link.peer.seen_address, node_id in self._table, True)
        for each in self._table.entries():
            if each.contact.addresses:
                node_id = NodeId(each.contact.node_id)
                found.setdefault(node_id, Candidate(node_id, each.contact.addresses[0], True, False))
        if len(found) < CANDIDATES_MAX:
            for entry in self._book().good_entries(self._now()):
                found.setdefault(entry.node_id, Candidate(entry.node_id, entry.addresses[0], False, False))
        return list(found.values())[:CANDIDATES_MAX]
