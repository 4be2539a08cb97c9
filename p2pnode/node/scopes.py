"""Services that run for the length of a block: start order is nesting order, and stop order its reverse."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import trio


class Service(Protocol):
    """Anything with `run(task_status)` that is ready at `started()` and works until cancelled."""

    @property
    def run(self) -> Callable[..., Awaitable[Any]]:
        """Work until cancelled; `task_status.started()` when ready."""
        ...


@asynccontextmanager
async def running(*services: Service | None) -> AsyncIterator[None]:
    """Run services around a block, started in order; they are cancelled when the block is left.

    A service that fails cancels the block and its error comes out bare, not wrapped once per level of nesting.
    """
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            for service in services:
                if service is not None:
                    await nursery.start(service.run)
            yield
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        failure = bare(group)
    if failure is not None:
        raise failure


def bare(error: BaseException) -> BaseException:
    """Give the first real error in nested groups; the others are only its consequences."""
    while isinstance(error, BaseExceptionGroup):
        inner = [each for each in error.exceptions if not isinstance(each, trio.Cancelled)]
        error = (inner or list(error.exceptions))[0]
    return error
