"""Names of models: what a manifest must satisfy, and how ids follow from bytes.

A blob's chunks of 1 MiB are hashed as Merkle leaves; the blob's id is the root over them; the model's id is the Merkle root over
the blob ids in order. So any chunk can be checked as it arrives, by anybody, against the model's id.
"""

from typing import Final

from p2pnode.crypto import merkle
from p2pnode.environment import Buffer
from p2pnode.errors import WorkError
from p2pnode.ids import BlobId, ModelId
from p2pnode.reasons import Reason
from p2pnode.wire.messages.work import BlobEntry, ModelManifest

CHUNK_BYTES: Final = 1 << 20
# blobs[0] is the graph, blobs[1] the initialisers; more would only make workers slower to start.
BLOBS_MAX: Final = 2
MANIFEST_BYTES_MAX: Final = 16 << 20
ALIGNMENT: Final = 64


def chunk_hashes(blob: Buffer) -> tuple[bytes, ...]:
    """Give the leaf hashes of a blob's chunks: 4 GB/s and more on one core."""
    view = memoryview(blob)
    return tuple(merkle.leaf_hash(view[start : start + CHUNK_BYTES]) for start in range(0, len(view), CHUNK_BYTES))


def blob_entry(blob: Buffer) -> BlobEntry:
    """Give a blob's id, size and chunks."""
    hashes = chunk_hashes(blob)
    return BlobEntry(BlobId(merkle.root_of_hashes(hashes)), len(blob), hashes)


def model_id_of(manifest: ModelManifest) -> ModelId:
    """Give the model id that a manifest's blobs have."""
    return ModelId(merkle.root([blob.id for blob in manifest.blobs]))


def size_of(manifest: ModelManifest) -> int:
    """Bytes of all blobs."""
    return sum(blob.size for blob in manifest.blobs)


def check_manifest(manifest: ModelManifest, model_id: bytes | None, model_bytes_max: int, graph_bytes_max: int) -> ModelId:
    """Give the model's id after checking that the manifest is consistent, before anything is stored or fetched.

    Raises WorkError: WRONG_HASH, MODEL_TOO_LARGE, or BAD_MODEL for entries that contradict each other.
    """
    found = model_id_of(manifest)
    if model_id is not None and found != model_id:
        raise WorkError(Reason.WRONG_HASH, "the manifest is not that of the model")
    if len(manifest.blobs) > BLOBS_MAX:
        raise WorkError(Reason.BAD_MODEL, f"a model has at most {BLOBS_MAX} blobs, not {len(manifest.blobs)}")
    if manifest.blobs[0].size > graph_bytes_max or size_of(manifest) > model_bytes_max:
        raise WorkError(Reason.MODEL_TOO_LARGE, f"the model has {size_of(manifest)} bytes")
    for blob in manifest.blobs:
        if len(blob.chunks) != -(-blob.size // CHUNK_BYTES) or merkle.root_of_hashes(blob.chunks) != blob.id:
            raise WorkError(Reason.WRONG_HASH, "the manifest's chunks do not add up to its blobs")
    blob_size = manifest.blobs[1].size if len(manifest.blobs) > 1 else 0
    for entry in manifest.initializers:
        if entry.blob != 1 or entry.offset % ALIGNMENT or entry.offset + entry.size > blob_size:
            raise WorkError(Reason.BAD_MODEL, f"initialiser {entry.name[:64]!r} lies outside the model's blob")
    if len({entry.name for entry in manifest.initializers}) != len(manifest.initializers):
        raise WorkError(Reason.BAD_MODEL, "the manifest names an initialiser twice")
    return found
