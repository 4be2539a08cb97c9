"""A bell wakes one task that does in its own time what others found due."""

import trio


class Bell:
    """Rung from plain code, heard by one task; ringing twice before it is heard is ringing once."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        """Wake the task now, or let its next wait return at once."""
        self._event.set()

    async def heard(self, deadline: float) -> None:
        """Wait until the bell rings or the deadline (trio's clock) has come."""
        with trio.move_on_at(deadline):
            await self._event.wait()
        self._event = trio.Event()
