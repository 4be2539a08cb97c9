"""The drop-in beside ONNX Runtime itself: the same results, the same exception classes, the same texts.

The network is replaced by a session that runs the model with ONNX Runtime in this process, as a worker would, and sends its
errors as `ClassName: message`.
"""

import os

import numpy as np
import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper  # noqa: E402

from p2pnode.client import Connection, InferenceSession, patch_onnxruntime, terms_of  # noqa: E402
from p2pnode.dropin import NetworkSession, translated  # noqa: E402
from p2pnode.errors import ConfigError, Refused, TooSlow, WorkError  # noqa: E402
from p2pnode.jobs.feeds import ValueInfo  # noqa: E402
from p2pnode.reasons import Reason  # noqa: E402


class Backend:
    """Runs models here and counts the calls that would have been paid."""

    alive = True

    def __init__(self):
        self.calls = 0
        self.specs = []
        self.closed = 0

    def session(self, spec):
        self.specs.append(spec)
        own = onnxruntime.InferenceSession(spec.model, providers=["CPUExecutionProvider"])

        def infer(values, names):
            self.calls += 1
            try:
                return dict(zip(names, own.run(list(names), dict(values)), strict=True))
            except Exception as error:
                raise Refused(Reason.RUN_FAILED, f"{type(error).__name__}: {error}") from error

        def close():
            self.closed += 1

        inputs, outputs = (
            [ValueInfo(item.name, item.type, tuple(item.shape)) for item in items]
            for items in (own.get_inputs(), own.get_outputs())
        )
        meta = own.get_modelmeta()
        told = {"producer_name": meta.producer_name, "graph_name": meta.graph_name, "version": meta.version}
        return NetworkSession(inputs, outputs, told | {"custom": meta.custom_metadata_map}, infer, close)


def model(kind, shape, operator="Identity"):
    x, y = helper.make_tensor_value_info("x", kind, shape), helper.make_tensor_value_info("y", kind, shape)
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "graph", [x], [y])
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="tests")
    return built.SerializeToString()


def both(data, backend=None):
    own = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return own, InferenceSession(data, connection=Connection(backend or Backend()))


def outcome(session, *arguments):
    try:
        return [value.tolist() for value in session.run(*arguments)]
    except Exception as error:
        return type(error), str(error)


F, I = np.float32, np.int64  # noqa: E741
CASES = [
    (TensorProto.FLOAT, (None,), (None, {"x": [1, 2]})),
    (TensorProto.FLOAT, (None,), (["y"], {"x": np.ones(2, F)})),
    (TensorProto.FLOAT, (None,), ([], {"x": np.ones(2, F)})),
    (TensorProto.FLOAT, (None,), (None, {"x": (1, 2)})),
    (TensorProto.FLOAT, (None,), (None, {"x": np.ones(2)})),
    (TensorProto.FLOAT, (None,), (None, {"x": "abc"})),
    (TensorProto.FLOAT, (None,), (None, {"x": ["a", "b"]})),
    (TensorProto.FLOAT, (None,), (None, {"x": [[1], [1, 2]]})),
    (TensorProto.FLOAT, (None,), (None, {"x": np.zeros((2, 2), F)})),
    (TensorProto.FLOAT, (None,), (None, {"z": np.zeros(2, F)})),
    (TensorProto.FLOAT, (None,), (None, {})),
    (TensorProto.FLOAT, (None,), (None, {"x": np.zeros(2, F), "z": np.zeros(2, F)})),
    (TensorProto.FLOAT, (None,), (["q"], {"x": np.zeros(2, F)})),
    (TensorProto.FLOAT, (None,), (None, {"x": np.arange(6, dtype=F)[::2]})),
    (TensorProto.INT64, (2,), (None, {"x": [1, 2, 3]})),
    (TensorProto.INT64, (2, 3), (None, {"x": np.zeros((3, 2), I)})),
    (TensorProto.INT64, (None,), (None, {"x": [1.5, 2]})),
    (TensorProto.STRING, (None,), (None, {"x": ["a", "bc"]})),
    (TensorProto.STRING, (None,), (None, {"x": np.array(["a", "bc"])})),
    (TensorProto.STRING, (None,), (None, {"x": np.array([1, "bc"], object)})),
    (TensorProto.STRING, (None,), (None, {"x": np.zeros(2, F)})),
    (TensorProto.BOOL, (None,), (None, {"x": [True, False]})),
    (TensorProto.FLOAT16, (None,), (None, {"x": [1.5]})),
]


@pytest.mark.parametrize(("kind", "shape", "arguments"), CASES)
def test_results_and_errors_are_onnxruntimes(kind, shape, arguments):
    own, drop_in = both(model(kind, shape))
    assert outcome(drop_in, *arguments) == outcome(own, *arguments)


def test_what_the_runtime_would_refuse_is_not_paid_for():
    backend = Backend()
    _, drop_in = both(model(TensorProto.FLOAT, (None,)), backend)
    for feed in ({"x": np.ones(2)}, {"x": np.zeros((2, 2), F)}, {"x": np.ones(2, F), "z": np.ones(1, F)}):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            drop_in.run(None, feed)
    assert backend.calls == 0
    drop_in.run(None, {"x": np.ones(2, F)})
    assert backend.calls == 1


def test_scalars_are_taken_where_onnxruntime_wants_arrays():
    _, drop_in = both(model(TensorProto.FLOAT, ()))
    assert drop_in.run(None, {"x": np.float32(3)})[0] == 3


def test_sequences_and_their_errors():
    x = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None)
    y = helper.make_tensor_value_info("y", TensorProto.INT64, ())
    graph = helper.make_graph([helper.make_node("SequenceLength", ["x"], ["y"])], "g", [x], [y])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    own, drop_in = both(data)
    for feed in ([np.zeros(2, F), np.ones((1, 1), F)], [], [[1.0]], np.zeros((2, 2), F), [np.zeros(2)]):
        assert outcome(drop_in, None, {"x": feed}) == outcome(own, None, {"x": feed})
    assert drop_in.get_inputs()[0].type == "seq(tensor(float))"


def test_descriptions_look_like_onnxruntimes():
    own, drop_in = both(model(TensorProto.FLOAT, ("N", 3, None)))
    for mine, theirs in ((drop_in.get_inputs(), own.get_inputs()), (drop_in.get_outputs(), own.get_outputs())):
        assert [(item.name, item.type, item.shape) for item in mine] == [(item.name, item.type, item.shape) for item in theirs]
        assert str(mine[0]) == str(theirs[0])
    assert drop_in.get_modelmeta().producer_name == "tests"
    assert drop_in.get_modelmeta().custom_metadata_map == {}
    assert drop_in.get_providers() == own.get_providers()
    assert drop_in.get_provider_options() == own.get_provider_options()
    assert drop_in.get_overridable_initializers() == []
    assert isinstance(drop_in.get_session_options(), onnxruntime.SessionOptions)


def test_models_come_as_path_text_or_bytes(tmp_path):
    data = model(TensorProto.FLOAT, (None,))
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    for form in (path, str(path), data):
        session = InferenceSession(form, providers=["CPUExecutionProvider"], connection=Connection(Backend()))
        assert session.run(None, {"x": [1]})[0].tolist() == [1]


@pytest.mark.parametrize("form", ["missing.onnx", 5])
def test_what_cannot_be_loaded_is_refused_alike(form):
    def error_of(function):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the class and text are compared below
            function()
        return type(caught.value), str(caught.value)

    mine = error_of(lambda: InferenceSession(form, connection=Connection(Backend())))
    assert mine == error_of(lambda: onnxruntime.InferenceSession(form))


def test_binding_device_memory_is_refused_clearly():
    _, drop_in = both(model(TensorProto.FLOAT, (None,)))
    state = onnxruntime.capi.onnxruntime_pybind11_state
    for refused in (lambda: drop_in.run_with_iobinding(None), drop_in.io_binding, lambda: drop_in.run_with_ort_values(None, {})):
        with pytest.raises(state.NotImplemented, match=r"use run\(\)"):
            refused()


def test_run_async_hands_results_and_errors_to_the_callback():
    import threading

    _, drop_in = both(model(TensorProto.FLOAT, (None,)))
    seen, done = [], threading.Semaphore(0)

    def callback(results, user_data, error):
        seen.append((results, user_data, error))
        done.release()

    drop_in.run_async(None, {"x": [1]}, callback, "mine")
    assert done.acquire(timeout=5)
    drop_in.run_async(None, {"x": np.ones(2)}, callback, "mine")
    assert done.acquire(timeout=5)
    assert seen[0][0][0].tolist() == [1]
    assert seen[0][1:] == ("mine", "")
    assert seen[1][0] is None
    assert "Unexpected input data type" in seen[1][2]


def test_patching_serves_packages_that_look_the_class_up_and_ends():
    original = onnxruntime.InferenceSession
    backend = Backend()
    path_free = model(TensorProto.FLOAT, (None,))

    class Local(Backend):
        def session(self, spec):
            onnxruntime.InferenceSession, patched = original, onnxruntime.InferenceSession
            try:
                return backend.session(spec)
            finally:
                onnxruntime.InferenceSession = patched

    with patch_onnxruntime(Connection(Local()), max_price="0.25"):
        session = onnxruntime.InferenceSession(path_free, providers=["CPUExecutionProvider"])
        assert session.run(None, {"x": [2]})[0].tolist() == [2]
    assert onnxruntime.InferenceSession is original
    assert backend.calls == 1
    assert backend.specs[0].terms.max_price == 250_000
    assert session.run(None, {"x": [2]})[0].tolist() == [2]


def test_a_workers_error_comes_back_as_its_own_class():
    state = onnxruntime.capi.onnxruntime_pybind11_state
    error = translated(Refused(Reason.RUN_FAILED, "InvalidArgument: [ONNXRuntimeError] : 2 : INVALID_ARGUMENT : no"))
    assert type(error) is state.InvalidArgument
    assert str(error) == "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : no"
    assert type(translated(WorkError(Reason.NOT_ONNX, "no protobuf"))) is state.InvalidProtobuf
    assert type(translated(WorkError(Reason.WRONG_DTYPE, "RuntimeError: no"))) is RuntimeError


def test_the_networks_own_troubles_stay_what_they_are():
    for error in (Refused(Reason.PRICE, "too dear"), TooSlow("late")):
        assert translated(error) is error


def test_terms_take_human_units():
    terms = terms_of({"max_price": "0.25", "max_total": 7, "deadline_seconds": "1m30s", "deny": "node-a"})
    assert (terms.max_price, terms.max_total, terms.deadline_seconds, terms.deny) == (250_000, 7, 90.0, ("node-a",))
    with pytest.raises(ConfigError, match="no term called 'prize'"):
        terms_of({"prize": 1})
