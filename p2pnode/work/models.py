"""The models on this machine: stored by hash, split into graph and blob, kept to a quota.

Folder layout: `models/<id in hex>/{manifest,blob0,blob1}` for whole models, `partial/<id in hex>/` for those being fetched.
A model appears in `models` by one rename of a complete, synced folder, so that a crash leaves either all of it or none. The
last use is the manifest file's modification time. Files are parsed in confined children only; the daemon hashes and moves bytes.
"""

import mmap
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from p2pnode.environment import Buffer, Environment, WorkerModel
from p2pnode.errors import P2PNodeError, StoreError, WorkError
from p2pnode.ids import ModelId
from p2pnode.reasons import Reason
from p2pnode.wire.codec import decode, encode
from p2pnode.wire.messages.work import InitializerEntry, ModelManifest
from p2pnode.work import model_files
from p2pnode.work.blob_writer import BlobWriter, blob_name
from p2pnode.work.manifest import MANIFEST_BYTES_MAX, blob_entry, check_manifest, model_id_of, size_of
from p2pnode.work.settings import WorkSettings

_MANIFEST: Final = "manifest"
_EXPORT_BYTES_MAX: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One model on disk. used_ms: Unix time of its last use; is_partial: still being fetched."""

    model_id: ModelId
    name: str
    size_bytes: int
    used_ms: int
    is_partial: bool = False


class ModelStore:
    """Models by id under one folder. One process uses a folder at a time; the node's lock sees to that."""

    def __init__(self, folder: Path, environment: Environment, settings: WorkSettings | None = None) -> None:
        self._environment = environment
        self._models = folder / "models"
        self._partial = folder / "partial"
        self._manifests: dict[bytes, ModelManifest] = {}
        self._mapped: dict[tuple[bytes, int], memoryview] = {}
        self._temporary = 0
        self.settings = settings or WorkSettings()
        # Models that must not be freed now, such as those in workers; set by the work service.
        self.in_use: Callable[[], Collection[bytes]] = frozenset

    async def add_file(self, path: Path, name: str = "") -> tuple[ModelId, ModelManifest]:
        """Store a model from an .onnx file and the external data files beside it; give its id and manifest.

        The file is split in a confined child. Older models give way when the quota is reached. Raises WorkError for a file
        that is no sound model or too large, StoreError when it cannot be read or written. Cancelled, nothing is left behind.
        """
        result, data = await model_files.split_file(path, self._environment, self.settings)
        graph = memoryview(data)[: result.graph_size]
        blob = memoryview(data)[result.blob_offset : result.blob_offset + result.blob_size]
        blobs = (graph, blob) if result.blob_size else (graph,)
        entries = await self._environment.executor.run(lambda: tuple(blob_entry(content) for content in blobs))
        manifest = ModelManifest((name or path.name)[:256], entries, model_files.entries(result.initializers))
        model_id = check_manifest(manifest, None, self.settings.model_bytes_max, self.settings.graph_bytes_max)
        if self.has(model_id):
            self._touch(model_id)
            return model_id, self.manifest(model_id)
        self._make_room(size_of(manifest))
        await self._environment.executor.run(self._store, model_id, manifest, blobs)
        return model_id, manifest

    def has(self, model_id: bytes) -> bool:
        """Say whether the whole model is here."""
        return model_id in self._manifests or (self._folder(model_id) / _MANIFEST).is_file()

    def manifest(self, model_id: bytes) -> ModelManifest:
        """Give a stored model's manifest. Raises WorkError(UNKNOWN_MODEL)."""
        known = self._manifests.get(model_id)
        if known is None:
            known = _read_manifest(self._folder(model_id) / _MANIFEST)
            if known is None:
                raise WorkError(Reason.UNKNOWN_MODEL, "the model is not here")
            self._manifests[model_id] = known
        return known

    def manifest_bytes(self, model_id: bytes) -> bytes:
        """Give the encoded manifest, as it is sent to peers. Raises WorkError(UNKNOWN_MODEL)."""
        return encode(self.manifest(model_id))

    def read_blob(self, model_id: bytes, blob: int, offset: int, length: int) -> memoryview:
        """Give bytes of a blob without copying them. Raises WorkError: UNKNOWN_MODEL, or TOO_LARGE beyond the blob's end."""
        manifest = self.manifest(model_id)
        if not 0 <= blob < len(manifest.blobs) or offset < 0 or length < 0 or offset + length > manifest.blobs[blob].size:
            raise WorkError(Reason.TOO_LARGE, "the bytes asked for are not in the blob")
        return self._map(model_id, blob)[offset : offset + length]

    def worker_model(self, model_id: bytes) -> WorkerModel:
        """Give a model as a worker takes it; its blob is a read-only mapping of the file. Raises WorkError(UNKNOWN_MODEL)."""
        manifest = self.manifest(model_id)
        self._touch(model_id)
        return WorkerModel(
            model_id=bytes(model_id),
            graph=bytes(self._map(model_id, 0)),
            initializers=model_files.places(manifest.initializers),
            blob=self._map(model_id, 1) if len(manifest.blobs) > 1 else b"",
            execution_providers=self.settings.execution_providers,
            optimise=self.settings.optimise,
        )

    def begin_fetch(self, manifest: ModelManifest, model_id: bytes | None = None) -> BlobWriter:
        """Give a writer for a model that peers will send, with what an earlier attempt left.

        model_id: what was asked for, if known. Raises WorkError for a manifest that contradicts itself or the id, or is over a
        limit; StoreError when it cannot be written.
        """
        found = check_manifest(manifest, model_id, self.settings.model_bytes_max, self.settings.graph_bytes_max)
        self._make_room(size_of(manifest), but=found)
        folder = self._partial / found.hex()
        _write_file(folder / _MANIFEST, encode(manifest))
        return BlobWriter(folder, found, manifest, self._environment.executor, self._adopt)

    async def inspect(self, graph: Buffer, blob_size: int, initializers: Sequence[InitializerEntry] | None) -> dict[str, Any]:
        """Check a graph in a confined child; gives `inspection.inspect`'s result. Raises WorkError with what is wrong."""
        limits = self.settings
        arguments = {
            "blob_size": blob_size,
            "initializers": None if initializers is None else model_files.places(initializers),
            "graph_bytes_max": limits.graph_bytes_max,
            "nodes_max": limits.nodes_max,
            "opset_max": limits.opset_max,
        }
        result, _ = await self._environment.runtime.confined("inspect", arguments, graph, 0, limits.inspect_seconds)
        return result

    async def export(self, model_id: bytes, path: Path) -> None:
        """Write a model back as one .onnx file, for a local run of exactly what providers run. Raises WorkError, StoreError.

        Beyond 1 GiB, where one file would break protobuf's limit, the initialisers go to `weights.bin` beside it.
        """
        manifest = self.manifest(model_id)
        graph = self._map(model_id, 0)
        blob = self._map(model_id, 1) if len(manifest.blobs) > 1 else memoryview(b"")
        if size_of(manifest) > _EXPORT_BYTES_MAX:
            await self._environment.executor.run(_write_file, path.parent / model_files.BLOB_LOCATION, blob)
            await self._environment.executor.run(_write_file, path, graph)
            return
        arguments = {"graph_size": len(graph), "blob_offset": len(graph)}
        size = len(graph) + len(blob)
        _, whole = await self._environment.runtime.confined(
            "join", arguments, b"".join((graph, blob)), size + (1 << 20), self.settings.inspect_seconds
        )
        await self._environment.executor.run(_write_file, path, whole)

    def list(self) -> tuple[StoredModel, ...]:
        """Give all models, whole ones and partial ones, the longest unused first."""
        found = [*self._scan(self._models, is_partial=False), *self._scan(self._partial, is_partial=True)]
        return tuple(sorted(found, key=lambda model: (model.used_ms, model.model_id)))

    def size_bytes(self) -> int:
        """Bytes of all models, partial ones at their full size."""
        return sum(model.size_bytes for model in self.list())

    def remove(self, model_id: bytes) -> int:
        """Remove a model, whole or partial; gives the bytes freed, 0 when it was not here. Running workers keep theirs."""
        freed = 0
        for folder in (self._folder(model_id), self._partial / model_id.hex()):
            manifest = _read_manifest(folder / _MANIFEST)
            freed += size_of(manifest) if manifest else 0
            shutil.rmtree(folder, ignore_errors=True)
        self._manifests.pop(model_id, None)
        for number in (0, 1):
            self._mapped.pop((model_id, number), None)
        return freed

    def clean(self, quota_bytes: int | None = None) -> tuple[StoredModel, ...]:
        """Remove models, the longest unused first, until all take at most `quota_bytes` (the setting); gives what was freed.

        Those in use by a worker stay.
        """
        quota = self.settings.disk_bytes if quota_bytes is None else quota_bytes
        for leftover in self._models.glob("*.new"):
            shutil.rmtree(leftover, ignore_errors=True)
        return self._free_down_to(quota, frozenset())

    def _make_room(self, size: int, but: bytes = b"") -> None:
        if size > self.settings.disk_bytes:
            raise WorkError(Reason.DISK, f"the model has {size} bytes and the disk quota is {self.settings.disk_bytes}")
        self._free_down_to(self.settings.disk_bytes - size, frozenset({but}))
        others = sum(model.size_bytes for model in self.list() if model.model_id != but)
        if others + size > self.settings.disk_bytes:
            raise WorkError(Reason.DISK, "the disk quota is taken by models in use")

    def _free_down_to(self, quota: int, but: frozenset[bytes]) -> tuple[StoredModel, ...]:
        kept = but | frozenset(self.in_use())
        models = [model for model in self.list() if model.model_id not in but]
        total = sum(model.size_bytes for model in models)
        freed: tuple[StoredModel, ...] = ()
        for model in models:
            if total <= quota:
                break
            if model.model_id in kept:
                continue
            self.remove(model.model_id)
            total -= model.size_bytes
            freed = (*freed, model)
        return freed

    def _scan(self, folder: Path, *, is_partial: bool) -> Iterator[StoredModel]:
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            manifest = _read_manifest(entry / _MANIFEST) if len(entry.name) == 64 else None
            if manifest is not None:
                used = int((entry / _MANIFEST).stat().st_mtime * 1000)
                yield StoredModel(model_id_of(manifest), manifest.name, size_of(manifest), used, is_partial)

    def _store(self, model_id: ModelId, manifest: ModelManifest, blobs: Sequence[Buffer]) -> None:
        self._temporary += 1
        folder = self._models / f"{model_id.hex()}.{self._temporary}.new"
        try:
            for number, blob in enumerate(blobs):
                _write_file(folder / blob_name(number), blob)
            _write_file(folder / _MANIFEST, encode(manifest))
            self._place(folder, model_id)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise StoreError(f"the model cannot be stored: {error}") from error

    async def _adopt(self, writer: BlobWriter) -> None:
        """Move a model whose blobs have the right hashes into the store, with its places as its own graph says.

        The sender's manifest is not believed in this: places are not part of the id. A model that fails inspection is removed.
        """
        manifest = writer.manifest
        blob_size = manifest.blobs[1].size if len(manifest.blobs) > 1 else 0
        graph = await self._environment.executor.run((writer.folder / blob_name(0)).read_bytes)
        try:
            found = model_files.parse_places((await self.inspect(graph, blob_size, None)).get("initializers"))
        except WorkError:
            shutil.rmtree(writer.folder, ignore_errors=True)
            raise
        own = ModelManifest(manifest.name, manifest.blobs, model_files.entries(found))
        try:
            _write_file(writer.folder / _MANIFEST, encode(own))
            (writer.folder / "have").unlink(missing_ok=True)
            self._place(writer.folder, writer.model_id)
        except OSError as error:
            raise StoreError(f"the model cannot be stored: {error}") from error

    def _place(self, folder: Path, model_id: ModelId) -> None:
        """Let a complete folder appear under its final name, durably."""
        target = self._folder(model_id)
        self._models.mkdir(parents=True, exist_ok=True)
        now = self._environment.clock.wall_ms() / 1000
        os.utime(folder / _MANIFEST, (now, now))
        _sync_folder(folder)
        if target.exists():
            shutil.rmtree(folder)
        else:
            folder.rename(target)
        _sync_folder(self._models)

    def _touch(self, model_id: bytes) -> None:
        now = self._environment.clock.wall_ms() / 1000
        try:
            os.utime(self._folder(model_id) / _MANIFEST, (now, now))
        except OSError:
            # Only the order in which models are freed suffers.
            pass

    def _map(self, model_id: bytes, number: int) -> memoryview:
        key = (bytes(model_id), number)
        view = self._mapped.get(key)
        if view is None:
            try:
                with (self._folder(model_id) / blob_name(number)).open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    view = memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)) if size else memoryview(b"")
            except OSError as error:
                raise StoreError(f"a stored model cannot be read: {error}") from error
            if size != self.manifest(model_id).blobs[number].size:
                raise StoreError("a stored model is damaged: remove it with `p2pnode model remove` and add it again")
            self._mapped[key] = view
        return view

    def _folder(self, model_id: bytes) -> Path:
        return self._models / model_id.hex()


def _read_manifest(path: Path) -> ModelManifest | None:
    try:
        return decode(ModelManifest, path.read_bytes(), MANIFEST_BYTES_MAX)
    except (OSError, P2PNodeError):
        return None


def _write_file(path: Path, content: Buffer) -> None:
    """Write a file durably; it has its whole content or does not exist. Raises StoreError."""
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path.name} cannot be written: {error}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
