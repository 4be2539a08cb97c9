"""Models between peers: whole, verified, resumable, and only for those who were asked to run them."""

import numpy as np
import onnx
import pytest
import trio
from onnx import TensorProto, helper, numpy_helper

from p2pnode.errors import ProtocolViolation, Refused, Unreachable, WorkError
from p2pnode.market.settings import MarketSettings
from p2pnode.reasons import Reason
from p2pnode.wire.messages.work import BlobRequest, ManifestRequest


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """A model of about 12 MiB: more than two ranges of 4 MiB."""
    weights = np.random.default_rng(1).normal(size=(1024, 3072)).astype(np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1024])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3072])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "large", [x], [y], [numpy_helper.from_array(weights, "w")]
    )
    path = tmp_path_factory.mktemp("model") / "large.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_model_is_fetched_whole_by_whoever_was_asked(simulated, large_model) -> None:
    async def scenario(world, alice, bob, _) -> None:
        model_id, manifest = await bob.models.add_file(large_model)
        await world.link(bob, alice)
        link = alice.transport.links()[bob.identity.node_id]
        with pytest.raises(Refused) as refusal:
            await alice.market.fetch_model(link, model_id)
        assert refusal.value.reason is Reason.UNKNOWN_MODEL, "a stranger is told nothing"
        bob.market.models.allow(model_id, alice.identity.node_id)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(alice.market.fetch_model, link, model_id)
        assert alice.models.has(model_id)
        size = sum(blob.size for blob in manifest.blobs)
        assert alice.metrics.value("model_fetched_bytes_total") == size, "three callers, one fetch"
        assert bytes(alice.models.read_blob(model_id, 1, 0, 4096)) == bytes(bob.models.read_blob(model_id, 1, 0, 4096))

    simulated(scenario)


def test_a_broken_fetch_goes_on_where_it_stopped(simulated, large_model) -> None:
    async def scenario(world, alice, bob, _) -> None:
        model_id, manifest = await bob.models.add_file(large_model)
        bob.market.models.allow(model_id, alice.identity.node_id)
        await world.link(bob, alice)
        link = alice.transport.links()[bob.identity.node_id]
        served = 0
        serve = bob.market.models.serve_blob

        def cut(incoming) -> None:
            nonlocal served
            served += 1
            if served > 2:
                incoming.link.close(Reason.SHUTTING_DOWN)
            else:
                serve(incoming)

        bob.market._at_once[BlobRequest] = cut
        with pytest.raises(Unreachable):
            await alice.market.fetch_model(link, model_id)
        first = alice.metrics.value("model_fetched_bytes_total")
        bob.market._at_once[BlobRequest] = serve
        await trio.sleep(1)
        await world.link(bob, alice)
        await alice.market.fetch_model(alice.transport.links()[bob.identity.node_id], model_id)
        assert alice.models.has(model_id)
        assert alice.metrics.value("model_fetched_bytes_total") == sum(blob.size for blob in manifest.blobs)
        assert first <= sum(blob.size for blob in manifest.blobs)

    simulated(scenario)


def test_false_bytes_are_refused_by_chunk(simulated, large_model) -> None:
    async def scenario(world, alice, bob, _) -> None:
        model_id, _ = await bob.models.add_file(large_model)
        bob.market.models.allow(model_id, alice.identity.node_id)
        await world.link(bob, alice)
        read = bob.models.read_blob
        bob.models.read_blob = lambda model, blob, offset, length: (
            memoryview(bytes(length)) if blob else read(model, blob, offset, length)
        )
        with pytest.raises(ProtocolViolation) as violation:
            await alice.market.fetch_model(alice.transport.links()[bob.identity.node_id], model_id)
        assert violation.value.reason is Reason.WRONG_HASH
        assert not alice.models.has(model_id)

    simulated(scenario)


def test_size_is_checked_on_the_manifest(simulated, large_model) -> None:
    async def scenario(world, alice, bob, _) -> None:
        model_id, _ = await bob.models.add_file(large_model)
        bob.market.models.allow(model_id, alice.identity.node_id)
        await world.link(bob, alice)
        with pytest.raises((Refused, WorkError)) as refusal:
            await alice.market.fetch_model(alice.transport.links()[bob.identity.node_id], model_id)
        assert refusal.value.reason is Reason.MODEL_TOO_LARGE
        assert alice.metrics.value("model_fetched_bytes_total") == 0

    simulated(scenario, alice_settings=MarketSettings(model_bytes_max=1 << 20))


def test_a_public_model_is_served_to_anybody_and_ranges_are_bounded(simulated, large_model) -> None:
    async def scenario(world, alice, bob, _) -> None:
        model_id, _ = await bob.models.add_file(large_model)
        bob.market.apply(MarketSettings(public_models=frozenset({bytes(model_id)})))
        await world.link(bob, alice)
        link = alice.transport.links()[bob.identity.node_id]
        assert (await link.request(ManifestRequest(model_id))).attachment
        for blob, offset, length in ((1, 0, 5 << 20), (1, 12 << 20, 1 << 20), (9, 0, 1)):
            with pytest.raises(Refused) as refusal:
                await link.request(BlobRequest(model_id, blob, offset, length))
            assert refusal.value.reason is Reason.TOO_LARGE

    simulated(scenario)
