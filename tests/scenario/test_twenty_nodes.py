"""Twenty nodes join, publish and find; half of them lose their power; the others go on, and those who come back find them."""

import pytest
import trio

from p2pnode.discovery.records.record import open_record, record_key
from p2pnode.sim.options import WorldOptions
from p2pnode.sim.world import run_world

pytestmark = pytest.mark.slow
NODES = 20


async def grow(world):
    nodes = [await world.start("n0")]
    for number in range(1, NODES):
        entries = {"n0", f"n{world.random.randrange(number)}"}
        addresses = ",".join(sorted(world.residents[name].address for name in entries))
        nodes.append(await world.start(f"n{number}", {"network.bootstrap": addresses}))
    await world.settle(lambda: all(node.discovery.roles.is_server for node in nodes), 60)
    await trio.sleep(30)
    return nodes


async def found(node, publisher_id):
    outcome = await node.discovery.get_record(record_key(publisher_id, b"place"))
    return open_record(outcome.record, node.network_id, node.discovery.now()).value if outcome.record else b""


@pytest.mark.parametrize("loss", [0.0, 0.02])
def test_twenty_nodes_join_publish_find_lose_half_and_recover(loss):
    async def scenario(world):
        nodes = await grow(world)
        sizes = sorted(len(node.discovery.dht.table) for node in nodes)
        assert sizes[0] >= (NODES - 4 if loss else NODES - 1), f"twenty fit into everybody's table: {sizes}"
        for number, node in enumerate(nodes):
            publication = await node.discovery.publish(b"place", str(number).encode(), 3600.0)
            assert publication.is_stored
            assert publication.acks >= 8
        for number, node in enumerate(nodes):
            assert await found(nodes[-1 - number], node.node_id) == str(number).encode()

        dead = await world.kill(0.5, silent=True)
        alive = [name for name in world.residents if name not in dead]
        await trio.sleep(120)
        good = total = 0
        for name in alive:
            reader = world.residents[name].node
            for number in range(0, NODES, 3):
                total += 1
                good += await found(reader, nodes[number].node_id) == str(number).encode()
        assert good >= 0.99 * total, "two minutes later the dead cost nobody a record"
        assert all(len(world.residents[name].node.discovery.dht.table) >= len(alive) - 1 for name in alive)

        for name in dead:
            await world.restart(name)
        await trio.sleep(120)
        sizes = [len(world.residents[f"n{number}"].node.discovery.dht.table) for number in range(NODES)]
        assert min(sizes) >= NODES - 2, sizes
        late = world.residents[dead[0]].node
        assert await found(late, nodes[0].node_id) == b"0"
        return world.trace.digest()

    options = WorldOptions(seed=3, nodes=NODES, loss=loss, cipher="plain")
    assert run_world(scenario, options=options) == run_world(scenario, options=options), "the same seed, the same run"


def test_nodes_that_nobody_can_dial_use_the_network_as_clients():
    async def scenario(world):
        servers = [await world.start("s0", nat="none")]
        servers += [
            await world.start(f"s{number}", {"network.bootstrap": world.residents["s0"].address}, nat="none")
            for number in range(1, 6)
        ]
        hidden = [
            await world.start(f"c{number}", {"network.bootstrap": world.residents["s1"].address}, nat=kind)
            for number, kind in enumerate(("cone", "symmetric", "firewalled"))
        ]
        await trio.sleep(180)
        assert all(node.discovery.roles.is_server for node in servers)
        assert not any(node.discovery.roles.is_server for node in hidden)
        for node in servers + hidden:
            entries = {each.contact.node_id for each in node.discovery.dht.table.entries()}
            assert not entries & {each.node_id for each in hidden}, "a client is in nobody's table"
        assert (await hidden[0].discovery.publish(b"place", b"hidden", 600.0)).is_stored
        assert await found(hidden[1], hidden[0].node_id) == b"hidden"

    run_world(scenario, options=WorldOptions(seed=5, nodes=9))
