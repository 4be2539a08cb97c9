"""The truth that lookups are judged by: the nearest nodes by XOR, and the table of a settled node."""

import random

import pytest

from p2pnode.sim.census import Census


def place(node_id: bytes) -> int:
    return int.from_bytes(node_id, "big")


@pytest.fixture
def ids() -> list[bytes]:
    chance = random.Random(5)
    return [chance.randbytes(32) for _ in range(700)]


@pytest.fixture
def census(ids) -> Census:
    census = Census()
    census.refill((node_id, index) for index, node_id in enumerate(ids))
    return census


@pytest.mark.parametrize("count", [1, 3, 16, 100, 699, 700, 800])
def test_the_closest_are_those_that_sorting_everything_gives(ids, census, count) -> None:
    chance = random.Random(count)
    targets = [chance.randbytes(32) for _ in range(20)] + ids[:5] + [bytes(32), b"\xff" * 32]
    for target in targets:
        assert census.closest(target, count) == sorted(ids, key=lambda each: place(each) ^ place(target))[:count]


def test_who_goes_is_found_no_longer_and_who_comes_is(ids, census) -> None:
    gone = ids[7]
    census.strike(gone)
    census.strike(gone)
    assert not census.holds(gone)
    assert len(census) == 699
    assert gone not in census.closest(gone, 10)
    census.enter(gone, 7)
    assert census.closest(gone, 1) == [gone]


def test_a_settled_table_has_all_siblings_and_k_of_every_bucket_or_all_there_are(ids, census) -> None:
    own = ids[0]
    table = [ids[index] for index in census.perfect_table(own, 16, 16, random.Random(1))]
    assert own not in table
    assert len(table) == len(set(table))
    nearest = sorted(ids, key=lambda each: place(each) ^ place(own))[1:17]
    assert set(nearest) <= set(table)
    for bits in range(246, 257):
        there = [each for each in ids if (place(each) ^ place(own)).bit_length() == bits]
        held = [each for each in table if (place(each) ^ place(own)).bit_length() == bits]
        beyond = [each for each in held if each not in nearest]
        assert len(held) >= min(16, len(there)), bits
        assert len(beyond) <= 16, bits
