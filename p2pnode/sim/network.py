"""The simulated internet behind `environment.Network`: hosts, dials, delays, and everything that goes wrong between them.

One heap (the clock's) carries every delivery. What a network can do to its hosts is set at any time: latency, jitter,
duplicated and overtaken connections, bandwidth, clogged links, cuts in one direction or both, machines that are off. Lost
requests and replies are not the stream's business: a stream is reliable, so they are taken out at the session's frame boundary
(`frame_tap`).
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from p2pnode.errors import ConfigError, Unreachable
from p2pnode.sim.clock import SimClock
from p2pnode.sim.latency import LatencyModel, Place, flat
from p2pnode.sim.nat import NONE, Nat
from p2pnode.sim.streams import Draws, MemoryListener, MemoryStream, Pipe
from p2pnode.sim.trace import Trace

_FIRST_FREE_PORT = 40_000
_BACKLOG = 128
# A lost SYN is sent again after one second, then after twice as long each time (RFC 6298).
_SYN_SECONDS = 1.0
# An overtaken delivery is late by up to so many times its pair's delay.
_OVERTAKEN_FACTOR = 4.0
# What a duplicated connection attempt leaves at the answerer before it vanishes.
_GHOST_SECONDS = 3.0
_LATENCIES_MAX = 1_000_000


class Plan(Protocol):
    """What runs plain functions at virtual times: the simulation's clock."""

    def call_at(self, when: float, action: Callable[[], None], key: int | None = None) -> None:
        """Run a function at a time."""
        ...


class TaskPlan:
    """A plan for other clocks than the simulation's, such as the one of trio's own testing tools: one system task."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._next_key = 0
        self._wake: trio.CancelScope | None = None
        trio.lowlevel.spawn_system_task(self._run)

    def call_at(self, when: float, action: Callable[[], None], key: int | None = None) -> None:
        """Run a plain function at a time, in the order of the calls where times are equal."""
        self._next_key += 1
        heapq.heappush(self._due, (when, self._next_key, action))
        if self._wake is not None:
            self._wake.cancel()

    async def _run(self) -> None:
        while True:
            while self._due and self._due[0][0] <= trio.current_time():
                heapq.heappop(self._due)[2]()
            with trio.CancelScope() as self._wake:
                await trio.sleep_until(self._due[0][0] if self._due else math.inf)
            self._wake = None


@dataclass(slots=True)
class NetworkStats:
    """What has passed so far. messages, bytes: by message class; lost: requests and replies that never arrived.

    dials: by outcome (connected, refused, dropped); stream_bytes: all bytes on streams, handshakes included.
    """

    messages: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    dials: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    stream_bytes: int = 0
    deliveries: int = 0


class MemoryHost:
    """One machine on the network, as `environment.Network`. name: its own address; nat: what others see and may reach.

    is_on: False while the machine is without power. delay_seconds: how slow it is with everything that comes and goes.
    streams: its ends of open connections, by serial.
    """

    def __init__(self, network: "MemoryNetwork", name: str, nat: Nat, label: str) -> None:
        self.network = network
        self.name = name
        self.nat = nat
        self.label = label
        self.number = len(network.hosts)
        self.place: Place = network.model.place(network.seed, name)
        self.is_on = True
        self.delay_seconds = 0.0
        self.streams: dict[int, MemoryStream] = {}
        self.listeners: dict[str, MemoryListener] = {}
        self.leaves_at = 0.0
        self.comes_at = 0.0
        self.draws = Draws(network.seed * 7_368_787 + self.number)

    async def dial(self, address: str) -> MemoryStream:
        """Connect to `host:port` after one round trip. Raises Unreachable when refused; waits for ever where SYNs vanish."""
        network = self.network
        if not self.is_on:
            raise Unreachable(f"{address}: this machine is off")
        for attempt in range(8):
            target = network.route(self, address)
            if target is not None and not (network.syn_loss and self._loses_syn()):
                break
            await network.wait(_SYN_SECONDS * 2**attempt)
        else:
            network.count_dial(self, address, "dropped")
            await trio.sleep_forever()
        await network.wait(2 * network.latency_between(self, target) + 2 * (self.delay_seconds + target.delay_seconds))
        return network.connect(self, target, address)

    async def listen(self, address: str) -> MemoryListener:
        """Listen on `host:port` under this machine's name; port 0 picks one. Raises ConfigError."""
        await trio.lowlevel.checkpoint()
        port = address.rpartition(":")[2]
        return self.network.bind(self, f"{self.name}:{self.network.free_port() if port == '0' else port}")

    def forget(self, address: str) -> None:
        """Stop listening on an address."""
        self.listeners.pop(address, None)

    def power_off(self, *, silent: bool) -> None:
        """End every connection and stop listening. silent: as at a power cut; otherwise the peers are told (a reset)."""
        for stream in list(self.streams.values()):
            if silent:
                stream.fall_silent()
            else:
                stream.fall_silent()
                self.network.reset_peer(stream)
        for listener in list(self.listeners.values()):
            listener.close()
        self.is_on = not silent

    def power_on(self) -> None:
        """The machine is back; connections of before are reset when a peer next speaks."""
        self.is_on = True

    def _loses_syn(self) -> bool:
        return self.draws.uniform() < self.network.syn_loss


class MemoryNetwork:
    """The wires between all simulated hosts. `host(name)` gives what one machine sees of it.

    latency_seconds: one way, for every pair, when no model is given. buffer_bytes: per direction of a connection. loss: share of
    requests and of replies that never arrive. syn_loss: share of connection attempts that must be sent again. duplication: share
    of connection attempts that reach the answerer twice. reordering: share of deliveries that others overtake.
    bandwidth_bytes_per_second: of every host, each way.
    """

    def __init__(
        self,
        latency_seconds: float = 0.001,
        buffer_bytes: int = 262_144,
        *,
        seed: int = 1,
        model: LatencyModel | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.seed = seed
        self.buffer_bytes = buffer_bytes
        self.model = model or flat(latency_seconds)
        self.trace = trace or Trace()
        self.stats = NetworkStats()
        self.loss = 0.0
        self.syn_loss = 0.0
        self.duplication = 0.0
        self.reordering = 0.0
        self.bandwidth_bytes_per_second = math.inf
        self.cuts: list[Callable[[MemoryHost, MemoryHost], bool]] = []
        self.held_back: dict[int, Pipe] = {}
        self.hosts: dict[str, MemoryHost] = {}
        self.labels: dict[bytes, str] = {}
        self._outside: dict[str, MemoryHost] = {}
        self._clogs: dict[tuple[int, int], float] = {}
        self._latencies: dict[tuple[int, int], float] = {}
        self._next_port = _FIRST_FREE_PORT
        self._serial = 0
        self._taps = 0
        self._plan: Plan | None = None
        self.now: Callable[[], float] = trio.current_time

    # --- hosts -------------------------------------------------------------------------------------------------------

    def host(self, name: str, *, nat: Nat | None = None, label: str = "") -> MemoryHost:
        """Give one machine's view, the same for the same name; name: its address, such as `80.0.0.7`."""
        host = self.hosts.get(name)
        if host is None:
            host = self.hosts[name] = MemoryHost(self, name, nat or Nat(NONE, name), label or name)
            self._outside[host.nat.outside] = host
        return host

    def free_port(self) -> int:
        """Give a port that was not given before."""
        self._next_port += 1
        return self._next_port

    def next_tap(self) -> int:
        """Give the seed of what one end of a session draws; each end is asked once."""
        self._taps += 1
        return self.seed * 15_485_863 + self._taps

    def bind(self, host: MemoryHost, address: str) -> MemoryListener:
        """Listen on a full address. Raises ConfigError when it is taken."""
        if address in host.listeners:
            raise ConfigError(f"cannot listen on {address}: it is in use")
        listener = host.listeners[address] = MemoryListener(address, _BACKLOG, host.forget)
        return listener

    def route(self, source: MemoryHost, address: str) -> MemoryHost | None:
        """Give the machine that a dial reaches, or None where it is dropped without an answer."""
        name = address.rpartition(":")[0]
        target = self._outside.get(name)
        if target is None:
            # A private address means something only to the machine itself.
            target = self.hosts.get(name)
            if target is not source:
                return None
        if target is source:
            return target
        if not target.is_on or self.is_cut(source, target) or self.is_cut(target, source):
            return None
        if not target.nat.lets_in(source.nat.outside, self.now()):
            return None
        return target

    def connect(self, source: MemoryHost, target: MemoryHost, address: str) -> MemoryStream:
        """Join two machines by a new connection. Raises Unreachable when nobody listens there or its queue is full."""
        port = address.rpartition(":")[2]
        listener = target.listeners.get(f"{target.name}:{port}")
        if listener is None or listener.is_full or not target.is_on or not source.is_on:
            self.count_dial(source, address, "refused")
            raise Unreachable(f"{address}: nobody listens there" if listener is None else f"{address}: it takes no more")
        near = self._join(source, target, address, listener)
        self.count_dial(source, address, "connected")
        if self.duplication and source.draws.uniform() < self.duplication:
            # The attempt arrives twice: the answerer meets a connection that says nothing and breaks.
            ghost = self._join(source, target, address, listener)
            self.plan.call_at(self.now() + _GHOST_SECONDS, ghost.break_off)
        return near

    def count_dial(self, source: MemoryHost, address: str, outcome: str) -> None:
        """Take note of a connection attempt's end."""
        self.stats.dials[outcome] += 1
        self.trace.add(self.now(), "d", source.label, address, outcome)

    # --- what the network does ---------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """What carries deliveries: the simulation's clock, or a task where another clock runs."""
        if self._plan is None:
            clock = trio.lowlevel.current_clock()
            if isinstance(clock, SimClock):
                self._plan, self.now = clock, clock.current_time
            else:
                self._plan = TaskPlan()
        return self._plan

    @property
    def latency_seconds(self) -> float:
        """One way between two machines with ordinary lines. Setting it makes every pair equally far apart."""
        nowhere = Place(0, 0.0)
        return self.model.one_way(self.seed, "", nowhere, "", nowhere)

    @latency_seconds.setter
    def latency_seconds(self, seconds: float) -> None:
        self.set_model(flat(seconds))

    def set_model(self, model: LatencyModel) -> None:
        """Change how far apart machines are, from the next delivery on."""
        self.model = model
        self._latencies.clear()
        for host in self.hosts.values():
            host.place = model.place(self.seed, host.name)
        for host in self.hosts.values():
            for stream in host.streams.values():
                stream.update_latency()

    def latency_between(self, source: MemoryHost, target: MemoryHost) -> float:
        """Give a pair's one-way delay in seconds."""
        pair = (source.number, target.number) if source.number < target.number else (target.number, source.number)
        found = self._latencies.get(pair)
        if found is None:
            if len(self._latencies) >= _LATENCIES_MAX:
                self._latencies.clear()
            found = self._latencies[pair] = self.model.one_way(self.seed, source.name, source.place, target.name, target.place)
        return found

    def count_bytes(self, size: int) -> None:
        """Take note of bytes that travel with those that were sent just before."""
        self.stats.stream_bytes += size

    def arrival(self, pipe: Pipe, size: int, now: float) -> float:
        """Give when bytes that are sent now arrive, by everything that delays them."""
        stats = self.stats
        stats.stream_bytes += size
        stats.deliveries += 1
        source, target = pipe.source, pipe.target
        delay = pipe.latency_seconds
        if self.model.jitter:
            # Exponential: the queues of routers on the way.
            delay -= delay * self.model.jitter * math.log(1 - pipe.draws.uniform())
        if self.reordering and pipe.draws.uniform() < self.reordering:
            delay += pipe.latency_seconds * _OVERTAKEN_FACTOR * pipe.draws.uniform()
        arrival = now + delay + source.delay_seconds + target.delay_seconds
        if self.bandwidth_bytes_per_second != math.inf:
            arrival = self._queue(source, target, size, now, delay)
        if self._clogs:
            arrival = max(arrival, self._clogs.get((source.number, target.number), 0.0))
        return arrival

    def is_cut(self, source: MemoryHost, target: MemoryHost) -> bool:
        """Say whether nothing passes from one machine to another."""
        return any(cut(source, target) for cut in self.cuts)

    def partition(self, groups: Iterable[Iterable[str]]) -> None:
        """Let nothing pass between machines of different groups, in both directions; machines in no group are a group too."""
        side = {name: number for number, group in enumerate(groups, 1) for name in group}
        self.cuts.append(lambda source, target: side.get(source.name, 0) != side.get(target.name, 0))

    def cut(self, sources: Iterable[str], targets: Iterable[str]) -> None:
        """Let nothing pass from some machines to others; the other direction stays open."""
        here, there = frozenset(sources), frozenset(targets)
        self.cuts.append(lambda source, target: source.name in here and target.name in there)

    def heal(self) -> None:
        """End every cut and clog; what was held back goes on its way."""
        self.cuts.clear()
        self._clogs.clear()
        waiting, self.held_back = self.held_back, {}
        for pipe in waiting.values():
            pipe.release()

    def clog(self, source: str, target: str, seconds: float) -> None:
        """Let nothing arrive from one machine at another for so long; then everything at once."""
        pair = self.hosts[source].number, self.hosts[target].number
        self._clogs[pair] = self.now() + seconds

    def reset_sender(self, pipe: Pipe) -> None:
        """Bytes came to a machine that knows nothing of the connection: it answers with a reset, if it is on."""
        source, target = pipe.source, pipe.target
        if not target.is_on or pipe.is_broken or self.is_cut(target, source):
            return
        self.plan.call_at(self.now() + 2 * pipe.latency_seconds, lambda: _reset(pipe))

    def reset_peer(self, stream: MemoryStream) -> None:
        """A machine ends a connection by a reset, which arrives unless the way is cut."""
        pipe = stream.outgoing
        if not self.is_cut(pipe.source, pipe.target):
            self.plan.call_at(self.now() + pipe.latency_seconds, stream.break_off)

    async def wait(self, seconds: float) -> None:
        """Sleep for the cost of one delivery."""
        task: trio.lowlevel.Task | None = trio.lowlevel.current_task()

        def wake() -> None:
            if task is not None:
                trio.lowlevel.reschedule(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            nonlocal task
            task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self.plan.call_at(self.now() + seconds, wake)
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _join(self, source: MemoryHost, target: MemoryHost, address: str, listener: MemoryListener) -> MemoryStream:
        port = self.free_port()
        self._serial += 2
        there = Pipe(self, self._serial, source, target)
        back = Pipe(self, self._serial + 1, target, source)
        near = MemoryStream(back, there, f"{source.name}:{port}", address)
        listener.offer(MemoryStream(there, back, address, source.nat.seen_address(port, address)))
        return near

    def _queue(self, source: MemoryHost, target: MemoryHost, size: int, now: float, delay: float) -> float:
        """Bytes leave one line after the other, and come in so too."""
        seconds = size / self.bandwidth_bytes_per_second
        source.leaves_at = max(now + source.delay_seconds, source.leaves_at) + seconds
        target.comes_at = max(source.leaves_at + delay + target.delay_seconds, target.comes_at + seconds)
        return target.comes_at


def _reset(pipe: Pipe) -> None:
    stream = pipe.source.streams.get(pipe.serial)
    pipe.break_off()
    if stream is not None:
        stream.reset()
