"""Which calls are joined, when, and that joining and parting lose nothing."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.wire import tensors
from p2pnode.wire.messages.work import ValueHeader
from p2pnode.work import batching
from p2pnode.work.batching import Batcher
from p2pnode.work.facts import ModelFacts, ValueFact
from p2pnode.work.settings import WorkSettings

SETTINGS = WorkSettings(batch_size_max=4, batch_delay_seconds=0.01, batch_bytes_max=1000)


def encoded(values: dict[str, Any]) -> tuple[tuple[ValueHeader, ...], bytes]:
    headers, chunks, _ = tensors.encode_values(values)
    return headers, b"".join(memoryview(chunk).cast("B") for chunk in chunks)


def key_of(values: dict[str, Any], outputs: tuple[str, ...] = (), tolerance: bool = False) -> Any:
    return batching.batch_key(encoded(values)[0], outputs, tolerance)


def test_only_calls_that_agree_in_everything_but_rows_share_a_key() -> None:
    base = {"x": np.zeros((2, 3), np.float32)}
    assert key_of(base) == key_of({"x": np.ones((5, 3), np.float32)})
    for other in (
        key_of({"x": np.zeros((2, 4), np.float32)}),
        key_of({"x": np.zeros((2, 3), np.float64)}),
        key_of({"z": np.zeros((2, 3), np.float32)}),
        key_of(base, ("y",)),
        key_of(base, (), True),
    ):
        assert other != key_of(base)


@pytest.mark.parametrize(
    "values",
    [
        {"x": np.float32(1).reshape(())},
        {"x": np.zeros((0, 3), np.float32)},
        {"x": [np.zeros(2, np.float32)]},
        {"x": np.array(["a"], object)},
        {"x": np.zeros((2, 3), np.float32), "z": np.zeros((3, 3), np.float32)},
    ],
)
def test_calls_that_cannot_be_joined(values: dict[str, Any]) -> None:
    assert key_of(values) is None


def filled(*calls: tuple[Any, str, int]) -> Batcher[str]:
    batcher: Batcher[str] = Batcher(SETTINGS)
    for number, (key, item, priority) in enumerate(calls):
        batcher.add(key, item, 1, 100, (priority, number), now=float(number) / 1000)
    return batcher


def test_when_idle_nothing_waits() -> None:
    batcher = filled((("k",), "a", 5), (("k",), "b", 5), (("l",), "c", 5))
    assert batcher.take(0.003, idle=True) == ["a", "b"]
    assert batcher.take(0.003, idle=True) == ["c"]
    assert batcher.take(0.003, idle=True) == []
    assert len(batcher) == 0


def test_a_partly_filled_batch_waits_for_its_delay_while_others_run() -> None:
    batcher = filled((("k",), "a", 5), (("k",), "b", 5))
    assert batcher.take(0.005, idle=False) == []
    assert batcher.deadline == pytest.approx(0.01)
    assert batcher.take(batcher.deadline, idle=False) == ["a", "b"]
    assert batcher.deadline == float("inf")


def test_a_full_batch_waits_for_nothing_and_takes_no_more_than_fits() -> None:
    batcher = filled(*((("k",), name, 5) for name in "abcdef"))
    assert batcher.take(0.006, idle=False) == list("abcd")
    assert batcher.take(0.006, idle=False) == []
    assert len(batcher) == 2


def test_bytes_bound_a_batch_too() -> None:
    batcher: Batcher[str] = Batcher(SETTINGS)
    for number, name in enumerate("abc"):
        batcher.add(("k",), name, 1, 450, (5, number), 0.0)
    assert batcher.take(0.0, idle=False) == ["a", "b"]


def test_calls_without_a_key_run_alone_and_at_once() -> None:
    batcher = filled((None, "a", 5), (None, "b", 5))
    assert batcher.take(0.0, idle=False) == ["a"]
    assert batcher.take(0.0, idle=False) == ["b"]


def test_priority_goes_before_age_and_age_before_nothing() -> None:
    batcher = filled((None, "old", 5), (None, "urgent", 0), (("k",), "mate", 5), (None, "late", 9))
    assert batcher.head(1.0, idle=True) == ((0, 1), "urgent")
    assert [batcher.take(1.0, idle=True)[0] for _ in range(4)] == ["urgent", "old", "mate", "late"]


def test_a_cancelled_call_is_gone_and_the_clock_follows_the_next() -> None:
    batcher = filled((("k",), "a", 5), (("k",), "b", 5))
    assert batcher.remove(("k",), "a")
    assert not batcher.remove(("k",), "a")
    assert batcher.deadline == pytest.approx(0.011)
    assert batcher.items() == ["b"]
    assert batcher.take(1.0, idle=False) == ["b"]


arrays = st.lists(st.integers(1, 3), min_size=1, max_size=5)


@given(arrays, st.integers(1, 20), st.integers(0, 5))
def test_joined_is_what_concatenation_gives_and_parted_is_what_went_in(rows: list[int], width: int, second: int) -> None:
    generator = np.random.default_rng(0)
    calls = [
        {"x": generator.random((count, width), np.float32), "z": generator.integers(0, 9, (count, second, 2)).astype(np.int8)}
        for count in rows
    ]
    parts = [encoded(call) for call in calls]
    headers = batching.joined_headers([part[0] for part in parts])
    target = bytearray(tensors.values_size(headers))
    batching.join_into(memoryview(target), parts)
    joined = tensors.decode_values(headers, target)
    for name in ("x", "z"):
        assert np.array_equal(joined[name], np.concatenate([call[name] for call in calls]))
    again = batching.part(headers, target, rows)
    assert again is not None
    for (own_headers, payload), call, (wanted_headers, wanted) in zip(again, calls, parts, strict=True):
        assert bytes(payload) == wanted
        assert own_headers == wanted_headers
        assert np.array_equal(tensors.decode_values(own_headers, payload)["x"], call["x"])


def test_outputs_without_the_batch_s_rows_cannot_be_parted() -> None:
    headers, payload = encoded({"y": np.zeros((3, 2), np.float32)})
    assert batching.part(headers, payload, [1, 1]) is None
    headers, payload = encoded({"y": np.float32(1).reshape(())})
    assert batching.part(headers, payload, [1, 1]) is None


async def _count(shapes: Any) -> int:
    return 1


def facts(may_batch: bool = True) -> ModelFacts:
    x = ValueFact("x", "tensor", 1, "tensor(float)", ("N", 3))
    return ModelFacts(b"m", "m", (x,), (x,), {"": 17}, {}, (), False, 0, may_batch, {}, _count)


def runner(function: Any) -> Any:
    async def run(inputs: dict[str, Any]) -> Any:
        return function(inputs["x"])

    return run


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda x: {"y": x * 2}, (True, True)),
        (lambda x: {"y": x * np.float32(1 + 1e-6 * (len(x) - 1))}, (True, False)),
        (lambda x: {"y": x - x.mean(axis=0)}, (False, False)),
        (lambda x: {"y": x.sum()}, (False, False)),
        (lambda x: {"y": x[:1]}, (False, False)),
        (lambda x: {"y": np.argsort(x.sum(axis=1), kind="stable")}, (False, False)),
        (lambda x: None if len(x) > 1 else {"y": x}, (False, False)),
        (lambda x: None, (False, False)),
        # Right for small batches, wrong in the largest.
        (lambda x: {"y": x if len(x) < 4 else x + 1}, (False, False)),
    ],
)
async def test_the_proof_finds_models_that_look_at_batch_mates(function: Any, wanted: tuple[bool, bool]) -> None:
    assert await batching.prove_batchable(runner(function), facts(), SETTINGS, 4) == wanted


async def test_no_proof_without_the_shape_or_the_wish() -> None:
    assert await batching.prove_batchable(runner(lambda x: {"y": x}), facts(may_batch=False), SETTINGS, 4) == (False, False)
    one = WorkSettings(batch_size_max=1)
    assert await batching.prove_batchable(runner(lambda x: {"y": x}), facts(), one, 4) == (False, False)


def test_sample_inputs_differ_by_seed_and_fill_every_shape() -> None:
    inputs = (
        ValueFact("a", "tensor", 1, "tensor(float)", ("N", "S", 7)),
        ValueFact("b", "tensor", 7, "tensor(int64)", (None,)),
        ValueFact("c", "tensor", 9, "tensor(bool)", ()),
    )
    values = batching.sample_inputs(inputs, 0, 5)
    assert values["a"].shape == (1, 5, 7)
    assert values["b"].shape == (1,)
    assert values["b"].dtype == np.int64
    assert values["c"].shape == ()
    assert not np.array_equal(values["a"], batching.sample_inputs(inputs, 1, 5)["a"])
    assert batching.can_sample(inputs, 5, 40)
    assert not batching.can_sample(inputs, 5, 30)
    assert not batching.can_sample((ValueFact("s", "sequence", 1, "seq(tensor(float))", None),), 5, 30)
