"""An in-memory network behind `environment.Network`: ordered byte streams with a latency and bounded buffers.

Bytes arrive `latency_seconds` after they were sent; a sender may have `buffer_bytes` on the way or unread, like a socket.
A host dials under its own name, so that per-address limits and diversity rules see what they would see on the internet.
"""

import math
from collections import deque
from collections.abc import Sequence

import trio

from p2pnode.environment import Buffer
from p2pnode.errors import ConfigError, Unreachable

_FIRST_FREE_PORT = 40_000
_BACKLOG = 128


class _Pipe:
    """One direction: chunks with the time at which they arrive."""

    def __init__(self, latency_seconds: float, buffer_bytes: int) -> None:
        self.latency_seconds = latency_seconds
        self.capacity = buffer_bytes
        self.held = 0
        self.chunks: deque[tuple[float, memoryview]] = deque()
        self.ended_at = math.inf
        self.is_broken = False
        self.changed = trio.Event()

    def notify(self) -> None:
        changed, self.changed = self.changed, trio.Event()
        changed.set()


class MemoryStream:
    """One end of an in-memory connection, as `environment.ByteStream`."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe, local_address: str, remote_address: str) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._local_address = local_address
        self._remote_address = remote_address
        self._is_closed = False

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
            if size == 0:
                break
            pipe.chunks.append((trio.current_time() + pipe.latency_seconds, memoryview(bytes(memoryview(chunk)[:size]))))
            pipe.held += size
            sent += size
        if sent:
            pipe.notify()
        return sent

    async def wait_writable(self) -> None:
        """Wait for room. Raises Unreachable when the stream is broken meanwhile."""
        pipe = self._outgoing
        while pipe.held >= pipe.capacity:
            if self._is_closed or pipe.is_broken:
                raise Unreachable(f"the connection to {self._remote_address} broke")
            await pipe.changed.wait()
        await trio.lowlevel.checkpoint()

    async def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes that have arrived by now; 0 at the end. Raises Unreachable after `aclose` and a break."""
        pipe = self._incoming
        while True:
            if self._is_closed or pipe.is_broken:
                raise Unreachable(f"the connection to {self._remote_address} broke")
            arrival = pipe.chunks[0][0] if pipe.chunks else pipe.ended_at
            if arrival <= trio.current_time():
                break
            changed = pipe.changed
            with trio.move_on_at(arrival):
                await changed.wait()
        await trio.lowlevel.checkpoint()
        return self._take(buffer)

    def break_off(self) -> None:
        """Cut the connection as a crashed machine or a reset would: both ends get Unreachable, what was unread is lost."""
        for pipe in (self._incoming, self._outgoing):
            pipe.is_broken = True
            pipe.notify()

    async def aclose(self) -> None:
        """Close: the other end reads what is on its way and then the end. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._outgoing.ended_at = trio.current_time() + self._outgoing.latency_seconds
            self._incoming.is_broken = True
            self._outgoing.notify()
            self._incoming.notify()
        await trio.lowlevel.checkpoint()

    def _take(self, buffer: memoryview) -> int:
        pipe = self._incoming
        taken, now = 0, trio.current_time()
        while pipe.chunks and pipe.chunks[0][0] <= now and taken < len(buffer):
            arrival, chunk = pipe.chunks.popleft()
            size = min(len(chunk), len(buffer) - taken)
            buffer[taken : taken + size] = chunk[:size]
            taken += size
            if size < len(chunk):
                pipe.chunks.appendleft((arrival, chunk[size:]))
        pipe.held -= taken
        if taken:
            pipe.notify()
        return taken


class MemoryListener:
    """A listening place of the in-memory network, as `environment.Listener`."""

    def __init__(self, world: "MemoryNetwork", address: str) -> None:
        self._world = world
        self._address = address
        self.send, self._receive = trio.open_memory_channel[MemoryStream](_BACKLOG)

    @property
    def address(self) -> str:
        """`host:port` bound."""
        return self._address

    async def accept(self) -> MemoryStream:
        """Wait for a connection. Raises Unreachable after `aclose`."""
        try:
            return await self._receive.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError) as error:
            raise Unreachable(f"{self._address} is closed") from error

    async def aclose(self) -> None:
        """Stop listening. Idempotent."""
        self._world.forget(self._address)
        self.send.close()
        self._receive.close()
        await trio.lowlevel.checkpoint()


class MemoryNetwork:
    """The wires between all simulated hosts. `host(name)` gives what one machine sees of it.

    latency_seconds: one way, for every pair. buffer_bytes: per direction of a connection.
    """

    def __init__(self, latency_seconds: float = 0.001, buffer_bytes: int = 262_144) -> None:
        self.latency_seconds = latency_seconds
        self.buffer_bytes = buffer_bytes
        self._listeners: dict[str, MemoryListener] = {}
        self._next_port = _FIRST_FREE_PORT

    def host(self, name: str) -> "MemoryHost":
        """Give one machine's view; name: its address, such as `10.0.0.7`."""
        return MemoryHost(self, name)

    def free_port(self) -> int:
        """Give a port that was not given before."""
        self._next_port += 1
        return self._next_port

    def bind(self, address: str) -> MemoryListener:
        """Listen on a full address. Raises ConfigError when it is taken."""
        if address in self._listeners:
            raise ConfigError(f"cannot listen on {address}: it is in use")
        listener = self._listeners[address] = MemoryListener(self, address)
        return listener

    def forget(self, address: str) -> None:
        """Stop listening on an address."""
        self._listeners.pop(address, None)

    def connect(self, source: str, target: str) -> MemoryStream:
        """Join two addresses by a new connection. Raises Unreachable when nobody listens there or its queue is full."""
        listener = self._listeners.get(target)
        if listener is None:
            raise Unreachable(f"{target}: nobody listens there")
        there = _Pipe(self.latency_seconds, self.buffer_bytes)
        back = _Pipe(self.latency_seconds, self.buffer_bytes)
        try:
            listener.send.send_nowait(MemoryStream(there, back, target, source))
        except trio.WouldBlock as error:
            raise Unreachable(f"{target}: too many connections wait there") from error
        return MemoryStream(back, there, source, target)


class MemoryHost:
    """One machine's view of a MemoryNetwork, as `environment.Network`."""

    def __init__(self, world: MemoryNetwork, name: str) -> None:
        self._world = world
        self._name = name

    async def dial(self, address: str) -> MemoryStream:
        """Connect to `host:port` after one round trip. Raises Unreachable."""
        await trio.sleep(2 * self._world.latency_seconds)
        return self._world.connect(f"{self._name}:{self._world.free_port()}", address)

    async def listen(self, address: str) -> MemoryListener:
        """Listen on `host:port` under this machine's name; port 0 picks one. Raises ConfigError."""
        await trio.lowlevel.checkpoint()
        port = address.rpartition(":")[2]
        return self._world.bind(f"{self._name}:{self._world.free_port() if port == '0' else port}")
