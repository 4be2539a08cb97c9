"""The transport's service: listens, dials, shakes hands, and keeps one link per peer.

Which of two sessions with the same peer survives is a pure function of what both sides know (`Precedence`), so that both
keep the same one however their messages cross. The one that loses finishes what it has in flight.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

import trio

from p2pnode.crypto.keys import Identity
from p2pnode.crypto.noise import preferred_suite
from p2pnode.environment import ByteStream, Environment, Listener
from p2pnode.errors import ProtocolViolation, Refused, Unreachable
from p2pnode.ids import NodeId
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.dispatch import LinkSurroundings
from p2pnode.transport.handshake import Established, Handshake, Introduction, Peer, refusal
from p2pnode.transport.limits import BufferBudget, ConnectionGate, Limits
from p2pnode.transport.link import Link
from p2pnode.transport.requests import Router
from p2pnode.wire.version import SPOKEN, VersionRange

# How often time-outs and probes are looked at; every one of them is many times longer.
_TICK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """What the owner may set. listen: `host:port`, port 0 picks one. addresses: what peers are told; empty: what is bound.

    suite: 1 AES-GCM, 2 ChaCha20-Poly1305, 0 what suits the processor; only for dialling, both are always accepted.
    exempt_private: loopback and private addresses are free of per-address limits. puzzle_bits: of peers' identities.
    strict: a bug met while serving a peer stops the node (tests, simulations) instead of costing that link.
    """

    listen: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    agent: str = "p2pnode"
    features: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    versions: VersionRange = SPOKEN
    suite: int = 0
    exempt_private: bool = True
    puzzle_bits: int = 0
    strict: bool = False


class Precedence(Enum):
    """What becomes of a new session when there is one with the same peer already."""

    REPLACE = "the new one takes over; the old one finishes"
    RETIRE = "the old one stays; the new one finishes"
    RESTARTED = "the peer's process is another one: the old session ends at once"


def precedence(own: bytes, existing: Peer, new: Peer) -> Precedence:
    """Decide between two sessions with one peer, the same on both sides.

    Dialled from both sides at once: the one that the smaller node id dialled stays. Dialled twice by the same side: the
    newer one, because nobody dials whom it still has. Another instance: the peer was restarted, or two daemons share its
    identity; then each hears DUPLICATE_IDENTITY.
    """
    if existing.instance != new.instance:
        return Precedence.RESTARTED
    if existing.inbound == new.inbound:
        return Precedence.REPLACE
    smaller_is_peer = new.node_id < own
    return Precedence.REPLACE if new.inbound == smaller_is_peer else Precedence.RETIRE


class TransportService:
    """All links of one node. on_link_up and on_link_down are called in pairs, with one link up per peer at any time."""

    def __init__(
        self,
        environment: Environment,
        identity: Identity,
        network_id: bytes,
        settings: TransportSettings,
        metrics: Metrics,
        router: Router,
    ) -> None:
        self.on_link_up: Callable[[Link], None] = lambda link: None
        self.on_link_down: Callable[[Link, Reason], None] = lambda link, reason: None
        self.on_violation: Callable[[bytes, Reason], None] = lambda node_id, reason: None
        self.before_flush: Callable[[], None] = lambda: None
        self._environment = environment
        self._identity = identity
        self._network_id = network_id
        self._settings = settings
        self._metrics = metrics
        limits = self._limits = settings.limits
        self._around = LinkSurroundings(
            limits, metrics, BufferBudget(limits.buffer_bytes_max, metrics), environment.clock, router, settings.strict,
            lambda node_id, reason: self.on_violation(node_id, reason),
            lambda: self.before_flush(),
        )  # fmt: skip
        self._instance = environment.entropy.token(16).hex()
        self._suite = settings.suite or preferred_suite()
        self._links: dict[NodeId, Link] = {}
        self._all: set[Link] = set()
        self._dialling: dict[NodeId, trio.Event] = {}
        self._listeners: list[Listener] = []
        self._gate: ConnectionGate | None = None
        self._nursery: trio.Nursery | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """What peers are told: the settings' addresses, or what is bound."""
        return self._settings.addresses or self.bound_addresses

    @property
    def bound_addresses(self) -> tuple[str, ...]:
        """`host:port` of every listener, in the settings' order."""
        return tuple(listener.address for listener in self._listeners)

    @property
    def instance(self) -> str:
        """A value that is new each time this service is made."""
        return self._instance

    @property
    def buffered_bytes(self) -> int:
        """Bytes held for peers now, of `limits.buffer_bytes_max`."""
        return self._around.budget.used

    def links(self) -> Mapping[NodeId, Link]:
        """Give the link that is up, per peer: a live, read-only view."""
        return MappingProxyType(self._links)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, serve and keep time until cancelled; then say goodbye on every link. Raises ConfigError at the start."""
        clock = self._environment.clock
        self._gate = ConnectionGate(self._limits, self._metrics, self._settings.exempt_private, clock.monotonic())
        try:
            for address in self._settings.listen:
                self._listeners.append(await self._environment.network.listen(address))
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for listener in self._listeners:
                    nursery.start_soon(self._listen, listener)
                nursery.start_soon(self._keep_time)
                task_status.started()
        finally:
            self._nursery = None
            listeners, self._listeners = self._listeners, []
            with trio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()

    async def connect(self, addresses: Sequence[str], expected: NodeId | None = None) -> Link:
        """Give the open link with a peer, or dial its addresses in turn until one answers.

        expected: who must answer; None takes whoever does. Concurrent calls for one peer share one dial.
        Raises Unreachable when no address leads to the peer, ProtocolViolation when the last one that answered broke the
        protocol (WRONG_PEER, WRONG_NETWORK, WRONG_VERSION, SELF_DIAL, DUPLICATE_IDENTITY ...), Refused at our own limit of
        connections. Cancelled: the half-open connection is closed; a finished link stays.
        """
        if expected is None:
            return await self._dial_any(addresses, None)
        if expected == self._identity.node_id:
            raise ProtocolViolation(Reason.SELF_DIAL, "this is the node itself")
        while expected not in self._links:
            other = self._dialling.get(expected)
            if other is not None:
                await other.wait()
                if expected not in self._links:
                    raise Unreachable("another attempt at the same peer has just failed")
                continue
            done = self._dialling[expected] = trio.Event()
            try:
                return await self._dial_any(addresses, expected)
            finally:
                del self._dialling[expected]
                done.set()
        await trio.lowlevel.checkpoint()
        return self._links[expected]

    # --- dialling ----------------------------------------------------------------------------------------------------

    async def _dial_any(self, addresses: Sequence[str], expected: NodeId | None) -> Link:
        violation: ProtocolViolation | None = None
        failures = []
        for address in addresses:
            try:
                return await self._dial(address, expected)
            except ProtocolViolation as error:
                violation = error
                self._count_failure(error)
            except Unreachable as error:
                failures.append(str(error))
            if expected is not None and expected in self._links:
                return self._links[expected]
        if violation is not None:
            raise violation
        raise Unreachable("; ".join(failures) or "no address is known for this peer")

    async def _dial(self, address: str, expected: NodeId | None) -> Link:
        gate, nursery = self._gate, self._nursery
        if gate is None or nursery is None:
            raise Unreachable("this node's transport is not running")
        gate.dial()
        stream: ByteStream | None = None
        adopted = False
        try:
            with trio.move_on_after(self._limits.dial_seconds):
                stream = await self._environment.network.dial(address)
            if stream is None:
                self._metrics.add("limit_hits_total", "dial_seconds")
                raise Unreachable(f"{address}: no answer within {self._limits.dial_seconds:g} s")
            handshake = self._handshake(stream, True, expected)
            established, last = await self._shake_as_initiator(stream, handshake, address)
            node_id = established.peer.node_id
            existing = self._links.get(node_id)
            if existing is not None and self._settle(existing.peer, established.peer) is Precedence.RETIRE:
                # The peer's own dial has won meanwhile. Without message 3 the peer never sees this session.
                return existing
            _tell(stream, last)
            link = Link(stream, established, handshake.leftover, self._around)
            nursery.start_soon(self._drive_outbound, link)
            adopted = True
            self._adopt(link)
            return link
        finally:
            if not adopted:
                gate.hang_up()
                if stream is not None:
                    with trio.CancelScope(shield=True):
                        await stream.aclose()

    async def _shake_as_initiator(self, stream: ByteStream, handshake: Handshake, address: str) -> tuple[Established, bytes]:
        """Shake hands up to the last message, which is given back unsent."""
        established: Established | None = None
        last = b""
        with trio.move_on_after(self._limits.handshake_seconds):
            await _send_all(stream, handshake.start())
            last = await _receive_handshake(stream, handshake)
            established = handshake.established
        if established is None:
            self._metrics.add("limit_hits_total", "handshake_seconds")
            raise Unreachable(f"{address}: the handshake took longer than {self._limits.handshake_seconds:g} s")
        return established, last

    async def _drive_outbound(self, link: Link) -> None:
        try:
            await self._drive(link)
        finally:
            if self._gate is not None:
                self._gate.hang_up()

    # --- answering ---------------------------------------------------------------------------------------------------

    async def _listen(self, listener: Listener) -> None:
        gate, nursery = self._gate, self._nursery
        while gate is not None and nursery is not None:
            try:
                stream = await listener.accept()
            except Unreachable:
                return
            try:
                gate.admit(stream.remote_address, self._environment.clock.monotonic())
            except Refused as error:
                self._metrics.add("refusals_total", error.reason.value)
                _tell(stream, refusal(error.reason))
                await stream.aclose()
                continue
            nursery.start_soon(self._answer, stream, gate)

    async def _answer(self, stream: ByteStream, gate: ConnectionGate) -> None:
        """Shake hands with whoever has connected, and drive the link if it is somebody."""
        link: Link | None = None
        half_open = True
        try:
            established, leftover = await self._shake_as_responder(stream)
            gate.verified()
            half_open = False
            if established is not None:
                link = Link(stream, established, leftover, self._around)
                self._adopt(link)
                await self._drive(link)
        finally:
            if half_open:
                gate.verified()
            gate.leave(stream.remote_address)
            if link is None:
                with trio.CancelScope(shield=True):
                    await stream.aclose()

    async def _shake_as_responder(self, stream: ByteStream) -> tuple[Established | None, bytes]:
        handshake = self._handshake(stream, False, None)
        limit = "first_byte_seconds"
        try:
            with trio.move_on_after(self._limits.handshake_seconds) as whole:
                first = bytearray(2048)
                count = 0
                with trio.move_on_after(self._limits.first_byte_seconds):
                    count = await stream.receive_into(memoryview(first))
                    limit = "handshake_seconds"
                if limit == "handshake_seconds":
                    if count == 0:
                        raise Unreachable("closed before it said anything")
                    await _send_all(stream, handshake.receive(first[:count]))
                    await _send_all(stream, await _receive_handshake(stream, handshake))
            if handshake.established is not None and not whole.cancelled_caught:
                return handshake.established, handshake.leftover
            self._metrics.add("limit_hits_total", limit)
            self._metrics.add("handshakes_failed_total", Reason.TOO_SLOW.value)
        except ProtocolViolation as error:
            self._count_failure(error)
            if handshake.is_in_the_clear:
                _tell(stream, refusal(error.reason))
        except Unreachable:
            self._metrics.add("handshakes_failed_total", Reason.CONNECTION_LOST.value)
        return None, b""

    # --- links -------------------------------------------------------------------------------------------------------

    def _handshake(self, stream: ByteStream, initiator: bool, expected: NodeId | None) -> Handshake:
        settings = self._settings
        introduction = Introduction(
            identity=self._identity,
            network_id=self._network_id,
            instance=self._instance,
            versions=settings.versions,
            features=settings.features,
            agent=settings.agent,
            addresses=self.addresses[:8],
            puzzle_bits=settings.puzzle_bits,
        )
        return Handshake(
            introduction,
            initiator=initiator,
            ephemeral=self._environment.entropy.token(32),
            seen_address=stream.remote_address,
            suite=self._suite,
            expected=expected,
            message_bytes_max=self._limits.handshake_message_bytes_max,
        )

    def _count_failure(self, error: ProtocolViolation) -> None:
        self._metrics.add("handshakes_failed_total", error.reason.value)
        if error.reason is Reason.TOO_LARGE:
            self._metrics.add("limit_hits_total", "handshake_message_bytes_max")

    def _adopt(self, link: Link) -> None:
        """Enter a new link and settle it with one that is there already."""
        self._all.add(link)
        self._metrics.add("connections_total", "inbound" if link.peer.inbound else "outbound")
        self._metrics.set("connections_open", len(self._all))
        node_id = link.peer.node_id
        existing = self._links.get(node_id)
        if existing is not None:
            choice = self._settle(existing.peer, link.peer)
            if choice is Precedence.RETIRE:
                link.retire(existing)
                return
            self._down(existing, Reason.DUPLICATE_SESSION if choice is Precedence.REPLACE else Reason.DUPLICATE_IDENTITY)
            if choice is Precedence.REPLACE:
                link.pinned = existing.pinned
                existing.retire(link)
            else:
                existing.close(Reason.DUPLICATE_IDENTITY)
        self._links[node_id] = link
        self.on_link_up(link)

    def _settle(self, existing: Peer, new: Peer) -> Precedence:
        return precedence(self._identity.node_id, existing, new)

    def _down(self, link: Link, reason: Reason) -> None:
        if self._links.get(link.peer.node_id) is link:
            del self._links[link.peer.node_id]
            self.on_link_down(link, reason)

    async def _drive(self, link: Link) -> None:
        try:
            await link.run()
        finally:
            self._all.discard(link)
            self._metrics.set("connections_open", len(self._all))
            self._down(link, link.closed or Reason.CONNECTION_LOST)

    async def _keep_time(self) -> None:
        while True:
            await trio.sleep(_TICK_SECONDS)
            now = self._environment.clock.monotonic()
            in_flight = 0
            for link in list(self._all):
                link.tick(now)
                in_flight += link.answering
            self._metrics.set("requests_in_flight", in_flight)


def _tell(stream: ByteStream, text: bytes) -> None:
    """Say why, if the other side still listens."""
    try:
        stream.send_nowait((text,))
    except Unreachable:
        return


async def _send_all(stream: ByteStream, data: bytes) -> None:
    """Send a few hundred bytes during the handshake."""
    view = memoryview(data)
    while view:
        view = view[stream.send_nowait((view,)) :]
        if view:
            await stream.wait_writable()


async def _receive_handshake(stream: ByteStream, handshake: Handshake) -> bytes:
    """Receive until the handshake is established; give what it wants to send last. Raises Unreachable at an early end."""
    buffer = bytearray(2048)
    answer = b""
    while handshake.established is None:
        if answer:
            await _send_all(stream, answer)
        count = await stream.receive_into(memoryview(buffer))
        if count == 0:
            raise Unreachable("the peer closed the connection during the handshake")
        answer = handshake.receive(buffer[:count])
    return answer
