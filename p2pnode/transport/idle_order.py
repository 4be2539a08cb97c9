"""Which link makes room when all places are taken: the one that was idle longest among those that nobody keeps.

Lookups dial so many peers that at the limit every dial asks this. The links are sorted once for some twenty questions: whatever
was used since then, or came later, belongs behind all that were not.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pnode.transport.link import Link


class IdleOrder:
    """The links of one node by idleness, as of some time ago. Pure: links and time are arguments."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        # (idle since, tie, link), the longest idle last.
        self._order: list[tuple[float, int, Link]] = []

    def take(self, links: Iterable["Link"], latest: float, only_inbound: bool) -> "Link | None":
        """Give the link that has been idle longest, at least since `latest`, or None. only_inbound: among those of that kind."""
        found = self._first(latest, only_inbound)
        if found is None:
            idle = ((link.idle_since(), number, link) for number, link in enumerate(links))
            self._order = sorted((each for each in idle if each[0] <= latest), reverse=True)
            found = self._first(latest, only_inbound)
        return found

    def forget(self, link: "Link") -> None:
        """A link is over."""
        if self._order:
            self._order = [each for each in self._order if each[2] is not link]

    def _first(self, latest: float, only_inbound: bool) -> "Link | None":
        order = self._order
        for position in range(len(order) - 1, -1, -1):
            since, _, link = order[position]
            if link.idle_since() != since:
                del order[position]
            elif since <= latest and (link.peer.inbound or not only_inbound):
                del order[position]
                return link
        return None
