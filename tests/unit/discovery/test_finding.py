"""Alice, bob and carol on virtual time: roles by dial-back, records, links opened by id, and what becomes of idle ones."""

import pytest
import trio

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.records.address_record import address_key, decode_addresses
from p2pnode.discovery.records.record import open_record, record_key
from p2pnode.errors import Refused, Unreachable
from p2pnode.ids import NodeId
from p2pnode.reasons import Reason
from p2pnode.sim.network import MemoryNetwork
from p2pnode.store import peers as peer_rows
from p2pnode.wire.messages.discovery import Closest, DialBack, DialBackResult, FindNode, Introduction, WhoAreYou
from p2pnode.wire.messages.session import Done

NETWORK = bytes(32)


async def test_the_first_two_nodes_make_servers_of_each_other(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob = Machine(1, wires), Machine(2, wires, static=["10.0.0.1:7000"])
    async with alice.running(), bob.running():
        assert not bob.discovery.roles.is_server
        await until(lambda: alice.discovery.roles.is_server and bob.discovery.roles.is_server, 5)
        assert bob.discovery.roles.confirmed == ("10.0.0.2:7000",)
        await until(lambda: alice.node_id in bob.discovery.dht.table and bob.node_id in alice.discovery.dht.table, 10)
        assert bob.discovery.status()["role"] == "server"
        assert alice.metrics.value("dial_backs_total", "reached") >= 1
        assert len(bob.transport.links()) == 1, "the proof's own connection never becomes the link"


async def test_bob_finds_carol_by_her_id_through_alice(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob, carol = Machine(1, wires), *(Machine(n, wires, static=["10.0.0.1:7000"]) for n in (2, 3))
    async with alice.running(), bob.running(), carol.running():
        await until(lambda: len(bob.discovery.dht.table) == 2 and len(carol.discovery.dht.table) == 2)
        outcome = await bob.discovery.find_node(carol.node_id)
        assert outcome.contacts[0].node_id == carol.node_id
        link = await bob.discovery.reach(carol.node_id)
        assert link.peer.node_id == carol.node_id
        with pytest.raises(Unreachable, match="cannot be reached"):
            await bob.discovery.reach(NodeId(b"\x77" * 32))


async def test_links_opened_for_the_hash_table_are_not_kept(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob, carol = Machine(1, wires), *(Machine(n, wires, static=["10.0.0.1:7000"]) for n in (2, 3))
    async with alice.running(), bob.running(), carol.running():
        await until(lambda: len(bob.discovery.dht.table) == 2)
        await bob.discovery.reach(carol.node_id)
        assert bob.transport.links()[alice.node_id].pinned
        assert not bob.transport.links()[carol.node_id].pinned
        assert not carol.transport.links()[bob.node_id].pinned
        views = {view.node_id: view for view in bob.discovery.peers()}
        assert views[alice.node_id].kept_for[0] == "static"
        assert "static" not in views[carol.node_id].kept_for
        assert all(view.table for view in views.values()), "each says why it is in or out of the table"


async def test_what_alice_publishes_bob_reads_and_it_outlives_her_restart(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob, carol = Machine(1, wires), *(Machine(n, wires, static=["10.0.0.1:7000"]) for n in (2, 3))
    async with bob.running(), carol.running():
        async with alice.running():
            await until(lambda: len(alice.discovery.dht.table) == 2)
            publication = await alice.discovery.publish(b"greeting", b"hello", 600.0)
            assert (publication.acks, publication.is_stored) == (2, True)
            outcome = await bob.discovery.get_record(record_key(alice.node_id, b"greeting"))
            assert open_record(outcome.record, NETWORK, bob.discovery.now()).value == b"hello"
            first = publication.sequence
        async with Machine(1, wires, database=alice.database).running() as again:
            await trio.sleep(700)
            outcome = await again.discovery.get_record(record_key(alice.node_id, b"greeting"))
            found = open_record(outcome.record, NETWORK, again.discovery.now())
            assert found.value == b"hello"
            assert found.sequence > first, "it was signed anew before it expired"


async def test_a_node_publishes_where_it_is(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob = Machine(1, wires), Machine(2, wires, static=["10.0.0.1:7000"])
    silent = Machine(3, wires, static=["10.0.0.1:7000"], publish_address=False)
    async with alice.running(), bob.running(), silent.running():
        await trio.sleep(120)
        outcome = await alice.discovery.get_record(address_key(bob.node_id))
        record = open_record(outcome.record, NETWORK, alice.discovery.now())
        assert decode_addresses(record, bob.node_id).addresses == ("10.0.0.2:7000",)
        assert (await alice.discovery.get_record(address_key(silent.node_id))).record == b""


async def test_providers_are_found(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob, carol = Machine(1, wires), *(Machine(n, wires, static=["10.0.0.1:7000"]) for n in (2, 3))
    async with alice.running(), bob.running(), carol.running():
        await until(lambda: len(alice.discovery.dht.table) == 2)
        assert (await alice.discovery.provide(b"\x42" * 32)).is_stored
        outcome = await carol.discovery.find_providers(b"\x42" * 32)
        assert [contact.node_id for contact in outcome.providers] == [alice.node_id]


async def test_who_says_reached_without_the_nonce_is_not_believed(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    liar = Machine(1, wires, answers={DialBack: lambda message: DialBackResult(message.addresses[0], "reached")})
    bob = Machine(2, wires, static=["10.0.0.1:7000"])
    async with liar.running(), bob.running():
        await trio.sleep(60)
        assert bob.is_linked_with(liar)
        assert not bob.discovery.roles.is_server
        assert bob.metrics.value("requests_total", "DialBackProof") == 0


async def test_who_says_unreachable_leaves_a_client_that_is_in_nobodys_table(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice = Machine(1, wires, answers={DialBack: lambda message: DialBackResult(message.addresses[0], "unreachable")})
    bob = Machine(2, wires, static=["10.0.0.1:7000"])
    async with alice.running(), bob.running():
        await trio.sleep(120)
        assert bob.discovery.status()["role"] == "client"
        assert bob.node_id not in alice.discovery.dht.table
        assert alice.node_id in bob.discovery.dht.table, "a client uses the table; it is only not in it"


@pytest.mark.parametrize(
    ("addresses", "outcome"),
    [
        (("10.0.0.3:7000",), "refused"),  # carol's door, not bob's
        (("10.0.0.2:9",), "unreachable"),
        (("10.0.0.3:7000", "10.0.0.2:9"), "unreachable"),
        (("no address",), "refused"),
        ((), "refused"),
    ],
)
async def test_a_dial_back_goes_only_to_the_askers_own_host(autojump_clock, Machine, until, addresses, outcome):
    wires = MemoryNetwork(0.01)
    alice, bob, carol = Machine(1, wires), Machine(2, wires, static=["10.0.0.1:7000"]), Machine(3, wires)
    async with alice.running(), bob.running(), carol.running():
        await until(lambda: bob.is_linked_with(alice))
        link = bob.transport.links()[alice.node_id]
        answer = (await link.request(DialBack(addresses, bytes(16)))).message
        assert answer.outcome == outcome
        assert carol.metrics.total("connections_total") == 0


@pytest.mark.parametrize(("host", "outcome"), [("10.0.0.2", "refused"), ("80.1.0.2", "unreachable")])
async def test_in_a_public_network_no_private_address_is_dialled_for_others(autojump_clock, Machine, until, host, outcome):
    wires = MemoryNetwork(0.01)
    alice = Machine(1, wires, dials_private=False)
    bob = Machine(2, wires, static=["10.0.0.1:7000"], host=host)
    async with alice.running(), bob.running():
        await until(lambda: bob.is_linked_with(alice))
        link = bob.transport.links()[alice.node_id]
        assert (await link.request(DialBack((f"{host}:9",), bytes(16)))).message.outcome == outcome


async def test_one_host_cannot_have_us_dial_without_end(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob = Machine(1, wires), Machine(2, wires, static=["10.0.0.1:7000"], host="80.1.0.2")
    async with alice.running(), bob.running():
        await until(lambda: bob.discovery.roles.is_server)
        link = bob.transport.links()[alice.node_id]
        refused = 0
        for _ in range(20):
            try:
                await link.request(DialBack(("80.1.0.2:9",), bytes(16)))
            except Refused as error:
                refused += error.reason is Reason.RATE
        assert refused >= 15


async def test_an_answer_of_another_class_costs_the_link_and_score(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    wrong = Machine(1, wires, answers={FindNode: lambda message: Done()})
    bob = Machine(2, wires, static=["10.0.0.1:7000"])
    async with wrong.running(), bob.running():
        await trio.sleep(30)
        (view,) = bob.discovery.peers()
        assert view.score < -15
        assert view.banned_for == "wrong-type"
        assert wrong.node_id not in bob.discovery.dht.table


async def test_contacts_that_are_lies_never_enter_the_table(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    lie = tuple({"node_id": Identity(bytes([n]) * 32).node_id, "addresses": ("10.0.0.1:7000",)} for n in range(100, 110))
    from p2pnode.wire.messages.discovery import Contact

    contacts = tuple(Contact(**each) for each in lie)
    liar = Machine(1, wires, answers={FindNode: lambda message: Closest(contacts, True)})
    bob = Machine(2, wires, static=["10.0.0.1:7000"])
    async with liar.running(), bob.running():
        await trio.sleep(60)
        assert [each.contact.node_id for each in bob.discovery.dht.table.entries()] == [liar.node_id]


async def test_clocks_are_compared_with_peers(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    alice, bob = Machine(1, wires, skew_ms=90_000), Machine(2, wires, static=["10.0.0.1:7000"])
    async with alice.running(), bob.running():
        await until(lambda: bob.discovery.introductions.skew_seconds is not None)
        assert bob.discovery.introductions.skew_seconds == pytest.approx(90.0, abs=0.05)


async def test_an_introduction_in_anothers_name_is_a_violation(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    false = Introduction(node_id=bytes(32), addresses=(), seen_address="10.0.0.2:1", role="server")
    alice = Machine(1, wires, answers={WhoAreYou: lambda message: false})
    bob = Machine(2, wires, static=["10.0.0.1:7000"])
    async with alice.running(), bob.running():
        await until(lambda: bob.discovery.peers() and bob.discovery.peers()[0].score < 0)
        assert bob.discovery.roles.seen_addresses == ()


async def test_anchors_are_kept_and_dialled_first_after_a_restart(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    others = [Machine(n, wires, host=f"80.{n}.0.1") for n in (1, 2)]
    bob = Machine(9, wires, bootstrap=["80.1.0.1:7000", "80.2.0.1:7000"])
    async with others[0].running(), others[1].running():
        async with bob.running():
            await trio.sleep(200)
            kept = {view.node_id: view.kept_for for view in bob.discovery.peers()}
            assert all("anchor" in kept[other.node_id] for other in others)
        rows = await bob.database.read(peer_rows.list_peers)
        assert {row.source for row in rows} == {"anchor"}
        async with Machine(9, wires, database=bob.database).running() as again:
            await until(lambda: all(again.is_linked_with(other) for other in others), 2)


@pytest.mark.slow
async def test_after_a_partition_a_lost_peer_leads_to_all_others(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    machines = [Machine(n, wires, host=f"80.{n}.0.1", static=[] if n == 1 else ["80.1.0.1:7000"]) for n in range(1, 7)]
    async with trio.open_nursery() as nursery:
        stop = trio.Event()

        async def run(machine):
            async with machine.running():
                await stop.wait()

        for machine in machines:
            nursery.start_soon(run, machine)
        await until(lambda: all(len(machine.discovery.dht.table) == 5 for machine in machines))
        wires.partition([["80.1.0.1", "80.2.0.1", "80.3.0.1"], ["80.4.0.1", "80.5.0.1", "80.6.0.1"]])
        await trio.sleep(400)
        assert all(len(machine.discovery.dht.table) <= 2 for machine in machines), "each half knows only itself"
        wires.heal()
        await until(lambda: all(len(machine.discovery.dht.table) == 5 for machine in machines), 120)
        assert sum(machine.metrics.total("peers_found_again_total") for machine in machines) >= 1
        stop.set()


async def test_a_client_in_nobodys_table_is_reached_by_the_record_of_its_addresses(autojump_clock, Machine, until):
    wires = MemoryNetwork(0.01)
    no = {DialBack: lambda message: DialBackResult(message.addresses[0], "unreachable")}
    alice, bob = Machine(1, wires, answers=no), Machine(2, wires, static=["10.0.0.1:7000"], answers=no)
    carol = Machine(3, wires, bootstrap=["10.0.0.1:7000"])
    for machine in (alice, bob):
        machine.discovery.dht.is_server = True  # as if the network had others to dial back
    async with alice.running(), bob.running(), carol.running():
        await trio.sleep(120)
        assert carol.discovery.status()["role"] == "client"
        bob.discovery.keeper.book = alice.discovery.keeper.book.__class__(
            bob.node_id, bob.discovery._settings, lambda: 0.5, (), bob.discovery.keeper.plan
        )  # bob has never heard of carol
        link = bob.transport.links().get(carol.node_id)
        if link is not None:
            link.close(Reason.IDLE)
            await trio.sleep(1)
        assert carol.node_id not in bob.discovery.dht.table
        link = await bob.discovery.reach(carol.node_id)
        assert link.peer.seen_address == "10.0.0.3:7000"
