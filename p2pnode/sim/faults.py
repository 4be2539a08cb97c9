"""What goes wrong in a world, as plans: each is a plain value that a scenario runs beside its own work.

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_faults, world, [Flapping(0.2), RollingPartitions(0.3)])

A plan draws its victims from the world's seed and leaves the world as it found it when it ends or is cancelled, but for what
its nodes have lost: machines are up again, cuts healed, clocks and lines as before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from p2pnode.sim.world import World


class Fault(Protocol):
    """A plan of things that go wrong."""

    async def run(self, world: World) -> None:
        """Let them go wrong, in virtual time, and repair what can be repaired."""
        ...


@dataclass(frozen=True, slots=True)
class MassFailure:
    """A share of the machines crashes at the same moment; after `down_seconds` they come back, one after the other.

    silent: by a power cut. spare: names that never fail.
    """

    share: float = 0.5
    down_seconds: float = 120.0
    silent: bool = False
    spare: Sequence[str] = ()

    async def run(self, world: World) -> None:
        """Kill, wait, restart."""
        fallen: list[str] = []
        try:
            fallen = await world.kill(self.share, silent=self.silent, spare=self.spare)
            await trio.sleep(self.down_seconds)
        finally:
            await _bring_back(world, fallen)


@dataclass(frozen=True, slots=True)
class Flapping:
    """A share of the machines crashes again and again, each at moments of its own, and restarts with the same disk.

    up_seconds, down_seconds: the longest of each; times: how often each goes down.
    """

    share: float = 0.1
    up_seconds: float = 60.0
    down_seconds: float = 30.0
    times: int = 3
    silent: bool = False
    spare: Sequence[str] = ()

    async def run(self, world: World) -> None:
        """Let every chosen machine flap."""
        async with trio.open_nursery() as nursery:
            for name in _chosen(world, self.share, self.spare):
                nursery.start_soon(self._flap, world, name)

    async def _flap(self, world: World, name: str) -> None:
        for _ in range(self.times):
            await trio.sleep(world.draws.uniform(0.1, 1.0) * self.up_seconds)
            try:
                await world.crash(name, silent=self.silent)
                await trio.sleep(world.draws.uniform(0.1, 1.0) * self.down_seconds)
            finally:
                await _bring_back(world, [name])


@dataclass(frozen=True, slots=True)
class RollingPartitions:
    """One group after the other is cut off from all others for a while. one_way: the group hears, but is not heard."""

    share: float = 0.3
    seconds: float = 60.0
    pause_seconds: float = 30.0
    times: int = 3
    one_way: bool = False

    async def run(self, world: World) -> None:
        """Cut, wait, heal, again and again."""
        for _ in range(self.times):
            group = _chosen(world, self.share)
            away = frozenset(group)
            try:
                if self.one_way:
                    world.cut(group, [name for name in world.residents if name not in away])
                else:
                    world.partition(group)
                await trio.sleep(self.seconds)
            finally:
                world.heal()
            await trio.sleep(self.pause_seconds)


@dataclass(frozen=True, slots=True)
class SlowMachines:
    """A share of the machines is late by `delay_seconds` with everything, as an overloaded or swapping one is."""

    share: float = 0.1
    delay_seconds: float = 0.5
    seconds: float = 120.0

    async def run(self, world: World) -> None:
        """Slow down, wait, recover."""
        names = _chosen(world, self.share)
        try:
            for name in names:
                world.slow(name, self.delay_seconds)
            await trio.sleep(self.seconds)
        finally:
            for name in names:
                world.slow(name, 0.0)


@dataclass(frozen=True, slots=True)
class SkewedClocks:
    """A share of the machines has its wall clock wrong by up to so much, ahead or behind, and then corrected."""

    share: float = 0.2
    skew_ms: int = 300_000
    seconds: float = 120.0

    async def run(self, world: World) -> None:
        """Turn the clocks, wait, turn them back."""
        before = {name: world.residents[name].clock.skew_ms for name in _chosen(world, self.share)}
        try:
            for name in before:
                world.skew(name, round(world.draws.uniform(-1.0, 1.0) * self.skew_ms))
            await trio.sleep(self.seconds)
        finally:
            for name, skew_ms in before.items():
                world.skew(name, skew_ms)


@dataclass(frozen=True, slots=True)
class CloggedLinks:
    """Now and then nothing arrives from one machine at another for a while, and then everything at once."""

    clogs: int = 20
    clog_seconds: float = 5.0
    pause_seconds: float = 2.0

    async def run(self, world: World) -> None:
        """Clog one direction of one pair at a time."""
        for _ in range(self.clogs):
            if len(world.residents) > 1:
                source, target = world.draws.sample(list(world.residents), 2)
                world.clog(source, target, self.clog_seconds)
            await trio.sleep(self.pause_seconds)


@dataclass(frozen=True, slots=True)
class BadWires:
    """For a while the network loses messages, lets deliveries overtake each other and doubles connection attempts."""

    loss: float = 0.05
    reordering: float = 0.05
    duplication: float = 0.05
    seconds: float = 120.0

    async def run(self, world: World) -> None:
        """Worsen the network, wait, put it back as it was."""
        network = world.network
        before = network.loss, network.syn_loss, network.reordering, network.duplication
        try:
            world.worsen(self.loss, self.reordering, self.duplication)
            await trio.sleep(self.seconds)
        finally:
            network.loss, network.syn_loss, network.reordering, network.duplication = before


@dataclass(frozen=True, slots=True)
class After:
    """Another plan, later."""

    seconds: float
    fault: Fault
    then: Sequence[Fault] = field(default_factory=tuple)

    async def run(self, world: World) -> None:
        """Wait, then run the plan, then those that follow it, one after the other."""
        await trio.sleep(self.seconds)
        for fault in (self.fault, *self.then):
            await fault.run(world)


async def run_faults(world: World, faults: Iterable[Fault]) -> None:
    """Run plans side by side until all have ended; then every cut is healed and every machine that was started is up."""
    async with trio.open_nursery() as nursery:
        for fault in faults:
            nursery.start_soon(fault.run, world)
    world.heal()
    await _bring_back(world, list(world.residents))


async def _bring_back(world: World, names: Iterable[str]) -> None:
    with trio.CancelScope(shield=True):
        for name in names:
            if world.residents[name].node is None:
                await world.start(name)


def _chosen(world: World, share: float, spare: Sequence[str] = ()) -> list[str]:
    candidates = [name for name in world.running if name not in spare]
    return world.draws.sample(candidates, round(share * len(candidates)))
