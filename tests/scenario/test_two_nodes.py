"""The main job on virtual time: alice lends, bob borrows, and both hold a signed receipt and a cheque."""

import numpy as np
import onnx
import pytest
import trio
from onnx import TensorProto, helper

from p2pnode.errors import Refused
from p2pnode.ids import node_text
from p2pnode.jobs.spec import JobSpec, Terms
from p2pnode.market.receipt_file import is_verified, verify_bundle
from p2pnode.reasons import EndReason, Reason
from p2pnode.sim.world import run_world
from p2pnode.store import accounts, agreements

pytestmark = pytest.mark.slow


@pytest.fixture
def square(tmp_path):
    """A model that squares rows of four numbers."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "square", [x], [y])
    path = tmp_path / "square.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


async def meet(world):
    alice = await world.start("alice")
    bob = await world.start("bob", {"provide.enabled": "false"}, knows=["alice"])
    await world.settle(lambda: alice.transport.links() and bob.transport.links())
    return alice, bob


async def books(node):
    def query(connection):
        accounts.check_balanced(connection)
        rows = agreements.list_receipts(connection)
        return (
            [(row.document, row.amount, row.calls) for row in rows],
            [agreements.get_cheque(connection, row.agreement, row.slice) for row in rows],
            {row.account: row.amount for row in accounts.balances(connection)},
            [row.end_reason for row in agreements.list_agreements(connection)],
        )

    return await node.environment.database.read(query)


def test_alice_serves_bob_and_both_hold_receipt_and_cheque(square):
    async def scenario(world):
        alice, bob = await meet(world)
        result = await bob.jobs.run_job(JobSpec(square, {"x": ROWS}))
        assert np.array_equal(result.outputs["y"], ROWS * ROWS)
        assert result.provider == node_text(alice.node_id)
        assert result.end_reason is EndReason.COMPLETED
        await world.settle(lambda: not alice.market.status()["sales"])
        sold, sold_cheques, earned, sold_ends = await books(alice)
        bought, bought_cheques, spent, bought_ends = await books(bob)
        assert sold == bought, "both sides hold the same receipt"
        assert len(sold) == 1
        assert sold_cheques == bought_cheques
        assert sold_cheques[0] is not None
        assert sold_ends == bought_ends == [EndReason.COMPLETED.value]
        assert earned["income"] == -result.amount
        assert spent["spend"] == result.amount == sold[0][1]
        for node in (alice, bob):
            calls = await node.environment.database.read(
                lambda connection: agreements.list_calls(connection, agreements.list_receipts(connection)[0].agreement)
            )
            bundle = await node.market.receipt(calls[0].agreement, calls[0].number)
            checks = verify_bundle(bundle, {"x": ROWS}, {"y": ROWS * ROWS})
            assert is_verified(checks), [check for check in checks if not check.ok]
        return result.job, sold

    first, second = run_world(scenario, seed=7), run_world(scenario, seed=7)
    assert first == second, "the same seed gives the same run"
    assert run_world(scenario, seed=8) != first


def test_the_owner_can_pause_and_resume(square):
    async def scenario(world):
        alice, bob = await meet(world)
        alice.pause(None)
        assert alice.state() == "paused"
        with pytest.raises(Refused) as caught:
            await bob.jobs.run_job(JobSpec(square, {"x": ROWS}, terms=Terms(deadline_seconds=30)))
        assert caught.value.reason is Reason.PAUSED
        assert any("p2pnode resume" in sentence for sentence in alice.why()["sentences"])
        alice.resume()
        await bob.jobs.run_job(JobSpec(square, {"x": ROWS}))

    run_world(scenario)


def test_a_price_above_the_limit_is_refused_and_a_change_applies_live(square):
    async def scenario(world):
        from p2pnode.node.config import with_settings

        alice, bob = await meet(world)
        now, later = alice.apply_config(with_settings(alice.config, {"provide.call_price": "5", "network.listen": "1.2.3.4:5"}))
        assert (now, later) == (["provide.call_price"], ["network.listen"])
        terms = Terms(max_price=1_000_000, deadline_seconds=30)
        with pytest.raises(Refused) as caught:
            await bob.jobs.run_job(JobSpec(square, {"x": ROWS}, terms=terms))
        assert caught.value.reason is Reason.PRICE
        alice.apply_config(with_settings(alice.config, {"provide.call_price": "0.5"}))
        result = await bob.jobs.run_job(JobSpec(square, {"x": ROWS}, terms=terms))
        assert result.amount >= 500_000

    run_world(scenario)


def test_a_node_that_was_stopped_comes_back_with_its_books(square):
    async def scenario(world):
        _, bob = await meet(world)
        before = (await bob.jobs.run_job(JobSpec(square, {"x": ROWS}))).amount
        await world.stop("alice")
        await world.settle(lambda: not bob.transport.links())
        alice = await world.start("alice")
        await world.settle(lambda: bob.transport.links(), 120)
        result = await bob.jobs.run_job(JobSpec(square, {"x": ROWS}))
        await world.settle(lambda: not alice.market.status()["sales"])
        receipts, _, earned, _ = await books(alice)
        assert len(receipts) == 2
        assert earned["income"] == -(before + result.amount)

    run_world(scenario)


def test_a_run_that_is_given_up_while_it_asks_for_quotes_ends_in_the_books(square):
    async def scenario(world):
        _, bob = await meet(world)
        world.partition(["alice"], ["bob"])
        with trio.move_on_after(5) as given_up:
            await bob.jobs.run_job(JobSpec(square, {"x": ROWS}, terms=Terms(deadline_seconds=60)))
        assert given_up.cancelled_caught
        rows = await bob.environment.database.read(lambda book: book.execute("SELECT state, end_reason FROM jobs").fetchall())
        assert rows == [("ended", EndReason.CANCELLED.value)]

    run_world(scenario)
