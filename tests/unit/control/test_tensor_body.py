"""Tensors in a control request come back as they were, and nonsense has a reason."""

import json
import struct

import numpy as np
import pytest

from p2pnode.control.tensor_body import pack, unpack
from p2pnode.errors import ProtocolViolation


def test_values_of_every_kind_come_back():
    values = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros((0, 4), dtype=np.int64),
        "scalar": np.array(3.5),
        "text": np.array(["ä", "b"], dtype=object),
    }
    head, back = unpack(pack({"model": "m"}, values))
    assert head == {"model": "m"}
    assert list(back) == list(values)
    for name, value in values.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert back[name].tolist() == value.tolist()


@pytest.mark.parametrize(
    "body",
    [b"", b"1234567", struct.pack("<II", 100, 0), struct.pack("<II", 2**31, 2**31), struct.pack("<II", 2, 0) + b"[]",
     struct.pack("<II", 1, 0) + b"{", pack({}, {"a": np.zeros(8)})[:-1]],
)  # fmt: skip
def test_nonsense_is_refused(body):
    with pytest.raises(ProtocolViolation):
        unpack(body)


def test_the_head_is_json():
    packed = pack({"x": [1, 2]}, {})
    size = struct.unpack("<II", packed[:8])[0]
    assert json.loads(packed[8 : 8 + size]) == {"x": [1, 2]}
