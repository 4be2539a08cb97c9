"""The demo's fraud model: fraudurl's published gradient-boosted trees, written as an ONNX graph.

The package scores URLs in pure Python; the same 400 trees fit one `TreeEnsembleRegressor` (ai.onnx.ml 3), and its Platt
calibration fits Mul, Add and Sigmoid. Feature vectors are still made by the package, so both sides judge the same numbers.
"""

import json
from pathlib import Path
from typing import Any

FEATURES_INPUT = "features"
PROBABILITY_OUTPUT = "probability"
_MISSING_IS_NAN = 2
_MISSING_IS_ZERO = 1


def convert_fraud_model(source: Path, target: Path) -> None:
    """Write fraudurl's JSON model as ONNX. Raises ValueError if a tree uses a rule that the ONNX operator lacks.

    Input `features` float32 [n, features] (NaN: missing); output `probability` float32 [n, 1].
    """
    import onnx
    from onnx import TensorProto, helper

    model = json.loads(source.read_text(encoding="utf-8"))
    columns = len(model["features"])
    calibration = model["calibration"]
    if calibration["type"] != "platt":
        raise ValueError(f"this fraudurl release calibrates by {calibration['type']}, not by Platt's sigmoid")
    nodes = [
        helper.make_node(
            "TreeEnsembleRegressor",
            [FEATURES_INPUT],
            ["score"],
            domain="ai.onnx.ml",
            n_targets=1,
            aggregate_function="SUM",
            base_values=[float(model.get("init_score", 0.0))],
            **_ensemble(model["trees"]),
        ),
        helper.make_node("Mul", ["score", "slope"], ["scaled"]),
        helper.make_node("Add", ["scaled", "intercept"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], [PROBABILITY_OUTPUT]),
    ]
    graph = helper.make_graph(
        nodes,
        "fraudurl",
        [helper.make_tensor_value_info(FEATURES_INPUT, TensorProto.FLOAT, ["n", columns])],
        [helper.make_tensor_value_info(PROBABILITY_OUTPUT, TensorProto.FLOAT, ["n", 1])],
        [
            helper.make_tensor("slope", TensorProto.FLOAT, [1], [calibration["a"]]),
            helper.make_tensor("intercept", TensorProto.FLOAT, [1], [calibration["b"]]),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    converted = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(converted)
    onnx.save(converted, str(target))


def _ensemble(trees: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Give the operator's attributes. Inner nodes keep their numbers; leaf k of a tree with n inner nodes becomes n + k."""
    nodes: dict[str, list[Any]] = {
        name: []
        for name in (
            "nodes_treeids", "nodes_nodeids", "nodes_featureids", "nodes_values", "nodes_modes",
            "nodes_truenodeids", "nodes_falsenodeids", "nodes_missing_value_tracks_true",
            "target_treeids", "target_nodeids", "target_ids", "target_weights",
        )
    }  # fmt: skip

    def add(tree: int, node: int, feature: int, value: float, mode: str, true: int, false: int, missing: int) -> None:
        row = (tree, node, feature, value, mode, true, false, missing)
        for name, cell in zip(list(nodes)[:8], row, strict=True):
            nodes[name].append(cell)

    for number, tree in enumerate(trees):
        inner = len(tree["f"])
        for index in range(inner):
            true, false = (inner + ~child if child < 0 else child for child in (tree["l"][index], tree["r"][index]))
            threshold = tree["t"][index]
            add(number, index, tree["f"][index], _at_most(threshold), "BRANCH_LEQ", true, false, _missing_goes_true(tree, index))
        for index, weight in enumerate(tree["lv"]):
            add(number, inner + index, 0, 0.0, "LEAF", 0, 0, 0)
            nodes["target_treeids"].append(number)
            nodes["target_nodeids"].append(inner + index)
            nodes["target_ids"].append(0)
            nodes["target_weights"].append(weight)
    return nodes


def _at_most(threshold: float) -> float:
    """Give the largest float32 that is not above a float64 threshold, so that `value <= threshold` keeps its meaning."""
    import numpy as np

    nearest = np.float32(threshold)
    return float(np.nextafter(nearest, np.float32(-np.inf)) if float(nearest) > threshold else nearest)


def _missing_goes_true(tree: dict[str, Any], index: int) -> int:
    kind = tree["m"][index]
    if kind == _MISSING_IS_ZERO:
        raise ValueError("this fraudurl release treats zero as missing, which TreeEnsembleRegressor cannot say")
    return int(bool(tree["d"][index]) if kind == _MISSING_IS_NAN else tree["t"][index] >= 0.0)
