"""The peer book."""

import pytest

from p2pnode.ids import node_text
from p2pnode.store import peers
from p2pnode.store.database import memory

ALICE, BOB = b"a" * 32, b"b" * 32


@pytest.fixture
def connection():
    connection = memory()
    yield connection
    connection.close()


def test_sightings_merge_newest_addresses_first(connection):
    peers.saw_peer(connection, ALICE, ["1.1.1.1:1"], "mdns", 5)
    peers.saw_peer(connection, ALICE, [f"2.2.2.2:{port}" for port in range(9)], "static", 3)
    row = peers.get_peer(connection, ALICE)
    assert row.addresses == tuple(f"2.2.2.2:{port}" for port in range(8))
    assert (row.source, row.first_seen_ms, row.last_seen_ms) == ("mdns", 5, 5)


def test_connections_failures_and_scores(connection):
    peers.saw_peer(connection, ALICE, ["1.1.1.1:1"], "mdns", 5)
    peers.failed_peer(connection, ALICE)
    peers.adjust_score(connection, ALICE, -5000)
    assert (peers.get_peer(connection, ALICE).failures, peers.get_peer(connection, ALICE).score) == (1, -1000)
    peers.connected_peer(connection, ALICE, b"k" * 32, "2.2.2.2:2", "p2pnode/1", 9)
    row = peers.get_peer(connection, ALICE)
    assert (row.failures, row.public_key, row.addresses, row.last_connected_ms) == (0, b"k" * 32, ("2.2.2.2:2", "1.1.1.1:1"), 9)
    peers.connected_peer(connection, BOB, b"k" * 32, "", "", 10)
    assert [row.node_id for row in peers.list_peers(connection)] == [BOB, ALICE]
    assert peers.find_peers(connection, node_text(ALICE)[:9]) == [row]


def test_bans_last_and_only_grow(connection):
    peers.ban_peer(connection, ALICE, "bad-frame", 0, 100)
    peers.ban_peer(connection, ALICE, "rate", 0, 50)
    assert peers.get_peer(connection, ALICE).ban_reason == "bad-frame"
    assert peers.is_banned(connection, ALICE, 99)
    assert not peers.is_banned(connection, ALICE, 100)
    assert not peers.is_banned(connection, BOB, 0)
    assert peers.unban_peer(connection, ALICE)
    assert not peers.unban_peer(connection, ALICE)


def test_forgetting_spares_static_and_banned_peers(connection):
    for number, source in enumerate(["mdns", "static", "mdns", "mdns", "mdns"]):
        peers.saw_peer(connection, bytes([number]) * 32, ["x:1"], source, number)
    peers.ban_peer(connection, bytes([2]) * 32, "rate", 0, 1000)
    assert peers.forget_peers(connection, 1, 500) == 2
    assert [row.last_seen_ms for row in peers.list_peers(connection)] == [4, 2, 1]
