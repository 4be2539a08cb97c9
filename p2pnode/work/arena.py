"""Memory shared with a worker: sealed memfds, and an allocator that only the parent runs.

The seals matter: a worker that could shrink the file would kill its parent with SIGBUS on the next access. Offsets are
multiples of 64 because ONNX Runtime's sums depend on the alignment of their input; 4 KiB and more start on a page, so that
freed pages can be handed back to the system.
"""

import ctypes
import fcntl
import mmap
import os
from bisect import bisect_left
from collections.abc import Iterable
from typing import Final

from p2pnode.environment import Buffer, Slot

UNIT: Final = 64
PAGE: Final = 4096
_PUNCH_HOLE_KEEP_SIZE: Final = 0x02 | 0x01
_SEAL_SIZE: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_WRITE_CHUNK: Final = 64 << 20


def align(size: int, unit: int = UNIT) -> int:
    """Give the next multiple of `unit`."""
    return (size + unit - 1) // unit * unit


def rounded(size: int) -> int:
    """Give what a piece of `size` bytes takes."""
    return align(max(size, 1), PAGE if size >= PAGE else UNIT)


class Allocator:
    """First fit over `capacity` bytes. Low addresses are reused first, which keeps pages warm."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []
        self._taken: dict[int, int] = {}
        # Bytes handed out now, after rounding.
        self.taken_bytes = 0

    def allocate(self, size: int, low: int = 0, high: int | None = None) -> int | None:
        """Give the offset of a free piece of at least `size` bytes between two offsets, or None."""
        unit, needed = PAGE if size >= PAGE else UNIT, rounded(size)
        for index, (start, length) in enumerate(self._free):
            offset = align(max(start, low), unit)
            lead, rest = offset - start, start + length - offset - needed
            if rest < 0 or (high is not None and offset + needed > high):
                continue
            pieces = ([(start, lead)] if lead else []) + ([(offset + needed, rest)] if rest else [])
            self._free[index : index + 1] = pieces
            self._taken[offset] = needed
            self.taken_bytes += needed
            return offset
        return None

    def free(self, offset: int) -> None:
        """Take a piece back and join it with its free neighbours. Raises KeyError for what was never handed out."""
        start, length = offset, self._taken.pop(offset)
        self.taken_bytes -= length
        index = bisect_left(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == start + length:
            length += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            previous = self._free.pop(index - 1)
            start, length, index = previous[0], length + previous[1], index - 1
        self._free.insert(index, (start, length))

    def free_pieces(self) -> Iterable[tuple[int, int]]:
        """Give (offset, size) of every free piece, in order."""
        return tuple(self._free)


def sealed_memfd(name: str, size: int) -> int:
    """Give a memfd of fixed size, all zeros and sparse. The caller closes it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEAL_SIZE | fcntl.F_SEAL_SEAL)
    except BaseException:  # whatever it was, nothing is left open
        os.close(descriptor)
        raise
    return descriptor


def constant_memfd(name: str, parts: Iterable[Buffer]) -> int:
    """Give a memfd with these bytes that nobody can change any more. The caller closes it. May take long: 1 s for a few GB."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for part in parts:
            rest = memoryview(part).cast("B")
            while rest:
                rest = rest[os.write(descriptor, rest[:_WRITE_CHUNK]) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEAL_SIZE | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
    except BaseException:  # whatever it was, nothing is left open
        os.close(descriptor)
        raise
    return descriptor


def map_constant(descriptor: int) -> memoryview:
    """Map a sealed memfd for reading. An empty one gives an empty view."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return memoryview(b"")
    # Private: kernels before 6.7 refuse a shared mapping of what is sealed against writing. The pages are shared anyway.
    return memoryview(mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))


class Arena:
    """The parent's side of one worker's input and output memory.

    The mapping lives as long as any view of it, also after the worker's death; nothing is unmapped under a reader. Calls that
    wait must not hold the room that the running one needs for its outputs: nothing would ever be freed. So the inputs of several
    calls lie in one part, outputs of calls whose turn has not come in the last half of the rest, and the first half of the rest
    is the running call's, in one piece whatever sizes came and went. Inputs have half of it all, or more where outputs are small.
    """

    def __init__(self, size: int) -> None:
        size = max(align(size, PAGE), PAGE)
        self.descriptor = sealed_memfd("p2pnode-arena", size)
        self._view = memoryview(mmap.mmap(self.descriptor, size))
        self._allocator = Allocator(size)
        self._peak = 0
        self._inputs: dict[int, int] = {}
        self._input_bytes = 0
        self._inputs_end = size // 2
        self._largest_output = 0
        self._has_learned = False
        self.size = size

    @property
    def touched_bytes(self) -> int:
        """The most that was handed out at the same time since the last `trim`: about what the memory holds."""
        return self._peak

    @property
    def is_idle(self) -> bool:
        """True when nothing is handed out."""
        return not self._allocator.taken_bytes

    def view(self, offset: int, size: int) -> memoryview:
        """Give a writable view of a part."""
        return self._view[offset : offset + size]

    def reserve(self, size: int) -> Slot | None:
        """Take `size` bytes for the running call, or None when there is no room now."""
        return self._take(size, self._inputs_end, self.size) or self._take(size, 0, self.size)

    def reserve_ahead(self, size: int) -> Slot | None:
        """Take `size` bytes for a call whose turn has not come, or None when it must wait for that."""
        return self._take(size, (self._inputs_end + self.size) // 2, self.size)

    def reserve_input(self, size: int) -> Slot | None:
        """Take `size` bytes for an input: within the part that all inputs may take, or alone within all there is."""
        needed = rounded(size)
        if self._inputs and self._input_bytes + needed > self._inputs_end:
            return None
        slot = self._take(size, 0, self._inputs_end if self._inputs else self.size)
        if slot is not None:
            self._inputs[slot.offset] = needed
            self._input_bytes += needed
        return slot

    def learn(self, input_size: int, output_size: int) -> None:
        """Note what a call's outputs take. Once an input was large enough to matter, outputs keep room for 16 of the largest."""
        self._largest_output = max(self._largest_output, output_size)
        self._has_learned = self._has_learned or input_size >= self.size // 64
        if self._has_learned:
            self._inputs_end = self.size - min(max(16 * self._largest_output, self.size // 32), self.size // 2)

    def _take(self, size: int, low: int, high: int) -> Slot | None:
        offset = self._allocator.allocate(size, low, high)
        if offset is None:
            return None
        self._peak = max(self._peak, self._allocator.taken_bytes)
        return Slot(offset, self._view[offset : offset + size])

    def free(self, slot: Slot) -> None:
        """Take a slot back."""
        self._allocator.free(slot.offset)
        self._input_bytes -= self._inputs.pop(slot.offset, 0)

    def trim(self) -> None:
        """Hand the memory of free pages back to the system."""
        for start, size in self._allocator.free_pieces():
            first, last = align(start, PAGE), (start + size) // PAGE * PAGE
            if last > first:
                _punch_hole(self.descriptor, first, last - first)
        self._peak = self._allocator.taken_bytes

    def close(self) -> None:
        """Close the descriptor. Views stay valid."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _punch_hole(descriptor: int, offset: int, size: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    # The file systems that lack this keep the memory, which is correct too.
    library.fallocate(descriptor, _PUNCH_HOLE_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(size))
