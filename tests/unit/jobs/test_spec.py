"""Specifications: refused when they make no sense, stored and read again unchanged."""

import pytest

from p2pnode.errors import ConfigError
from p2pnode.jobs.spec import MapSpec, Terms, decode_map_spec


def test_a_map_spec_survives_storage():
    spec = MapSpec("m.onnx", "/d", "/o", ("y",), 7, Terms(max_total=5, deny=("node-a", "node-b"), providers=3))
    assert decode_map_spec(spec.encoded()) == spec


def test_equal_specs_have_equal_bytes():
    assert MapSpec("m", "d", "o").encoded() == MapSpec("m", "d", "o").encoded()
    assert MapSpec("m", "d", "o").encoded() != MapSpec("m", "d", "o", batch=2).encoded()


def test_a_term_of_a_later_version_is_ignored():
    text = MapSpec("m", "d", "o").encoded().replace(b'"priority"', b'"prestige"')
    assert decode_map_spec(text).terms.priority == 5


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"terms": 1}'])
def test_what_is_no_spec_is_refused(data):
    with pytest.raises(ConfigError):
        decode_map_spec(data)


@pytest.mark.parametrize(
    "values",
    [{"max_price": -1}, {"max_total": -1}, {"deadline_seconds": 0}, {"priority": 10}, {"priority": -1}, {"providers": -1}],
)
def test_terms_that_cannot_be_meant_are_refused(values):
    with pytest.raises(ConfigError):
        Terms(**values)
