"""Whether a TensorProto's declared shape fits the bytes it carries, decided before anything is allocated.

Plain integers only, so that a shape of 2^62 elements costs nothing to refuse. Runs in the confined child.
Source: onnx.proto3, message TensorProto (which field holds which type, and how sub-byte types are packed).
"""

from typing import Any, Final

from onnx import TensorProto

from p2pnode.errors import WorkError
from p2pnode.reasons import Reason

RANK_MAX: Final = 32
# A sparse initialiser becomes a dense tensor when a model is loaded.
SPARSE_BYTES_MAX: Final = 1 << 31

_BITS: Final[dict[int, int]] = {
    TensorProto.FLOAT: 32, TensorProto.UINT8: 8, TensorProto.INT8: 8, TensorProto.UINT16: 16, TensorProto.INT16: 16,
    TensorProto.INT32: 32, TensorProto.INT64: 64, TensorProto.BOOL: 8, TensorProto.FLOAT16: 16, TensorProto.DOUBLE: 64,
    TensorProto.UINT32: 32, TensorProto.UINT64: 64, TensorProto.COMPLEX64: 64, TensorProto.COMPLEX128: 128,
    TensorProto.BFLOAT16: 16, TensorProto.FLOAT8E4M3FN: 8, TensorProto.FLOAT8E4M3FNUZ: 8, TensorProto.FLOAT8E5M2: 8,
    TensorProto.FLOAT8E5M2FNUZ: 8, TensorProto.UINT4: 4, TensorProto.INT4: 4,
    # float4e2m1, float8e8m0, uint2, int2: named in newer onnx packages only.
    23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
_TYPED_FIELDS: Final[dict[int, tuple[str, int]]] = {
    TensorProto.FLOAT: ("float_data", 1), TensorProto.COMPLEX64: ("float_data", 2), TensorProto.DOUBLE: ("double_data", 1),
    TensorProto.COMPLEX128: ("double_data", 2), TensorProto.INT64: ("int64_data", 1), TensorProto.UINT32: ("uint64_data", 1),
    TensorProto.UINT64: ("uint64_data", 1),
}  # fmt: skip


def element_count(dims: Any, name: str) -> int:
    """Give the number of elements of a shape. Raises WorkError(INITIALIZER_SHAPE) for a negative or absurd one."""
    if len(dims) > RANK_MAX:
        raise WorkError(Reason.INITIALIZER_SHAPE, f"tensor {name[:64]!r} has {len(dims)} dimensions")
    count = 1
    for dimension in dims:
        if dimension < 0:
            raise WorkError(Reason.INITIALIZER_SHAPE, f"tensor {name[:64]!r} has a negative dimension")
        count *= dimension
    return count


def byte_size(dtype: int, dims: Any, name: str) -> int:
    """Give the bytes that a tensor of this type and shape takes. Raises WorkError for an unknown type or a bad shape."""
    bits = _BITS.get(dtype)
    if bits is None:
        raise WorkError(Reason.BAD_MODEL, f"tensor {name[:64]!r} has dtype {dtype}, which has no fixed size")
    return (element_count(dims, name) * bits + 7) // 8


def check_tensor(tensor: Any) -> None:
    """Refuse an inline tensor whose data does not have exactly the size its shape declares."""
    name = tensor.name
    count = element_count(tensor.dims, name)
    dtype = tensor.data_type
    if tensor.HasField("raw_data"):
        actual, wanted = len(tensor.raw_data), byte_size(dtype, tensor.dims, name)
    elif dtype == TensorProto.STRING:
        actual, wanted = len(tensor.string_data), count
    elif dtype in _TYPED_FIELDS:
        field, factor = _TYPED_FIELDS[dtype]
        actual, wanted = len(getattr(tensor, field)), count * factor
    elif dtype in _BITS:
        # Types of a byte and more take an int32 each; smaller ones are packed into bytes first.
        bits = _BITS[dtype]
        actual, wanted = len(tensor.int32_data), count if bits >= 8 else (count * bits + 7) // 8
    else:
        raise WorkError(Reason.BAD_MODEL, f"tensor {name[:64]!r} has the unknown dtype {dtype}")
    if actual != wanted:
        raise WorkError(
            Reason.INITIALIZER_SHAPE, f"tensor {name[:64]!r} declares {list(tensor.dims)[:8]} and carries {actual}, not {wanted}"
        )


def check_sparse(sparse: Any) -> None:
    """Refuse a sparse tensor that would become too large, or whose parts do not fit their shapes."""
    check_tensor(sparse.values)
    check_tensor(sparse.indices)
    if byte_size(sparse.values.data_type, sparse.dims, sparse.values.name) > SPARSE_BYTES_MAX:
        raise WorkError(Reason.INITIALIZER_SHAPE, "a sparse initialiser would become too large")
