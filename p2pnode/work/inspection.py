"""Looking into a stranger's model: splitting it into graph and blob, checking it, pricing it.

Every function in `TASKS` runs inside a confined child process, which can open nothing and may be killed at any time; only its
small result leaves it. They take (arguments, data) and give (result, bytes); refusals are WorkErrors with a closed reason.

The form in which models are stored: a graph skeleton, whose initialisers of 1 KiB and more are marked external with location
`weights.bin`, and one blob with their bytes, each on a 64-byte boundary. Smaller ones stay inline: shape inference needs
them, and the graph stays readable. The skeleton is hashed, and with it every name, type, shape and place.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import onnx
import onnx.checker
import onnx.numpy_helper
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from p2pnode.environment import Buffer
from p2pnode.errors import WorkError
from p2pnode.reasons import Reason
from p2pnode.work import graph_cost, value_types
from p2pnode.work.protobuf_depth import subgraph_depth
from p2pnode.work.tensor_sizes import byte_size, check_sparse, check_tensor

BLOB_LOCATION: Final = "weights.bin"
EXTERNAL_BYTES_MIN: Final = 1024
ALIGNMENT: Final = 64
SUBGRAPH_DEPTH_MAX: Final = 16
# All of them must fit a manifest and a confined task's result; further ones stay inline.
INITIALIZERS_MAX: Final = 16384
ALLOWED_DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "ai.onnx.preview.training"})
# Shipped by ONNX Runtime, but they run code or open files from outside the model.
FORBIDDEN_OPERATORS: Final = frozenset({"EPContext", "PythonOp", "PythonOpGrad", "ATen", "ExternalOp"})
RANDOM_OPERATORS: Final = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Sampling"}
)
DROPOUT_OPERATORS: Final = frozenset({"Dropout", "BiasDropout", "BitmaskDropout", "BitmaskBiasDropout"})
CONTROL_FLOW: Final = frozenset({"If", "Loop", "Scan", "SequenceMap"})
# Types that a worker can hand to ONNX Runtime from outside the graph.
_MOVABLE: Final = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 16})

Result = tuple[dict[str, Any], bytes]
# (name, dtype, shape, offset in the blob, size in bytes)
Place = tuple[str, int, list[int], int, int]


def split(arguments: Mapping[str, Any], data: Buffer) -> Result:
    """Split a model file into graph skeleton and blob.

    arguments: graph_size, bytes of the .onnx file at the start of `data`; external, location -> (offset, size) in `data` of each
    external data file; graph_bytes_max. Result: `missing`, locations that are needed and were not given (then nothing else);
    or graph_size, blob_offset, initializers [(name, dtype, shape, offset, size)] and output = skeleton, padding, blob.
    """
    view = memoryview(data)
    graph_size = int(arguments["graph_size"])
    model = parse(view[:graph_size])
    external: Mapping[str, Any] = arguments.get("external", {})
    missing = sorted({location for tensor, _ in _tensors(model) if (location := _place(tensor)[0]) and location not in external})
    if missing:
        return {"missing": missing[:256]}, b""
    chunks, initializers, blob_size = _move_initializers(model, view, external)
    skeleton = model.SerializeToString(deterministic=True)
    if len(skeleton) > int(arguments["graph_bytes_max"]):
        raise WorkError(Reason.MODEL_TOO_LARGE, f"the graph without its initialisers has {len(skeleton)} bytes")
    padding = b"\0" * (-len(skeleton) % ALIGNMENT)
    blob_offset = len(skeleton) + len(padding)
    result = {"missing": [], "graph_size": len(skeleton), "blob_offset": blob_offset, "blob_size": blob_size}
    return {**result, "initializers": initializers}, b"".join([skeleton, padding, *chunks])


def join(arguments: Mapping[str, Any], data: Buffer) -> Result:
    """Put a model together again: `data` = skeleton (graph_size bytes), then the blob at blob_offset. Output: one .onnx file."""
    view = memoryview(data)
    model = parse(view[: int(arguments["graph_size"])])
    blob = view[int(arguments["blob_offset"]) :]
    for tensor, _ in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            _, offset, size = _place(tensor)
            tensor.raw_data = bytes(blob[offset : offset + (size or 0)])
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return {}, model.SerializeToString(deterministic=True)


def inspect(arguments: Mapping[str, Any], data: Buffer) -> Result:
    """Check a graph skeleton and tell what it is. Output bytes: none.

    arguments: blob_size; initializers [(name, dtype, shape, offset, size)] as the manifest has them, or None to learn them;
    limits: graph_bytes_max, nodes_max, opset_max. Raises WorkError with NOT_ONNX, TOO_DEEP, MODEL_TOO_LARGE, OPSET,
    TOO_MANY_ITEMS, CUSTOM_OPERATOR, EXTERNAL_DATA, INITIALIZER_SHAPE or BAD_MODEL.
    """
    if len(data) > int(arguments["graph_bytes_max"]):
        raise WorkError(Reason.MODEL_TOO_LARGE, f"the graph has {len(data)} bytes")
    model = parse(data)
    _check_opsets(model, int(arguments["opset_max"]))
    operators = _count_operators(model, int(arguments["nodes_max"]))
    initializers = _check_tensors(model, arguments["initializers"], int(arguments["blob_size"]))
    _check_standard(model)
    random = sorted(_random_operators(model))
    inputs, outputs = value_types.signature(model)
    control_flow = any(_short_name(name) in CONTROL_FLOW for name in operators)
    return {
        "inputs": inputs,
        "outputs": outputs,
        "opsets": {entry.domain: entry.version for entry in model.opset_import},
        "operators": dict(sorted(operators.items())),
        "random_operators": random,
        "control_flow": control_flow,
        "may_batch": not random and not control_flow and value_types.may_batch(inputs, outputs),
        "metadata": _metadata(model),
        "initializers": initializers,
    }, b""


def cost(arguments: Mapping[str, Any], data: Buffer) -> Result:
    """Count the operations of one run of a checked skeleton. arguments: shapes, input name -> dims. Result: operations."""
    shapes = {str(name): tuple(int(size) for size in dims) for name, dims in arguments["shapes"].items()}
    return {"operations": graph_cost.operations(parse(data), shapes)}, b""


def parse(data: Buffer) -> ModelProto:
    """Give a model from its bytes. Raises WorkError NOT_ONNX, or TOO_DEEP for subgraphs nested beyond the limit."""
    encoded = bytes(data)
    if subgraph_depth(encoded, SUBGRAPH_DEPTH_MAX) > SUBGRAPH_DEPTH_MAX:
        raise WorkError(Reason.TOO_DEEP, f"subgraphs are nested more than {SUBGRAPH_DEPTH_MAX} deep")
    try:
        model = ModelProto.FromString(encoded)
    except DecodeError as error:
        raise WorkError(Reason.NOT_ONNX, "the bytes are not an ONNX model") from error
    if model.ir_version <= 0 or not model.HasField("graph"):
        raise WorkError(Reason.NOT_ONNX, "the bytes are not an ONNX model: no version or no graph")
    return model


def _move_initializers(model: ModelProto, view: memoryview, external: Mapping[str, Any]) -> tuple[list[bytes], list[Place], int]:
    """Move large initialisers of the main graph out of the model; others that were external come in."""
    chunks: list[bytes] = []
    moved: list[Place] = []
    end = 0
    for tensor, top in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.raw_data = _external_bytes(tensor, view, external)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
        check_tensor(tensor)
        if not top or tensor.data_type not in _MOVABLE:
            continue
        size = byte_size(tensor.data_type, tensor.dims, tensor.name)
        if size < EXTERNAL_BYTES_MIN or len(moved) >= INITIALIZERS_MAX:
            continue
        chunks += [raw := _raw_bytes(tensor), b"\0" * (-len(raw) % ALIGNMENT)]
        moved.append((tensor.name, tensor.data_type, list(tensor.dims), end, size))
        _make_external(tensor, end, size)
        end += size + -size % ALIGNMENT
    return chunks, moved, end


def _make_external(tensor: TensorProto, offset: int, size: int) -> None:
    kept = (tensor.name, tensor.data_type, list(tensor.dims), tensor.doc_string)
    tensor.Clear()
    tensor.name, tensor.data_type, tensor.doc_string = kept[0], kept[1], kept[3]
    tensor.dims.extend(kept[2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", BLOB_LOCATION), ("offset", str(offset)), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)


def _raw_bytes(tensor: TensorProto) -> bytes:
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    array = onnx.numpy_helper.to_array(tensor)
    return bytes(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def _external_bytes(tensor: TensorProto, view: memoryview, external: Mapping[str, Any]) -> bytes:
    location, offset, size = _place(tensor)
    start, length = (int(number) for number in external[location])
    wanted = byte_size(tensor.data_type, tensor.dims, tensor.name)
    size = length - offset if size is None else size
    if size != wanted:
        raise WorkError(Reason.INITIALIZER_SHAPE, f"tensor {tensor.name[:64]!r} needs {wanted} bytes and has {size}")
    if offset < 0 or offset + size > length:
        raise WorkError(Reason.EXTERNAL_DATA, f"tensor {tensor.name[:64]!r} lies beyond the end of its file")
    return bytes(view[start + offset : start + offset + size])


def _place(tensor: TensorProto) -> tuple[str, int, int | None]:
    """Give (location, offset, length or None) of an external tensor; location "" when its data is inline."""
    if tensor.data_location != TensorProto.EXTERNAL:
        if len(tensor.external_data):
            raise WorkError(Reason.EXTERNAL_DATA, f"tensor {tensor.name[:64]!r} has both inline and external data")
        return "", 0, None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        location, offset = entries["location"], int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else None
    except (KeyError, ValueError):
        raise WorkError(Reason.EXTERNAL_DATA, f"tensor {tensor.name[:64]!r} does not say where its data lies") from None
    if not location:
        raise WorkError(Reason.EXTERNAL_DATA, f"tensor {tensor.name[:64]!r} names no file")
    return location, offset, length


def _check_opsets(model: ModelProto, opset_max: int) -> None:
    if not model.opset_import and model.ir_version >= 3:
        raise WorkError(Reason.BAD_MODEL, "the model names no operator set")
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and not 1 <= entry.version <= opset_max:
            raise WorkError(Reason.OPSET, f"operator set {entry.version} is not within 1..{opset_max}")
        if not entry.domain.isprintable() or len(entry.domain) > 256:
            raise WorkError(Reason.BAD_MODEL, "an operator set has an impossible name")


def _count_operators(model: ModelProto, nodes_max: int) -> Counter[str]:
    """Count operators with functions expanded, without expanding them: a chain of functions can stand for 2^64 nodes."""
    functions = {(function.domain, function.name): function for function in model.functions}
    expanded: dict[tuple[str, str], Counter[str]] = {}

    def count(nodes: Any, open_functions: tuple[tuple[str, str], ...]) -> Counter[str]:
        found: Counter[str] = Counter()
        for node in nodes:
            key = (node.domain, node.op_type)
            if key in functions:
                if key in open_functions or len(open_functions) > SUBGRAPH_DEPTH_MAX:
                    raise WorkError(Reason.TOO_DEEP, f"function {node.op_type[:64]!r} calls itself or nests too deep")
                if key not in expanded:
                    expanded[key] = count(functions[key].node, (*open_functions, key))
                found.update(expanded[key])
            else:
                _check_operator(node)
                found[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
            for graph in _subgraphs(node):
                found.update(count(graph.node, open_functions))
            if found.total() > nodes_max:
                raise WorkError(Reason.TOO_MANY_ITEMS, f"the model has more than {nodes_max} nodes")
        return found

    return count(model.graph.node, ())


def _check_operator(node: NodeProto) -> None:
    if node.domain not in ALLOWED_DOMAINS:
        raise WorkError(Reason.CUSTOM_OPERATOR, f"operator {node.op_type[:64]!r} is of domain {node.domain[:64]!r}")
    if node.op_type in FORBIDDEN_OPERATORS and node.domain not in ("", "ai.onnx"):
        raise WorkError(Reason.CUSTOM_OPERATOR, f"operator {node.op_type!r} reaches outside the model")
    if not node.op_type or len(node.op_type) > 256:
        raise WorkError(Reason.BAD_MODEL, "a node has no operator")


def _check_tensors(model: ModelProto, manifest: Any, blob_size: int) -> list[Place]:
    """Hold every tensor to its declared size, and external ones to the model's own blob. Gives where those lie."""
    external: dict[str, Place] = {}
    for tensor, top in _tensors(model):
        location, offset, size = _place(tensor)
        if not location:
            check_tensor(tensor)
            continue
        name = tensor.name
        if location != BLOB_LOCATION or not top or size is None or name in external or len(external) >= INITIALIZERS_MAX:
            raise WorkError(Reason.EXTERNAL_DATA, f"tensor {name[:64]!r} refers to data outside the model")
        if size != byte_size(tensor.data_type, tensor.dims, name):
            raise WorkError(Reason.INITIALIZER_SHAPE, f"tensor {name[:64]!r} declares another size than it has")
        if offset < 0 or offset % ALIGNMENT or offset + size > blob_size or tensor.data_type not in _MOVABLE:
            raise WorkError(Reason.EXTERNAL_DATA, f"tensor {name[:64]!r} lies outside the model's blob")
        external[name] = (name, tensor.data_type, list(tensor.dims), offset, size)
    if manifest is not None:
        declared = [(name, dtype, list(shape), offset, size) for name, dtype, shape, offset, size in manifest]
        if sorted(declared) != sorted(external.values()):
            raise WorkError(Reason.EXTERNAL_DATA, "the manifest's initialisers are not those of the graph")
    for graph in _graphs(model):
        for sparse in graph.sparse_initializer:
            check_sparse(sparse)
    return list(external.values())


def _check_standard(model: ModelProto) -> None:
    """Hold the model to the ONNX standard. External initialisers stand in as inputs: the checker would look for their file."""
    checked = value_types.with_inputs_for_external(model)
    for output in checked.graph.output:
        # ONNX Runtime accepts outputs without a shape, the checker wants the field; an empty one says the same.
        if output.type.HasField("tensor_type") and not output.type.tensor_type.HasField("shape"):
            output.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(checked)
    except (onnx.checker.ValidationError, RuntimeError, ValueError, IndexError, OverflowError) as error:
        raise WorkError(Reason.BAD_MODEL, " ".join(str(error).split())[:300]) from error


def _random_operators(model: ModelProto) -> Iterator[str]:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    constants = {
        tensor.name: any(tensor.raw_data) or any(tensor.int32_data) for graph in _graphs(model) for tensor in graph.initializer
    }
    for node in _nodes(model):
        trains = node.op_type in DROPOUT_OPERATORS and _trains(node, versions.get(node.domain, 1), constants)
        if trains or node.op_type in RANDOM_OPERATORS:
            yield node.op_type


def _trains(node: NodeProto, version: int, constants: Mapping[str, bool]) -> bool:
    """Say whether a Dropout may drop: an old one without is_test, or one whose training_mode is not a constant False."""
    if not node.domain and version < 7:
        return not any(attribute.name == "is_test" and attribute.i for attribute in node.attribute)
    position = 2 if node.op_type in ("Dropout", "BitmaskDropout") else 4
    if len(node.input) <= position or not node.input[position]:
        return False
    return constants.get(node.input[position], True)


def _metadata(model: ModelProto) -> dict[str, Any]:
    return {
        "producer_name": model.producer_name[:256],
        "graph_name": model.graph.name[:256],
        "domain": model.domain[:256],
        "description": model.doc_string[:4096],
        "graph_description": model.graph.doc_string[:4096],
        "version": model.model_version,
        "custom": {entry.key[:256]: entry.value[:65536] for entry in list(model.metadata_props)[:64]},
    }


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH or attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _graphs(model: ModelProto) -> Iterator[GraphProto]:
    waiting = [model.graph]
    for function in model.functions:
        waiting += [graph for node in function.node for graph in _subgraphs(node)]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += [inner for node in graph.node for inner in _subgraphs(node)]


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    for function in model.functions:
        yield from function.node
    for graph in _graphs(model):
        yield from graph.node


def _tensors(model: ModelProto) -> Iterator[tuple[TensorProto, bool]]:
    """Give every tensor that carries data, and whether it is an initialiser of the main graph; those come first, in order."""
    for tensor in model.graph.initializer:
        yield tensor, True
    for graph in _graphs(model):
        if graph is not model.graph:
            for tensor in graph.initializer:
                yield tensor, False
        for sparse in graph.sparse_initializer:
            yield sparse.values, False
            yield sparse.indices, False
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t, False
            if attribute.HasField("sparse_tensor"):
                yield attribute.sparse_tensor.values, False
                yield attribute.sparse_tensor.indices, False
            for tensor in attribute.tensors:
                yield tensor, False


def _short_name(operator: str) -> str:
    return operator.rpartition("::")[2]


TASKS: Final[dict[str, Callable[[Mapping[str, Any], Buffer], Result]]] = {
    "split": split,
    "join": join,
    "inspect": inspect,
    "cost": cost,
}
