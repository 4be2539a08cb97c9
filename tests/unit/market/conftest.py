"""Two machines on virtual time with everything below the market real: transport, work, store; models run inline."""

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
import trio
from onnx import TensorProto, helper, numpy_helper

from p2pnode.crypto.keys import Identity
from p2pnode.market.negotiation import OrderTerms
from p2pnode.market.service import MarketService
from p2pnode.market.settings import MarketSettings
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.sim.clock import SimClock
from p2pnode.sim.database import InlineDatabase
from p2pnode.sim.machine import simulated_machine
from p2pnode.sim.network import MemoryNetwork
from p2pnode.sim.runtime import InlineRuntime
from p2pnode.transport.service import TransportService, TransportSettings
from p2pnode.wire.messages.market import InputShape
from p2pnode.work.models import ModelStore
from p2pnode.work.service import WorkService
from p2pnode.work.settings import WorkSettings

NETWORK_ID = b"market test"
SHAPES = (InputShape("x", (4, 64)),)
TERMS = OrderTerms(amount_max=10_000_000, slice_calls=16, slice_seconds=20.0)


@dataclass
class Machine:
    """One machine: what survives a crash (disk, key, models), and the services of its present run."""

    world: "Markets"
    name: str
    address: str
    settings: MarketSettings
    identity: Identity
    database: InlineDatabase
    metrics: Metrics = field(default_factory=Metrics)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)

    async def start(self) -> None:
        host = self.world.network.host(self.address.rpartition(":")[0])
        self.runtime = InlineRuntime(self.world.seconds_of)
        environment = simulated_machine(1, f"{self.name}{self.world.runs}", host, self.database, self.runtime)
        self.world.runs += 1
        work = WorkSettings(sandbox_min="simulated", batch_size_max=1)
        self.models = ModelStore(self.world.folder / self.name, environment, work)
        self.work = WorkService(environment, work, self.models, self.metrics)
        settings = TransportSettings(listen=(self.address,), strict=True)
        self.transport = TransportService(
            environment, self.identity, NETWORK_ID, settings, self.metrics, lambda incoming: self.route(incoming)
        )
        self.market = MarketService(
            environment, self.identity, NETWORK_ID, self.settings, self.metrics, self.transport, self.work, self.models
        )
        self.transport.on_link_up = self.market.link_up
        self.transport.on_link_down = self.market.link_down
        self.scope, self.ended = trio.CancelScope(), trio.Event()
        await self.world.nursery.start(self._run)

    def route(self, incoming) -> None:
        if self.world.drop(self, incoming):
            return
        if not self.market.handle(incoming):
            incoming.refuse(Reason.UNKNOWN_MESSAGE)

    async def _run(self, *, task_status) -> None:
        with self.scope:
            async with trio.open_nursery() as below:
                for service in (self.runtime, self.work, self.transport):
                    await below.start(service.run)
                async with trio.open_nursery() as nursery:
                    self.market_scope = nursery.cancel_scope
                    await nursery.start(self.market.run)
                    task_status.started()
                below.cancel_scope.cancel()
        self.ended.set()

    async def stop(self) -> None:
        """An orderly stop: the market says its goodbyes while the layers below still run."""
        self.market_scope.cancel()
        await self.ended.wait()

    async def crash(self) -> None:
        """Power off: from now on nothing is written or signed."""
        self.market._nursery.cancel_scope.cancel()
        self.market._stopping.set()
        self.scope.cancel()
        await self.ended.wait()
        self.database = InlineDatabase(disk=self.database.crash())


@dataclass
class Markets:
    """alice sells, bob buys."""

    folder: Path
    nursery: trio.Nursery
    network: MemoryNetwork
    runs: int = 0
    seconds_of: object = None
    drops: list = field(default_factory=list)

    def drop(self, machine: Machine, incoming) -> bool:
        """Lose a request of a kind that a test named: [(machine, message class, times)]."""
        for entry in self.drops:
            if entry[0] == machine.name and isinstance(incoming.message, entry[1]) and entry[2] > 0:
                entry[2] -= 1
                return True
        return False

    def machine(self, name: str, number: int, settings: MarketSettings) -> Machine:
        (self.folder / name).mkdir()
        return Machine(self, name, f"80.0.{number}.1:7470", settings, Identity(name.encode().ljust(32, b"\1")), InlineDatabase())

    async def link(self, bob: Machine, alice: Machine):
        link = await bob.transport.connect([alice.address], alice.identity.node_id)
        await trio.sleep(0.1)
        return link


@pytest.fixture(scope="session")
def model_file(tmp_path_factory) -> Path:
    """y = x @ w, [n, 64] -> [n, 8], weights large enough to be a blob of their own."""
    weights = np.random.default_rng(3).normal(size=(64, 8)).astype(np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "tiny", [x], [y], [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture
def simulated(tmp_path, model_file):
    """Run `scenario(world, alice, bob, model_id)` on virtual time; alice sells, bob has the model and buys."""

    def run(scenario, alice_settings=None, bob_settings=None, seconds_of=None):
        async def main() -> None:
            async with opened(tmp_path) as world:
                world.seconds_of = seconds_of
                alice = world.machine("alice", 1, alice_settings or MarketSettings(operations_price=100_000_000))
                bob = world.machine("bob", 2, bob_settings or MarketSettings(selling=False))
                await alice.start()
                await bob.start()
                model_id, _ = await bob.models.add_file(model_file)
                with trio.fail_after(10_000):
                    await scenario(world, alice, bob, model_id)
                world.nursery.cancel_scope.cancel()

        trio.run(main, clock=SimClock())

    return run


@asynccontextmanager
async def opened(folder: Path):
    async with trio.open_nursery() as nursery:
        yield Markets(folder, nursery, MemoryNetwork(0.01))
