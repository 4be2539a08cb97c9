"""Services run around a block, stop in reverse order, and fail with their own error."""

import pytest
import trio

from p2pnode.node.scopes import running


class Recorder:
    def __init__(self, name, log, error=None):
        self.name, self.log, self.error = name, log, error

    async def run(self, *, task_status=trio.TASK_STATUS_IGNORED):
        self.log.append(f"start {self.name}")
        task_status.started()
        try:
            if self.error:
                raise self.error
            await trio.sleep_forever()
        finally:
            self.log.append(f"stop {self.name}")


async def test_start_order_is_nesting_and_stop_order_its_reverse():
    log = []
    async with running(Recorder("store", log)), running(Recorder("market", log)):
        log.append("work")
    assert log == ["start store", "start market", "work", "stop market", "stop store"]


async def test_a_service_that_fails_ends_the_block_with_its_own_error():
    log = []
    with pytest.raises(ValueError, match="broken"):
        async with running(Recorder("store", log)), running(Recorder("market", log, ValueError("broken"))):
            await trio.sleep_forever()
    assert log[-1] == "stop store"


async def test_an_error_in_the_block_comes_out_bare():
    with pytest.raises(KeyError):
        async with running(Recorder("store", [])):
            raise KeyError("mine")
