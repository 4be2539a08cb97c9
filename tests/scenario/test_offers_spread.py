"""Offers on real nodes: known to everybody by gossip, searched, bought from without a link, gone when their provider is."""

import json

import numpy as np
import onnx
import pytest
import trio
from onnx import TensorProto, helper

from p2pnode.api.http import Request
from p2pnode.api.routes import Control, all_routes
from p2pnode.errors import QueryError
from p2pnode.ids import node_text
from p2pnode.jobs.spec import JobSpec
from p2pnode.node.main import Daemon
from p2pnode.reasons import Reason
from p2pnode.sim.world import run_world

pytestmark = pytest.mark.slow


async def network(world):
    """A hub that only buys, three sellers and a buyer; all know the hub alone."""
    nodes = {"hub": await world.start("hub", {"provide.enabled": "false"})}
    for name, price in (("alice", "100000"), ("bob", "500000"), ("carol", "900000")):
        nodes[name] = await world.start(name, {"provide.price": price, "provide.region": "eu"}, knows=["hub"])
    nodes["dave"] = await world.start("dave", {"provide.enabled": "false"}, knows=["hub"])
    await world.settle(lambda: len(nodes["dave"].market.finding.listings()) == 3)
    return nodes


def found(node, query="", **options):
    return [each.listed.provider for each in node.market.finding.search(query, **options).found]


def test_every_offer_is_known_to_everybody_and_searched():
    async def scenario(world):
        nodes = await network(world)
        dave = nodes["dave"]
        assert found(dave) == [nodes[name].node_id for name in ("alice", "bob", "carol")], "cheapest first"
        assert found(dave, "price<600000 region=eu", order="-price") == [nodes["bob"].node_id, nodes["alice"].node_id]

        async def ask(**query):
            reply = await all_routes().dispatch(Control(Daemon(dave)), Request("GET", ("v1", "offers", "search"), query, {}, b""))
            return json.loads(reply.body)

        answer = await ask(q="price<600000", order="-price", explain="1")
        assert [row["provider"] for row in answer["offers"]] == [node_text(nodes[name].node_id) for name in ("bob", "alice")]
        assert answer["offers"][0]["price"] == 500000
        excluded = {each["condition"]: (each["excluded"], each["alone"]) for each in answer["exclusions"]}
        assert excluded["price<600000"] == (1, 1)
        assert excluded["not suspected"] == (0, 0)
        assert answer["sources"]["price"] == "offer"
        assert answer["sources"]["reliability"] == "own"
        with pytest.raises(QueryError, match="did you mean `price`"):
            await ask(q="prise<1")

    run_world(scenario, seed=5)


def test_a_buyer_reaches_the_cheapest_provider_though_no_link_stands(tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "square", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "square.onnx")

    async def scenario(world):
        nodes = await network(world)
        dave, alice = nodes["dave"], nodes["alice"]
        link = dave.transport.links().get(alice.node_id)
        if link is not None:
            link.close(Reason.IDLE)
            await world.settle(lambda: alice.node_id not in dave.transport.links())
        reached, reach = [], dave.market.finding.reach

        async def watched(node_id):
            reached.append(node_id)
            return await reach(node_id)

        dave.market.finding.reach = watched
        rows = np.arange(8, dtype=np.float32).reshape(2, 4)
        result = await dave.jobs.run_job(JobSpec(str(tmp_path / "square.onnx"), {"x": rows}))
        assert np.array_equal(result.outputs["y"], rows * rows)
        assert result.provider == node_text(alice.node_id)
        assert alice.node_id in reached
        knows = dave.market.finding.peer_fields()
        assert knows(alice.node_id)["reliability"] == 1.0
        assert knows(alice.node_id)["new"] is False
        assert found(dave, "reliability>0.97") == [alice.node_id]

    run_world(scenario, seed=5)


def test_a_dead_provider_leaves_the_default_search_within_a_minute_and_comes_back():
    async def scenario(world):
        nodes = await network(world)
        dave, alice = nodes["dave"], nodes["alice"].node_id
        await trio.sleep(60)
        assert alice in found(dave), "nobody is suspected while everybody lives"
        await world.crash("alice", silent=True)
        started = world.now
        await world.settle(lambda: alice not in found(dave), 60)
        assert world.now - started > 3, "one lost packet is no reason to suspect anybody"
        assert alice in found(dave, use_default=False), "suspicion hides, it does not delete"
        await world.restart("alice")
        await world.settle(lambda: alice in found(dave), 20)

    run_world(scenario, seed=6)


def test_who_stops_selling_is_gone_at_once():
    async def scenario(world):
        nodes = await network(world)
        dave = nodes["dave"]
        started = world.now
        await world.stop("bob")
        nodes["carol"].pause(None)
        await world.settle(lambda: found(dave, use_default=False) == [nodes["alice"].node_id], 10)
        assert world.now - started < 5
        nodes["carol"].resume()
        bob = await world.restart("bob")
        await world.settle(lambda: set(found(dave)) == {nodes[name].node_id for name in ("alice", "carol")} | {bob.node_id}, 30)

    run_world(scenario, seed=7)
