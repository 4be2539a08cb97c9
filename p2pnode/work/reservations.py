"""Pieces of workers' memory that the network is filling with an input right now, recognised again when the call is submitted.

A waiting call that found no room in a worker has the first claim to what is freed there: newcomers get none until it has run.
"""

import numpy as np

from p2pnode.environment import Slot
from p2pnode.work.calls import WorkTicket
from p2pnode.work.pool import Handle


class Reservations:
    """Views handed out and not yet submitted. Their number is bounded by the arenas they lie in."""

    def __init__(self) -> None:
        # By identity: a memoryview that can be written has no hash. The slot keeps its view alive, so no id is used twice.
        self._by_id: dict[int, tuple[Handle, Slot]] = {}
        self._wanted: dict[Handle, WorkTicket] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def make(self, handle: Handle, size: int) -> memoryview | None:
        """Take `size` bytes of a worker's memory; None when there is no room, or a waiting call wants it."""
        slot = None if handle in self._wanted else handle.worker.reserve(size)
        if slot is None:
            return None
        view = slot.view[:size]
        self._by_id[id(view)] = (handle, Slot(slot.offset, view))
        handle.reserved += 1
        return view

    def want(self, handle: Handle, ticket: WorkTicket) -> None:
        """Note that the first waiting call found no room in this worker."""
        self._wanted[handle] = ticket

    def end_want(self, ticket: WorkTicket) -> None:
        """Note that a call was placed or does not wait any more."""
        if self._wanted:
            self._wanted = {handle: other for handle, other in self._wanted.items() if other is not ticket}

    def take(self, view: memoryview) -> tuple[Handle, Slot] | None:
        """Recognise a view and forget it; also when it comes back as another view that starts at the same byte."""
        found = self._by_id.pop(id(view), None)
        if found is not None or not len(view) or not self._by_id:
            return found
        address = _address(view)
        for number, (handle, slot) in self._by_id.items():
            if slot.view.obj is view.obj and _address(slot.view) == address and len(view) <= len(slot.view):
                del self._by_id[number]
                return handle, Slot(slot.offset, view)
        return None


def free(handle: Handle, slot: Slot) -> None:
    """Give a reserved piece back to its worker, if that still lives."""
    handle.reserved -= 1
    if handle.worker.alive:
        handle.worker.free(slot)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
