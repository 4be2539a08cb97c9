"""The model store: names from bytes, crash-safe placing, verified fetching, quota."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from p2pnode.crypto import merkle
from p2pnode.errors import ProtocolViolation, StoreError, WorkError
from p2pnode.reasons import Reason
from p2pnode.sim.runtime import InlineRuntime
from p2pnode.wire.messages.work import BlobEntry, InitializerEntry, ModelManifest
from p2pnode.work.manifest import CHUNK_BYTES, blob_entry, check_manifest, model_id_of
from p2pnode.work.models import ModelStore
from p2pnode.work.settings import WorkSettings

MIB = 1 << 20


def environment() -> Any:
    from p2pnode.environment import Environment
    from p2pnode.sim.machine import InlineExecutor, SeededEntropy

    class StepClock:
        wall = 1_700_000_000_000

        def monotonic(self) -> float:
            return 0.0

        def wall_ms(self) -> int:
            self.wall += 1000
            return self.wall

    return Environment(StepClock(), SeededEntropy(1, "a"), None, None, InlineExecutor(), InlineRuntime())  # type: ignore[arg-type]


@pytest.fixture
def make_store(tmp_path: Path) -> Any:
    def make(name: str = "store", **settings: Any) -> ModelStore:
        return ModelStore(tmp_path / name, environment(), WorkSettings(**settings))

    return make


def written(folder: Path, model: Any, name: str = "m.onnx") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def large(onnx_models: Any, mebibytes: float, seed: int = 0) -> Any:
    model = onnx_models.linear()
    noise = np.random.default_rng(seed).random(int(mebibytes * MIB) // 4, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(noise, "unused"))
    return model


async def test_a_model_is_named_by_its_bytes_alone(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    store = make_store()
    first, manifest = await store.add_file(written(tmp_path, onnx_models.linear(), "a.onnx"))
    second, _ = await store.add_file(written(tmp_path, onnx_models.linear(), "b.onnx"), "another name")
    other, _ = await store.add_file(written(tmp_path, onnx_models.linear(scale=2.0), "c.onnx"))
    assert first == second != other
    assert manifest.name == "a.onnx"
    assert len(store.list()) == 2
    graph, blob = manifest.blobs
    assert blob.id == merkle.root([bytes(store.read_blob(first, 1, 0, blob.size))])
    assert first == merkle.root([graph.id, blob.id])
    assert manifest.initializers == (InitializerEntry("w", 1, (32, 32), 1, 0, 4096),)


async def test_a_restarted_store_has_it_all_and_workers_get_it(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    model = onnx_models.linear()
    model_id, manifest = await make_store().add_file(written(tmp_path, model))
    store = make_store()
    assert store.has(model_id)
    assert store.manifest(model_id) == manifest
    worker = store.worker_model(model_id)
    assert worker.initializers == (("w", 1, (32, 32), 0, 4096),)
    assert bytes(worker.blob) == numpy_helper.to_array(model.graph.initializer[0]).tobytes()
    assert memoryview(worker.blob).readonly
    assert onnx.ModelProto.FromString(worker.graph).graph.initializer[0].external_data[0].value == "weights.bin"


async def test_unknown_models_and_ranges(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    store = make_store()
    for ask in (store.manifest, store.worker_model, store.manifest_bytes, lambda m: store.read_blob(m, 0, 0, 1)):
        with pytest.raises(WorkError) as caught:
            ask(b"?" * 32)
        assert caught.value.reason is Reason.UNKNOWN_MODEL
    model_id, manifest = await store.add_file(written(tmp_path, onnx_models.linear()))
    for blob, offset, length in ((2, 0, 1), (0, -1, 1), (1, manifest.blobs[1].size, 1), (1, 0, 10**9), (-1, 0, 1)):
        with pytest.raises(WorkError):
            store.read_blob(model_id, blob, offset, length)


async def test_export_gives_one_file_with_the_same_answers(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    store, model = make_store(), onnx_models.linear()
    model_id, _ = await store.add_file(written(tmp_path, model))
    await store.export(model_id, tmp_path / "out" / "back.onnx")
    x = {"x": np.random.default_rng(0).random((3, 32), np.float32)}
    ours = onnxruntime.InferenceSession(tmp_path / "out" / "back.onnx", providers=["CPUExecutionProvider"]).run(None, x)
    theirs = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, x)
    assert np.array_equal(ours[0], theirs[0])
    assert os.listdir(tmp_path / "out") == ["back.onnx"]


async def test_external_data_beside_the_file_gives_the_same_model(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    store, model = make_store(), onnx_models.linear()
    inline, _ = await store.add_file(written(tmp_path, model))
    folder = tmp_path / "external"
    folder.mkdir()
    onnx.save_model(model, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    external, _ = await store.add_file(folder / "m.onnx")
    assert external == inline


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "sub/../../secret", "link", "linked/secret", "absent"])
async def test_external_data_outside_the_folder_is_refused(
    make_store: Any, onnx_models: Any, tmp_path: Path, location: str
) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 4096)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    model = onnx_models.linear()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    tensor.external_data.add(key="location", value=location)
    with pytest.raises(WorkError) as caught:
        await make_store().add_file(written(folder, model))
    assert caught.value.reason is Reason.EXTERNAL_DATA


async def test_files_that_cannot_be_added_leave_nothing(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    store = make_store(model_bytes_max=100_000)
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(WorkError) as caught:
        await store.add_file(tmp_path / "text.onnx")
    assert caught.value.reason is Reason.NOT_ONNX
    with pytest.raises(StoreError):
        await store.add_file(tmp_path / "absent.onnx")
    with pytest.raises(WorkError) as caught:
        await store.add_file(written(tmp_path, large(onnx_models, 1)))
    assert caught.value.reason is Reason.MODEL_TOO_LARGE
    assert store.list() == ()


def chunk(source: ModelStore, model_id: bytes, blob: int, offset: int, length: int) -> memoryview:
    return source.read_blob(model_id, blob, offset, length)


async def test_a_fetch_checks_every_chunk_and_ends_with_the_model(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    source, target = make_store("source"), make_store("target")
    model_id, manifest = await source.add_file(written(tmp_path, large(onnx_models, 2.5)))
    with target.begin_fetch(manifest, model_id) as writer:
        ranges = writer.missing(CHUNK_BYTES)
        assert len(ranges) == 4
        assert writer.received_bytes == 0
        blob, offset, length = ranges[1]
        bad = bytearray(chunk(source, model_id, blob, offset, length))
        bad[-1] ^= 1
        with pytest.raises(ProtocolViolation) as caught:
            writer.write(blob, offset, bad)
        assert caught.value.reason is Reason.WRONG_HASH
        assert ranges[1] in writer.missing(CHUNK_BYTES)
        for each in ranges:
            writer.write(each[0], each[1], chunk(source, model_id, *each))
        assert writer.is_complete
        assert await writer.finish() == model_id
    assert [model.is_partial for model in target.list()] == [False]
    assert target.worker_model(model_id) == source.worker_model(model_id)


async def test_a_fetch_goes_on_after_a_crash(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    source = make_store("source")
    model_id, manifest = await source.add_file(written(tmp_path, large(onnx_models, 3)))
    writer = make_store("target").begin_fetch(manifest)
    done = writer.missing(CHUNK_BYTES)[:2]
    for each in done:
        writer.write(each[0], each[1], chunk(source, model_id, *each))
    del writer  # not closed: a crash
    store = make_store("target")
    assert [model.is_partial for model in store.list()] == [True]
    assert not store.has(model_id)
    with store.begin_fetch(manifest) as again:
        assert not set(done) & set(again.missing(CHUNK_BYTES))
        assert again.received_bytes == sum(each[2] for each in done)
        for each in again.missing():
            again.write(each[0], each[1], chunk(source, model_id, *each))
        await again.finish()
    assert store.has(model_id)


async def test_bytes_that_rot_on_disk_are_fetched_again(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    source, target = make_store("source"), make_store("target")
    model_id, manifest = await source.add_file(written(tmp_path, large(onnx_models, 2)))
    with target.begin_fetch(manifest) as writer:
        for each in writer.missing():
            writer.write(each[0], each[1], chunk(source, model_id, *each))
        with (writer.folder / "blob1").open("r+b") as file:
            file.seek(MIB + 5)
            file.write(b"rot")
        with pytest.raises(WorkError) as caught:
            await writer.finish()
        assert caught.value.reason is Reason.WRONG_HASH
        assert writer.missing() == [(1, MIB, MIB)]
        writer.write(1, MIB, chunk(source, model_id, 1, MIB, MIB))
        await writer.finish()
    assert target.has(model_id)


@pytest.mark.parametrize(
    ("blob", "offset", "size", "reason"),
    [
        (1, 5, MIB, Reason.TRUNCATED),
        (1, 0, 100, Reason.TRUNCATED),
        (1, 2 * MIB, MIB, Reason.TOO_LARGE),
        (7, 0, MIB, Reason.TRUNCATED),
        (1, -MIB, MIB, Reason.TRUNCATED),
    ],
)
async def test_ranges_that_are_not_whole_chunks(
    make_store: Any, onnx_models: Any, tmp_path: Path, blob: int, offset: int, size: int, reason: Reason
) -> None:
    _, manifest = await make_store("source").add_file(written(tmp_path, large(onnx_models, 2)))
    with make_store("target").begin_fetch(manifest) as writer, pytest.raises(ProtocolViolation) as caught:
        writer.write(blob, offset, bytes(size))
    assert caught.value.reason is reason


async def test_the_senders_word_on_places_is_not_believed(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    source, target = make_store("source"), make_store("target")
    model_id, manifest = await source.add_file(written(tmp_path, onnx_models.linear()))
    lying = ModelManifest("evil", manifest.blobs, (InitializerEntry("w", 1, (16, 64), 1, 0, 4096),))
    with target.begin_fetch(lying, model_id) as writer:
        for each in writer.missing():
            writer.write(each[0], each[1], chunk(source, model_id, *each))
        await writer.finish()
    assert target.manifest(model_id).initializers == manifest.initializers


async def test_a_fetched_model_that_is_unsound_is_removed(make_store: Any) -> None:
    junk = b"this is no model"
    manifest = ModelManifest("junk", (blob_entry(junk),), ())
    store = make_store()
    with store.begin_fetch(manifest) as writer:
        writer.write(0, 0, junk)
        with pytest.raises(WorkError) as caught:
            await writer.finish()
        assert caught.value.reason is Reason.NOT_ONNX
    assert store.list() == ()


def changed(manifest: ModelManifest, **changes: Any) -> ModelManifest:
    import msgspec

    return msgspec.structs.replace(manifest, **changes)


async def test_manifests_that_contradict_themselves(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    model_id, manifest = await make_store().add_file(written(tmp_path, onnx_models.linear()))
    graph, blob = manifest.blobs
    entry = manifest.initializers[0]
    cases = [
        (changed(manifest, blobs=(graph,)), Reason.WRONG_HASH),
        (changed(manifest, blobs=(graph, BlobEntry(blob.id, 2**40, blob.chunks))), Reason.MODEL_TOO_LARGE),
        (changed(manifest, blobs=(graph, BlobEntry(blob.id, blob.size + MIB, blob.chunks))), Reason.WRONG_HASH),
        (changed(manifest, blobs=(graph, BlobEntry(blob.id, blob.size, (b"x" * 32,)))), Reason.WRONG_HASH),
        (changed(manifest, initializers=(entry, entry)), Reason.BAD_MODEL),
        (changed(manifest, initializers=(InitializerEntry("w", 1, (32, 32), 1, 64, 4096),)), Reason.BAD_MODEL),
        (changed(manifest, initializers=(InitializerEntry("w", 1, (32, 32), 0, 0, 4096),)), Reason.BAD_MODEL),
    ]
    for bad, reason in cases:
        with pytest.raises(WorkError) as caught:
            check_manifest(bad, model_id, 1 << 30, 1 << 20)
        assert caught.value.reason is reason
    three = changed(manifest, blobs=(graph, blob, blob))
    with pytest.raises(WorkError):
        check_manifest(three, model_id_of(three), 1 << 30, 1 << 20)


async def test_the_longest_unused_model_gives_way(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    store = make_store(disk_bytes=5 * MIB)
    ids = [(await store.add_file(written(tmp_path, large(onnx_models, 2, seed))))[0] for seed in (1, 2)]
    store.worker_model(ids[0])  # used again
    third, _ = await store.add_file(written(tmp_path, large(onnx_models, 2, 3)))
    assert {model.model_id for model in store.list()} == {ids[0], third}
    store.in_use = lambda: {ids[0], third}
    with pytest.raises(WorkError) as caught:
        await store.add_file(written(tmp_path, large(onnx_models, 2, 4)))
    assert caught.value.reason is Reason.DISK
    assert store.clean(0) == ()
    store.in_use = frozenset
    freed = store.clean(3 * MIB)
    assert [model.model_id for model in freed] == [ids[0]]
    assert store.size_bytes() < 3 * MIB


async def test_removing(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    store = make_store()
    model_id, manifest = await store.add_file(written(tmp_path, onnx_models.linear()))
    view = store.read_blob(model_id, 1, 0, 64)
    assert store.remove(model_id) == sum(blob.size for blob in manifest.blobs)
    assert store.remove(model_id) == 0
    assert not store.has(model_id)
    assert len(bytes(view)) == 64  # a running worker's mapping stays good


async def test_a_half_stored_model_is_no_model(make_store: Any, onnx_models: Any, tmp_path: Path) -> None:
    store = make_store()
    model_id, _ = await store.add_file(written(tmp_path, onnx_models.linear()))
    folder = tmp_path / "store" / "models"
    (folder / model_id.hex()).rename(folder / f"{model_id.hex()}.1.new")
    again = make_store()
    assert not again.has(model_id)
    assert again.list() == ()
    again.clean()
    assert list(folder.iterdir()) == []
