"""Feeds: converted as ONNX Runtime converts them, refused with its words."""

import numpy as np
import pytest

from p2pnode.errors import WorkError
from p2pnode.jobs.feeds import ValueInfo, as_value, as_values, value_info

FLOAT = ValueInfo("x", "tensor(float)", (None,))


class Fact:
    def __init__(self, name, dtype, shape):
        self.name, self.dtype, self.shape = name, dtype, shape


@pytest.mark.parametrize(
    ("kind", "raw", "dtype", "expected"),
    [
        ("tensor(float)", [1, 2], np.float32, [1.0, 2.0]),
        ("tensor(float)", [np.float32(1), np.array(2.0)], np.float32, [1.0, 2.0]),
        ("tensor(int64)", [1.5, 2], np.int64, [1, 2]),
        ("tensor(float16)", [1.5], np.float16, [1.5]),
        ("tensor(bool)", [True, False], np.bool_, [True, False]),
        ("tensor(string)", ["a", "bc"], np.object_, ["a", "bc"]),
        ("tensor(string)", [1, 2], np.object_, ["1", "2"]),
        ("optional(tensor(float))", [1], np.float32, [1.0]),
        ("tensor(int64)", [[1, 2], [3, 4]], np.int64, [[1, 2], [3, 4]]),
    ],
)
def test_lists_take_the_models_dtype(kind, raw, dtype, expected):
    value = as_value(ValueInfo("x", kind, (None,)), raw)
    assert value.dtype == dtype
    assert value.tolist() == expected


def test_arrays_keep_their_dtype_for_the_runtime_to_judge():
    assert as_value(FLOAT, np.array([1.0])).dtype == np.float64


@pytest.mark.parametrize("raw", [np.arange(6, dtype=np.float32)[::2], np.arange(3, dtype=">f4"), np.ones((2, 3), np.float32).T])
def test_arrays_become_contiguous_and_native(raw):
    value = as_value(FLOAT, raw)
    assert value.flags.c_contiguous
    assert value.dtype.isnative
    assert np.array_equal(value, raw)


@pytest.mark.parametrize("raw", [np.float32(3), 3.0, 3, True])
def test_scalars_become_zero_rank_arrays(raw):
    assert as_value(ValueInfo("x", "tensor(float)"), raw).shape == ()


def test_text_arrays_become_objects():
    assert as_value(ValueInfo("x", "tensor(string)"), np.array(["a", "bc"])).tolist() == ["a", "bc"]
    assert as_value(ValueInfo("x", "tensor(string)"), np.array([1, "bc"], object)).tolist() == ["1", "bc"]


def test_sequences_keep_their_members():
    info = ValueInfo("x", "seq(tensor(float))")
    value = as_value(info, [np.zeros(2, np.float32), np.float32(1)])
    assert [item.shape for item in value] == [(2,), ()]
    assert as_value(info, []) == []
    assert as_value(info, None) is None


@pytest.mark.parametrize(
    ("info", "raw", "message"),
    [
        (FLOAT, ["a"], "RuntimeError: Could not create tensor from given input list"),
        (FLOAT, [[1], [1, 2]], "RuntimeError: Could not create tensor from given input list"),
        (FLOAT, (1, 2), "RuntimeError: Input must be a list of dictionaries or a single numpy array for input 'x'."),
        (FLOAT, "abc", "RuntimeError: Input must be a list of dictionaries or a single numpy array for input 'x'."),
        (ValueInfo("x", "seq(tensor(float))"), [[1.0]], "RuntimeError: CreateSequenceOfTensors: Input is not a tensor"),
    ],
)
def test_refused_in_the_runtimes_words(info, raw, message):
    with pytest.raises(WorkError) as caught:
        as_value(info, raw)
    assert caught.value.detail == message


def test_unknown_names_pass_on_to_the_runtime():
    assert as_values([FLOAT], {"z": np.zeros(1)}).keys() == {"z"}


def test_descriptions_come_from_numbers_or_texts():
    assert value_info(Fact("x", 7, ("N", 3))) == ValueInfo("x", "tensor(int64)", ("N", 3))
    assert value_info(Fact("x", "float", None)) == ValueInfo("x", "tensor(float)", ())
