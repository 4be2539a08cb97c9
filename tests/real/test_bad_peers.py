"""Hostile peers and hostile models against a real daemon: a reason from the closed list, a counter, a lower score, no harm.

The peer here is made of the product's own handshake and session, with a free hand over what it says inside them. Every test
ends with an honest client's call, which must not have noticed anything.
"""

import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import onnx
import pytest
import trio
from onnx import TensorProto, helper

import p2pnode
from p2pnode.crypto.keys import Identity, generate_identity
from p2pnode.errors import P2PNodeError, PeerError, ProtocolViolation, Refused
from p2pnode.ids import node_text
from p2pnode.market.cheques import HashChain
from p2pnode.market.negotiation import OrderTerms, make_order
from p2pnode.market.settings import MarketSettings
from p2pnode.metrics import Metrics
from p2pnode.node.config import load_config
from p2pnode.node.machine import SystemClock, SystemEntropy
from p2pnode.reasons import Reason
from p2pnode.transport.handshake import PREAMBLE_SIZE, network_tag
from p2pnode.transport.limits import Limits
from p2pnode.transport.requests import Pending
from p2pnode.transport.service import TransportService, TransportSettings
from p2pnode.transport.tcp import TcpNetwork
from p2pnode.wire.codec import decode, encode, encode_numbered
from p2pnode.wire.envelope import decode_envelope, document_id, encode_envelope, open_envelope, seal
from p2pnode.wire.messages.market import InputShape, PlaceOrder, Quote, QuoteRequest
from p2pnode.wire.messages.work import (
    BlobReply,
    BlobRequest,
    Call,
    ManifestReply,
    ManifestRequest,
    ModelManifest,
)
from p2pnode.wire.registry import number_of
from p2pnode.wire.tensors import encode_values, values_hash
from p2pnode.work.manifest import blob_entry, model_id_of

pytestmark = pytest.mark.slow

ROW = np.arange(4, dtype=np.float32).reshape(1, 4)
SHAPES = (InputShape("x", (1, 4)),)


def value(name: str, shape: Any, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def build(nodes: Any, inputs: Any, outputs: Any, constants: Any = ()) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(constants))
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())


def doubling() -> bytes:
    return build([helper.make_node("Add", ["x", "x"], ["y"])], [value("x", ["n", 4])], [value("y", ["n", 4])])


# --- a daemon, an honest client, and the peer -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stern(tmp_path_factory: pytest.TempPathFactory, provider: Any) -> Iterator[Any]:
    """A daemon with short deadlines, because endless work is among the tests."""
    settings = {"provide.load_time_max": "3s", "provide.call_time_max": "2s", "provide.worker_memory": "1GiB"}
    daemon = type(provider)(tmp_path_factory.mktemp("stern"), provider.settings["network.id"] + "-stern", settings).start()
    yield daemon
    daemon.stop()
    daemon.control.close()


@pytest.fixture(scope="module")
def honest(stern: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A connection that knows the stern daemon only."""
    made = type(stern)(tmp_path_factory.mktemp("honest"), stern.settings["network.id"], {"network.static_peers": stern.address})
    with p2pnode.connect(config=load_config(made.environment), embed=True) as connection:
        yield connection


@pytest.fixture(scope="module")
def bystander(honest: Any) -> Iterator[Callable[[], None]]:
    """Make one call of a session that stays open throughout, and insist on its answer."""
    session = p2pnode.InferenceSession(doubling(), connection=honest)

    def call() -> None:
        assert np.array_equal(session.run(None, {"x": ROW})[0], ROW + ROW)

    call()
    yield call
    session.close()


class BadPeer:
    """A verified peer of the daemon that says whatever a test wants. models: what it serves when asked, by id."""

    def __init__(self, daemon: Any, transport: TransportService, link: Any, identity: Identity) -> None:
        self.daemon = daemon
        self.link = link
        self.identity = identity
        self.network_id = load_config(daemon.environment).network.network_id
        self.models: dict[bytes, tuple[bytes, bytes]] = {}
        self.transport = transport

    async def say(self, data: bytes) -> Any:
        """Send these bytes as a request and give the reply. Raises what the daemon answers."""
        outcome: list[Any] = []
        done = trio.Event()

        def on_reply(reply: Any) -> None:
            outcome.append(reply)
            done.set()

        # The session takes any bytes: the codec that would refuse to write them is left out.
        self.link._session.send_request(Pending(on_reply, None), data)
        self.link._pump.kick()
        with trio.fail_after(10):
            await done.wait()
        if isinstance(outcome[0], PeerError):
            raise outcome[0]
        return outcome[0]

    def seal(self, document: Any, identity: Identity | None = None, network_id: bytes | None = None) -> Any:
        return seal(document, identity or self.identity, network_id or self.network_id)

    def serve(self, graph: bytes) -> bytes:
        """Offer a model as a client does, unchecked; gives its id."""
        manifest = ModelManifest("bad", (blob_entry(graph),), ())
        model_id = bytes(model_id_of(manifest))
        self.models[model_id] = (encode(manifest), graph)
        return model_id

    def answer(self, incoming: Any) -> None:
        """Serve models; everything else is unknown."""
        match incoming.message:
            case ManifestRequest(model_id):
                data = self.models[model_id][0]
                incoming.reply(ManifestReply(len(data)), (data,))
            case BlobRequest(model_id, _, offset, length):
                incoming.reply(BlobReply(offset, length), (self.models[model_id][1][offset : offset + length],))
            case _:
                incoming.refuse(Reason.UNKNOWN_MESSAGE)

    async def quote(self, model_id: bytes, shapes: tuple[InputShape, ...] = SHAPES) -> tuple[Quote, bytes]:
        """Ask for a quote; gives it with its id."""
        with trio.fail_after(30):
            reply = await self.link.request(QuoteRequest(model_id, "fast", shapes))
        envelope = decode_envelope(reply.message.envelope)
        return open_envelope(envelope, Quote, self.network_id), document_id(envelope)

    def order(self, quote: Quote, quote_id: bytes, **changes: Any) -> Any:
        """Give an order for a quote, with fields changed."""
        clock = SystemClock()
        order = make_order(
            quote, quote_id, self.link.peer.node_id, OrderTerms(1_000_000), MarketSettings(),
            HashChain(bytes(32), 4096).value(0), clock.wall_ms(), SystemEntropy().token(16),
        )  # fmt: skip
        return type(order)(**{name: getattr(order, name) for name in order.__struct_fields__} | changes)

    async def agree(self, model_id: bytes) -> bytes:
        """Quote and order; gives the agreement's id."""
        envelope = self.seal(self.order(*await self.quote(model_id)))
        await self.link.request(PlaceOrder(encode_envelope(envelope)))
        return bytes(document_id(envelope))

    async def call(
        self,
        agreement: bytes,
        inputs: dict[str, Any],
        number: int = 0,
        headers: Any = None,
        input_hash: bytes = b"",
        outputs: tuple[str, ...] = (),
    ) -> Any:
        """Make a call; headers and input_hash in place of the true ones."""
        true, chunks, _ = encode_values(inputs)
        message = Call(
            agreement_id=agreement,
            number=number,
            input_hash=input_hash or values_hash(true, chunks),
            inputs=true if headers is None else headers,
            outputs=outputs,
        )
        with trio.fail_after(30):
            return await self.link.request(message, chunks)

    def score(self) -> float:
        """Give what the daemon thinks of this peer, in [-100, 100]."""
        peers = {row["node_id"]: row for row in self.daemon.control.get("/v1/peers")["peers"]}
        return float(peers[node_text(self.identity.node_id)]["score"])


class _Visit:
    """An async context around a bad peer that is connected to a daemon."""

    def __init__(self, daemon: Any) -> None:
        self._daemon = daemon

    async def __aenter__(self) -> BadPeer:
        peer = SimpleNamespace()
        entropy = SystemEntropy()
        environment = SimpleNamespace(clock=SystemClock(), entropy=entropy, network=TcpNetwork())
        identity = generate_identity(entropy, 0)
        config = load_config(self._daemon.environment)
        settings = TransportSettings(limits=replace(Limits(), message_bytes_max=1 << 24))
        transport = TransportService(
            environment, identity, config.network.network_id, settings, Metrics(), lambda incoming: peer.bad.answer(incoming)
        )  # type: ignore[arg-type]
        self._nursery = trio.open_nursery()
        nursery = await self._nursery.__aenter__()
        await nursery.start(self._run, transport)
        link = await transport.connect([self._daemon.address])
        peer.bad = BadPeer(self._daemon, transport, link, identity)
        self._scope = nursery.cancel_scope
        return peer.bad  # type: ignore[no-any-return]

    @staticmethod
    async def _run(transport: TransportService, *, task_status: Any) -> None:
        await transport.run(task_status=task_status)

    async def __aexit__(self, *error: Any) -> None:
        self._scope.cancel()
        await self._nursery.__aexit__(None, None, None)


async def eventually(condition: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while True:
            if condition():
                return
            await trio.sleep(0.02)


# --- bytes ------------------------------------------------------------------------------------------------------------

QUOTE_NUMBER = struct.pack(">H", number_of(QuoteRequest))
GOOD = encode_numbered(QuoteRequest(bytes(32), "fast", SHAPES))
FIELDS = {"model_id": bytes(32), "numeric_class": "fast", "shapes": []}


def _deep(levels: int) -> Any:
    return [_deep(levels - 1)] if levels else 1


BYTES = {
    "truncated": (GOOD[:-2], Reason.TRUNCATED),
    "empty": (QUOTE_NUMBER, Reason.TRUNCATED),
    "trailing": (GOOD + b"\0", Reason.TRAILING_BYTES),
    "wrong-typed": (QUOTE_NUMBER + msgpack.packb({**FIELDS, "model_id": 5}), Reason.WRONG_TYPE),
    "short-hash": (QUOTE_NUMBER + msgpack.packb({**FIELDS, "model_id": bytes(31)}), Reason.WRONG_TYPE),
    "not-a-map": (QUOTE_NUMBER + msgpack.packb([1, 2, 3]), Reason.WRONG_TYPE),
    "duplicate-key": (QUOTE_NUMBER + b"\x82" + 2 * (msgpack.packb("model_id") + msgpack.packb(bytes(32))), Reason.DUPLICATE_KEY),
    "not-minimal": (QUOTE_NUMBER + b"\xde\x00\x01" + msgpack.packb("model_id") + msgpack.packb(bytes(32)), Reason.NOT_MINIMAL),
    "extension": (QUOTE_NUMBER + msgpack.packb({**FIELDS, "extra": msgpack.ExtType(5, b"abcd")}), Reason.EXTENSION_TYPE),
    "too-deep": (QUOTE_NUMBER + msgpack.packb({**FIELDS, "extra": _deep(64)}), Reason.TOO_DEEP),
    "bad-text": (QUOTE_NUMBER + b"\x81\xa1\xff\x01", Reason.BAD_UTF8),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
async def test_bytes_that_are_no_message(stern: Any, bystander: Any, name: str) -> None:
    data, reason = BYTES[name]
    before = stern.counter("violations_total", reason.value)
    async with _Visit(stern) as peer:
        with pytest.raises(PeerError) as caught:
            await peer.say(data)
        # A peer that is banned for it may see its link end before it reads the refusal.
        assert getattr(caught.value, "reason", reason) is reason
        await eventually(lambda: peer.score() < 0)
    assert stern.counter("violations_total", reason.value) == before + 1
    await trio.to_thread.run_sync(bystander)


async def test_an_unknown_message_is_refused_and_nobodys_fault(stern: Any, bystander: Any) -> None:
    before = stern.counter("violations_total", Reason.UNKNOWN_MESSAGE.value)
    async with _Visit(stern) as peer:
        with pytest.raises(Refused) as caught:
            await peer.say(struct.pack(">H", 19_999) + msgpack.packb({"from": "the future"}))
        assert caught.value.reason is Reason.UNKNOWN_MESSAGE
        assert peer.score() >= 0
        assert peer.link.closed is None
    assert stern.counter("violations_total", Reason.UNKNOWN_MESSAGE.value) == before + 1
    await trio.to_thread.run_sync(bystander)


async def test_an_oversized_message_ends_the_link(stern: Any, bystander: Any) -> None:
    hits = stern.counter("limit_hits_total", "message_bytes_max")
    async with _Visit(stern) as peer:
        with pytest.raises(PeerError):
            await peer.say(GOOD + bytes(300 << 10))
        # The goodbye names the reason, unless the reset for the bytes nobody read overtakes it.
        await eventually(lambda: peer.link.closed in (Reason.TOO_LARGE, Reason.CONNECTION_LOST))
        await eventually(lambda: peer.score() < 0)
    assert stern.counter("limit_hits_total", "message_bytes_max") == hits + 1
    await trio.to_thread.run_sync(bystander)


async def test_a_replayed_record_ends_the_link(stern: Any, bystander: Any) -> None:
    async with _Visit(stern) as peer:
        sent: list[bytes] = []
        stream = peer.link._stream
        send = stream.send_nowait

        def record(chunks: Any) -> int:
            count: int = send(chunks)
            sent.append(b"".join(bytes(chunk) for chunk in chunks)[:count])
            return count

        # The writer calls the stream by attribute: put the recorder in its place, then play back what it heard.
        peer.link._pump._stream = SimpleNamespace(send_nowait=record, wait_writable=stream.wait_writable)
        with pytest.raises(Refused):
            await peer.say(encode_numbered(QuoteRequest(bytes(32), "none", SHAPES)))
        assert sent
        send((sent[-1],))
        await eventually(lambda: peer.link.closed is not None)
        await eventually(lambda: peer.score() < 0)
    await trio.to_thread.run_sync(bystander)


def dial(daemon: Any) -> socket.socket:
    host, _, port = daemon.address.rpartition(":")
    return socket.create_connection((host, int(port)), 5)


@pytest.mark.parametrize("kind", ["noise", "other-network", "other-version", "cut"])
def test_a_bad_handshake_is_told_and_counted(stern: Any, bystander: Any, kind: str) -> None:
    tag = network_tag(load_config(stern.environment).network.network_id)
    first, reason = {
        "noise": (bytes(range(200)), None),
        "other-network": (bytes((1, 1, 1, 0)) + b"else", Reason.WRONG_NETWORK),
        "other-version": (bytes((1, 90, 99, 0)) + tag, Reason.WRONG_VERSION),
        "cut": (bytes((1, 1, 1, 0)) + tag + struct.pack(">H", 32), Reason.CONNECTION_LOST),
    }[kind]
    assert kind == "noise" or len(first) >= PREAMBLE_SIZE
    before = stern.counter("handshakes_failed_total", reason.value if reason else "")
    with dial(stern) as sock:
        sock.sendall(first)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(10)
        told = b""
        while data := sock.recv(4096):
            told += data
    if reason not in (None, Reason.CONNECTION_LOST):
        assert told[:2] == b"\0\0"
        assert reason.value.encode() in told  # type: ignore[union-attr]
    assert stern.counter("handshakes_failed_total", reason.value if reason else "") > before
    bystander()


# --- documents and calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flipped", "other-signer", "other-network", "other-kind"])
async def test_a_wrong_signature(stern: Any, bystander: Any, how: str) -> None:
    async with _Visit(stern) as peer:
        quote, quote_id = await peer.quote(peer.serve(doubling()))
        order = peer.order(quote, quote_id)
        stranger = generate_identity(SystemEntropy(), 0)
        envelope, reason = {
            "flipped": (replace_signature(peer.seal(order)), Reason.BAD_SIGNATURE),
            "other-signer": (peer.seal(order, stranger), Reason.WRONG_SIGNER),
            "other-network": (peer.seal(order, network_id=bytes(32)), Reason.BAD_SIGNATURE),
            "other-kind": (peer.seal(quote), Reason.WRONG_TYPE),
        }[how]
        before = stern.counter("violations_total", reason.value)
        with pytest.raises(PeerError) as caught:
            await peer.say(encode_numbered(PlaceOrder(encode_envelope(envelope))))
        assert getattr(caught.value, "reason", reason) is reason
        await eventually(lambda: peer.score() < 0)
        assert stern.counter("violations_total", reason.value) == before + 1
    await trio.to_thread.run_sync(bystander)


def replace_signature(envelope: Any) -> Any:
    return type(envelope)(envelope.kind, envelope.body, envelope.signer, bytes(64))


async def test_expired_replayed_and_unknown_documents(stern: Any, bystander: Any) -> None:
    async with _Visit(stern) as peer:
        quote, quote_id = await peer.quote(peer.serve(doubling()))

        async def refused(order: Any) -> Reason:
            with pytest.raises(Refused) as caught:
                await peer.say(encode_numbered(PlaceOrder(encode_envelope(peer.seal(order)))))
            return caught.value.reason

        assert await refused(peer.order(quote, quote_id, expires_ms=1_000)) is Reason.EXPIRED
        assert await refused(peer.order(quote, bytes(32))) is Reason.UNKNOWN_QUOTE
        good = encode_numbered(PlaceOrder(encode_envelope(peer.seal(peer.order(quote, quote_id)))))
        first, again = await peer.say(good), await peer.say(good)
        assert first.message == again.message, "the same order again is the same agreement"
        assert await refused(peer.order(quote, quote_id)) is Reason.ALREADY_USED
        assert stern.counter("refusals_total", Reason.EXPIRED.value) >= 1
        with pytest.raises(Refused) as caught:
            await peer.call(bytes(32), {"x": ROW})
        assert caught.value.reason is Reason.UNKNOWN_AGREEMENT
        sales = stern.control.get("/v1/status")["market"]["sales"]
        assert sum(sale["client"] in node_text(peer.identity.node_id) for sale in sales) <= 1
    await trio.to_thread.run_sync(bystander)


async def test_calls_that_lie(stern: Any, bystander: Any) -> None:
    async with _Visit(stern) as peer:
        agreement = await peer.agree(peer.serve(doubling()))

        async def reason_of(inputs: dict[str, Any], number: int, **changes: Any) -> Reason:
            with pytest.raises((Refused, ProtocolViolation)) as caught:
                await peer.call(agreement, inputs, number, **changes)
            return caught.value.reason

        assert await reason_of({}, 1) is Reason.MISSING_INPUT
        assert await reason_of({"x": ROW.astype(np.float64)}, 2) is Reason.WRONG_DTYPE
        assert await reason_of({"x": ROW[:, :3]}, 3) is Reason.WRONG_SHAPE
        assert await reason_of({"x": ROW, "z": ROW}, 4) in (Reason.UNKNOWN_INPUT, Reason.SHAPE_OVER_QUOTE)
        assert await reason_of({"x": np.ones((1000, 4), np.float32)}, 5) is Reason.SHAPE_OVER_QUOTE
        assert await reason_of({"x": ROW}, 6, input_hash=bytes(32)) is Reason.WRONG_HASH
        assert await reason_of({"x": ROW}, 7, outputs=("nothing",)) is Reason.UNKNOWN_OUTPUT
        await peer.call(agreement, {"x": ROW}, 8)
        await peer.call(agreement, {"x": ROW}, 8)
        assert await reason_of({"x": ROW + 1}, 8) is Reason.CALL_MISMATCH
        assert peer.daemon.control.get("/v1/status")["bugs"] == 0
    await trio.to_thread.run_sync(bystander)


async def test_a_tensor_whose_header_and_bytes_differ(stern: Any, bystander: Any) -> None:
    async with _Visit(stern) as peer:
        agreement = await peer.agree(peer.serve(doubling()))
        before = stern.counter("violations_total", Reason.BAD_TENSOR.value)
        headers, _, _ = encode_values({"x": np.ones((1, 4), np.float32)})
        with pytest.raises(PeerError) as caught:
            await peer.call(agreement, {"x": np.ones((2, 4), np.float32)}, 0, headers=headers)
        assert getattr(caught.value, "reason", Reason.BAD_TENSOR) is Reason.BAD_TENSOR
        await eventually(lambda: peer.score() < 0)
        assert stern.counter("violations_total", Reason.BAD_TENSOR.value) == before + 1
    await trio.to_thread.run_sync(bystander)


# --- models -----------------------------------------------------------------------------------------------------------


def folding_bomb() -> bytes:
    fill = helper.make_tensor("v", TensorProto.FLOAT, [1], [1e-3])
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["c0"], value=fill)]
    nodes += [helper.make_node("MatMul", [f"c{n}", f"c{n}"], [f"c{n + 1}"]) for n in range(60)]
    nodes.append(helper.make_node("Add", ["c60", "x"], ["y"]))
    square = helper.make_tensor("s", TensorProto.INT64, [2], [3000, 3000])
    return build(nodes, [value("x", [1, 1])], [value("y", [3000, 3000])], [square])


def allocation_bomb() -> bytes:
    fill = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["c"], value=fill),
        helper.make_node("ReduceSum", ["c"], ["t"], keepdims=0),
        helper.make_node("Add", ["t", "x"], ["y"]),
    ]
    return build(
        nodes, [value("x", [1, 1])], [value("y", [1, 1])], [helper.make_tensor("s", TensorProto.INT64, [1], [4_000_000_000])]
    )


def endless_loop() -> bytes:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Add", ["a", "one"], ["a2"])],
        "body",
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("a", [1, 4])],
        [value("c2", [], TensorProto.BOOL), value("a2", [1, 4])],
        [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])],
    )
    limits = [helper.make_tensor("m", TensorProto.INT64, [], [2**62]), helper.make_tensor("go", TensorProto.BOOL, [], [True])]
    return build(
        [helper.make_node("Loop", ["m", "go", "x"], ["y"], body=body)], [value("x", [1, 4])], [value("y", [1, 4])], limits
    )


def _field(number: int, payload: bytes) -> bytes:
    length, size = len(payload), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + payload


def nested_if(depth: int) -> bytes:
    """Deeper than the protobuf library agrees to write, so put together by hand."""
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [], [value("y", [1, 4])]).SerializeToString()
    other = helper.make_attribute("else_branch", helper.make_graph([], "e", [], [])).SerializeToString()
    for _ in range(depth):
        branch = _field(1, b"then_branch") + _field(6, graph) + b"\xa0\x01\x05"
        node = _field(1, b"c") + _field(2, b"y") + _field(4, b"If") + _field(5, branch) + _field(5, other)
        graph = _field(1, node) + _field(2, b"g")
    head = onnx.ModelProto.FromString(doubling())
    head.ClearField("graph")
    return bytes(head.SerializeToString()) + _field(7, graph)


MODELS = {
    "not-onnx": (lambda: b"MZ\x90\x00 this is another kind of file" * 40, {Reason.NOT_ONNX}),
    "folding-bomb": (folding_bomb, {Reason.TIME_LIMIT, Reason.MEMORY, Reason.WORKER_DIED, Reason.CREDIT}),
    "allocation-bomb": (allocation_bomb, {Reason.MEMORY, Reason.INITIALIZER_SHAPE, Reason.CREDIT}),
    "endless-loop": (endless_loop, {Reason.TIME_LIMIT, Reason.CREDIT}),
    "nested-if": (lambda: nested_if(3000), {Reason.TOO_DEEP, Reason.NOT_ONNX, Reason.BAD_MODEL}),
}


async def buy_one_call(peer: BadPeer, model_id: bytes, shapes: tuple[InputShape, ...]) -> None:
    envelope = peer.seal(peer.order(*await peer.quote(model_id, shapes)))
    await peer.link.request(PlaceOrder(encode_envelope(envelope)))
    await peer.call(bytes(document_id(envelope)), {"x": np.ones(shapes[0].shape, np.float32)})


@pytest.mark.parametrize("name", MODELS)
async def test_a_hostile_model_is_refused_by_the_provider(stern: Any, bystander: Any, name: str) -> None:
    make, reasons = MODELS[name]
    async with _Visit(stern) as peer:
        model_id = peer.serve(make())
        shapes = (InputShape("x", (1, 1)),) if "bomb" in name else SHAPES
        with pytest.raises(Refused) as caught:
            await buy_one_call(peer, model_id, shapes)
        assert caught.value.reason in reasons
        await trio.to_thread.run_sync(bystander)
    status = stern.control.get("/v1/status")
    assert status["state"] == "taking work"
    assert status["bugs"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model_gives_the_client_its_reason(stern: Any, bystander: Any, tmp_path: Any, name: str) -> None:
    make, reasons = MODELS[name]
    path = tmp_path / "bad.onnx"
    path.write_bytes(make())
    x = ROW if name == "endless-loop" else np.ones((1, 1), np.float32)
    # A client of its own each time: one that saw a provider fail does not ask it again for a while.
    made = type(stern)(tmp_path / "buyer", stern.settings["network.id"], {"network.static_peers": stern.address})
    with p2pnode.connect(config=load_config(made.environment), embed=True) as buyer, pytest.raises(P2PNodeError) as caught:
        buyer.run(path, {"x": x}, deadline_seconds=20.0)
    assert getattr(caught.value, "reason", None) in reasons, caught.value
    bystander()


def test_the_answers_are_decoded_by_the_closed_list() -> None:
    """What the tests above compare is the list itself: a text that is not on it cannot pass for a reason."""
    assert decode(QuoteRequest, GOOD[2:]).model_id == bytes(32)
    with pytest.raises(ValueError, match="not a valid"):
        Reason("something else")
