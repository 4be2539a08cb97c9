"""How many operations one run of a model takes at given input shapes: the quantity that work is priced by.

Integer arithmetic only, and no measurement: provider and client get the same number from the same graph and shapes.
One operation is one arithmetic result; a multiply-add is two. With E(x) the elements of tensor x, `out` the first output:

- MatMul, MatMulInteger, QLinearMatMul, FusedMatMul, Gemm, MatMulNBits   2 E(out) K, K the joined dimension
- Conv and its kinds            2 E(out) x (elements of one filter)      ConvTranspose   2 E(in) x (elements of one filter)
- LSTM, GRU, RNN and kinds      2 steps x batch x (E(W) + E(R)) + 4 steps x batch x E(R) / hidden
- Attention and kinds           2 E(Q) T + 2 E(out) T + 5 E(Q) T / head, T the length attended to; plus the projection, if in it
- Einsum                        2 x product of all its index sizes, per operand beyond the first
- Softmax 5, normalisations 8, batch normalisation 2, Resize 4, GridSample 8, per element of out
- reductions, ArgMax, global pooling      E(in);     pooling     E(out) x window;      sorts     E(in) x bits of the sorted length
- tree ensembles                rows x trees x depth, taken as the bits of twice the nodes per tree
- linear and support vector models              2 rows x coefficients
- If   the dearer branch;       Loop, Scan      body x trip count where it is a constant or a dimension, otherwise 1
- functions are inlined
- views (Reshape, Identity, Shape, Constant …)   1;  everything else   E(out)

Shapes come from onnx's shape inference with the inputs fixed. A dimension that stays unknown counts as the largest input of
its node would, so that hiding a shape never makes work free. The sum is at least 1 and at most 2^62.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import onnx
import onnx.inliner
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from p2pnode.work import value_types

OPERATIONS_MAX: Final = 1 << 62
TRIPS_MAX: Final = 1 << 31

Shape = tuple[int | None, ...]

_FREE: Final = frozenset(
    {"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Size", "Constant", "ConstantOfShape", "Optional"}
    | {"OptionalGetElement", "OptionalHasElement", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceInsert"}
    | {"SequenceErase", "SequenceLength"}
)
_PER_ELEMENT: Final = {
    "Softmax": 5, "LogSoftmax": 5, "Hardmax": 2, "LayerNormalization": 8, "SkipLayerNormalization": 9,
    "SimplifiedLayerNormalization": 6, "SkipSimplifiedLayerNormalization": 7, "RMSNormalization": 6,
    "EmbedLayerNormalization": 10, "InstanceNormalization": 8, "GroupNormalization": 8, "GroupNorm": 8,
    "MeanVarianceNormalization": 8,
    "LpNormalization": 4, "LRN": 8, "BatchNormalization": 2, "Resize": 4, "Upsample": 4, "GridSample": 8, "RotaryEmbedding": 3,
    "DynamicQuantizeLinear": 4,
}  # fmt: skip
_PER_INPUT: Final = frozenset(
    {"ArgMax", "ArgMin", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "CumSum", "NonZero", "Compress"}
)
_SORTS: Final = frozenset({"TopK", "Unique"})
_POOLS: Final = frozenset({"AveragePool", "MaxPool", "LpPool", "QLinearAveragePool"})
_MATMULS: Final = frozenset({"MatMul", "FusedMatMul", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat"})
_GEMMS: Final = frozenset({"Gemm", "FusedGemm", "QGemm"})
_CONVS: Final = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3, "DeformConv": 1, "NhwcConv": 1}
_RECURRENT: Final = frozenset({"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})
_ATTENTIONS: Final = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention"})
_TREES: Final = frozenset({"TreeEnsembleClassifier", "TreeEnsembleRegressor", "TreeEnsemble"})
_LINEAR: Final = frozenset({"LinearClassifier", "LinearRegressor", "SVMClassifier", "SVMRegressor"})


def operations(model: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count the operations of one run with inputs of these shapes. Inputs not named keep their declared shape. At least 1."""
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    dtypes = {value.name: _dtype(value) for value in model.graph.input}
    known = {name: (tuple(dims), dtypes.get(name, TensorProto.FLOAT)) for name, dims in shapes.items()}
    total = _graph_operations(model, model.graph, known, {})
    return max(1, min(total, OPERATIONS_MAX))


@dataclass(slots=True)
class _Scope:
    """What is known about the tensors of one graph: shapes, element types, and small constants."""

    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)

    def size(self, name: str) -> int:
        """Elements of a tensor as far as known, at least 0; the absent optional input has none."""
        return self.elements.get(name, 1 if name else 0)

    def dims(self, name: str) -> Shape:
        return self.shapes.get(name, ())

    def dimension(self, name: str, index: int) -> int:
        """One dimension; 1 when it is unknown."""
        dims = self.shapes.get(name, ())
        if not -len(dims) <= index < len(dims):
            return 1
        return dims[index] or (1 if dims[index] is None else 0)


def _graph_operations(
    model: ModelProto, graph: GraphProto, inputs: Mapping[str, tuple[Shape, int]], constants: Mapping[str, int]
) -> int:
    scope = _infer(model, graph, inputs)
    scope.constants = {**constants, **_integers(graph)}
    total = 0
    for node in graph.node:
        largest = max((scope.size(name) for name in node.input if name), default=1)
        for name in node.output:
            if name:
                scope.elements[name] = _elements(scope.shapes.get(name), largest)
        total += _node_operations(model, node, scope)
        if total >= OPERATIONS_MAX:
            return OPERATIONS_MAX
    return total


def _infer(model: ModelProto, graph: GraphProto, inputs: Mapping[str, tuple[Shape, int]]) -> _Scope:
    """Give what shape inference finds with these inputs; values of outer graphs count as inputs of an inner one."""
    whole = ModelProto(ir_version=model.ir_version)
    whole.opset_import.extend(model.opset_import)
    whole.graph.CopyFrom(graph)
    whole.graph.ClearField("value_info")
    declared = {value.name for value in whole.graph.input}
    own = {tensor.name for tensor in whole.graph.initializer}
    for value in whole.graph.input:
        if value.name in inputs:
            _set_shape(value, *inputs[value.name])
    for name, (shape, dtype) in inputs.items():
        if name not in declared and name not in own and dtype:
            _set_shape(whole.graph.input.add(name=name), shape, dtype)
    for value in whole.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    inferred = value_types.inferred_model(whole).graph
    scope = _Scope()
    for value in [*inferred.value_info, *inferred.output, *inferred.input]:
        dims = value_types.dimensions(value)
        scope.dtypes[value.name] = _dtype(value)
        if dims is not None:
            scope.shapes[value.name] = tuple(size if isinstance(size, int) else None for size in dims)
    for tensor in graph.initializer:
        scope.shapes[tensor.name], scope.dtypes[tensor.name] = tuple(tensor.dims), tensor.data_type
    for name, shape in scope.shapes.items():
        scope.elements[name] = _elements(shape, 1)
    return scope


def _node_operations(model: ModelProto, node: NodeProto, scope: _Scope) -> int:
    kind = node.op_type
    rule = _RULES.get(kind)
    out = scope.size(node.output[0]) if node.output else 1
    first = scope.size(node.input[0]) if node.input else 0
    if rule is not None:
        return rule(node, scope)
    if kind in _FREE:
        return 1
    if kind in _PER_ELEMENT:
        return _PER_ELEMENT[kind] * max(out, 1)
    if kind.startswith("Reduce") or kind in _PER_INPUT:
        return max(first, out)
    if kind in _SORTS:
        return first * max(1, scope.dimension(node.input[0], -1).bit_length())
    if kind in _POOLS:
        return out * _product(_integer_list(node, "kernel_shape"))
    if kind in ("If", "Loop", "Scan", "SequenceMap"):
        return _control_flow(model, node, scope)
    return out


def _control_flow(model: ModelProto, node: NodeProto, scope: _Scope) -> int:
    outer = {name: (shape, scope.dtypes.get(name, 0)) for name, shape in scope.shapes.items()}
    graphs = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    if node.op_type == "If":
        return max((_graph_operations(model, graph, outer, scope.constants) for graph in graphs), default=1)
    total = 1
    for graph in graphs:
        inner, trips = _body_inputs(node, graph, scope)
        total += trips * max(1, _graph_operations(model, graph, {**outer, **inner}, scope.constants))
    return total


def _body_inputs(node: NodeProto, graph: GraphProto, scope: _Scope) -> tuple[dict[str, tuple[Shape, int]], int]:
    """Give the shapes of a body's inputs and how often the body runs."""
    inner: dict[str, tuple[Shape, int]] = {}
    names = [value.name for value in graph.input]
    if node.op_type == "Loop":
        for name, outer_name in zip(names[2:], node.input[2:], strict=False):
            if outer_name in scope.shapes:
                inner[name] = (scope.shapes[outer_name], scope.dtypes.get(outer_name, 0))
        trips = scope.constants.get(node.input[0], 1) if node.input else 1
        return inner, max(0, min(trips, TRIPS_MAX))
    if node.op_type != "Scan":
        return inner, 1
    scanned = _integer(node, "num_scan_inputs", 1)
    axes = _integer_list(node, "scan_input_axes")
    states = max(0, len(node.input) - scanned)
    trips = 1
    for index, (name, outer_name) in enumerate(zip(names, node.input, strict=False)):
        dims = list(scope.dims(outer_name))
        axis = axes[index - states] if 0 <= index - states < len(axes) else 0
        if index >= states and -len(dims) <= axis < len(dims):
            trips = max(trips, dims.pop(axis) or 1)
        inner[name] = (tuple(dims), scope.dtypes.get(outer_name, 0))
    return inner, min(trips, TRIPS_MAX)


def _matmul(node: NodeProto, scope: _Scope) -> int:
    # QLinearMatMul has scale and zero point between its factors.
    right = node.input[3] if node.op_type == "QLinearMatMul" else node.input[1]
    left_dims, right_dims = scope.dims(node.input[0]), scope.dims(right)
    joined = scope.dimension(node.input[0], -2 if _integer(node, "transA", 0) else -1) if left_dims else 1
    if joined == 1 and right_dims:
        joined = scope.dimension(right, -2 if len(right_dims) > 1 and not _integer(node, "transB", 0) else -1)
    return 2 * scope.size(node.output[0]) * joined


def _gemm(node: NodeProto, scope: _Scope) -> int:
    joined = scope.dimension(node.input[0], 0 if _integer(node, "transA", 0) else 1)
    return scope.size(node.output[0]) * (2 * joined + (len(node.input) > 2))


def _matmul_bits(node: NodeProto, scope: _Scope) -> int:
    return 2 * scope.size(node.output[0]) * max(1, _integer(node, "K", 1))


def _conv(node: NodeProto, scope: _Scope) -> int:
    weights = scope.dims(node.input[_CONVS.get(node.op_type, 1)])
    return 2 * scope.size(node.output[0]) * _product(weights[1:])


def _conv_transpose(node: NodeProto, scope: _Scope) -> int:
    return 2 * scope.size(node.input[0]) * _product(scope.dims(node.input[1])[1:])


def _recurrent(node: NodeProto, scope: _Scope) -> int:
    name = node.input[0]
    rows = scope.dimension(name, 0) * scope.dimension(name, 1)
    weights = scope.size(node.input[1]) + scope.size(node.input[2])
    hidden = max(1, _integer(node, "hidden_size", 1))
    return 2 * rows * weights + 4 * rows * (scope.size(node.input[2]) // hidden)


def _attention(node: NodeProto, scope: _Scope) -> int:
    query = node.input[0]
    length = scope.dimension(query, -2)
    queries = scope.size(query)
    projection = 0
    if node.op_type in ("Attention", "QAttention") and node.domain == "com.microsoft":
        weights = scope.dims(node.input[1])
        projection = 2 * scope.dimension(query, 0) * length * _product(weights)
        queries = scope.dimension(query, 0) * length * max(1, _product(weights[1:]) // 3)
    elif len(node.input) > 1 and scope.dims(node.input[1]):
        length = max(length, scope.dimension(node.input[1], -2))
    heads = max(1, _integer(node, "num_heads", 0) or _integer(node, "q_num_heads", 0))
    rank = len(scope.dims(query))
    head = scope.dimension(query, -1) if rank == 4 else max(1, scope.dimension(query, -1) // heads)
    return projection + 4 * queries * length + 5 * queries * length // max(1, head)


def _einsum(node: NodeProto, scope: _Scope) -> int:
    equation = next((attribute.s.decode("ascii", "replace") for attribute in node.attribute if attribute.name == "equation"), "")
    sizes: dict[str, int] = {}
    for name, labels in zip(node.input, equation.replace(" ", "").split("->")[0].split(","), strict=False):
        dims = scope.dims(name)
        letters = labels.replace("...", "")
        named = letters if len(letters) == len(dims) else letters[::-1]
        ordered = dims if len(letters) == len(dims) else dims[::-1]
        for letter, size in zip(named, ordered, strict=False):
            sizes[letter] = max(sizes.get(letter, 1), size or 1)
    return max(2 * _product(sizes.values()) * max(1, len(node.input) - 1), scope.size(node.output[0]))


def _trees(node: NodeProto, scope: _Scope) -> int:
    rows = scope.dimension(node.input[0], 0) if len(scope.dims(node.input[0])) > 1 else 1
    identities = _integer_list(node, "nodes_treeids")
    trees = len(set(identities)) or len(_integer_list(node, "tree_roots")) or 1
    nodes = len(identities) or len(_integer_list(node, "nodes_featureids"))
    return rows * trees * (2 * max(1, nodes // trees)).bit_length()


def _linear(node: NodeProto, scope: _Scope) -> int:
    rows = scope.dimension(node.input[0], 0) if len(scope.dims(node.input[0])) > 1 else 1
    numbers = sum(len(attribute.floats) for attribute in node.attribute)
    return max(2 * rows * numbers, 1)


def _fourier(node: NodeProto, scope: _Scope) -> int:
    size = max(scope.size(node.output[0]), scope.size(node.input[0]))
    return 5 * size * max(1, size.bit_length())


def _suppression(node: NodeProto, scope: _Scope) -> int:
    boxes = scope.dimension(node.input[0], 1)
    return max(1, scope.size(node.input[1])) * max(1, boxes.bit_length() + 8)


_RULES: Final[dict[str, Callable[[NodeProto, _Scope], int]]] = {
    **dict.fromkeys(_MATMULS, _matmul),
    **dict.fromkeys(_GEMMS, _gemm),
    "MatMulNBits": _matmul_bits,
    **dict.fromkeys(_CONVS, _conv),
    "ConvTranspose": _conv_transpose,
    **dict.fromkeys(_RECURRENT, _recurrent),
    **dict.fromkeys(_ATTENTIONS, _attention),
    "Einsum": _einsum,
    **dict.fromkeys(_TREES, _trees),
    **dict.fromkeys(_LINEAR, _linear),
    "DFT": _fourier,
    "STFT": _fourier,
    "NonMaxSuppression": _suppression,
}


def _elements(shape: Shape | None, largest_input: int) -> int:
    """Elements of a shape; where a dimension is unknown, at least as many as the node's largest input."""
    if shape is None:
        return largest_input
    known = _product(size for size in shape if size is not None)
    return max(known, largest_input) if None in shape else known


def _product(sizes: Any) -> int:
    product = 1
    for size in sizes:
        product = min(product * (1 if size is None else size), OPERATIONS_MAX)
    return product


def _integers(graph: GraphProto) -> dict[str, int]:
    """Give the single integers that initialisers and Constant nodes hold: trip counts."""
    tensors = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            tensors += [(node.output[0], attribute.t) for attribute in node.attribute if attribute.name == "value"]
    found = {}
    for name, tensor in tensors:
        is_one = tensor.data_type in (TensorProto.INT64, TensorProto.INT32) and _product(tensor.dims) == 1
        if is_one and tensor.data_location != TensorProto.EXTERNAL:
            found[name] = int(onnx.numpy_helper.to_array(tensor).reshape(()))
    return found


def _set_shape(value: Any, shape: Shape, dtype: int) -> None:
    if value.type.WhichOneof("value") not in (None, "tensor_type"):
        return
    tensor_type = value.type.tensor_type
    tensor_type.elem_type = tensor_type.elem_type or dtype
    tensor_type.ClearField("shape")
    tensor_type.shape.SetInParent()
    for size in shape:
        dimension = tensor_type.shape.dim.add()
        if size is not None:
            dimension.dim_value = size


def _dtype(value: Any) -> int:
    return int(value.type.tensor_type.elem_type) if value.type.HasField("tensor_type") else 0


def _integer(node: NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def _integer_list(node: NodeProto, name: str) -> list[int]:
    return next((list(attribute.ints) for attribute in node.attribute if attribute.name == name), [])
