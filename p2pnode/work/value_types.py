"""A model's inputs and outputs in plain values, and copies of the model that onnx's own tools can read without its blob.

Runs in the confined child. Type texts are those of ONNX Runtime's `NodeArg.type`, such as `seq(tensor(int64))`.
"""

from typing import Any, Final

import onnx
import onnx.helper
import onnx.shape_inference
from onnx import ModelProto, TensorProto, TypeProto, ValueInfoProto

from p2pnode.errors import WorkError
from p2pnode.reasons import Reason

VALUES_MAX: Final = 1024
TYPE_DEPTH_MAX: Final = 8

_TEXTS: Final = {
    1: "float", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool", 10: "float16",
    11: "double", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16", 17: "float8e4m3fn",
    18: "float8e4m3fnuz", 19: "float8e5m2", 20: "float8e5m2fnuz", 21: "uint4", 22: "int4", 23: "float4e2m1",
}  # fmt: skip

Value = dict[str, Any]


def signature(model: ModelProto) -> tuple[list[Value], list[Value]]:
    """Give inputs and outputs as [{name, kind, dtype, type, shape}]. An input that an initialiser fills is none.

    Outputs whose file gives no shape get the inferred one, as in ONNX Runtime.
    """
    filled = {tensor.name for tensor in model.graph.initializer}
    filled |= {sparse.values.name for sparse in model.graph.sparse_initializer}
    inputs = [_describe(value) for value in model.graph.input if value.name not in filled]
    outputs = [_describe(value) for value in model.graph.output]
    if any(output["shape"] is None and output["kind"] == "tensor" for output in outputs):
        inferred = {value.name: _describe(value) for value in inferred_model(model).graph.output}
        outputs = [inferred.get(output["name"], output) for output in outputs]
    if max(len(inputs), len(outputs)) > VALUES_MAX:
        raise WorkError(Reason.TOO_MANY_ITEMS, f"the model has more than {VALUES_MAX} inputs or outputs")
    return inputs, outputs


def may_batch(inputs: list[Value], outputs: list[Value]) -> bool:
    """Say whether the declared shapes allow joining calls along dimension 0: it is free in every input and output.

    A necessary condition only; whether the results stay the same is measured before any batch is made.
    """
    values = inputs + outputs
    if not inputs or not outputs or any(value["kind"] != "tensor" or not value["shape"] for value in values):
        return False
    # Exporters give the same dimension different symbols, so names decide nothing here.
    return not any(isinstance(value["shape"][0], int) for value in values)


def with_inputs_for_external(model: ModelProto) -> ModelProto:
    """Give a copy in which every external initialiser is an input of its type: same meaning, and no file to look for."""
    copy = ModelProto()
    copy.CopyFrom(model)
    names = {value.name for value in copy.graph.input}
    kept = [tensor for tensor in copy.graph.initializer if tensor.data_location != TensorProto.EXTERNAL]
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in names:
            copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    if len(kept) < len(copy.graph.initializer):
        kept_copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        copy.graph.ClearField("initializer")
        copy.graph.initializer.extend(kept_copies)
    return copy


def inferred_model(model: ModelProto) -> ModelProto:
    """Give the model with the shapes that onnx can infer; unchanged where inference fails, which is no fault of the model."""
    copy = with_inputs_for_external(model)
    for with_values in (True, False):
        try:
            return onnx.shape_inference.infer_shapes(copy, data_prop=with_values)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, IndexError, OverflowError):
            continue
    return copy


def dimensions(value: ValueInfoProto) -> list[int | str | None] | None:
    """Give a tensor's declared shape: a size, a symbol or None per dimension; None without a rank."""
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        return None
    return [_dimension(dimension) for dimension in value.type.tensor_type.shape.dim]


def _describe(value: ValueInfoProto) -> Value:
    kind, dtype, text = _type(value.type, 0)
    name = value.name
    if not name or len(name) > 512:
        raise WorkError(Reason.BAD_MODEL, "an input or output has no name, or one of more than 512 characters")
    return {"name": name, "kind": kind, "dtype": dtype, "type": text[:512], "shape": dimensions(value)}


def _type(value_type: TypeProto, depth: int) -> tuple[str, int, str]:
    which = value_type.WhichOneof("value")
    if depth > TYPE_DEPTH_MAX:
        raise WorkError(Reason.TOO_DEEP, "a type is nested too deep")
    if which == "sequence_type":
        _, dtype, text = _type(value_type.sequence_type.elem_type, depth + 1)
        return "sequence", dtype, f"seq({text})"
    if which == "optional_type":
        _, dtype, text = _type(value_type.optional_type.elem_type, depth + 1)
        return "optional", dtype, f"optional({text})"
    if which == "map_type":
        _, dtype, text = _type(value_type.map_type.value_type, depth + 1)
        key = _TEXTS.get(value_type.map_type.key_type, "undefined")
        return "map", dtype, f"map({key},{text})"
    if which == "sparse_tensor_type":
        dtype = value_type.sparse_tensor_type.elem_type
        return "sparse", dtype, f"sparse_tensor({_TEXTS.get(dtype, 'undefined')})"
    dtype = value_type.tensor_type.elem_type
    return "tensor", dtype, f"tensor({_TEXTS.get(dtype, 'undefined')})"


def _dimension(dimension: Any) -> int | str | None:
    if dimension.HasField("dim_value"):
        return max(0, int(dimension.dim_value)) if dimension.dim_value >= 0 else None
    return str(dimension.dim_param)[:256] or None
