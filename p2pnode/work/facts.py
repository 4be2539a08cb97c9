"""What is known about a model after it was inspected, in plain values: this module never imports onnx.

The raw form is the dictionary that `inspection.inspect` returns through the confined child; it is not trusted to be
well-formed (the child had a stranger's bytes in it), so `parse_facts` checks every field.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from p2pnode.errors import WorkError
from p2pnode.reasons import Reason
from p2pnode.wire.messages.work import ValueHeader

KINDS: Final = ("tensor", "sequence", "map", "optional", "sparse")
TENSOR_KIND: Final = 0
EMPTY_KIND: Final = 3
_VALUES_MAX: Final = 4096
_TEXT_MAX: Final = 512

Dimension = int | str | None
Shapes = Mapping[str, tuple[int, ...]]
Counter = Callable[[Shapes], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class ValueFact:
    """One input or output of a model.

    kind: one of KINDS. dtype: ONNX TensorProto.DataType of its tensors, 0 if unknown. type: as ONNX Runtime writes it, such as
    `tensor(float)`. shape: a size, a symbol or None per dimension; None when not even the rank is known.
    """

    name: str
    kind: str
    dtype: int
    type: str
    shape: tuple[Dimension, ...] | None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a provider needs to know to quote, admit and run a model.

    opsets: domain -> version ("" is ai.onnx). operators: `domain::type` -> count, subgraphs included. random_operators: True
    when the same input may give another output. batchable: calls may be joined along dimension 0, as measured, not assumed;
    batch_exact: and then each output has the very bits of a call run alone. seconds_per_call: the first measured run
    (0.0 if none could be made).
    """

    model_id: bytes
    name: str
    inputs: tuple[ValueFact, ...]
    outputs: tuple[ValueFact, ...]
    opsets: Mapping[str, int]
    operators: Mapping[str, int]
    random_operator_names: tuple[str, ...]
    control_flow: bool
    size_bytes: int
    may_batch: bool
    metadata: Mapping[str, Any]
    counter: Counter = field(repr=False, compare=False)
    batchable: bool = False
    batch_exact: bool = False
    seconds_per_call: float = 0.0

    @property
    def random_operators(self) -> bool:
        """Whether the model draws random numbers, so that results cannot be compared."""
        return bool(self.random_operator_names)

    async def operations(self, shapes: Shapes) -> int:
        """Count the operations of one call at these input shapes (see `graph_cost`); runs in a confined child, cached."""
        return await self.counter(shapes)

    def fault(self, headers: Sequence[ValueHeader], outputs: Sequence[str]) -> tuple[Reason, str] | None:
        """Say what is wrong with a call's inputs and wanted outputs, or None. Pure; a few microseconds."""
        given = {header.name: header for header in headers}
        if len(given) != len(headers):
            return Reason.UNKNOWN_INPUT, "an input is given twice"
        for fact in self.inputs:
            header = given.pop(fact.name, None)
            if header is None:
                if fact.kind != "optional":
                    return Reason.MISSING_INPUT, f"input {fact.name!r} is missing"
                continue
            problem = _mismatch(fact, header)
            if problem is not None:
                return problem
        if given:
            return Reason.UNKNOWN_INPUT, f"the model has no input {next(iter(given))!r}"
        known = {fact.name for fact in self.outputs}
        for name in outputs:
            if name not in known:
                return Reason.UNKNOWN_OUTPUT, f"the model has no output {name!r}"
        return None


def _mismatch(fact: ValueFact, header: ValueHeader) -> tuple[Reason, str] | None:
    if fact.kind != "tensor":
        return None
    if header.kind != TENSOR_KIND:
        return Reason.WRONG_DTYPE, f"input {fact.name!r} must be a {fact.type}"
    if fact.dtype and header.dtype != fact.dtype:
        return Reason.WRONG_DTYPE, f"input {fact.name!r} must be a {fact.type}, not dtype {header.dtype}"
    if not fact.shape:
        return None  # Like ONNX Runtime, which lets a declared scalar be fed with any shape.
    if len(header.shape) != len(fact.shape):
        return Reason.WRONG_SHAPE, f"input {fact.name!r} must have {len(fact.shape)} dimensions, not {len(header.shape)}"
    for wanted, actual in zip(fact.shape, header.shape, strict=True):
        if isinstance(wanted, int) and wanted != actual:
            return Reason.WRONG_SHAPE, f"input {fact.name!r} must have shape {list(fact.shape)}, not {list(header.shape)}"
    return None


def parse_facts(model_id: bytes, name: str, size_bytes: int, raw: Mapping[str, Any], counter: Counter) -> ModelFacts:
    """Give facts from a confined child's answer. Raises WorkError(BAD_MODEL) when that answer is malformed."""
    try:
        return ModelFacts(
            model_id=model_id,
            name=name,
            inputs=_values(raw["inputs"]),
            outputs=_values(raw["outputs"]),
            opsets={_text(domain): int(version) for domain, version in raw["opsets"].items()},
            operators={_text(operator): int(count) for operator, count in raw["operators"].items()},
            random_operator_names=tuple(_text(operator) for operator in raw["random_operators"]),
            control_flow=bool(raw["control_flow"]),
            size_bytes=size_bytes,
            may_batch=bool(raw["may_batch"]),
            metadata=_metadata(raw["metadata"]),
            counter=counter,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorkError(Reason.BAD_MODEL, f"its inspection gave no sound answer ({error})") from error


def _metadata(raw: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {
        name: str(raw[name]) for name in ("producer_name", "graph_name", "domain", "description", "graph_description")
    }
    plain["version"] = int(raw["version"])
    plain["custom"] = {str(key): str(value) for key, value in raw["custom"].items()}
    return plain


def _values(raw: Sequence[Mapping[str, Any]]) -> tuple[ValueFact, ...]:
    if len(raw) > _VALUES_MAX:
        raise ValueError(f"more than {_VALUES_MAX} values")
    return tuple(_value(item) for item in raw)


def _value(raw: Mapping[str, Any]) -> ValueFact:
    if raw["kind"] not in KINDS:
        raise ValueError("unknown kind of value")
    shape = None if raw["shape"] is None else tuple(_dimension(dimension) for dimension in raw["shape"])
    return ValueFact(_text(raw["name"]), str(raw["kind"]), int(raw["dtype"]), _text(raw["type"]), shape)


def _dimension(raw: object) -> Dimension:
    if raw is None or (isinstance(raw, int) and raw >= 0):
        return raw
    return _text(raw)


def _text(raw: object) -> str:
    if not isinstance(raw, str) or len(raw) > _TEXT_MAX:
        raise ValueError("not a short text")
    return raw
