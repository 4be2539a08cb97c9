"""The driver for real nodes: the experiment's callbacks on a `World`, through the public operations of each `Node`.

Whatever waits runs in tasks of the world; the experiment only sees callbacks. A node's starts, stops and crashes follow one
another in the order in which they were asked for. Adversaries are bare transports with a router of their own.
"""

import math
import sqlite3
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from p2pnode.crypto.hashing import blake3_256
from p2pnode.crypto.keys import Identity
from p2pnode.discovery.dht.asks import LookupOutcome
from p2pnode.discovery.gossip.events import Republish
from p2pnode.discovery.gossip.gossip import OfferGossip
from p2pnode.discovery.gossip.items import Kind
from p2pnode.discovery.records.record import parse_record, record_key
from p2pnode.errors import ConfigError, InputError, P2PNodeError, PeerError, Refused, WorkError
from p2pnode.ids import NodeId
from p2pnode.jobs.spec import JobSpec, Terms
from p2pnode.node.node import Node
from p2pnode.sim.chance import seeded
from p2pnode.sim.clock import EPOCH_MS
from p2pnode.sim.driver import RECORD_SECONDS, Adversary, Driver, Found, NodeOptions, Stored
from p2pnode.sim.experiment import Experiment
from p2pnode.sim.nat import CONE
from p2pnode.sim.options import WorldOptions
from p2pnode.sim.trace import Trace
from p2pnode.sim.world import Outsider, World, run_world
from p2pnode.transport.requests import Incoming
from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.registry import Message

SLOW_SECONDS: Final = 0.25
OPERATION_SECONDS: Final = 120.0
ASK_SECONDS: Final = 3.0
JOB_SECONDS: Final = 60.0
MODEL_WIDTH: Final = 4
# Address records are left out, on both drivers: the fast one has no peers that are looked up by them.
_SETTINGS: Final[Mapping[str, str]] = {"network.publish_address": "false"}
_SELLS: Final[Mapping[str, str]] = {"provide.enabled": "true", "provide.call_price": "0.5"}
_BUYS: Final[Mapping[str, str]] = {"provide.enabled": "false"}


class _Place:
    """One node's number, name and state as the experiment sees it. todo: what waits for its turn on this machine."""

    __slots__ = ("epoch", "identity", "is_busy", "is_up", "name", "options", "outsider", "todo")

    def __init__(self, name: str, identity: Identity, options: NodeOptions) -> None:
        self.name = name
        self.identity = identity
        self.options = options
        self.is_up = False
        self.epoch = 0
        self.outsider: Outsider | None = None
        self.todo: deque[Callable[[], Awaitable[object]]] = deque()
        self.is_busy = False


class WorldDriver:
    """`driver.Driver` on a world of real nodes. record_seconds: life of a record."""

    kind = "world"

    def __init__(self, options: WorldOptions, trace: Trace, record_seconds: float = RECORD_SECONDS) -> None:
        self.seed = options.seed
        self._options = options
        self._trace = trace
        self._record_seconds = record_seconds
        self._places: list[_Place] = []
        self._chance = seeded(options.seed, "world driver")
        self._ground: dict[bytes, Identity] = {}
        self._error: BaseException | None = None
        self._ended = trio.Event()
        self._bought = 0
        self._model_path = ""
        self._folder: Path
        self._world: World

    # --- time ---------------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""
        return self._world.now

    def schedule(self, delay: float, action: Callable[[], None]) -> None:
        """Call a function after so many virtual seconds; an error in it ends the run."""
        self._world.call_at(self._world.now + delay, lambda: self._guarded(action))

    def fail(self, message: str) -> None:
        """End the run with an error."""
        self._fail(RuntimeError(message))

    def run(self, experiment: Callable[[Driver], None], seconds: float) -> str:
        """Start an experiment and let so many virtual seconds pass; gives the digest of the trace."""

        async def scenario(world: World) -> None:
            self._world = world
            self._guarded(lambda: experiment(self))
            with trio.move_on_after(seconds):
                await self._ended.wait()
            if self._error is not None:
                raise self._error

        with tempfile.TemporaryDirectory(prefix="p2pnode-models-") as folder:
            self._folder = Path(folder)
            run_world(scenario, options=self._options, trace=self._trace)
        return self._trace.digest()

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run a plain function between tasks, where it must not raise."""
        try:
            action()
        except Exception as error:  # kept and raised in the run's own task; the clock must not be left half-way
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
            self._ended.set()

    # --- nodes --------------------------------------------------------------------------------------------------------

    def add_node(self, options: NodeOptions) -> int:
        """Switch a new node on, or put an adversary on the network; gives its number."""
        index = len(self._places)
        name = f"n{index}"
        identity = self._ground.get(options.node_id) or Identity(
            blake3_256(b"simulated identity", f"{self.seed}/{name}".encode())
        )
        place = _Place(name, identity, options)
        self._places.append(place)
        self._up(place)
        if options.adversary is not None:
            self._queue(place, lambda: self._join(place, index, options.adversary))
        else:
            self._queue(place, lambda: self._start(place))
        return index

    async def _start(self, place: _Place) -> None:
        options, world = place.options, self._world
        known = [world.residents[self._places[index].name].address for index in options.entry_points]
        settings = {**_SETTINGS, **(_SELLS if options.offer_bytes else _BUYS), "network.bootstrap": ",".join(known)}
        nat = None if options.is_reachable else CONE
        await world.start(
            place.name, settings, nat=nat or "none", subnet=_subnet(options), skew_ms=round(options.skew_seconds * 1000)
        )
        if options.is_slow:
            world.slow(place.name, SLOW_SECONDS)

    async def _join(self, place: _Place, index: int, adversary: Adversary | None) -> None:
        def route(incoming: Incoming) -> None:
            peer = incoming.link.peer
            asker = Contact(peer.node_id, peer.addresses[:4])
            answer = adversary.answer(asker, incoming.message, self._wall()) if adversary and place.is_up else None
            # Silence is a request that stays open until its sender gives up.
            if answer is not None:
                incoming.reply(answer)

        place.outsider = await self._world.join(place.name, route, subnet=_subnet(place.options), identity=place.identity)
        if adversary is not None and place.is_up:
            self._guarded(lambda: adversary.begin(self, index))

    def crash(self, index: int) -> None:
        """Cut a node's power."""
        place = self._places[index]
        self._down(place)
        if place.options.adversary is None:
            self._queue(place, lambda: self._world.crash(place.name, silent=True))

    def leave(self, index: int) -> None:
        """Stop a node in order."""
        place = self._places[index]
        self._down(place)
        self._queue(place, lambda: self._world.stop(place.name))

    def restart(self, index: int) -> None:
        """Switch a node on again, with its key and disk."""
        place = self._places[index]
        self._up(place)
        self._queue(place, lambda: self._world.start(place.name))

    def _up(self, place: _Place) -> None:
        place.is_up = True
        place.epoch += 1

    def _down(self, place: _Place) -> None:
        place.is_up = False
        place.epoch += 1

    def _queue(self, place: _Place, action: Callable[[], Awaitable[object]]) -> None:
        place.todo.append(action)
        if not place.is_busy:
            place.is_busy = True
            self._world.spawn(self._work_off, place)

    async def _work_off(self, place: _Place) -> None:
        try:
            while place.todo:
                await place.todo.popleft()()
        finally:
            place.is_busy = False

    def _node(self, index: int) -> Node | None:
        place = self._places[index]
        resident = self._world.residents.get(place.name)
        return resident.node if resident is not None and place.is_up else None

    def is_up(self, index: int) -> bool:
        """Say whether a node runs, or will at once."""
        return self._places[index].is_up

    def is_server(self, index: int) -> bool:
        """Say whether a node has found out that it is a server."""
        node = self._node(index)
        return node is not None and node.discovery.dht.is_server

    def contact(self, index: int) -> Contact:
        """Give a node's id and address; without address until its machine has been switched on for the first time."""
        place = self._places[index]
        resident = self._world.residents.get(place.name)
        address = resident.address if resident is not None else place.outsider.address if place.outsider is not None else ""
        return Contact(place.identity.node_id, (address,) if address else ())

    def table(self, index: int) -> Sequence[bytes]:
        """Give the ids in a node's routing table."""
        node = self._node(index)
        return [entry.contact.node_id for entry in node.discovery.dht.table.entries()] if node is not None else []

    def grind(self, key: bytes, within: int) -> bytes:
        """Make keys until one's id is that near, as an attacker does."""
        place = int.from_bytes(key, "big")
        while True:
            identity = Identity(self._chance.randbytes(32))
            if 0 < int.from_bytes(identity.node_id, "big") ^ place < within:
                self._ground[identity.node_id] = identity
                return identity.node_id

    def fill_tables(self) -> None:
        """Not here: real nodes fill their own. Raises ConfigError."""
        raise ConfigError("only the fast driver can fill tables")

    # --- operations ---------------------------------------------------------------------------------------------------

    def lookup(self, index: int, target: bytes, done: Callable[[Found], None]) -> None:
        """Let a node find the nodes nearest to a target."""
        self._find(index, lambda node: node.discovery.find_node(target), done)

    def get(self, index: int, key: bytes, done: Callable[[Found], None]) -> None:
        """Let a node find a record."""
        self._find(index, lambda node: node.discovery.get_record(key), done)

    def put(self, index: int, salt: bytes, value: bytes, done: Callable[[Stored], None]) -> bytes:
        """Let a node publish a record; gives its key."""
        key = record_key(self._places[index].identity.node_id, salt)

        async def run(node: Node) -> Stored:
            began = self.now
            outcome = await node.discovery.publish(salt, value, self._record_seconds)
            return Stored(key, outcome.acks, outcome.asked, outcome.is_stored, self.now - began)

        self._operate(index, run, Stored(key, 0, 0, False, OPERATION_SECONDS), done)
        return key

    def _find(self, index: int, operation: Callable[[Node], Awaitable[LookupOutcome]], done: Callable[[Found], None]) -> None:
        async def run(node: Node) -> Found:
            outcome = await operation(node)
            value = b""
            if outcome.record:
                try:
                    value = parse_record(outcome.record, self._wall()).value
                except PeerError:
                    value = b""
            contacts = tuple(contact.node_id for contact in outcome.contacts)
            return Found(contacts, value, outcome.hops, outcome.asked, outcome.failed, outcome.seconds)

        self._operate(index, run, Found((), b"", 0, 0, 0, OPERATION_SECONDS), done)

    def _operate(self, index: int, run: Callable[[Node], Awaitable[Any]], nothing: Any, done: Callable[[Any], None]) -> None:
        place, epoch = self._places[index], self._places[index].epoch

        async def operate() -> None:
            node = self._node(index)
            outcome = nothing
            if node is not None:
                with trio.move_on_after(OPERATION_SECONDS):
                    try:
                        outcome = await run(node)
                    except P2PNodeError:
                        outcome = nothing
            if place.epoch == epoch:
                self._guarded(lambda: done(outcome))

        self._world.spawn(operate)

    def ask(self, index: int, contact: Contact, message: Message, done: Callable[[Message | None], None]) -> None:
        """Send one request from an adversary's bare transport."""
        place = self._places[index]

        async def ask() -> None:
            answer: Message | None = None
            if place.outsider is not None and place.is_up and contact.addresses:
                with trio.move_on_after(ASK_SECONDS):
                    try:
                        link = await place.outsider.transport.connect(contact.addresses, NodeId(contact.node_id))
                        answer = (await link.request(message)).message
                    except P2PNodeError:
                        answer = None
            self._guarded(lambda: done(answer))

        self._world.spawn(ask)

    def buy(self, index: int, done: Callable[[str], None]) -> None:
        """Let a node buy one run of a small model from whoever sells; done gets how it ended."""
        self._bought += 1
        rows = np.full((1, MODEL_WIDTH), self._bought, dtype=np.float32)

        async def run(node: Node) -> str:
            terms = Terms(deadline_seconds=JOB_SECONDS)
            try:
                return (await node.jobs.run_job(JobSpec(self._model(), {"x": rows}, terms=terms))).end_reason.value
            except (Refused, WorkError) as error:
                return error.reason.value

        self._operate(index, run, "failed", done)

    def books(self) -> Mapping[bytes, sqlite3.Connection]:
        """Give every machine's database by node id."""
        residents = self._world.residents.values()
        return {resident.identity.node_id: resident.database.write_now(lambda book: book) for resident in residents}

    def _model(self) -> str:
        """Write the model that everybody runs: it squares a row of numbers."""
        if not self._model_path:
            from onnx import TensorProto, helper, save

            x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", MODEL_WIDTH])
            y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", MODEL_WIDTH])
            graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "square", [x], [y])
            self._model_path = str(self._folder / "square.onnx")
            save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), self._model_path)
        return self._model_path

    def announce(self, index: int, size_bytes: int) -> None:
        """Let a node sign its offer anew; its size is what the node has to say."""
        node = self._node(index)
        if node is not None:
            version = self.offer(index, node.node_id)
            node.market.advertising.heard(Republish(version))

    def withdraw(self, index: int) -> None:
        """Let a node take its offer back."""
        node = self._node(index)
        if node is not None:
            node.pause(None)
            node.market.advertising.changed()

    def _gossip(self, index: int) -> OfferGossip | None:
        node = self._node(index)
        return node.discovery.gossip if node is not None else None

    def offers(self, index: int) -> Mapping[bytes, int]:
        """Give publisher -> version of the offers that a node would show."""
        gossip, now = self._gossip(index), self._wall()
        if gossip is None:
            return {}
        return {item.publisher: item.sequence for item in gossip.store.offers() if not gossip.is_suspected(item.publisher, now)}

    def offer(self, index: int, publisher: bytes) -> int:
        """Give the version of one offer that a node would show; 0 for none."""
        gossip = self._gossip(index)
        item = gossip.store.get(publisher) if gossip is not None else None
        if gossip is None or item is None or item.kind is not Kind.OFFER or gossip.is_suspected(publisher, self._wall()):
            return 0
        return item.sequence

    def neighbours(self, index: int) -> Sequence[bytes]:
        """Give the ids of a node's gossip neighbours."""
        gossip = self._gossip(index)
        return list(gossip.views.active) if gossip is not None else []

    # --- faults and figures -------------------------------------------------------------------------------------------

    def partition(self, groups: Sequence[Sequence[int]], *, is_symmetric: bool = True) -> None:
        """Let nothing pass between groups; asymmetric: nothing from a later group to an earlier one."""
        named = [[self._places[index].name for index in group] for group in groups]
        if is_symmetric:
            self._world.partition(*named)
            return
        for number, group in enumerate(named):
            self._world.cut([name for later in named[number + 1 :] for name in later], group)

    def heal(self) -> None:
        """End all partitions, loss and slowness."""
        self._world.heal()
        self._world.worsen(0.0)
        for place in self._places:
            if place.options.is_slow and place.name in self._world.residents:
                self._world.slow(place.name, 0.0)

    def set_loss(self, fraction: float) -> None:
        """Lose this share of requests and replies, and of connection attempts, from now on."""
        self._world.worsen(fraction)

    def counters(self) -> Mapping[str, float]:
        """Give running totals over all nodes, those that are down too."""
        metrics = [resident.metrics for resident in self._world.residents.values()]
        return {
            "messages": math.fsum(each.total("requests_total") for each in metrics),
            "bytes": math.fsum(each.total("sent_bytes_total") for each in metrics),
            "gossip_bytes": math.fsum(each.value("gossip_bytes_total", "sent") for each in metrics),
            "timeouts": 0.0,
            "tasks": float(trio.lowlevel.current_statistics().tasks_living),
        }

    def _wall(self) -> float:
        return EPOCH_MS / 1000 + self._world.now


def _subnet(options: NodeOptions) -> str | None:
    return None if options.subnet < 0 else f"185.{options.subnet >> 8}.{options.subnet & 255}"


def run_on_world(experiment: Experiment, trace: Trace) -> str:
    """Run an experiment on real nodes; gives the digest. Raises InputError for options that they do not have."""
    options = experiment.case.options
    if options.settings:
        raise InputError("settings of the hash table's machine can be changed on the fast driver only")
    world = WorldOptions(seed=experiment.seed, nodes=options.nodes, latency=options.latency, trace=trace.level)
    return WorldDriver(world, trace, options.record_seconds).run(experiment, experiment.seconds)
