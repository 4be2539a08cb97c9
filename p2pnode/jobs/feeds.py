"""From what a caller holds (arrays, numbers, nested lists, strings) to the values a model takes, as ONNX Runtime would do it.

Arrays pass as they are: a wrong dtype or rank is the model's runtime's to refuse, in its own words. Lists take their dtype
from the model. The messages here are ONNX Runtime's, so that a program which reads them finds the same text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from p2pnode.errors import WorkError
from p2pnode.reasons import Reason

NUMPY_TYPES: dict[str, Any] = {
    "float": np.float32, "double": np.float64, "float16": np.float16, "bool": np.bool_, "string": np.object_,
    "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
    "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
    "complex64": np.complex64, "complex128": np.complex128,
}  # fmt: skip
ONNX_NUMBERS: dict[int, str] = {
    1: "float", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool", 10: "float16",
    11: "double", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16", 17: "float8e4m3fn",
    18: "float8e4m3fnuz", 19: "float8e5m2", 20: "float8e5m2fnuz", 21: "uint4", 22: "int4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ValueInfo:
    """One input or output of a model. type: ONNX Runtime's text, such as `tensor(float)`; shape: int, name or None each."""

    name: str
    type: str
    shape: tuple[int | str | None, ...] = ()

    @property
    def is_optional(self) -> bool:
        """True when the model runs without it."""
        return self.type.startswith("optional")

    @property
    def element(self) -> Any:
        """The numpy dtype of the tensor (or of the sequence's tensors), None for types numpy lacks."""
        match = re.search(r"tensor\((\w+)\)", self.type)
        return NUMPY_TYPES.get(match[1]) if match else None

    @property
    def is_tensor(self) -> bool:
        """True for a plain (or optional) tensor, False for sequences and maps."""
        return self.type.removeprefix("optional(").startswith("tensor(")


def value_info(item: Any) -> ValueInfo:
    """Give a ValueInfo for any object with `.name`, `.shape` and `.type` or `.dtype` (an ONNX number or a type's text)."""
    kind = getattr(item, "type", None)
    if not isinstance(kind, str):
        dtype = item.dtype
        name = ONNX_NUMBERS.get(dtype, "undefined") if isinstance(dtype, int) else str(dtype)
        kind = name if "(" in name else f"tensor({name})"
    return ValueInfo(item.name, kind, tuple(item.shape or ()))


def as_values(inputs: Sequence[ValueInfo], feed: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a whole feed. Names the model does not know are passed on; the runtime refuses them in its own words."""
    known = {info.name: info for info in inputs}
    return {name: as_value(known.get(name), raw) for name, raw in feed.items()}


def as_value(info: ValueInfo | None, raw: Any) -> Any:
    """Convert one input: array, numpy scalar, number, text, nested list, list of arrays (a sequence), mapping or None.

    Raises WorkError whose detail is `RuntimeError: ` and ONNX Runtime's message.
    """
    if isinstance(raw, np.ndarray):
        return _contiguous(raw)
    if raw is None:
        return None
    name = info.name if info is not None else ""
    if isinstance(raw, np.generic):
        return np.asarray(raw)
    if isinstance(raw, Mapping):
        return dict(raw)
    is_sequence = info is not None and not info.is_tensor
    if isinstance(raw, list) and is_sequence:
        return [_member(item) for item in raw]
    if isinstance(raw, list):
        return _from_list(info, raw)
    if isinstance(raw, bool | int | float | complex):
        return np.asarray(raw, dtype=info.element if info is not None else None)
    if hasattr(raw, "numpy") and callable(raw.numpy):
        return _contiguous(np.asarray(raw.numpy()))
    raise _runtime_error(f"Input must be a list of dictionaries or a single numpy array for input '{name}'.")


def _member(item: Any) -> Any:
    if isinstance(item, np.ndarray):
        return _contiguous(item)
    if isinstance(item, np.generic):
        return np.asarray(item)
    if isinstance(item, Mapping):
        return dict(item)
    if item is None:
        return None
    raise _runtime_error("CreateSequenceOfTensors: Input is not a tensor")


def _from_list(info: ValueInfo | None, raw: list[Any]) -> np.ndarray[Any, Any]:
    element = info.element if info is not None else None
    try:
        if element is np.object_:
            return _texts(np.asarray(raw, dtype=object))
        array = np.asarray(raw)
        if array.dtype == object or (array.dtype.kind in "US" and element is not None):
            raise ValueError(array.dtype)
        return np.ascontiguousarray(array if element is None else array.astype(element)).reshape(array.shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise _runtime_error("Could not create tensor from given input list") from error


def _texts(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    flat = [item if isinstance(item, str | bytes) else str(item) for item in array.reshape(-1)]
    texts = np.empty(len(flat), dtype=object)
    texts[:] = flat
    return texts.reshape(array.shape)


def _contiguous(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.dtype.kind in "US":
        return _texts(array.astype(object))
    if array.dtype.kind == "O":
        return _texts(array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # ascontiguousarray turns a scalar into a vector of one; reshape undoes that.
    return array if array.flags.c_contiguous else np.ascontiguousarray(array).reshape(array.shape)


def _runtime_error(message: str) -> WorkError:
    return WorkError(Reason.WRONG_DTYPE, f"RuntimeError: {message}")
