"""The rows of the peer book."""

from dataclasses import replace

import pytest

from p2pnode.store.database import memory
from p2pnode.store.peers import ADDRESSES_MAX, SCORE_MAX, PeerRow, delete_peer, list_peers, put_peer

ALICE = PeerRow(b"a" * 32, b"k" * 32, ("1.1.1.1:1", "2.2.2.2:2"), "mdns", "p2pnode/1", 5, 9, 9, 1, -3, 100, "rate")


@pytest.fixture
def connection():
    connection = memory()
    yield connection
    connection.close()


def test_a_row_comes_back_as_it_was_put_and_is_replaced(connection):
    put_peer(connection, ALICE)
    assert list_peers(connection) == [ALICE]
    later = replace(ALICE, addresses=("3.3.3.3:3",), last_seen_ms=20, failures=0, score=7, banned_until_ms=0, ban_reason="")
    put_peer(connection, later)
    assert list_peers(connection) == [later]


def test_a_sighting_without_key_and_agent_leaves_the_known_ones(connection):
    put_peer(connection, ALICE)
    put_peer(connection, replace(ALICE, public_key=b"", agent=""))
    assert list_peers(connection) == [ALICE]


def test_addresses_and_scores_are_bounded(connection):
    put_peer(connection, replace(ALICE, addresses=tuple(f"1.1.1.1:{port}" for port in range(1, 20)), score=-5000))
    (row,) = list_peers(connection)
    assert len(row.addresses) == ADDRESSES_MAX
    assert row.score == -SCORE_MAX


def test_the_newest_sightings_come_first_and_one_peer_can_be_forgotten(connection):
    rows = [replace(ALICE, node_id=bytes([number]) * 32, last_seen_ms=number) for number in (1, 3, 2)]
    for row in rows:
        put_peer(connection, row)
    assert [row.last_seen_ms for row in list_peers(connection, limit=2)] == [3, 2]
    delete_peer(connection, rows[1].node_id)
    assert [row.last_seen_ms for row in list_peers(connection)] == [2, 1]
