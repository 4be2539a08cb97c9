"""A network of a few dozen: the estimate of its size may not say fewer than have answered."""

from p2pnode.discovery.dht.kademlia import Kademlia
from p2pnode.discovery.settings import KademliaSettings
from p2pnode.wire.messages.discovery import Contact

COUNT = 30
SPACE = 1 << 256


def spread_out(own: bytes, settings: KademliaSettings) -> Kademlia:
    """A hash table that knows 30 nodes: 14 in one quarter of the space, 16 in the far half, none near."""
    made = Kademlia(Contact(own, ()), settings, lambda: 0.5, None, 0.0, None)
    distances = [SPACE // 4 + number * SPACE // 64 for number in range(14)]
    distances += [SPACE // 2 + number * SPACE // 32 for number in range(16)]
    for number, distance in enumerate(distances):
        assert made.table.answered(Contact(distance.to_bytes(32, "big"), (f"8.8.{number}.1:1",)), 0.0)
    return made


def test_the_network_has_at_least_the_nodes_that_answered():
    hash_table = spread_out(bytes(32), KademliaSettings())
    by_distance = hash_table._size.estimate(hash_table.table.sibling_distances(), 16)
    assert by_distance < COUNT, "by distances alone it would be underestimated"
    assert hash_table.network_size() == COUNT + 1
    for entry in list(hash_table.table.entries())[:5]:
        hash_table.table.failed(entry.contact.node_id)
    assert hash_table.network_size() == max(by_distance, COUNT + 1 - 5), "who does not answer is not counted"
