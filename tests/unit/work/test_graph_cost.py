"""Operations counted by hand against the formulas of `graph_cost`."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from p2pnode.work import inspection
from p2pnode.work.graph_cost import OPERATIONS_MAX, operations

FLOAT = TensorProto.FLOAT


def floats(name: str, *shape: int) -> Any:
    return numpy_helper.from_array(np.zeros(shape, np.float32), name)


def one(onnx_models: Any, node: Any, inputs: dict[str, Any], initializers: Any = (), dtype: int = FLOAT) -> Any:
    outputs = [onnx_models.value(name, dtype, None) for name in node.output if name]
    return onnx_models.model_of(
        [node], [onnx_models.value(n, FLOAT, shape) for n, shape in inputs.items()], outputs, initializers
    )


def node(kind: str, inputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), ["y"], **attributes)


CASES = [
    # 2 x out x K
    (helper.make_node("MatMul", ["x", "w"], ["y"]), {"x": ["N", 8]}, [floats("w", 8, 5)], {"x": (3, 8)}, 2 * 15 * 8),
    (node("MatMul", "x z"), {"x": [None] * 3, "z": [None] * 3}, [], {"x": (2, 3, 4), "z": (2, 4, 5)}, 240),
    (node("Gemm", "x w b"), {"x": ["N", 8]}, [floats("w", 8, 5), floats("b", 5)], {"x": (3, 8)}, 15 * 17),
    (helper.make_node("Gemm", ["x", "w"], ["y"], transA=1), {"x": [8, "N"]}, [floats("w", 8, 5)], {"x": (8, 3)}, 15 * 16),
    # 2 x out x filter: out 1 x 6 x 8 x 8, filter 3 x 3 x 3
    (node("Conv", "x w"), {"x": [1, 3, "H", "W"]}, [floats("w", 6, 3, 3, 3)], {"x": (1, 3, 10, 10)}, 2 * 384 * 27),
    # grouped: each filter sees one channel
    (node("Conv", "x w", group=6), {"x": [1, 6, "H", "W"]}, [floats("w", 6, 1, 3, 3)], {"x": (1, 6, 10, 10)}, 2 * 384 * 9),
    (helper.make_node("ConvTranspose", ["x", "w"], ["y"]), {"x": [1, 3, 4, 4]}, [floats("w", 3, 5, 2, 2)], {}, 2 * 48 * 20),
    (helper.make_node("Add", ["x", "x"], ["y"]), {"x": ["N", 4]}, [], {"x": (5, 4)}, 20),
    (helper.make_node("Softmax", ["x"], ["y"]), {"x": ["N", 4]}, [], {"x": (5, 4)}, 100),
    (helper.make_node("ReduceSum", ["x"], ["y"]), {"x": ["N", 4]}, [], {"x": (5, 4)}, 20),
    (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2]), {"x": [1, 1, 4, 4]}, [], {}, 9 * 4),
    (helper.make_node("Identity", ["x"], ["y"]), {"x": ["N", 1000]}, [], {"x": (5, 1000)}, 1),
    (helper.make_node("Einsum", ["x", "z"], ["y"], equation="bij,bjk->bik"), {"x": [2, 3, 4], "z": [2, 4, 5]}, [], {}, 2 * 120),
    # W 1 x 12 x 5, R 1 x 12 x 3, seven steps of two: 2 x 14 x 96 + 4 x 14 x 12
    (
        helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=3),
        {"x": ["T", "B", 5]}, [floats("w", 1, 12, 5), floats("r", 1, 12, 3)], {"x": (7, 2, 5)}, 2 * 14 * 96 + 4 * 14 * 12,
    ),
    (
        helper.make_node("GRU", ["x", "w", "r"], ["y"], hidden_size=3),
        {"x": ["T", "B", 5]}, [floats("w", 1, 9, 5), floats("r", 1, 9, 3)], {"x": (7, 2, 5)}, 2 * 14 * 72 + 4 * 14 * 9,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "inputs", "initializers", "shapes", "wanted"), CASES, ids=lambda each: getattr(each, "op_type", "")
)
def test_single_operators(onnx_models: Any, operator: Any, inputs: Any, initializers: Any, shapes: Any, wanted: int) -> None:
    assert operations(one(onnx_models, operator, inputs, initializers), shapes) == wanted


def test_attention_grows_with_the_square_of_the_length(onnx_models: Any) -> None:
    attention = node("MultiHeadAttention", "q k v", domain="com.microsoft", num_heads=2)
    model = one(onnx_models, attention, {name: ["B", "S", 8] for name in ("q", "k", "v")})
    short, long = (operations(model, dict.fromkeys(("q", "k", "v"), (1, size, 8))) for size in (16, 32))
    # 4 E(Q) T for the two products, 5 E(Q) T / head for the softmax.
    assert short == 4 * 128 * 16 + 5 * 128 * 16 // 4
    assert long == 4 * short


def test_trees_cost_by_depth_not_by_nodes(onnx_models: Any) -> None:
    def forest(trees: int, nodes: int) -> Any:
        ids = [tree for tree in range(trees) for _ in range(nodes)]
        return one(
            onnx_models,
            helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", nodes_treeids=ids),
            {"x": ["N", 3]},
        )

    assert operations(forest(10, 63), {"x": (4, 3)}) == 4 * 10 * (2 * 63).bit_length()


def test_a_loop_costs_its_body_times_its_trips(onnx_models: Any) -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["a", "x"], ["b"]), helper.make_node("Identity", ["cond"], ["out"])],
        "body",
        [onnx_models.value("i", 7, []), onnx_models.value("cond", 9, []), onnx_models.value("a", 1, None)],
        [onnx_models.value("out", 9, []), onnx_models.value("b", 1, None)],
    )
    trips = numpy_helper.from_array(np.int64(50), "trips")
    model = onnx_models.model_of(
        [helper.make_node("Loop", ["trips", "", "x"], ["y"], body=body)],
        [onnx_models.value("x", 1, ["N"])],
        [onnx_models.value("y", 1, None)],
        [trips],
    )
    assert operations(model, {"x": (6,)}) == 1 + 50 * (6 + 1)


def test_an_if_costs_its_dearer_branch(onnx_models: Any) -> None:
    then = helper.make_graph([helper.make_node("Relu", ["x"], ["t"])], "then", [], [onnx_models.value("t", 1, None)])
    other = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["e"])], "else", [], [onnx_models.value("e", 1, None)])
    model = onnx_models.model_of(
        [helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)],
        [onnx_models.value("c", 9, []), onnx_models.value("x", 1, ["N", 8])],
        [onnx_models.value("y", 1, None)],
        [floats("w", 8, 8)],
    )
    assert operations(model, {"x": (3, 8), "c": ()}) == 2 * 24 * 8


def test_a_scan_costs_its_body_per_step(onnx_models: Any) -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "x"], ["t"]), helper.make_node("Identity", ["t"], ["u"])],
        "body",
        [onnx_models.value("s", 1, None), onnx_models.value("x", 1, None)],
        [onnx_models.value("t", 1, None), onnx_models.value("u", 1, None)],
    )
    model = onnx_models.model_of(
        [helper.make_node("Scan", ["init", "xs"], ["last", "all"], body=body, num_scan_inputs=1)],
        [onnx_models.value("init", 1, [4]), onnx_models.value("xs", 1, ["T", 4])],
        [onnx_models.value("last", 1, None), onnx_models.value("all", 1, None)],
    )
    assert operations(model, {"init": (4,), "xs": (9, 4)}) == 1 + 9 * (4 + 1)


def test_functions_are_inlined(onnx_models: Any) -> None:
    function = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    model = onnx_models.double()
    model.graph.node[0].CopyFrom(helper.make_node("Twice", ["x"], ["y"], domain="mine"))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.functions.append(function)
    assert operations(model, {"x": (5, 4)}) == 20


def test_hiding_a_shape_does_not_make_work_free(onnx_models: Any) -> None:
    # The shape to reshape to is data, so nothing downstream is known; Exp still counts as its input does.
    model = onnx_models.model_of(
        [helper.make_node("Reshape", ["x", "shape"], ["r"]), helper.make_node("Exp", ["r"], ["y"])],
        [onnx_models.value("x", 1, ["N", 4]), onnx_models.value("shape", 7, [None])],
        [onnx_models.value("y", 1, None)],
    )
    assert operations(model, {"x": (100, 4), "shape": (3,)}) == 1 + 400


def test_old_shapes_written_in_the_file_do_not_count(onnx_models: Any) -> None:
    model = onnx_models.model_of(
        [helper.make_node("Relu", ["x"], ["t"]), helper.make_node("Relu", ["t"], ["y"])],
        [onnx_models.value("x", 1, ["N", 4])],
        [onnx_models.value("y", 1, [10, 4])],
    )
    model.graph.value_info.append(onnx_models.value("t", 1, [10, 4]))
    assert operations(model, {"x": (2, 4)}) == 16


def test_absurd_shapes_stay_bounded_and_nothing_costs_nothing(onnx_models: Any) -> None:
    assert operations(onnx_models.double(), {"x": (2**40, 4)}) == 2**42
    assert operations(onnx_models.linear(), {"x": (2**61, 32)}) == OPERATIONS_MAX
    assert operations(onnx_models.double(), {"x": (0, 4)}) == 1


def test_the_task_gives_the_same_for_a_skeleton(onnx_models: Any) -> None:
    whole = onnx_models.linear().SerializeToString()
    result, output = inspection.split({"graph_size": len(whole), "graph_bytes_max": 1 << 20}, whole)
    assert result["initializers"]
    cost, _ = inspection.cost({"shapes": {"x": [3, 32]}}, output[: result["graph_size"]])
    assert cost == {"operations": 2 * 96 * 32}
