"""The shapes of a call's inputs, as they are quoted: those of the values, rounded up, or covering several calls."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from p2pnode.jobs.feeds import ValueInfo
from p2pnode.wire.messages.market import InputShape

Shapes = tuple[InputShape, ...]
# A symbolic dimension is quoted at least this large, so that sequences that grow by one need few quotes.
_GROWN_DIMENSION = 16
_GROWN_BYTES_MAX = 16 << 20


def input_shapes(values: Mapping[str, Any]) -> Shapes:
    """Give the shapes to quote for these values. A sequence counts as the largest of its members, as often as it has any."""
    shapes = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            members = [getattr(item, "size", 1) for item in value]
            shapes.append(InputShape(name=name, shape=(len(members), max(members, default=0))))
        elif isinstance(value, Mapping):
            shapes.append(InputShape(name=name, shape=(len(value),)))
        else:
            shapes.append(InputShape(name=name, shape=tuple(value.shape)))
    return tuple(shapes)


def grown_shapes(shapes: Shapes, inputs: Sequence[ValueInfo]) -> Shapes:
    """Give the shapes rounded up where the model leaves a dimension open, unless that would be very large."""
    known = {info.name: info for info in inputs}
    grown = []
    for item in shapes:
        info = known.get(item.name)
        declared = info.shape if info is not None and len(info.shape) == len(item.shape) else (1,) * len(item.shape)
        sizes = tuple(
            size if isinstance(axis, int) or size == 0 else max(_GROWN_DIMENSION, 1 << (size - 1).bit_length())
            for size, axis in zip(item.shape, declared, strict=True)
        )
        fits = prod(sizes) * 8 <= _GROWN_BYTES_MAX
        grown.append(InputShape(name=item.name, shape=sizes if fits else item.shape))
    return tuple(grown)


def larger_shapes(first: Shapes, second: Shapes) -> Shapes:
    """Give the shapes that cover both, input by input; where the number of axes differs the second's count."""
    sizes = {item.name: tuple(item.shape) for item in first}
    for item in second:
        old = sizes.get(item.name, ())
        if len(old) == len(item.shape):
            sizes[item.name] = tuple(max(a, b) for a, b in zip(old, item.shape, strict=True))
        else:
            sizes[item.name] = tuple(item.shape)
    return tuple(InputShape(name=name, shape=shape) for name, shape in sizes.items())
