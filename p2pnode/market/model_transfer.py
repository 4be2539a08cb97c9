"""Models between peers: the provider fetches, in verified pieces, what the client wants it to run; the client serves it.

Size limits and disk quota are checked on the manifest, before the first byte of a blob. Every chunk is checked against the
manifest as it arrives, several requests are in flight, and what has arrived survives a lost link or a crash.
"""

from typing import Any, Final

import trio

from p2pnode.errors import PeerError, ProtocolViolation, Refused, WorkError
from p2pnode.market.settings import MarketSettings
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.wire.codec import decode
from p2pnode.wire.messages.work import BlobReply, BlobRequest, ManifestReply, ManifestRequest, ModelManifest

MANIFEST_BYTES_MAX: Final = 8 << 20
_CLIENTS_PER_MODEL_MAX: Final = 256


class ModelDesk:
    """Serves models to those peers that were asked to run them, and fetches models that this node is asked to run."""

    def __init__(self, settings: MarketSettings, metrics: Metrics, models: Any) -> None:
        self.settings = settings
        self._metrics = metrics
        self._models = models
        self._allowed: dict[bytes, dict[bytes, None]] = {}
        self._fetching: dict[bytes, trio.Event] = {}
        self._slots = trio.CapacityLimiter(settings.fetches_max)

    def allow(self, model_id: bytes, peer: bytes) -> None:
        """Let a peer fetch a model from here, because it was asked to run it. The longest unasked peers are forgotten."""
        peers = self._allowed.setdefault(model_id, {})
        peers.pop(peer, None)
        peers[peer] = None
        if len(peers) > _CLIENTS_PER_MODEL_MAX:
            del peers[next(iter(peers))]

    # --- serving ------------------------------------------------------------------------------------------------------

    def serve_manifest(self, incoming: Any) -> None:
        """Answer a ManifestRequest."""
        message: ManifestRequest = incoming.message
        try:
            self._check_allowed(message.model_id, incoming.link.peer.node_id)
            data = self._models.manifest_bytes(message.model_id)
        except (Refused, WorkError) as error:
            incoming.refuse(error.reason)
            return
        incoming.reply(ManifestReply(len(data)), (data,))

    def serve_blob(self, incoming: Any) -> None:
        """Answer a BlobRequest, without copying the bytes."""
        message: BlobRequest = incoming.message
        try:
            self._check_allowed(message.model_id, incoming.link.peer.node_id)
            if message.length > self.settings.fetch_bytes:
                raise Refused(Reason.TOO_LARGE, f"at most {self.settings.fetch_bytes} bytes at once")
            data = self._models.read_blob(message.model_id, message.blob, message.offset, message.length)
        except (Refused, WorkError) as error:
            incoming.refuse(error.reason)
            return
        incoming.reply(BlobReply(message.offset, message.length), (data,))

    def _check_allowed(self, model_id: bytes, peer: bytes) -> None:
        # Whoever was not asked to run a model is told that it is unknown, held here or not.
        if model_id not in self.settings.public_models and peer not in self._allowed.get(model_id, ()):
            raise Refused(Reason.UNKNOWN_MODEL)

    # --- fetching -----------------------------------------------------------------------------------------------------

    async def fetch(self, link: Any, model_id: bytes) -> None:
        """Have a model here, fetching what is missing of it from a peer.

        Several callers that need one model share one fetch. Raises Refused, Unreachable, WorkError (limits, quota, wrong hash),
        ProtocolViolation for chunks that do not fit the manifest. Cancelled: what has arrived is kept for the next attempt.
        """
        while not self._models.has(model_id):
            running = self._fetching.get(model_id)
            if running is not None:
                await running.wait()
                continue
            done = self._fetching[model_id] = trio.Event()
            try:
                async with self._slots:
                    await self._fetch(link, model_id)
            finally:
                del self._fetching[model_id]
                done.set()

    async def _fetch(self, link: Any, model_id: bytes) -> None:
        reply = await link.request(ManifestRequest(model_id), sink=_bounded(MANIFEST_BYTES_MAX))
        if not isinstance(reply.message, ManifestReply) or reply.message.size != len(reply.attachment):
            raise ProtocolViolation(Reason.WRONG_TYPE, "a manifest was asked for")
        manifest = decode(ModelManifest, reply.attachment, MANIFEST_BYTES_MAX)
        size = sum(blob.size for blob in manifest.blobs)
        if size > self.settings.model_bytes_max:
            raise Refused(Reason.MODEL_TOO_LARGE, f"{size} bytes; this provider takes {self.settings.model_bytes_max}")
        with self._models.begin_fetch(manifest, model_id) as writer:
            ranges = iter(writer.missing(self.settings.fetch_bytes))
            errors: list[PeerError | WorkError] = []

            async def worker(scope: trio.CancelScope) -> None:
                for blob, offset, length in ranges:
                    try:
                        await self._fetch_range(link, model_id, writer, blob, offset, length)
                    except (PeerError, WorkError) as error:
                        errors.append(error)
                        scope.cancel()
                        return

            async with trio.open_nursery() as nursery:
                for _ in range(self.settings.fetch_requests):
                    nursery.start_soon(worker, nursery.cancel_scope)
            if errors:
                raise errors[0]
            await writer.finish()

    async def _fetch_range(self, link: Any, model_id: bytes, writer: Any, blob: int, offset: int, length: int) -> None:
        reply = await link.request(BlobRequest(model_id, blob, offset, length), sink=_bounded(length))
        expected = BlobReply(offset, length)
        if reply.message != expected or len(reply.attachment) != length:
            raise ProtocolViolation(Reason.WRONG_TYPE, "other bytes than those asked for")
        writer.write(blob, offset, reply.attachment)
        self._metrics.add("model_fetched_bytes_total", amount=length)


def _bounded(size_max: int) -> Any:
    """Give a sink that refuses more bytes than were asked for, before they are allocated."""

    def sink(size: int) -> memoryview:
        if size > size_max:
            raise ProtocolViolation(Reason.TOO_LARGE, f"{size} bytes where {size_max} are allowed")
        return memoryview(bytearray(size))

    return sink
