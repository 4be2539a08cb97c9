"""The client's side between real nodes on virtual time: runs, maps, sessions, and what each of them leaves in the books."""

from contextlib import aclosing

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from p2pnode.errors import ConfigError, Refused, WorkError
from p2pnode.ids import node_text
from p2pnode.jobs.spec import JobSpec, MapSpec, SessionSpec, Terms
from p2pnode.reasons import Reason
from p2pnode.sim.world import run_world
from p2pnode.store import agreements

pytestmark = pytest.mark.slow

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)
DATA = np.arange(400, dtype=np.float32).reshape(100, 4)


@pytest.fixture
def square(tmp_path):
    """A model that squares rows of four numbers."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "square", [x], [y], doc_string="squares")
    path = tmp_path / "square.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, DATA)
    return str(path)


async def market(world, providers=("alice",), **settings):
    """Start providers and bob, who only buys; gives bob once he knows them all."""
    for name in providers:
        await world.start(name, {"provide.call_price": "0.001", **settings})
    bob = await world.start("bob", {"provide.enabled": "false"}, knows=list(providers))
    await world.settle(lambda: len(bob.transport.links()) == len(providers))
    return bob


async def until_done(node, job, count):
    """Follow a map until so many of its items are done."""
    async with aclosing(node.jobs.events(job)) as events:
        async for event in events:
            if event["done"] >= count:
                return


async def bought(node):
    return await node.environment.database.read(lambda connection: agreements.list_agreements(connection, role="client"))


def test_a_map_uses_every_provider_and_keeps_the_order(square, data, tmp_path):
    output = tmp_path / "out.npy"

    async def scenario(world):
        bob = await market(world, ("alice", "carol"))
        job = await bob.jobs.start_map(MapSpec(square, data, str(output), batch=5))
        events = [event async for event in bob.jobs.events(job)]
        assert events[-1]["end_reason"] == "completed"
        assert (events[-1]["done"], events[-1]["total"]) == (20, 20)
        assert np.array_equal(np.load(output), DATA * DATA)
        rows = await bought(bob)
        assert {row.peer for row in rows} == {world.residents[name].identity.node_id for name in ("alice", "carol")}
        description = await bob.jobs.describe(job)
        assert description["items_by_state"] == {"done": 20}
        assert description["spent_microcredits"] == events[-1]["spent"] == sum(row.paid for row in rows)
        # 20 calls at 1000 micro-credits each, and the operations beside them.
        assert 20_000 <= description["spent_microcredits"] <= 20_100
        assert not (tmp_path / "out.npy.parts").exists()
        assert await bob.jobs.start_map(MapSpec(square, data, str(output), batch=5)) == job, "it is complete: nothing to do"
        assert len(await bought(bob)) == len(rows)
        assert [row["id"] for row in await bob.jobs.list()] == [description["id"]]

    run_world(scenario)


def test_a_total_is_never_passed_and_more_money_goes_on_where_it_stopped(square, data, tmp_path):
    output = tmp_path / "out.jsonl"

    async def scenario(world):
        bob = await market(world, ("alice", "carol"))

        async def attempt(total):
            job = await bob.jobs.start_map(MapSpec(square, data, str(output), batch=5, terms=Terms(max_total=total)))
            return await bob.jobs.wait(job)

        first = await attempt(7500)
        assert first["end_reason"] == "budget"
        assert 0 < first["items_by_state"]["done"] <= 7
        assert first["spent_microcredits"] <= 7500
        assert not output.exists()
        second = await attempt(50_000)
        assert second["end_reason"] == "completed"
        spent = first["spent_microcredits"] + second["spent_microcredits"]
        assert 20_000 <= spent <= 20_100, "what the first attempt paid for is not paid again"
        assert len(output.read_text().splitlines()) == 100

    run_world(scenario)


def test_a_stopped_map_goes_on_with_the_same_command(square, data, tmp_path):
    output = tmp_path / "out.npy"

    async def scenario(world):
        bob = await market(world)
        spec = MapSpec(square, data, str(output), batch=1)
        job = await bob.jobs.start_map(spec)
        await until_done(bob, job, 20)
        await bob.jobs.stop(job)
        stopped = await bob.jobs.wait(job)
        assert stopped["end_reason"] == "cancelled"
        again = await bob.jobs.wait(await bob.jobs.start_map(spec))
        assert again["end_reason"] == "completed"
        assert again["id"] != stopped["id"]
        assert 100_000 <= stopped["spent_microcredits"] + again["spent_microcredits"] <= 100_500
        assert np.array_equal(np.load(output), DATA * DATA)

    run_world(scenario)


def test_a_node_that_stops_during_a_map_continues_it_after_its_restart(square, data, tmp_path):
    output = tmp_path / "out.npy"

    async def scenario(world):
        bob = await market(world)
        spec = MapSpec(square, data, str(output), batch=1)
        job = await bob.jobs.start_map(spec)
        await until_done(bob, job, 20)
        await world.stop("bob")
        bob = await world.start("bob", {"provide.enabled": "false"}, knows=["alice"])
        await world.settle(lambda: bob.transport.links())
        assert await bob.jobs.start_map(spec) == job
        description = await bob.jobs.wait(job)
        assert description["end_reason"] == "completed"
        assert 100_000 <= description["spent_microcredits"] <= 100_500, "nothing was paid twice"

    run_world(scenario)


def test_a_lost_provider_is_replaced(square, data, tmp_path):
    output = tmp_path / "out.npy"

    async def scenario(world):
        bob = await market(world, ("alice", "carol"))
        job = await bob.jobs.start_map(MapSpec(square, data, str(output), batch=1))
        await until_done(bob, job, 10)
        await world.stop("carol")
        description = await bob.jobs.wait(job)
        assert description["end_reason"] == "completed"
        assert np.array_equal(np.load(output), DATA * DATA)

    run_world(scenario)


def test_a_map_that_cannot_work_says_so_before_it_spends(square, data, tmp_path):
    async def scenario(world):
        bob = await market(world)
        with pytest.raises(ConfigError, match="no output z"):
            await bob.jobs.start_map(MapSpec(square, data, str(tmp_path / "o.npy"), outputs=("z",)))
        with pytest.raises(ConfigError, match="no data"):
            await bob.jobs.start_map(MapSpec(square, str(tmp_path / "none.npy"), str(tmp_path / "o.npy")))
        assert await bob.jobs.list() == []

    run_world(scenario)


def test_bad_items_fail_alone_and_the_parts_are_kept(square, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(6):
        np.save(folder / f"{number}.npy", ROWS if number != 3 else ROWS[:, :3])

    async def scenario(world):
        bob = await market(world)
        job = await bob.jobs.start_map(MapSpec(square, str(folder), str(tmp_path / "out")))
        description = await bob.jobs.wait(job)
        assert description["end_reason"] == "failed"
        assert description["items_by_state"] == {"done": 5, "failed": 1}
        assert "1 of 6 items failed" in description["end_detail"]
        assert [event["kind"] for event in description["history"]] == ["item-failed"]
        assert "item 3" in description["history"][0]["detail"]

    run_world(scenario)


def test_a_dry_run_explains_and_spends_nothing(square):
    async def scenario(world):
        bob = await market(world, ("alice", "carol"))
        alice = world.residents["alice"].identity.node_id
        told = await bob.jobs.dry_run(JobSpec(square, {"x": ROWS}, terms=Terms(deny=(node_text(alice),))))
        assert [row["provider"] for row in told["chosen"]] == [node_text(world.residents["carol"].identity.node_id)]
        assert told["rejected"] == [{"provider": node_text(alice), "reason": "denied", "detail": "on this job's deny list"}]
        assert told["total_microcredits"] == told["at_risk_microcredits"] >= 1000
        assert "sees" in told["notice"]
        assert await bought(bob) == []

    run_world(scenario)


def test_the_wanted_provider_serves_or_nobody(square):
    async def scenario(world):
        bob = await market(world, ("alice", "carol"))
        for name in ("carol", "alice"):
            wanted = node_text(world.residents[name].identity.node_id)
            assert (await bob.jobs.run_job(JobSpec(square, {"x": ROWS}, terms=Terms(provider=wanted[:20])))).provider == wanted
        with pytest.raises(Refused) as caught:
            await bob.jobs.run_job(JobSpec(square, {"x": ROWS}, terms=Terms(provider="node-zzzz", deadline_seconds=5)))
        assert caught.value.reason is Reason.DENIED

    run_world(scenario)


def test_local_fallback_runs_here_for_nothing(square):
    async def scenario(world):
        bob = await world.start("bob", {"provide.enabled": "false"})
        with pytest.raises(Refused):
            await bob.jobs.run_job(JobSpec(square, {"x": ROWS}, terms=Terms(deadline_seconds=20)))
        result = await bob.jobs.run_job(JobSpec(square, {"x": ROWS}, terms=Terms(local_fallback=True)))
        assert (result.provider, result.amount) == ("local", 0)
        assert np.array_equal(result.outputs["y"], ROWS * ROWS)

    run_world(scenario)


def test_a_bad_input_ends_the_job_and_is_tried_once(square):
    async def scenario(world):
        bob = await market(world)
        with pytest.raises((Refused, WorkError)) as caught:
            await bob.jobs.run_job(JobSpec(square, {"x": ROWS.astype(np.int64)}))
        assert caught.value.reason in (Reason.WRONG_DTYPE, Reason.RUN_FAILED)
        [job] = await bob.jobs.list()
        assert (job["state"], job["end_reason"]) == ("ended", "failed")
        why = await bob.jobs.why(await bob.jobs.find(job["id"][:14]))
        assert "the job has ended: failed" in why["sentences"][0]
        assert (await bob.jobs.run_job(JobSpec(square, {"x": ROWS}))).amount > 0, "the provider is not banned for it"

    run_world(scenario)


def test_a_session_keeps_its_agreement_and_replaces_it_when_the_provider_goes(square):
    async def scenario(world):
        bob = await market(world, ("alice", "carol"))
        session = await bob.jobs.session(SessionSpec(square))
        assert session.metadata["graph_name"] == "square"
        for rows in (1, 2, 5, 16):
            [y] = await session.run(None, {"x": DATA[:rows]})
            assert np.array_equal(y, DATA[:rows] ** 2)
        assert len(await bought(bob)) == 1, "growing shapes up to the quote's need no new agreement"
        [y] = await session.run(["y"], {"x": DATA[:40]})
        assert len(await bought(bob)) == 2
        first = session.providers[0]
        name = next(name for name, resident in world.residents.items() if resident.identity.node_id == first)
        await world.stop(name)
        [y] = await session.run(None, {"x": DATA[:3].tolist()})
        assert np.array_equal(y, DATA[:3] ** 2)
        assert session.providers[-1] != first
        await bob.jobs.close_session(session)
        [job] = await bob.jobs.list()
        assert (job["kind"], job["end_reason"]) == ("session", "completed")

    run_world(scenario)


def test_a_session_stops_at_its_total(square):
    async def scenario(world):
        bob = await market(world)
        session = await bob.jobs.session(SessionSpec(square, Terms(max_total=3500)))
        for _ in range(3):
            await session.run(None, {"x": ROWS})
        with pytest.raises(Refused) as caught:
            await session.run(None, {"x": ROWS})
        assert caught.value.reason is Reason.BUDGET
        await bob.jobs.close_session(session)
        assert sum(row.paid for row in await bought(bob)) <= 3500

    run_world(scenario)


def test_sessions_left_open_are_settled_when_the_node_stops(square):
    async def scenario(world):
        bob = await market(world)
        session = await bob.jobs.session(SessionSpec(square))
        await session.run(None, {"x": ROWS})
        await world.stop("bob")
        bob = await world.start("bob", {"provide.enabled": "false"}, knows=["alice"])
        [row] = await bought(bob)
        assert row.state == "ended"
        assert row.paid == row.total > 0
        [job] = await bob.jobs.list()
        assert job["end_reason"] == "client-stopped"

    run_world(scenario)


def test_the_owners_settings_hold_where_terms_say_nothing(square):
    async def scenario(world):
        await market(world, ("alice", "carol"))
        alice, carol = (world.residents[name].identity.node_id for name in ("alice", "carol"))
        await world.stop("bob")
        wishes = {"provide.enabled": "false", "client.providers_deny": node_text(alice), "client.max_price": "0.0001"}
        bob = await world.start("bob", wishes, knows=["alice", "carol"])
        await world.settle(lambda: len(bob.transport.links()) == 2)
        told = await bob.jobs.dry_run(JobSpec(square, {"x": ROWS}))
        assert {row["provider"]: row["reason"] for row in told["rejected"]} == {
            node_text(alice): "denied",
            node_text(carol): "price",
        }
        told = await bob.jobs.dry_run(JobSpec(square, {"x": ROWS}, terms=Terms(max_price=10_000)))
        assert [row["provider"] for row in told["chosen"]] == [node_text(carol)]

    run_world(scenario)
