"""Splitting, checking and refusing models, as the confined child does it."""

import contextlib
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from p2pnode.errors import WorkError
from p2pnode.reasons import Reason
from p2pnode.work import inspection
from p2pnode.work.protobuf_depth import subgraph_depth

LIMITS = {"graph_bytes_max": 1 << 24, "nodes_max": 1000, "opset_max": 26}


def split(model: Any, external: dict[str, bytes] | None = None) -> tuple[dict[str, Any], bytes]:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    places, tail = {}, b""
    for location, content in (external or {}).items():
        places[location] = (len(data) + len(tail), len(content))
        tail += content
    return inspection.split({"graph_size": len(data), "external": places, **LIMITS}, data + tail)


def inspect(model: Any, **changes: Any) -> dict[str, Any]:
    result, output = split(model)
    arguments = {"blob_size": result["blob_size"], "initializers": result["initializers"], **LIMITS, **changes}
    facts, nothing = inspection.inspect(arguments, output[: result["graph_size"]])
    assert nothing == b""
    return facts


def refusal(function: Any, *arguments: Any, **more: Any) -> Reason:
    with pytest.raises(WorkError) as caught:
        function(*arguments, **more)
    return caught.value.reason


def test_split_moves_large_initialisers_to_an_aligned_blob_and_join_puts_them_back(onnx_models: Any) -> None:
    rng = np.random.default_rng(1)
    big, other, small = (rng.random(size, np.float32) for size in (300, 257, 10))
    model = onnx_models.model_of(
        [helper.make_node("Concat", ["big", "other", "small", "x"], ["y"], axis=0)],
        [onnx_models.value("x", 1, [1])],
        [onnx_models.value("y", 1, [568])],
        [numpy_helper.from_array(array, name) for name, array in (("big", big), ("other", other), ("small", small))],
    )
    result, output = split(model)
    assert [entry[0] for entry in result["initializers"]] == ["big", "other"]
    for name, dtype, shape, offset, size in result["initializers"]:
        assert offset % 64 == 0
        start = result["blob_offset"] + offset
        assert output[start : start + size] == {"big": big, "other": other}[name].tobytes()
        assert (dtype, shape) == (TensorProto.FLOAT, [size // 4])
    assert result["blob_offset"] % 64 == 0
    skeleton = onnx.ModelProto.FromString(output[: result["graph_size"]])
    assert skeleton.graph.initializer[2].raw_data == small.tobytes()
    _, whole = inspection.join({"graph_size": result["graph_size"], "blob_offset": result["blob_offset"]}, output)
    session = onnxruntime.InferenceSession(whole, providers=["CPUExecutionProvider"])
    x = np.ones(1, np.float32)
    assert np.array_equal(session.run(None, {"x": x})[0], np.concatenate([big, other, small, x]))


def test_typed_data_fields_are_split_like_raw_ones(onnx_models: Any) -> None:
    numbers = np.arange(600, dtype=np.float32)
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [600], numbers.tolist())
    assert not tensor.HasField("raw_data")
    model = onnx_models.model_of(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [onnx_models.value("x", 1, [600])],
        [onnx_models.value("y", 1, [600])],
        [tensor],
    )
    result, output = split(model)
    start = result["blob_offset"]
    assert output[start : start + 2400] == numbers.tobytes()


def test_external_data_comes_in_and_its_absence_is_told(onnx_models: Any) -> None:
    model = onnx_models.linear()
    raw = model.graph.initializer[0].raw_data
    inspection._make_external(model.graph.initializer[0], 128, len(raw))
    model.graph.initializer[0].external_data[0].value = "data/w.bin"
    assert split(model)[0]["missing"] == ["data/w.bin"]
    result, output = split(model, {"data/w.bin": b"\0" * 128 + raw})
    assert output[result["blob_offset"] :][: len(raw)] == raw
    assert refusal(split, model, {"data/w.bin": b"\0" * 100}) is Reason.EXTERNAL_DATA


def test_facts_of_a_plain_model(onnx_models: Any) -> None:
    facts = inspect(onnx_models.linear())
    assert facts["inputs"] == [{"name": "x", "kind": "tensor", "dtype": 1, "type": "tensor(float)", "shape": ["N", 32]}]
    assert facts["outputs"][0]["shape"] == ["N", 32]
    assert facts["operators"] == {"MatMul": 1}
    assert facts["opsets"][""] == 17
    assert facts["may_batch"]
    assert not facts["control_flow"]
    assert facts["random_operators"] == []


def test_facts_agree_with_onnxruntime(onnx_models: Any) -> None:
    model = onnx_models.model_of(
        [helper.make_node("SequenceConstruct", ["a", "b"], ["s"]), helper.make_node("Shape", ["a"], ["n"])],
        [onnx_models.value("a", 1, ["N", 3]), onnx_models.value("b", 1, [None, 3])],
        [helper.make_tensor_sequence_value_info("s", 1, None), onnx_models.value("n", 7, [2])],
    )
    facts = inspect(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for ours, theirs in zip(facts["inputs"] + facts["outputs"], session.get_inputs() + session.get_outputs(), strict=True):
        assert (ours["name"], ours["type"]) == (theirs.name, theirs.type)
        if ours["kind"] == "tensor":
            assert ours["shape"] == theirs.shape
    assert not facts["may_batch"]


def test_an_initialiser_that_is_also_an_input_is_no_input(onnx_models: Any) -> None:
    model = onnx_models.linear()
    model.graph.input.append(onnx_models.value("w", 1, [32, 32]))
    assert [entry["name"] for entry in inspect(model)["inputs"]] == ["x"]


@pytest.mark.parametrize("operator", ["RandomNormalLike", "RandomUniformLike", "Bernoulli"])
def test_random_operators_are_found(onnx_models: Any, operator: str) -> None:
    model = onnx_models.model_of(
        [helper.make_node(operator, ["x"], ["y"])], [onnx_models.value("x", 1, ["N"])], [onnx_models.value("y", 1, ["N"])]
    )
    facts = inspect(model)
    assert facts["random_operators"] == [operator]
    assert not facts["may_batch"]


@pytest.mark.parametrize(("training", "random"), [(True, True), (False, False), (None, False)])
def test_dropout_is_random_only_in_training(onnx_models: Any, training: bool | None, random: bool) -> None:
    constants = [numpy_helper.from_array(np.float32(0.5), "ratio")]
    names = ["x", "ratio"]
    if training is not None:
        constants.append(numpy_helper.from_array(np.bool_(training), "training"))
        names.append("training")
    model = onnx_models.model_of(
        [helper.make_node("Dropout", names, ["y"])], [onnx_models.value("x", 1, [4])], [onnx_models.value("y", 1, [4])], constants
    )
    assert bool(inspect(model)["random_operators"]) is random


def test_control_flow_is_found(onnx_models: Any) -> None:
    assert inspect(onnx_models.nested_if(3))["control_flow"]


@pytest.mark.parametrize("data", [b"", b"hello, this is no model", b"\x00" * 100, b"\xff" * 64])
def test_what_is_not_onnx(data: bytes) -> None:
    assert refusal(split, data) is Reason.NOT_ONNX


def test_nested_subgraphs_beyond_the_limit(onnx_models: Any) -> None:
    for depth in (17, 40, 3000):
        assert refusal(split, onnx_models.nested_if(depth)) is Reason.TOO_DEEP
    assert subgraph_depth(onnx_models.nested_if(9), 16) == 9
    assert subgraph_depth(onnx_models.linear().SerializeToString(), 16) == 0


@pytest.mark.parametrize("version", [0, -1, 27, 10**6])
def test_operator_sets_out_of_range(onnx_models: Any, version: int) -> None:
    model = onnx_models.linear()
    model.opset_import[0].version = version
    assert refusal(inspect, model) is Reason.OPSET


@pytest.mark.parametrize(("domain", "operator"), [("com.example", "Steal"), ("pkg.torch", "Add"), ("com.microsoft", "EPContext")])
def test_operators_from_elsewhere(onnx_models: Any, domain: str, operator: str) -> None:
    model = onnx_models.linear()
    model.opset_import.append(helper.make_opsetid(domain, 1))
    model.graph.node[0].domain, model.graph.node[0].op_type = domain, operator
    assert refusal(inspect, model) is Reason.CUSTOM_OPERATOR


def test_a_function_of_the_model_itself_is_no_custom_operator(onnx_models: Any) -> None:
    function = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    model = onnx_models.double()
    model.graph.node[0].CopyFrom(helper.make_node("Twice", ["x"], ["y"], domain="mine"))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.functions.append(function)
    assert inspect(model)["operators"] == {"Add": 1}


def test_functions_that_stand_for_too_many_nodes(onnx_models: Any) -> None:
    model = onnx_models.double()
    model.opset_import.append(helper.make_opsetid("mine", 1))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    for level in range(12):
        inner = ("Add", "") if not level else (f"F{level - 1}", "mine")
        nodes = [helper.make_node(inner[0], ["a", "a"] if not level else ["a"], ["b"], domain=inner[1]) for _ in range(10)]
        for number, node in enumerate(nodes):
            node.output[0] = "b" if number == 9 else f"t{number}"
        model.functions.append(helper.make_function("mine", f"F{level}", ["a"], ["b"], nodes, opsets))
    model.graph.node[0].CopyFrom(helper.make_node("F11", ["x"], ["y"], domain="mine"))
    assert refusal(inspect, model) is Reason.TOO_MANY_ITEMS
    model.functions[0].node[0].op_type, model.functions[0].node[0].domain = "F11", "mine"
    assert refusal(inspect, model) is Reason.TOO_DEEP


def test_too_many_nodes(onnx_models: Any) -> None:
    assert refusal(inspect, onnx_models.linear(), nodes_max=0) is Reason.TOO_MANY_ITEMS


def test_a_graph_that_is_too_large(onnx_models: Any) -> None:
    assert refusal(inspect, onnx_models.linear(), graph_bytes_max=10) is Reason.MODEL_TOO_LARGE


@pytest.mark.parametrize("location", ["/etc/passwd", "../weights.bin", "other.bin", "_ORT_MEM_ADDR_"])
def test_a_skeleton_with_data_outside_its_blob(onnx_models: Any, location: str) -> None:
    result, output = split(onnx_models.linear())
    skeleton = onnx.ModelProto.FromString(output[: result["graph_size"]])
    skeleton.graph.initializer[0].external_data[0].value = location
    arguments = {"blob_size": result["blob_size"], "initializers": result["initializers"], **LIMITS}
    assert refusal(inspection.inspect, arguments, skeleton.SerializeToString()) is Reason.EXTERNAL_DATA


@pytest.mark.parametrize("change", [{"blob_size": 64}, {"initializers": []}, {"initializers": [("w", 1, [32, 32], 64, 4096)]}])
def test_a_manifest_that_contradicts_the_graph(onnx_models: Any, change: dict[str, Any]) -> None:
    assert refusal(inspect, onnx_models.linear(), **change) is Reason.EXTERNAL_DATA


@pytest.mark.parametrize("dims", [[33, 32], [2**62], [2**62, 2**62], [-1], [1] * 40, [0]])
def test_initialisers_that_lie_about_their_shape(onnx_models: Any, dims: list[int]) -> None:
    model = onnx_models.linear()
    tensor = model.graph.initializer[0]
    del tensor.dims[:]
    tensor.dims.extend(dims)
    assert refusal(split, model) is Reason.INITIALIZER_SHAPE
    arguments = {"blob_size": 0, "initializers": [], **LIMITS}
    assert refusal(inspection.inspect, arguments, model.SerializeToString()) is Reason.INITIALIZER_SHAPE


def test_a_constant_that_lies_about_its_shape(onnx_models: Any) -> None:
    model = onnx_models.double()
    tensor = TensorProto(data_type=1, dims=[2**40], raw_data=b"1234")
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    assert refusal(split, model) is Reason.INITIALIZER_SHAPE


def test_a_sparse_initialiser_that_would_explode(onnx_models: Any) -> None:
    model = onnx_models.double()
    values = TensorProto(name="s", data_type=1, dims=[1], raw_data=b"1234")
    indices = TensorProto(data_type=7, dims=[1], raw_data=b"12345678")
    model.graph.sparse_initializer.add(values=values, indices=indices, dims=[2**50])
    assert refusal(inspect, model) is Reason.INITIALIZER_SHAPE


@pytest.mark.parametrize("node", [("NoSuchOperator", ["x"]), ("Add", ["x", "missing"]), ("Add", ["x"])])
def test_the_checker_has_a_word(onnx_models: Any, node: tuple[str, list[str]]) -> None:
    model = onnx_models.double()
    model.graph.node[0].CopyFrom(helper.make_node(node[0], node[1], ["y"]))
    assert refusal(inspect, model) is Reason.BAD_MODEL


def test_sub_byte_and_text_tensors_are_measured(onnx_models: Any) -> None:
    texts = helper.make_tensor("t", TensorProto.STRING, [2], [b"a", b"b"])
    fours = TensorProto(name="f", data_type=TensorProto.INT4, dims=[3], raw_data=b"\x21\x03")
    model = onnx_models.double()
    model.graph.initializer.extend([texts, fours])
    split(model)
    model.graph.initializer[1].raw_data = b"\x21\x03\x04"
    assert refusal(split, model) is Reason.INITIALIZER_SHAPE


@pytest.mark.slow
def test_the_standard_s_own_test_models_pass() -> None:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [case for case in collect_testcases(None) if case.model is not None]
    tried = 0
    for case in cases[::7]:
        opsets = case.model.opset_import
        if any(entry.version > LIMITS["opset_max"] or entry.domain not in inspection.ALLOWED_DOMAINS for entry in opsets):
            continue
        tried += 1
        result, output = split(case.model)
        graph = output[: result["graph_size"]]
        facts, _ = inspection.inspect({"blob_size": 1 << 30, "initializers": None, **LIMITS}, graph)
        names = [entry["name"] for entry in facts["inputs"]]
        shapes = {name: array.shape for name, array in zip(names, case.data_sets[0][0], strict=False) if hasattr(array, "shape")}
        assert inspection.cost({"shapes": shapes}, graph)[0]["operations"] >= 1, case.name
    assert tried > 100


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_models_only_ever_raise_work_errors(data: st.DataObject) -> None:
    whole = bytearray(_FUZZED)
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(1, len(whole)))])
    for task, arguments in (
        (inspection.split, {"graph_size": len(cut), **LIMITS}),
        (inspection.inspect, {"blob_size": 64, "initializers": None, **LIMITS}),
    ):
        with contextlib.suppress(WorkError):
            task(arguments, cut)


def _fuzzed() -> bytes:
    small = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Relu", ["t"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 2])],
        [helper.make_tensor_value_info("y", 1, ["N", 2])],
        [small],
    )
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())


_FUZZED = _fuzzed()
