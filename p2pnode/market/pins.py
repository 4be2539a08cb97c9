"""Links that agreements stand on are kept alive while idle; how they were before is put back with the last agreement."""

from typing import Any


class Pins:
    """Counts the agreements on each link."""

    def __init__(self) -> None:
        self._held: dict[Any, list[Any]] = {}

    def hold(self, link: Any) -> None:
        """One more agreement stands on a link."""
        held = self._held.setdefault(link, [0, link.pinned])
        held[0] += 1
        link.pinned = True

    def holds(self, link: Any) -> bool:
        """Say whether any agreement stands on a link."""
        return link in self._held

    def drop(self, link: Any) -> None:
        """One fewer does. Safe for a link that was not held."""
        held = self._held.get(link)
        if held is None:
            return
        held[0] -= 1
        if held[0] <= 0:
            del self._held[link]
            link.pinned = held[1]
