"""What a model does to a provider's workers: retried soon where nobody else is there, and no other model suffers for it."""

import numpy as np
import onnx
import pytest
import trio
from onnx import TensorProto, helper

from p2pnode.errors import P2PNodeError, WorkError
from p2pnode.jobs.spec import JobSpec
from p2pnode.reasons import Reason

pytestmark = pytest.mark.slow

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


def kill_while_loading(seller, times: int, model_id: bytes | None = None) -> list[bytes]:
    """Let a seller's next workers die while they load; gives the models that were tried."""
    tried: list[bytes] = []
    start_worker = seller.runtime.start_worker

    async def dies(model, limits):
        if (model_id is None or model.model_id == model_id) and len(tried) < times:
            tried.append(model.model_id)
            raise WorkError(Reason.WORKER_DIED, "killed while loading")
        return await start_worker(model, limits)

    seller.runtime.start_worker = dies
    return tried


def test_a_map_tries_its_only_provider_again_soon_after_a_worker_was_killed(in_world):
    async def scenario(world):
        tried = kill_while_loading(world.sellers[0], 1)
        started = trio.current_time()
        assert await world.run_map()
        assert tried
        assert trio.current_time() - started < 8, "nobody waits out a ban where there is nobody else"
        world.check_paid_once()

    in_world(scenario, sellers=1)


def test_a_map_gives_up_on_a_model_that_kills_every_worker(in_world):
    async def scenario(world):
        tried = kill_while_loading(world.sellers[0], 1000)
        await world.bob.start(0, world.sellers)
        done = await world.bob.jobs.wait(await world.bob.jobs.start_map(world.spec))
        assert done["end_reason"] == "refused"
        assert done["spent_microcredits"] == 0
        assert 3 <= len(tried) <= 12, "each try doubles the wait before the next"

    in_world(scenario, sellers=1)


def test_a_model_that_kills_workers_does_not_keep_other_models_from_their_provider(in_world, tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    hostile = tmp_path / "double.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), hostile)

    async def scenario(world):
        bob = world.bob
        await bob.start(0, world.sellers)
        model_id = (await bob.jobs.model(str(hostile))).model_id
        kill_while_loading(world.sellers[0], 1000, model_id)
        with pytest.raises(P2PNodeError):
            await bob.jobs.run_job(JobSpec(str(hostile), {"x": ROWS}))
        started = trio.current_time()
        result = await bob.jobs.run_job(JobSpec(world.spec.model, {"x": ROWS}))
        assert np.array_equal(result.outputs["y"], ROWS * ROWS)
        assert trio.current_time() - started < 2, "the provider stays welcome"

    in_world(scenario, sellers=1)
