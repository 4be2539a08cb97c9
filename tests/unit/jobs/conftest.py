"""Machines on virtual time that buy and sell, and whose power can be cut at any durable step.

Bob's machine has a fuse: it burns down by one before and after every commit and every file operation, and at its end the power
is cut: nothing more is written, no byte leaves.
"""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import trio
from onnx import TensorProto, helper

from p2pnode.crypto.keys import Identity
from p2pnode.errors import P2PNodeError, StoreError, Unreachable
from p2pnode.jobs.outputs import parts_folder
from p2pnode.jobs.service import JobService
from p2pnode.jobs.settings import JobSettings
from p2pnode.jobs.spec import MapSpec, Terms
from p2pnode.market.service import MarketService
from p2pnode.market.settings import MarketSettings
from p2pnode.metrics import Metrics
from p2pnode.sim.clock import SimClock
from p2pnode.sim.database import InlineDatabase
from p2pnode.sim.machine import simulated_machine
from p2pnode.sim.network import MemoryNetwork
from p2pnode.sim.runtime import InlineRuntime
from p2pnode.store import accounts
from p2pnode.transport.service import TransportService, TransportSettings
from p2pnode.work.models import ModelStore
from p2pnode.work.service import WorkService
from p2pnode.work.settings import WorkSettings

NETWORK_ID = b"crash test"
ITEMS, PRICE = 10, 1000
DATA = np.arange(ITEMS * 4, dtype=np.float32).reshape(ITEMS, 4)
SELLER = MarketSettings(operations_price=0, call_price=PRICE, cheque_seconds=30.0)
BUYER = MarketSettings(selling=False)
JOBS = JobSettings(hedging=False, in_flight_per_provider=3)


class Fuse:
    """Cuts a machine's power after so many steps; 0: never."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.burnt = 0
        self.is_out = False
        self.out = trio.Event()
        self.streams: list = []
        self.unreachable: set[str] = set()
        self.disk = None

    def step(self, database: InlineDatabase) -> None:
        if self.is_out:
            raise StoreError("no power")
        self.burnt += 1
        if self.burnt == self.steps:
            self.cut(database)
            raise StoreError("no power")

    def cut(self, database: InlineDatabase) -> None:
        if self.is_out:
            return
        self.is_out = True
        self.disk = database.crash()
        for stream in self.streams:
            stream.break_off()
        self.out.set()


class FusedDatabase:
    def __init__(self, inner: InlineDatabase, fuse: Fuse) -> None:
        self.inner, self.fuse = inner, fuse

    async def write(self, transaction):
        self.fuse.step(self.inner)
        result = await self.inner.write(transaction)
        self.fuse.step(self.inner)
        return result

    async def read(self, query):
        return await self.inner.read(query)


class FusedExecutor:
    def __init__(self, inner, database: InlineDatabase, fuse: Fuse) -> None:
        self.inner, self.database, self.fuse = inner, database, fuse

    async def run(self, function, *arguments):
        self.fuse.step(self.database)
        result = await self.inner.run(function, *arguments)
        self.fuse.step(self.database)
        return result


class FusedNetwork:
    def __init__(self, inner, fuse: Fuse) -> None:
        self.inner, self.fuse = inner, fuse

    async def dial(self, address):
        if self.fuse.is_out or address in self.fuse.unreachable:
            raise Unreachable("no power, or no way")
        stream = await self.inner.dial(address)
        self.fuse.streams.append(stream)
        if self.fuse.is_out:
            stream.break_off()
        return stream

    async def listen(self, address):
        return await self.inner.listen(address)


@dataclass
class Machine:
    """What survives a crash (disk, key, models), and the services of the present run."""

    folder: Path
    network: MemoryNetwork
    nursery: trio.Nursery
    name: str
    address: str
    settings: MarketSettings
    identity: Identity = None
    database: InlineDatabase = field(default_factory=InlineDatabase)
    runs: int = 0

    async def start(self, steps: int = 0, peers=()) -> None:
        self.identity = Identity(self.name.encode().ljust(32, b"\1"))
        self.fuse = Fuse(steps)
        self.runs += 1
        host = self.network.host(self.address.rpartition(":")[0])
        self.runtime = InlineRuntime()
        plain = simulated_machine(1, f"{self.name}{self.runs}", host, self.database, self.runtime)
        environment = replace(
            plain,
            network=FusedNetwork(host, self.fuse),
            database=FusedDatabase(self.database, self.fuse),
            executor=FusedExecutor(plain.executor, self.database, self.fuse),
        )
        metrics = Metrics()
        self.models = ModelStore(self.folder, environment, WorkSettings(sandbox_min="simulated", batch_size_max=1))
        self.work = WorkService(environment, WorkSettings(sandbox_min="simulated", batch_size_max=1), self.models, metrics)
        # A peer's bug would stop the world; a dying node's own exceptions must not.
        settings = TransportSettings(listen=(self.address,), strict=False)
        self.transport = TransportService(environment, self.identity, NETWORK_ID, settings, metrics, self._route)
        self.market = MarketService(
            environment, self.identity, NETWORK_ID, self.settings, metrics, self.transport, self.work, self.models
        )
        self.transport.on_link_up = self.market.link_up
        self.transport.on_link_down = self.market.link_down
        self.jobs = JobService(environment, JOBS, metrics, self.market, self.work, self.models, self.transport.links)
        self.scope, self.ended = trio.CancelScope(), trio.Event()
        await self.nursery.start(self._run)
        for peer in peers:
            self.nursery.start_soon(self._keep_linked, peer, self.fuse)

    async def _keep_linked(self, peer: "Machine", fuse: Fuse) -> None:
        """What discovery does in a whole node."""
        transport = self.transport
        while not fuse.is_out and not self.ended.is_set():
            if peer.identity.node_id not in transport.links():
                with suppress(P2PNodeError, KeyError, RuntimeError):
                    await transport.connect([peer.address], peer.identity.node_id)
            await trio.sleep(1)

    def _route(self, incoming) -> None:
        assert self.market.handle(incoming)

    async def _run(self, *, task_status) -> None:
        try:
            with self.scope:
                async with trio.open_nursery() as below:
                    for service in (self.runtime, self.work, self.transport):
                        await below.start(service.run)
                    async with trio.open_nursery() as middle:
                        await middle.start(self.market.run)
                        async with trio.open_nursery() as top:
                            self.stopping = top.cancel_scope
                            await top.start(self.jobs.run)
                            task_status.started()
                        middle.cancel_scope.cancel()
                    below.cancel_scope.cancel()
        except BaseException:
            if not self.fuse.is_out:
                raise
        self.ended.set()

    async def stop(self) -> None:
        """An orderly stop, with goodbyes."""
        self.stopping.cancel()
        await self.ended.wait()

    async def crash(self) -> None:
        """The power is cut, now if it was not before."""
        self.fuse.cut(self.database)
        self.market._stopping.set()
        if self.market._nursery is not None:
            self.market._nursery.cancel_scope.cancel()
        self.scope.cancel()
        await self.ended.wait()
        self.database = InlineDatabase(disk=self.fuse.disk)

    def query(self, sql: str) -> list:
        return self.database.write_now(lambda connection: connection.execute(sql).fetchall())


@dataclass
class World:
    folder: Path
    nursery: trio.Nursery
    sellers: list
    bob: Machine
    spec: MapSpec

    async def run_map(self, steps: int = 0) -> bool:
        """Start bob and the map; False when he died first."""
        try:
            await self.bob.start(steps, self.sellers)
            done = None
            with trio.CancelScope() as scope:
                self.nursery.start_soon(cancel_when_out, self.bob.fuse, scope)
                done = await self.bob.jobs.wait(await self.bob.jobs.start_map(self.spec))
        except (P2PNodeError, BaseExceptionGroup, RuntimeError):
            if not self.bob.fuse.is_out:
                raise
        if self.bob.fuse.is_out:
            await self.bob.crash()
            return False
        assert done["end_reason"] == "completed", (done["end_detail"], done["history"])
        self.bob.fuse.out.set()
        return True

    def check_paid_once(self) -> None:
        """Every item was computed, charged and paid exactly once, and everybody's books say so."""
        assert np.array_equal(np.load(self.folder / "out.npy"), DATA * DATA)
        assert not parts_folder(self.folder / "out.npy").exists()
        inputs = Counter(row[0] for row in self.bob.query("SELECT hex(input_hash) FROM calls"))
        assert sorted(inputs.values()) == [1] * ITEMS, "an input was charged more than once"
        paid = self.bob.query("SELECT coalesce(sum(paid), 0) FROM agreements WHERE role = 'client'")[0][0]
        assert paid == ITEMS * PRICE
        earned = sum(seller.query("SELECT coalesce(sum(paid), 0) FROM agreements")[0][0] for seller in self.sellers)
        assert earned == paid
        for machine in (*self.sellers, self.bob):
            machine.database.write_now(accounts.check_balanced)

    async def check_nothing_stays(self) -> None:
        """No agreement is left standing on either side, and nobody counts anything as unpaid."""
        await trio.sleep(5)
        for machine in (*self.sellers, self.bob):
            rows = machine.query("SELECT state, end_reason, total - paid FROM agreements")
            assert {(state, unpaid) for state, _, unpaid in rows} <= {("ended", 0)}, (machine.name, rows)
            assert not {"unpaid", "mismatch", "peer-lost"} & {reason for _, reason, _ in rows}, (machine.name, rows)


async def cancel_when_out(fuse: Fuse, scope: trio.CancelScope) -> None:
    await fuse.out.wait()
    scope.cancel()


@pytest.fixture(scope="session")
def square(tmp_path_factory):
    """A model that squares rows of four numbers."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "square", [x], [y])
    path = tmp_path_factory.mktemp("square") / "square.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


@pytest.fixture
def in_world(tmp_path, square):
    """Run `scenario(world)` with one or two sellers and bob, who is off."""

    def run(scenario, sellers=2, seller=SELLER):
        data = tmp_path / "data.npy"
        np.save(data, DATA)
        spec = MapSpec(square, str(data), str(tmp_path / "out.npy"), batch=1, terms=Terms(max_total=100 * PRICE))

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                network = MemoryNetwork(0.01)

                def machine(name, number, settings):
                    (tmp_path / name).mkdir()
                    return Machine(tmp_path / name, network, nursery, name, f"80.0.{number}.1:7470", settings)

                them = [machine(f"seller{number}", number + 1, seller) for number in range(sellers)]
                for each in them:
                    await each.start()
                with trio.fail_after(100_000):
                    await scenario(World(tmp_path, nursery, them, machine("bob", 9, BUYER), spec))
                nursery.cancel_scope.cancel()

        trio.run(main, clock=SimClock())

    return run
