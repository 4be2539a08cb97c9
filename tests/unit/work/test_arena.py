"""Allocation without overlap, seals that hold, memory that returns."""

import fcntl
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import p2pnode
from p2pnode.work.arena import PAGE, Allocator, Arena, constant_memfd, map_constant, sealed_memfd

CAPACITY = 1 << 20


@given(st.lists(st.tuples(st.booleans(), st.integers(0, CAPACITY // 3)), max_size=60))
def test_pieces_never_overlap_and_all_comes_back(steps):
    allocator, taken = Allocator(CAPACITY), {}
    for give_back, size in steps:
        if give_back and taken:
            allocator.free(taken.popitem()[0])
            continue
        offset = allocator.allocate(size)
        if offset is None:
            continue
        assert offset % (PAGE if size >= PAGE else 64) == 0
        assert offset + size <= CAPACITY
        assert all(offset + max(size, 1) <= start or start + max(length, 1) <= offset for start, length in taken.items())
        taken[offset] = size
    for offset in list(taken):
        allocator.free(offset)
    assert allocator.free_pieces() == ((0, CAPACITY),)
    assert allocator.taken_bytes == 0


def test_first_fit_reuses_low_addresses():
    allocator = Allocator(CAPACITY)
    first, second = allocator.allocate(PAGE), allocator.allocate(PAGE)
    allocator.free(first)
    assert allocator.allocate(100) == first
    assert second == PAGE


def test_full_gives_none_and_unknown_is_refused():
    allocator = Allocator(CAPACITY)
    assert allocator.allocate(CAPACITY + 1) is None
    assert allocator.allocate(CAPACITY) == 0
    assert allocator.allocate(1) is None
    with pytest.raises(KeyError):
        allocator.free(64)


def test_trim_hands_memory_back_but_keeps_what_is_taken():
    arena = Arena(64 << 20)
    kept = arena.reserve(100)
    large = arena.reserve(16 << 20)
    kept.view[:] = b"k" * 100
    large.view[:] = b"x" * len(large.view)
    used = os.fstat(arena.descriptor).st_blocks
    assert used >= (16 << 20) // 512
    arena.free(large)
    arena.trim()
    assert os.fstat(arena.descriptor).st_blocks <= 16
    assert bytes(kept.view) == b"k" * 100
    assert arena.touched_bytes <= PAGE
    arena.close()
    assert bytes(kept.view) == b"k" * 100, "views outlive the descriptor"


def test_inputs_of_several_calls_take_half_and_one_alone_what_is_there():
    arena = Arena(1 << 20)
    alone = arena.reserve_input(900 << 10)
    assert arena.reserve_input(64) is None
    arena.free(alone)
    # A byte more than a page takes two.
    inputs = [arena.reserve_input(PAGE + 1) for _ in range(65)]
    assert inputs[64] is None
    assert all(slot.offset + len(slot.view) <= arena.size // 2 for slot in inputs[:64])
    assert arena.reserve(512 << 10) is not None
    for slot in inputs[:64]:
        arena.free(slot)
    assert arena.reserve_input(512 << 10) is not None


def test_an_input_beside_others_stays_in_its_half():
    arena = Arena(1 << 20)
    upper, lower = arena.reserve(300 << 10), arena.reserve(300 << 10)
    assert lower.offset == 0
    first = arena.reserve_input(150 << 10)
    assert arena.reserve_input(150 << 10) is None, "there is such room, but not in the first half"
    arena.free(upper)
    arena.free(first)
    alone = arena.reserve_input(700 << 10)
    assert alone.offset > 0
    arena.free(lower)
    assert arena.reserve_input(100) is None, "there is room below it, but together they take more than half"


def test_inputs_take_more_where_outputs_are_known_to_be_small():
    arena = Arena(1 << 20)

    def room_for_inputs():
        slots = []
        while (slot := arena.reserve_input(32 << 10)) is not None:
            slots.append(slot)
        for slot in slots:
            arena.free(slot)
        return len(slots)

    learned = []
    for sizes in ((100, 100), (32 << 10, 100), (100, 8 << 10), (32 << 10, 100), (100, 1 << 40)):
        arena.learn(*sizes)
        learned.append(room_for_inputs())
    # A small input says nothing of what large ones give; the largest output is never forgotten.
    assert learned == [16, 31, 28, 28, 16]


def test_a_quarter_in_one_piece_stays_for_the_running_call():
    arena = Arena(1 << 20)
    kept = []
    for size in (100, 5000, 70_000, 30_000) * 20:
        kept += [arena.reserve_input(size), arena.reserve_ahead(size)]
    for slot in kept[::3]:
        if slot is not None:
            arena.free(slot)
    assert None in kept
    assert arena.reserve(256 << 10) is not None


def test_sizes_are_sealed():
    descriptor = sealed_memfd("test", PAGE)
    for size in (0, 2 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(descriptor)


def test_constants_cannot_be_written():
    descriptor = constant_memfd("test", (b"abc", memoryview(b"def")))
    assert bytes(map_constant(descriptor)) == b"abcdef"
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, 6)
    os.close(descriptor)
    empty = constant_memfd("test", ())
    assert bytes(map_constant(empty)) == b""
    os.close(empty)


PARENT_WITH_TRUNCATING_CHILD = """
import mmap, os, sys
from p2pnode.work.arena import sealed_memfd
descriptor = sealed_memfd("x", 65536) if sys.argv[1] == "sealed" else os.memfd_create("x")
if sys.argv[1] != "sealed": os.ftruncate(descriptor, 65536)
view = mmap.mmap(descriptor, 65536)
child = os.fork()
if child == 0:
    try: os.ftruncate(descriptor, 0)
    except OSError: pass
    os._exit(0)
os.waitpid(child, 0)
print(view[32768])
"""


@pytest.mark.parametrize(("kind", "code"), [("sealed", 0), ("unsealed", -signal.SIGBUS)])
def test_a_truncating_worker_cannot_kill_its_parent(kind, code):
    environment = {"PYTHONPATH": str(Path(p2pnode.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", PARENT_WITH_TRUNCATING_CHILD, kind], env=environment, cwd="/", capture_output=True, timeout=60
    )
    assert done.returncode == code, "the unsealed control shows what the seal prevents"
