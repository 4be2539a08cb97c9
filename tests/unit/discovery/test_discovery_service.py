"""Discovery on virtual time: alice and bob meet, introduce themselves, lose each other and meet again."""

import pytest
import trio

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.addresses import claimed_addresses, parse_static_peer
from p2pnode.discovery.peers.mdns import MdnsStatus, Sighting
from p2pnode.errors import ConfigError
from p2pnode.ids import node_text
from p2pnode.reasons import Reason
from p2pnode.sim.network import MemoryNetwork
from p2pnode.store import peers as peer_rows


async def test_a_static_peer_is_met_and_both_know_each_other(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob = Machine(1, wires), Machine(2, wires, static=["10.0.0.1:7000"])
    async with alice.running(), bob.running():
        await until(lambda: alice.is_linked_with(bob) and bob.is_linked_with(alice))
        await trio.sleep(2)
        (seen,) = bob.discovery.peers()
        assert (seen.node_id, seen.connected, seen.addresses[0]) == (alice.identity.node_id, True, "10.0.0.1:7000")
        (back,) = alice.discovery.peers()
        assert back.inbound
        assert "10.0.0.2:7000" in back.addresses, "bob said where he listens"
        assert bob.discovery.status()["seen_as"][0].startswith("10.0.0.2:")
        stored = await bob.database.read(peer_rows.list_peers)
        assert [row.node_id for row in stored] == [alice.identity.node_id]
        assert stored[0].last_connected_ms > 0


async def test_links_stay_open_while_idle_and_come_back_after_a_loss(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob = Machine(1, wires), Machine(2, wires, static=["10.0.0.1:7000"])
    async with alice.running(), bob.running():
        await until(lambda: bob.is_linked_with(alice))
        await trio.sleep(300)
        assert bob.is_linked_with(alice)
        old = bob.transport.links()[alice.identity.node_id]
        old.close(Reason.IDLE)
        await until(lambda: bob.transport.links().get(alice.identity.node_id) not in (None, old) and alice.is_linked_with(bob))
        assert bob.transport.links()[alice.identity.node_id].pinned


async def test_a_peer_that_starts_later_is_found_and_one_from_the_book_too(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    bob = Machine(2, wires, static=["10.0.0.1:7000"])
    async with bob.running():
        await trio.sleep(100)
        async with Machine(1, wires).running() as alice:
            await until(lambda: bob.is_linked_with(alice), 400)
    again = Machine(2, wires, database=bob.database)
    async with Machine(1, wires).running() as alice, again.running():
        await until(lambda: again.is_linked_with(alice), 5)
        assert again.is_linked_with(alice)


async def test_what_mdns_hears_is_only_a_hint(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, carol = Machine(1, wires), Machine(3, wires)

    class Fake:
        identity_elsewhere = ""
        status = MdnsStatus("working")

        def __init__(self, announcement, settings, metrics):
            assert announcement.listen_addresses == ("10.0.0.2:7000",)

        async def run(self, sightings, *, task_status):
            task_status.started()
            await sightings.send(Sighting(alice.identity.node_id, ("10.0.0.1:7000",)))
            # A lie: carol's address under a name that she cannot prove.
            await sightings.send(Sighting(Identity(b"\x09" * 32).node_id, ("10.0.0.3:7000",)))
            await trio.sleep_forever()

    bob = Machine(2, wires, mdns=Fake)
    async with alice.running(), carol.running(), bob.running():
        await until(lambda: bob.is_linked_with(alice))
        await trio.sleep(30)
        assert set(bob.transport.links()) == {alice.identity.node_id}
        assert bob.discovery.status()["mdns"]["state"] == "working"


async def test_a_second_node_with_the_same_identity_is_told_of(autojump_clock, Machine, until, caplog):
    wires = MemoryNetwork(0.01)
    alice = Machine(1, wires)
    copy = Machine(2, wires, static=["10.0.0.1:7000"], identity=alice.identity)
    async with alice.running(), copy.running():
        await until(lambda: copy.discovery.duplicate_identity)
    assert "another node uses this identity" in caplog.text


async def test_a_banned_peer_loses_its_link_and_is_not_dialled(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob = Machine(1, wires), Machine(2, wires, static=["10.0.0.1:7000"])
    async with alice.running(), bob.running():
        await until(lambda: bob.is_linked_with(alice))
        bob.discovery.misbehaved(alice.identity.node_id, Reason.BAD_SIGNATURE)
        await until(lambda: not bob.is_linked_with(alice))
        linked = 0
        for _ in range(600):
            await trio.sleep(0.1)
            linked += bob.is_linked_with(alice)
        assert linked < 20, "alice comes back a few times and is closed each time"
        assert bob.discovery.is_banned(alice.identity.node_id)
        (view,) = bob.discovery.peers()
        assert view.banned_for == "bad-signature"
        assert view.banned_seconds > 3000
        assert node_text(alice.identity.node_id) == view.as_json()["node_id"]


@pytest.mark.parametrize("text", ["", "host", "host:0", "host:99999", "ho st:1", "node-x@host:1", "[::zz]:1", "a" * 300 + ":1"])
def test_a_mistyped_peer_is_a_config_error(text):
    with pytest.raises(ConfigError, match="is not a peer"):
        parse_static_peer(text)


def test_static_peers_are_parsed():
    node_id = Identity(b"\1" * 32).node_id
    assert parse_static_peer("host.example:7470") == ("host.example:7470", None)
    assert parse_static_peer(f"{node_text(node_id)}@[::1]:7470") == ("[::1]:7470", node_id)


def test_a_wildcard_stands_for_where_the_bytes_come_from():
    claimed = ["0.0.0.0:7470", "10.0.0.9:1", "bad", "0.0.0.0:0", "[::]:5"]
    assert claimed_addresses(claimed, "1.2.3.4:555") == ("1.2.3.4:7470", "10.0.0.9:1", "1.2.3.4:5")
