"""Simulated connections: two ends, two one-way pipes, each an ordered, reliable row of bytes with the network's delays.

What was sent stands in the pipe with the time at which it arrives; one entry in the clock's heap per arrival wakes whoever
reads. A pipe that a partition has cut keeps everything, as a sender's kernel would, and lets it go on when the cut heals.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import trio

from p2pnode.environment import Buffer
from p2pnode.errors import Unreachable

if TYPE_CHECKING:
    from p2pnode.sim.network import MemoryHost, MemoryNetwork

_MASK: Final = 2**64 - 1


class Draws:
    """Uniform draws of one connection or host: splitmix64, whose whole state is one integer.

    Its own for each, so that what one connection draws does not depend on what happens on another.
    """

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def uniform(self) -> float:
        """A float in [0, 1)."""
        self._state = value = (self._state + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((value ^ (value >> 31)) >> 11) / 2**53


class Pipe:
    """One direction of a connection. latency_seconds: of its pair of hosts; serial: unique, and the same in every run."""

    __slots__ = (
        "_arrival", "_sent_at", "capacity", "chunks", "draws", "held", "is_broken", "is_deaf", "is_held_back", "latency_seconds",
        "network", "reader", "serial", "source", "target", "writer",
    )  # fmt: skip

    def __init__(self, network: "MemoryNetwork", serial: int, source: "MemoryHost", target: "MemoryHost") -> None:
        self.network = network
        self.serial = serial
        self.source = source
        self.target = target
        self.capacity = network.buffer_bytes
        self.latency_seconds = network.latency_between(source, target)
        self.draws = Draws(network.seed * 1_000_003 + serial)
        # (arrival, bytes); no bytes are the end.
        self.chunks: list[tuple[float, memoryview]] = []
        self.held = 0
        # Broken: both ends know that it is over. Deaf: nobody reads at the other end, but this one does not know it yet.
        self.is_broken = False
        self.is_deaf = False
        # Something waits for a cut to heal: what follows waits behind it.
        self.is_held_back = False
        self.reader: trio.lowlevel.Task | None = None
        self.writer: trio.lowlevel.Task | None = None
        self._arrival = self._sent_at = -1.0

    def put(self, data: memoryview) -> None:
        """Send bytes on their way; none for the end."""
        self.held += len(data)
        network = self.network
        if self.is_held_back or (network.cuts and network.is_cut(self.source, self.target)):
            self.is_held_back = True
            network.held_back[self.serial] = self
            self.chunks.append((math.inf, data))
            return
        if self.is_deaf:
            network.reset_sender(self)
            return
        now = network.now()
        if now == self._sent_at and network.bandwidth_bytes_per_second == math.inf:
            # What is sent at one moment travels together, as it would in one packet.
            network.count_bytes(len(data))
        else:
            self._sent_at = now
            arrival = network.arrival(self, len(data), now)
            if arrival > self._arrival:
                self._arrival = arrival
                network.plan.call_at(arrival, self.wake_reader, self.serial)
        self.chunks.append((self._arrival, data))

    def release(self) -> None:
        """The cut has healed: what was held back goes on its way."""
        waiting = [data for arrival, data in self.chunks if arrival == math.inf]
        while self.chunks and self.chunks[-1][0] == math.inf:
            self.chunks.pop()
        self.is_held_back = False
        for data in waiting:
            self.held -= len(data)
            self.put(data)

    def wake_reader(self) -> None:
        """Something arrived."""
        task = self.reader
        if task is not None:
            self.reader = None
            trio.lowlevel.reschedule(task)

    def wake_writer(self) -> None:
        """There is room."""
        task = self.writer
        if task is not None:
            self.writer = None
            trio.lowlevel.reschedule(task)

    def break_off(self) -> None:
        """Both ends learn that it is over."""
        self.is_broken = True
        self.wake_reader()
        self.wake_writer()


class MemoryStream:
    """One end of a simulated connection, as `environment.ByteStream`."""

    __slots__ = ("_incoming", "_is_closed", "_local_address", "_outgoing", "_remote_address")

    def __init__(self, incoming: Pipe, outgoing: Pipe, local_address: str, remote_address: str) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._local_address = local_address
        self._remote_address = remote_address
        self._is_closed = False
        outgoing.source.streams[outgoing.serial] = self

    @property
    def local_address(self) -> str:
        """`host:port` of this end."""
        return self._local_address

    @property
    def remote_address(self) -> str:
        """`host:port` of the other end."""
        return self._remote_address

    def send_nowait(self, chunks: Sequence[Buffer]) -> int:
        """Copy as much as the buffer has room for. Raises Unreachable once either side has closed."""
        pipe = self._outgoing
        if self._is_closed or pipe.is_broken:
            raise Unreachable(f"the connection to {self._remote_address} broke")
        sent = 0
        for chunk in chunks:
            size = min(len(chunk), pipe.capacity - pipe.held)
            if size <= 0:
                break
            pipe.put(memoryview(bytes(memoryview(chunk)[:size])))
            sent += size
        return sent

    async def wait_writable(self) -> None:
        """Wait for room. Raises Unreachable when the stream is broken meanwhile."""
        pipe = self._outgoing
        while pipe.held >= pipe.capacity:
            if self._is_closed or pipe.is_broken:
                raise Unreachable(f"the connection to {self._remote_address} broke")
            pipe.writer = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._stop_writing)
        await trio.lowlevel.checkpoint()

    async def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes that have arrived by now; 0 at the end. Raises Unreachable after `aclose` and a break.

        Bytes that are there already are given without a wait; who reads on will come to the end of them.
        """
        await self.wait_readable()
        return self.receive_nowait(buffer)

    async def wait_readable(self) -> None:
        """Wait until bytes, or the end, have arrived. Raises Unreachable."""
        pipe = self._incoming
        while True:
            if self._is_closed or pipe.is_broken:
                raise Unreachable(f"the connection to {self._remote_address} broke")
            if pipe.chunks and pipe.chunks[0][0] <= pipe.network.now():
                return
            pipe.reader = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._stop_reading)

    def receive_nowait(self, buffer: memoryview) -> int:
        """Take what has arrived by now; 0 at the end, -1 when there is nothing. Raises Unreachable."""
        pipe = self._incoming
        if self._is_closed or pipe.is_broken:
            raise Unreachable(f"the connection to {self._remote_address} broke")
        now = pipe.network.now()
        return self._take(buffer, now) if pipe.chunks and pipe.chunks[0][0] <= now else -1

    def poll(self, buffer: memoryview, seconds: float) -> int:
        """Give -1: nothing arrives while a task runs."""
        return -1

    def break_off(self) -> None:
        """Cut the connection as a reset would: both ends get Unreachable, what was unread is lost."""
        self._incoming.break_off()
        self._outgoing.break_off()

    @property
    def outgoing(self) -> Pipe:
        """The direction in which this end sends."""
        return self._outgoing

    def reset(self) -> None:
        """The other end knows nothing of this connection: what has come may still be read, then it is broken."""
        if not self._incoming.chunks:
            self._incoming.break_off()

    def fall_silent(self) -> None:
        """This end is gone without a word, as at a power cut: the other one hears nothing until it sends."""
        self._is_closed = True
        incoming, outgoing = self._incoming, self._outgoing
        outgoing.source.streams.pop(outgoing.serial, None)
        incoming.is_deaf = True
        incoming.wake_reader()
        outgoing.wake_writer()

    def close(self) -> None:
        """Close: the other end reads what is on its way and then the end. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            incoming, outgoing = self._incoming, self._outgoing
            outgoing.source.streams.pop(outgoing.serial, None)
            if not (outgoing.is_broken or outgoing.is_deaf):
                outgoing.put(memoryview(b""))
            incoming.is_deaf = True
            incoming.wake_reader()
            outgoing.wake_writer()

    async def aclose(self) -> None:
        """Close, and let other tasks have a turn."""
        self.close()
        await trio.lowlevel.checkpoint()

    def update_latency(self) -> None:
        """The network's delays have changed."""
        pipe = self._outgoing
        pipe.latency_seconds = pipe.network.latency_between(pipe.source, pipe.target)

    def _take(self, buffer: memoryview, now: float) -> int:
        pipe = self._incoming
        chunks = pipe.chunks
        taken, room = 0, len(buffer)
        while chunks and taken < room:
            arrival, chunk = chunks[0]
            if arrival > now:
                break
            size = len(chunk)
            if size == 0:  # the end, which stays
                break
            if size > room - taken:
                size = room - taken
                chunks[0] = (arrival, chunk[size:])
                chunk = chunk[:size]
            else:
                del chunks[0]
            buffer[taken : taken + size] = chunk
            taken += size
        pipe.held -= taken
        if pipe.writer is not None:
            pipe.wake_writer()
        return taken

    def _stop_reading(self, _: object) -> trio.lowlevel.Abort:
        self._incoming.reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _stop_writing(self, _: object) -> trio.lowlevel.Abort:
        self._outgoing.writer = None
        return trio.lowlevel.Abort.SUCCEEDED


class MemoryListener:
    """A listening place of the simulated network, as `environment.Listener`."""

    def __init__(self, address: str, backlog: int, forget: Callable[[str], None]) -> None:
        self._address = address
        self._backlog = backlog
        self._forget = forget
        self._arrived: deque[MemoryStream] = deque()
        self._acceptor: trio.lowlevel.Task | None = None
        self._is_closed = False

    @property
    def address(self) -> str:
        """`host:port` bound."""
        return self._address

    @property
    def is_full(self) -> bool:
        """True if no more connections may wait here."""
        return len(self._arrived) >= self._backlog

    def offer(self, stream: MemoryStream) -> None:
        """A connection has arrived."""
        self._arrived.append(stream)
        self._wake()

    async def accept(self) -> MemoryStream:
        """Wait for a connection. Raises Unreachable after `aclose`."""
        while not self._is_closed:
            if self._arrived:
                return self._arrived.popleft()
            self._acceptor = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
        raise Unreachable(f"{self._address} is closed")

    def close(self) -> None:
        """Stop listening at once; connections that nobody took are reset."""
        if not self._is_closed:
            self._is_closed = True
            self._forget(self._address)
            while self._arrived:
                self._arrived.popleft().break_off()
            self._wake()

    async def aclose(self) -> None:
        """Stop listening. Idempotent."""
        self.close()
        await trio.lowlevel.checkpoint()

    def _wake(self) -> None:
        if self._acceptor is not None:
            task, self._acceptor = self._acceptor, None
            trio.lowlevel.reschedule(task)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._acceptor = None
        return trio.lowlevel.Abort.SUCCEEDED
