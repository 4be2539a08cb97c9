"""A map whose node dies at any durable step, on virtual time: it goes on, loses nothing, and each item is paid once.

What happens after the power cut is up to the test: bob may come back at once or much later, and the map may be asked for again
or not.
"""

import shutil
from pathlib import Path

import pytest
import trio

from p2pnode.errors import StoreError

pytestmark = pytest.mark.slow

# Commits and file operations of a whole map of ten items, before and after each: some hundred and sixty.
STEPS = 170


def stride(offset: int, step: int) -> list[int]:
    return list(range(offset, STEPS, step))


@pytest.mark.parametrize("steps", stride(5, 9))
def test_killed_at_any_step_it_pays_once(in_world, steps):
    async def scenario(world):
        if not await world.run_map(steps):
            assert await world.run_map()
        world.check_paid_once()
        await world.check_nothing_stays()

    in_world(scenario)


def test_killed_while_its_parts_are_removed_it_computes_and_pays_nothing_again(in_world, monkeypatch):
    """The crash of CI, in one place: half of the parts are gone, and nothing had said that the map was complete."""
    rmtree = shutil.rmtree

    async def scenario(world):
        def killed(folder, **options):
            if world.bob.fuse.is_out or not Path(folder).exists():
                return rmtree(folder, **options)
            for path in sorted(Path(folder).glob("*.part"))[::2]:
                path.unlink()
            world.bob.fuse.cut(world.bob.database)
            raise StoreError("no power")

        monkeypatch.setattr(shutil, "rmtree", killed)
        assert not await world.run_map()
        monkeypatch.undo()
        assert await world.run_map()
        world.check_paid_once()
        await world.check_nothing_stays()

    in_world(scenario)


@pytest.mark.parametrize("steps", stride(2, 14))
def test_killed_again_and_again_it_pays_once(in_world, steps):
    async def scenario(world):
        for more in (0, 7, 31):
            if await world.run_map(steps + more):
                break
        else:
            assert await world.run_map()
        world.check_paid_once()
        await world.check_nothing_stays()

    in_world(scenario)


@pytest.mark.parametrize("steps", stride(7, 14))
def test_a_daemon_that_comes_back_without_its_map_settles_and_pays_nothing_twice(in_world, steps):
    """Its owner types the command again ten minutes later: no clock decides what is paid."""

    async def scenario(world):
        if not await world.run_map(steps):
            await trio.sleep(20)
            await world.bob.start(0, world.sellers)
            await trio.sleep(600)
            await world.check_nothing_stays()
            await world.bob.stop()
            assert await world.run_map()
        world.check_paid_once()

    in_world(scenario)
