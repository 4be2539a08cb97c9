"""The control API's routes: a table from method and path to handler, and what every handler is given.

Handlers live by layer in `routes_owner`, `routes_net`, `routes_books` and `routes_jobs`; adding one is one line there.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from p2pnode.api.http import HttpError, Reply, Request
from p2pnode.node.main import Daemon
from p2pnode.node.node import Node


class Control:
    """What handlers work on: the daemon, and the sessions that clients opened through this API."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.node: Node = daemon.node
        self.nursery: trio.Nursery | None = None
        self.closers: dict[str, Callable[[], Awaitable[None]]] = {}
        self.sessions: dict[str, object] = {}

    async def aclose(self) -> None:
        """End what clients left open."""
        for close in list(self.closers.values()):
            await close()


Handler = Callable[[Control, Request], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Route:
    """One row: `{name}` in the path matches any one part, which the handler finds by `request.path`.

    takes_bytes: the body may be as large as tensors are.
    """

    method: str
    path: str
    handler: Handler
    takes_bytes: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The path between the slashes."""
        return tuple(part for part in self.path.split("/") if part)

    def matches(self, path: tuple[str, ...]) -> bool:
        """Say whether a request's path fits."""
        parts = self.parts
        return len(parts) == len(path) and all(
            mine.startswith("{") or mine == theirs for mine, theirs in zip(parts, path, strict=True)
        )


class Routes:
    """The table."""

    def __init__(self, routes: list[Route]) -> None:
        self.rows = tuple(routes)

    def takes_bytes(self, method: str, path: tuple[str, ...]) -> bool:
        """Say whether this request may carry tensors."""
        return any(route.takes_bytes and route.method == method and route.matches(path) for route in self.rows)

    async def dispatch(self, control: Control, request: Request) -> Reply:
        """Answer a request. Raises HttpError(404 or 405) where no route fits."""
        fitting = [route for route in self.rows if route.matches(request.path)]
        for route in fitting:
            if route.method == request.method or (request.method == "HEAD" and route.method == "GET"):
                return await route.handler(control, request)
        if fitting:
            allowed = ", ".join(route.method for route in fitting)
            raise HttpError(405, "wrong-method", f"{request.method} is not possible here", f"use {allowed}")
        raise HttpError(404, "not-found", f"/{'/'.join(request.path)} does not exist", "GET /v1 lists what does")


def all_routes() -> Routes:
    """Give every route of the control API."""
    from p2pnode.api.routes_books import BOOK_ROUTES
    from p2pnode.api.routes_jobs import JOB_ROUTES
    from p2pnode.api.routes_net import NET_ROUTES
    from p2pnode.api.routes_offers import OFFER_ROUTES
    from p2pnode.api.routes_owner import OWNER_ROUTES

    return Routes([*OWNER_ROUTES, *NET_ROUTES, *OFFER_ROUTES, *BOOK_ROUTES, *JOB_ROUTES])
