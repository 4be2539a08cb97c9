"""Fetching a model in pieces from strangers: every chunk is checked as it comes, and a crash loses none that was written.

A partial model is a folder with the manifest, the blobs at their final size (sparse), and `have`, one byte a chunk. That
file only saves work: the whole model is hashed again before it is used, and chunks that then prove wrong are missing again.
"""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from p2pnode.crypto import merkle
from p2pnode.environment import Buffer, Executor
from p2pnode.errors import ProtocolViolation, StoreError, WorkError
from p2pnode.ids import ModelId
from p2pnode.reasons import Reason
from p2pnode.wire.messages.work import ModelManifest
from p2pnode.work.manifest import CHUNK_BYTES, size_of

RANGE_BYTES_MAX: Final = 4 << 20
_HAVE: Final = "have"


def blob_name(number: int) -> str:
    """File name of a blob inside a model's folder."""
    return f"blob{number}"


class BlobWriter:
    """Takes a model's chunks in any order. Made by `ModelStore.begin_fetch`; use it as a context manager or `close` it.

    Closing keeps what has arrived; a later `begin_fetch` of the same model goes on from there.
    """

    def __init__(
        self,
        folder: Path,
        model_id: ModelId,
        manifest: ModelManifest,
        executor: Executor,
        adopt: Callable[["BlobWriter"], Awaitable[None]],
    ) -> None:
        self.model_id = model_id
        self.manifest = manifest
        self.folder = folder
        self._executor = executor
        self._adopt = adopt
        counts = [len(blob.chunks) for blob in manifest.blobs]
        self._first = [sum(counts[:number]) for number in range(len(counts))]
        self._have = bytearray(sum(counts))
        self._files: list[int] = []
        self._open(sum(counts))

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole model."""
        return size_of(self.manifest)

    @property
    def received_bytes(self) -> int:
        """Bytes of the chunks that are here."""
        return self.size_bytes - sum(length for _, _, length in self.missing(CHUNK_BYTES))

    @property
    def is_complete(self) -> bool:
        """True when no chunk is missing."""
        return all(self._have)

    def missing(self, range_bytes: int = RANGE_BYTES_MAX) -> list[tuple[int, int, int]]:
        """Give what is missing as (blob, offset, length), whole chunks, neighbours joined up to range_bytes."""
        ranges: list[tuple[int, int, int]] = []
        for number, blob in enumerate(self.manifest.blobs):
            start = length = 0
            for index in range(len(blob.chunks)):
                size = min(CHUNK_BYTES, blob.size - index * CHUNK_BYTES)
                if self._have[self._first[number] + index]:
                    size = 0
                if length and (not size or length + size > range_bytes):
                    ranges.append((number, start, length))
                    length = 0
                if size:
                    start = start if length else index * CHUNK_BYTES
                    length += size
            if length:
                ranges.append((number, start, length))
        return ranges

    def write(self, blob: int, offset: int, data: Buffer) -> None:
        """Check and keep whole chunks that start at `offset`; about 0.5 ms a chunk.

        Raises ProtocolViolation: WRONG_HASH when a chunk is not the promised one (good ones before it are kept), TOO_LARGE or
        TRUNCATED when the range is not made of whole chunks. Raises StoreError when the disk is full.
        """
        if not 0 <= blob < len(self.manifest.blobs) or offset < 0 or offset % CHUNK_BYTES:
            raise ProtocolViolation(Reason.TRUNCATED, "the bytes do not start at a chunk")
        entry, view = self.manifest.blobs[blob], memoryview(data).cast("B")
        if offset + len(view) > entry.size:
            raise ProtocolViolation(Reason.TOO_LARGE, "the bytes go beyond the end of the blob")
        if len(view) % CHUNK_BYTES and offset + len(view) != entry.size:
            raise ProtocolViolation(Reason.TRUNCATED, "the bytes do not end with a chunk")
        for start in range(0, len(view), CHUNK_BYTES):
            chunk, index = view[start : start + CHUNK_BYTES], (offset + start) // CHUNK_BYTES
            if merkle.leaf_hash(chunk) != entry.chunks[index]:
                raise ProtocolViolation(Reason.WRONG_HASH, f"chunk {index} of blob {blob} has another hash")
            self._keep(blob, index, chunk)

    async def finish(self) -> ModelId:
        """Check the whole model as it lies on disk and move it into the store.

        Raises WorkError: WRONG_HASH when chunks are missing or no longer right, and those are then in `missing()` again; or what
        inspection found, and then the partial model is removed. Cancelled, it stays.
        """
        bad = await self._executor.run(self._verify)
        for position in bad:
            self._mark(position, 0)
        if bad:
            raise WorkError(Reason.WRONG_HASH, f"{len(bad)} chunks of the model are missing or damaged on disk")
        await self._executor.run(self._sync)
        self.close()
        await self._adopt(self)
        return self.model_id

    def close(self) -> None:
        """Close the files and keep what has arrived. Idempotent."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> "BlobWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self, chunks: int) -> None:
        try:
            for number, blob in enumerate(self.manifest.blobs):
                self._files.append(os.open(self.folder / blob_name(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                os.ftruncate(self._files[-1], blob.size)
            self._files.append(os.open(self.folder / _HAVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            known = os.pread(self._files[-1], chunks, 0)
        except OSError as error:
            self.close()
            raise StoreError(f"the partial model cannot be written: {error}") from error
        self._have[: len(known)] = known

    def _keep(self, blob: int, index: int, chunk: memoryview) -> None:
        try:
            written = 0
            while written < len(chunk):
                written += os.pwrite(self._files[blob], chunk[written:], index * CHUNK_BYTES + written)
        except OSError as error:
            raise StoreError(f"the model cannot be written: {error}") from error
        self._mark(self._first[blob] + index, 1)

    def _mark(self, position: int, value: int) -> None:
        self._have[position] = value
        os.pwrite(self._files[-1], bytes([value]), position)

    def _verify(self) -> list[int]:
        bad = []
        for number, blob in enumerate(self.manifest.blobs):
            for index, wanted in enumerate(blob.chunks):
                size = min(CHUNK_BYTES, blob.size - index * CHUNK_BYTES)
                if merkle.leaf_hash(os.pread(self._files[number], size, index * CHUNK_BYTES)) != wanted:
                    bad.append(self._first[number] + index)
        return bad

    def _sync(self) -> None:
        for descriptor in self._files:
            os.fsync(descriptor)
