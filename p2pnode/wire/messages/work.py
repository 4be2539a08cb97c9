"""Models and calls on the wire."""

from typing import Annotated

from msgspec import Meta, Struct

from p2pnode.wire.messages.fields import Count, Hash32, Hashes, Label, ShortText
from p2pnode.wire.registry import message

Dimension = Annotated[int, Meta(ge=0, le=2**40)]
Shape = Annotated[tuple[Dimension, ...], Meta(max_length=32)]
TensorName = Annotated[str, Meta(max_length=512)]


class ValueHeader(Struct, frozen=True):
    """One input or output value; its bytes follow in the attachment, each leaf on a 64-byte boundary.

    kind: 0 tensor, 1 sequence, 2 map (keys then values as two items), 3 empty optional.
    dtype: ONNX TensorProto.DataType. shape: of the tensor. size: bytes of this leaf in the attachment.
    """

    name: TensorName
    kind: Annotated[int, Meta(ge=0, le=3)]
    dtype: Annotated[int, Meta(ge=0, le=64)]
    shape: Shape
    size: Count
    items: Annotated[tuple["ValueHeader", ...], Meta(max_length=65536)] = ()


Values = Annotated[tuple[ValueHeader, ...], Meta(max_length=1024)]
TensorNames = Annotated[tuple[TensorName, ...], Meta(max_length=1024)]


class BlobEntry(Struct, frozen=True):
    """One blob of a model. id: Merkle root over its 1 MiB chunks; chunks: their leaf hashes."""

    id: Hash32
    size: Count
    chunks: Annotated[tuple[Hash32, ...], Meta(max_length=65536)]


class InitializerEntry(Struct, frozen=True):
    """An initialiser that was moved out of the graph: blob number, byte offset in it (multiple of 64), size, dtype, shape."""

    name: TensorName
    dtype: Annotated[int, Meta(ge=0, le=64)]
    shape: Shape
    blob: Count
    offset: Count
    size: Count


@message(80)
class ModelManifest(Struct, frozen=True):
    """What a model consists of. The model id is the Merkle root over (graph blob id, initialiser blob ids in order).

    blobs[0] is the graph skeleton; the rest hold initialisers.
    """

    name: ShortText
    blobs: Annotated[tuple[BlobEntry, ...], Meta(min_length=1, max_length=4096)]
    initializers: Annotated[tuple[InitializerEntry, ...], Meta(max_length=65536)]


@message(81)
class ManifestRequest(Struct, frozen=True):
    """Ask for a model's manifest. Answered by ManifestReply; the encoded ModelManifest is the attachment."""

    model_id: Hash32


@message(82)
class ManifestReply(Struct, frozen=True):
    """The manifest follows as the attachment."""

    size: Count


@message(83)
class BlobRequest(Struct, frozen=True):
    """Ask for bytes of a blob; whole chunks only. Answered by BlobReply with the bytes attached."""

    model_id: Hash32
    blob: Count
    offset: Count
    length: Count


@message(84)
class BlobReply(Struct, frozen=True):
    """The bytes follow as the attachment."""

    offset: Count
    length: Count


@message(85)
class Call(Struct, frozen=True):
    """One inference within an agreement; the inputs' bytes are the attachment. Answered by CallResult.

    number: unique within the agreement, chosen by the client. input_hash: blake3 over encoded headers and attachment. The
    same number with the same hash asks again for the same answer and is not charged twice; with another hash it is refused.
    outputs: names wanted, empty for all. priority: 0 highest. timeout_ms: 0 for the provider's own limit.
    keep: the provider should keep the output until the cheque, so that it can be fetched again.
    """

    agreement_id: Hash32
    number: Count
    input_hash: Hash32
    inputs: Values
    outputs: TensorNames
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    timeout_ms: Count = 0
    keep: bool = True


@message(86)
class CallResult(Struct, frozen=True):
    """The answer to a Call; the outputs' bytes are the attachment.

    slice and position, both counted from 0, say where in which receipt this call's leaf stands. amount: micro-credits charged.
    work_us: time in the worker, microseconds.
    """

    output_hash: Hash32
    outputs: Values
    amount: Count
    slice: Count
    position: Count
    work_us: Count
    engine: Label


@message(87)
class ModelList(Struct, frozen=True):
    """Models held, by id."""

    models: Hashes


@message(88)
class FetchResult(Struct, frozen=True):
    """Ask again for the answer of a call, without sending its inputs. Answered by CallResult.

    Refused with `unknown-call` when the call was never executed and costs nothing, and with `output-gone` when it was and
    its answer is no longer kept: sent again, it is executed again without charge.
    """

    agreement_id: Hash32
    number: Count
    input_hash: Hash32
