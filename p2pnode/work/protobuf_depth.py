"""How deep the subgraphs of an encoded ONNX model are nested, found without decoding it and without recursion.

A model of a few kilobytes can nest `If` in `If` until a recursive decoder or checker runs out of stack. This walk follows only
the field numbers that lead from graph to node to attribute to graph, with a stack of its own.
Source: the protobuf encoding (tag = field << 3 | wire type) and the field numbers of onnx.proto3.
"""

from typing import Final

# Message kind -> {field number: kind of the message in it}. A model's graph is field 7, its functions field 25.
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _FUNCTION = range(5)
_CHILDREN: Final[dict[int, dict[int, int]]] = {
    _MODEL: {7: _GRAPH, 25: _FUNCTION},
    _GRAPH: {1: _NODE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {6: _GRAPH, 11: _GRAPH},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
}


def subgraph_depth(encoded: bytes, limit: int) -> int:
    """Give the deepest nesting of subgraphs, 0 for a model without any; limit + 1 as soon as it is passed.

    Bytes that are not protobuf end the walk of their message; the real decoder refuses them afterwards.
    """
    deepest = 0
    waiting = [(0, len(encoded), _MODEL, 0)]
    while waiting:
        position, end, kind, depth = waiting.pop()
        children = _CHILDREN[kind]
        while position < end:
            tag, position = _varint(encoded, position, end)
            wire_type = tag & 7
            if wire_type == 0:
                _, position = _varint(encoded, position, end)
            elif wire_type == 1:
                position += 8
            elif wire_type == 5:
                position += 4
            elif wire_type == 2:
                size, position = _varint(encoded, position, end)
                child = children.get(tag >> 3)
                if child is not None and position + size <= end:
                    child_depth = depth + (kind == _ATTRIBUTE)
                    deepest = max(deepest, child_depth)
                    if deepest > limit:
                        return limit + 1
                    waiting.append((position, position + size, child, child_depth))
                position += size
            else:
                break
    return deepest


def _varint(encoded: bytes, position: int, end: int) -> tuple[int, int]:
    """Give a base-128 number and the position behind it; (0, end) when it runs out of bytes or is too long."""
    value = shift = 0
    while position < end and shift < 64:
        byte = encoded[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return 0, end
