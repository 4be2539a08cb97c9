"""Two hundred single-node ONNX cases, drawn over every kind of input, give the same outputs over the network as locally."""

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import p2pnode

VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "onnx" / "node_cases_pass_ort_1.31.1.txt"
WANTED = 200


def _kind(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return f"sequence of {_kind(value[0]) if value else 'nothing'}"
    array = np.asarray(value)
    return f"{array.dtype}{' scalar' if array.ndim == 0 else ' empty' if array.size == 0 else ''}"


def _plain(value: Any) -> Any:
    from onnx import TensorProto, numpy_helper

    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, np.generic):  # what ONNX's cases hold in place of arrays of rank zero
        return np.asarray(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _draw() -> list[Any]:
    """Take cases round-robin over the kinds of (inputs, outputs), so that rare kinds are all in."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = {case.name: case for case in collect_testcases(None)}
    kinds: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for name in VECTORS.read_text().split():
        if name in cases and cases[name].data_sets:
            inputs, outputs = cases[name].data_sets[0]
            signature = [*sorted({_kind(_plain(v)) for v in inputs}), "->", *sorted({_kind(_plain(v)) for v in outputs})]
            kinds[tuple(signature)].append(cases[name])
    drawn: list[Any] = []
    depth = 0
    while len(drawn) < WANTED and depth < 200:
        for key in sorted(kinds):
            # Step through a kind with a stride so that its later cases are reached too.
            members = kinds[key]
            if depth < len(members) and len(drawn) < WANTED:
                drawn.append(members[(depth * 37) % len(members)] if len(members) > 37 else members[depth])
        depth += 1
    return drawn


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, list):
        return isinstance(ours, list) and len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if theirs is None or isinstance(theirs, dict):
        return bool(ours == theirs)
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if ours.dtype == object:
        return bool((ours == theirs).all())
    # Bit-equal, NaN included; the class of the two machines is the same here.
    return ours.tobytes() == theirs.tobytes() or bool(np.array_equal(ours, theirs, equal_nan=ours.dtype.kind in "fc"))


@pytest.mark.slow
def test_node_cases_give_the_same_outputs_over_the_network(client: Any) -> None:
    if not VECTORS.exists():
        pytest.skip("the conformance vectors are not beside this checkout")
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    wrong, ran = [], 0
    for case in _draw():
        model = case.model.SerializeToString()
        local = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feeds = {i.name: _plain(v) for i, v in zip(local.get_inputs(), case.data_sets[0][0], strict=False) if v is not None}
        expected = local.run(None, feeds)
        remote = p2pnode.InferenceSession(model, connection=client)
        try:
            got = remote.run(None, feeds)
        except Exception as error:  # every failure is listed, so that one bad kind does not hide the others
            wrong.append(f"{case.name}: {type(error).__name__}: {error}")
            continue
        finally:
            remote.close()
        ran += 1
        if len(got) != len(expected) or not all(map(_same, got, expected)):
            wrong.append(f"{case.name}: another output")
    assert not wrong, f"{len(wrong)} of {ran + len(wrong)} differ:\n" + "\n".join(wrong)
    assert ran == WANTED
