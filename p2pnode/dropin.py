"""What makes a session look like ONNX Runtime's: its value descriptions, its metadata, its checks and its errors.

Pure: no session lives here. The texts and their order are those of onnxruntime 1.2x to 1.31, which programs parse; where
ONNX Runtime is installed its own exception classes are raised, so that `except` clauses written for it still catch.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from p2pnode.errors import P2PNodeError, WorkError
from p2pnode.jobs.feeds import ValueInfo, as_values
from p2pnode.reasons import Reason

CPU: Final = "CPUExecutionProvider"
_CODES: Final = {
    "Fail": (1, "FAIL"), "InvalidArgument": (2, "INVALID_ARGUMENT"), "NoSuchFile": (3, "NO_SUCHFILE"), "NoModel": (4, "NO_MODEL"),
    "EngineError": (5, "ENGINE_ERROR"), "RuntimeException": (6, "RUNTIME_EXCEPTION"), "InvalidProtobuf": (7, "INVALID_PROTOBUF"),
    "ModelLoaded": (8, "MODEL_LOADED"), "NotImplemented": (9, "NOT_IMPLEMENTED"), "InvalidGraph": (10, "INVALID_GRAPH"),
    "EPFail": (11, "EP_FAIL"),
}  # fmt: skip
_PLAIN: Final = {"RuntimeError": RuntimeError, "ValueError": ValueError, "TypeError": TypeError}
_TENSOR_NAMES: Final = {
    "float32": "float", "float64": "double", "object": "string", "float16": "float16", "bool": "bool", "bfloat16": "bfloat16",
    "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64", "uint8": "uint8", "uint16": "uint16",
    "uint32": "uint32", "uint64": "uint64", "complex64": "complex64", "complex128": "complex128",
}  # fmt: skip
# Which of ONNX Runtime's classes tells best what a closed-list reason means, where the worker sent no text of its own.
_CLASS_OF: Final = {
    Reason.NOT_ONNX: "InvalidProtobuf",
    Reason.BAD_MODEL: "InvalidGraph",
    Reason.OPSET: "Fail",
    Reason.CUSTOM_OPERATOR: "InvalidGraph",
    Reason.EXTERNAL_DATA: "Fail",
    Reason.MISSING_INPUT: "InvalidArgument",
    Reason.UNKNOWN_INPUT: "InvalidArgument",
    Reason.UNKNOWN_OUTPUT: "InvalidArgument",
    Reason.WRONG_SHAPE: "InvalidArgument",
    Reason.WRONG_DTYPE: "InvalidArgument",
    Reason.RUN_FAILED: "Fail",
}


class NodeArg:
    """One input or output, as `onnxruntime.NodeArg`: `.name`, `.type` such as `tensor(float)`, `.shape`."""

    __slots__ = ("name", "shape", "type")

    def __init__(self, info: ValueInfo) -> None:
        self.name = info.name
        self.type = info.type
        self.shape = list(info.shape)

    def __repr__(self) -> str:
        shape = ", ".join(repr(axis) for axis in self.shape)
        return f"NodeArg(name={self.name!r}, type={self.type!r}, shape=[{shape}])"


@dataclass
class ModelMetadata:
    """What a model says about itself, as `onnxruntime.ModelMetadata`."""

    producer_name: str = ""
    graph_name: str = ""
    domain: str = ""
    description: str = ""
    graph_description: str = ""
    version: int = 9223372036854775807
    custom_metadata_map: dict[str, str] = field(default_factory=dict)


class NetworkSession:
    """One open session of a blocking connection. inputs, outputs: what the model takes and gives.

    infer: makes one call with converted values and wanted names, gives the outputs by name, raises P2PNodeError. close: ends it.
    """

    def __init__(
        self,
        inputs: Sequence[ValueInfo],
        outputs: Sequence[ValueInfo],
        metadata: Mapping[str, Any],
        infer: Callable[[Mapping[str, Any], Sequence[str]], Mapping[str, Any]],
        close: Callable[[], None],
    ) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.metadata = metadata
        self.infer = infer
        self.close = close

    def run(self, output_names: Sequence[str] | None, feed: Mapping[str, Any]) -> list[Any]:
        """Convert a feed, make one call, give the outputs in order."""
        names = list(output_names) if output_names else [info.name for info in self.outputs]
        outputs = self.infer(as_values(self.inputs, feed), names)
        return [outputs[name] for name in names]


def model_metadata(facts: Mapping[str, Any]) -> ModelMetadata:
    """Give the metadata from what the inspection of the model found."""
    plain = {
        name: str(facts.get(name, "")) for name in ("producer_name", "graph_name", "domain", "description", "graph_description")
    }
    return ModelMetadata(**plain, version=int(facts.get("version", 0)), custom_metadata_map=dict(facts.get("custom", {})))


def check_names(inputs: Sequence[ValueInfo], feed: Mapping[str, Any]) -> None:
    """Raise ValueError as ONNX Runtime's Python layer does for inputs that are missing."""
    given = list(feed.keys())
    missing = [info.name for info in inputs if info.name not in given and not info.is_optional]
    if missing:
        raise ValueError(f"Required inputs ({missing}) are missing from input feed ({given}).")


def check_values(
    inputs: Sequence[ValueInfo], outputs: Sequence[ValueInfo], names: Sequence[str], values: Mapping[str, Any]
) -> None:
    """Raise InvalidArgument for what ONNX Runtime would refuse before it runs, so that nobody is paid to say so."""
    known = {info.name: info for info in inputs}
    for name, value in values.items():
        info = known.get(name)
        if info is None:
            raise runtime_error("InvalidArgument", f"Invalid input name: {name}")
        if isinstance(value, np.ndarray):
            _check_array(info, value)
    wanted = {info.name for info in outputs}
    for name in names:
        if name not in wanted:
            raise runtime_error("InvalidArgument", f"Invalid output name:{name}")


def _check_array(info: ValueInfo, value: "np.ndarray[Any, Any]") -> None:
    if not info.is_tensor:
        number = 3 if info.type.startswith("seq(") else 4
        raise runtime_error(
            "InvalidArgument", f"input with name: '{info.name}' expected to be of type: {number} but received a tensor"
        )
    actual = _TENSOR_NAMES.get(value.dtype.name, value.dtype.name)
    expected = info.type.removeprefix("optional(").rstrip(")") + ")"
    if f"tensor({actual})" != expected:
        raise runtime_error("InvalidArgument", f"Unexpected input data type. Actual: (tensor({actual})) , expected: ({expected})")
    if not info.shape and value.ndim == 0:
        return
    if info.shape and len(info.shape) != value.ndim:
        raise runtime_error(
            "InvalidArgument",
            f"Invalid rank for input: {info.name} Got: {value.ndim} Expected: {len(info.shape)}"
            " Please fix either the inputs/outputs or the model.",
        )
    wrong = [
        f" index: {index} Got: {got} Expected: {axis}\n"
        for index, (got, axis) in enumerate(zip(value.shape, info.shape, strict=False))
        if isinstance(axis, int) and axis >= 0 and axis != got
    ]
    if wrong:
        raise runtime_error(
            "InvalidArgument",
            f"Got invalid dimensions for input: {info.name} for the following indices\n{''.join(wrong)}"
            " Please fix either the inputs/outputs or the model.",
        )


def runtime_error(name: str, message: str) -> Exception:
    """Give ONNX Runtime's own exception of this class name; its status prefix is added where the text lacks it."""
    if name in _PLAIN:
        return _PLAIN[name](message)
    code, label = _CODES.get(name, (1, "FAIL"))
    text = message if message.startswith("[ONNXRuntimeError]") else f"[ONNXRuntimeError] : {code} : {label} : {message}"
    # Before the import: ONNX Runtime's Linux wheels phone home unless this is set first.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError:
        return RuntimeError(text)
    cls = getattr(state, name, None) or state.Fail
    return cls(text)  # type: ignore[no-any-return]


def translated(error: P2PNodeError) -> Exception:
    """Give the exception that ONNX Runtime would have raised; errors of the network stay as they are.

    A worker sends ONNX Runtime's own error as `ClassName: message`.
    """
    detail = getattr(error, "detail", "")
    match = re.match(r"(?:onnxruntime\.[\w.]*\.)?([A-Z]\w+): (.*)", detail, re.DOTALL)
    if match and (match[1] in _CODES or match[1] in _PLAIN):
        return runtime_error(match[1], match[2])
    reason = getattr(error, "reason", None)
    if isinstance(error, WorkError) or reason in _CLASS_OF:
        name = _CLASS_OF.get(reason) if isinstance(reason, Reason) else None
        if name is not None:
            return runtime_error(name, detail or str(error))
    return error
