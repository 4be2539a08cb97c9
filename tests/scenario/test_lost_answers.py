"""Whole nodes on virtual time: a provider is cut off with an answer on its way, and is back when the job was done elsewhere."""

import numpy as np
import onnx
import pytest
import trio
from onnx import TensorProto, helper

from p2pnode.jobs.spec import SessionSpec
from p2pnode.sim.world import run_world
from p2pnode.store import accounts, agreements

pytestmark = pytest.mark.slow

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def square(tmp_path):
    """A model that squares rows of four numbers."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "square", [x], [y])
    path = tmp_path / "square.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


async def receipts(node):
    def query(connection):
        accounts.check_balanced(connection)
        rows = agreements.list_agreements(connection)
        assert all((row.state, row.unpaid) == ("ended", 0) for row in rows), rows
        assert not {"unpaid", "mismatch", "peer-lost"} & {row.end_reason for row in rows}, rows
        return {(row.document, row.calls, row.amount) for row in agreements.list_receipts(connection)}

    return await node.environment.database.read(query)


@pytest.mark.parametrize("away_seconds", [60, 600])
def test_a_call_that_was_made_elsewhere_is_paid_once(square, away_seconds):
    async def scenario(world):
        sellers = {name: await world.start(name) for name in ("alice", "carol")}
        bob = await world.start("bob", {"provide.enabled": "false"}, knows=list(sellers))
        await world.settle(lambda: len(bob.transport.links()) == 2)
        session = await bob.jobs.session(SessionSpec(square))
        await session.run(None, {"x": ROWS})
        lost = next(name for name, node in sellers.items() if node.node_id == session.providers[0])
        [sale] = sellers[lost].market.storefront.sales.values()
        outputs = []

        async def call() -> None:
            outputs.extend(await session.run(None, {"x": ROWS + 1}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            # The provider hears, and is not heard.
            world.cut([lost], [name for name in world.residents if name != lost])
            await world.settle(lambda: sale.machine.exposed_calls == 2)
            world.partition([lost])
        assert np.array_equal(outputs[0], (ROWS + 1) ** 2)
        assert sellers[lost].node_id not in session.providers
        await trio.sleep(away_seconds)
        world.heal()
        await trio.sleep(120)
        await bob.jobs.close_session(session)
        await world.settle(lambda: not bob.market.status()["purchases"])
        await world.settle(lambda: not any(node.market.status()["sales"] for node in sellers.values()))
        sold = {name: await receipts(node) for name, node in sellers.items()}
        assert await receipts(bob) == set().union(*sold.values())
        [(_, _, price)] = [row for name, rows in sold.items() for row in rows if name != lost]
        assert price > 0
        assert sorted((calls, amount) for _, calls, amount in sold[lost])[-1] == (2, price)
        assert sellers[lost].metrics.value("written_off_microcredits_total") == price

    run_world(scenario, seed=5)
