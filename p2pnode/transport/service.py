"""The transport's service: listens, dials, shakes hands, and keeps one link per peer.

Which of two sessions with the same peer survives is a pure function of what both sides know (`Precedence`), so that both
keep the same one however their messages cross. The one that loses finishes what it has in flight.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from p2pnode.transport.dialling import Dialler, count_failure, receive_handshake, send_all, tell
from p2pnode.transport.dispatch import LinkSurroundings
from p2pnode.transport.handshake import Established, Handshake, Introduction, Peer, refusal
from p2pnode.transport.idle_order import IdleOrder
from p2pnode.transport.limits import BufferBudget, ConnectionGate, Limits
from p2pnode.transport.link import Link
from p2pnode.transport.pump import Turn
from p2pnode.transport.requests import Router
from p2pnode.wire.registry import Message
from p2pnode.wire.version import SPOKEN, VersionRange

# How often time-outs and probes are looked at: the longer pause while nothing stays in flight. Every one of them is several times
# longer.
_TICK_SECONDS = 1.0
_CALM_SECONDS = 5.0
# What the initiator of a session says that is not to become the link with its peer (`ask_aside`).
ASIDE = "aside"


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
    """All links of one node. on_link_up and on_link_down are called in pairs, with one link up per peer at any time.

    handshakes: makes one side of a handshake; a simulation gives one of its own.
    """

    def __init__(
        self,
        environment: Environment,
        identity: Identity,
        network_id: bytes,
        settings: TransportSettings,
        metrics: Metrics,
        router: Router,
        handshakes: Callable[..., Handshake] = Handshake,
    ) -> None:
        self.on_link_up: Callable[[Link], None] = lambda link: None
        self.on_link_down: Callable[[Link, Reason], None] = lambda link, reason: None
        self.on_violation: Callable[[bytes, Reason], None] = lambda node_id, reason: None
        self.before_flush: Callable[[], None] = lambda: None
        self.on_aside: Router = lambda incoming: incoming.refuse(Reason.UNKNOWN_MESSAGE)
        self._handshakes = handshakes
        self._environment = environment
        self._identity = identity
        self._network_id = network_id
        self._settings = settings
        self._metrics = metrics
        limits = self._limits = settings.limits
        self._around = LinkSurroundings(
            limits, metrics, BufferBudget(limits.buffer_bytes_max, metrics), environment.clock, router,
            Turn(limits.send_buffer_bytes), settings.strict,
            lambda node_id, reason: self.on_violation(node_id, reason),
            lambda: self.before_flush(),
        )  # fmt: skip
        self._around_aside = replace(self._around, router=lambda incoming: self.on_aside(incoming))
        self._instance = environment.entropy.token(16).hex()
        self._suite = settings.suite or preferred_suite()
        self._introductions: dict[tuple[str, ...], Introduction] = {}
        self._links: dict[NodeId, Link] = {}
        # In order of arrival, so that a simulation visits them in the same order in every run.
        self._all: dict[Link, None] = {}
        # Closed to make room, and still to say goodbye: their places are given away already.
        self._leaving: dict[Link, None] = {}
        self._idle_order = IdleOrder()
        self._dialling: dict[NodeId, trio.Event] = {}
        self._listeners: list[Listener] = []
        self._gate: ConnectionGate | None = None
        self._dialler: Dialler | None = None
        self._dialler_aside: Dialler | None = None
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
        gate = self._gate = ConnectionGate(self._limits, self._metrics, self._settings.exempt_private, clock.monotonic())
        gate.make_room = self._make_room
        network = self._environment.network
        self._dialler = Dialler(network, gate, self._limits, self._metrics, self._handshake)
        self._dialler_aside = Dialler(network, gate, self._limits, self._metrics, self._handshake_aside)
        try:
            for address in self._settings.listen:
                self._listeners.append(await self._environment.network.listen(address))
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(self._around.turn.run)
                for listener in self._listeners:
                    nursery.start_soon(self._listen, listener)
                nursery.start_soon(self._keep_time)
                task_status.started()
        finally:
            self._nursery = self._dialler = self._dialler_aside = None
            listeners, self._listeners = self._listeners, []
            with trio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()

    async def connect(self, addresses: Sequence[str], expected: NodeId | None = None) -> Link:
        """Give the open link with a peer, or dial its addresses, staggered, until one answers.

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

    async def ask_aside(self, address: str, expected: NodeId, message: Message) -> Message:
        """Dial a peer at this very address, beside whatever link stands with it, ask one thing there, and close it again.

        Such a session never becomes the link with the peer; at the other end its requests go to `on_aside` alone. Raises as
        `connect` and `Link.request` do. Cancelled: the session is closed.
        """
        dialler, nursery = self._dialler_aside, self._nursery
        if dialler is None or nursery is None:
            raise Unreachable("this node's transport is not running")
        opened = await dialler.open([address], expected)
        assert opened is not None, "nothing makes this opening moot"
        tell(opened.stream, opened.last)
        link = Link(opened.stream, opened.established, opened.leftover, self._around_aside)
        self._all[link] = None
        nursery.start_soon(self._drive_outbound, link)
        try:
            return (await link.request(message)).message
        finally:
            link.close(Reason.IDLE)

    # --- dialling ----------------------------------------------------------------------------------------------------

    async def _dial_any(self, addresses: Sequence[str], expected: NodeId | None) -> Link:
        dialler = self._dialler
        if dialler is None:
            raise Unreachable("this node's transport is not running")
        opened = await dialler.open(addresses, expected, lambda: expected in self._links)
        if opened is None:
            assert expected is not None, "an opening is moot only beside a link"
            return self._links[expected]
        existing = self._links.get(opened.established.peer.node_id)
        if existing is not None and self._settle(existing.peer, opened.established.peer) is Precedence.RETIRE:
            # The peer's own dial has won meanwhile. Without message 3 the peer never sees this session.
            dialler.close(opened.stream)
            return existing
        nursery = self._nursery
        if nursery is None:
            dialler.close(opened.stream)
            raise Unreachable("this node's transport has stopped")
        tell(opened.stream, opened.last)
        link = Link(opened.stream, opened.established, opened.leftover, self._around)
        nursery.start_soon(self._drive_outbound, link)
        self._adopt(link)
        return link

    async def _drive_outbound(self, link: Link) -> None:
        try:
            await self._drive(link)
        finally:
            if self._gate is not None and not self._has_left(link):
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
                tell(stream, refusal(error.reason))
                stream.close()
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
                is_aside = ASIDE in established.peer.features
                link = Link(stream, established, leftover, self._around_aside if is_aside else self._around)
                if is_aside:
                    self._all[link] = None
                else:
                    self._adopt(link)
                await self._drive(link)
        finally:
            if half_open:
                gate.verified()
            if link is None or not self._has_left(link):
                gate.leave(stream.remote_address)
            if link is None:
                stream.close()

    async def _shake_as_responder(self, stream: ByteStream) -> tuple[Established | None, bytes]:
        handshake = self._handshake(stream, False, None)
        limit = "first_byte_seconds"
        try:
            begun = trio.current_time()
            with trio.move_on_at(begun + self._limits.first_byte_seconds) as whole:
                first = bytearray(2048)
                count = await stream.receive_into(memoryview(first))
                limit, whole.deadline = "handshake_seconds", begun + self._limits.handshake_seconds
                if count == 0:
                    raise Unreachable("closed before it said anything")
                await send_all(stream, handshake.receive(first[:count]))
                await send_all(stream, await receive_handshake(stream, handshake))
            if handshake.established is not None and not whole.cancelled_caught:
                return handshake.established, handshake.leftover
            self._metrics.add("limit_hits_total", limit)
            self._metrics.add("handshakes_failed_total", Reason.TOO_SLOW.value)
        except ProtocolViolation as error:
            count_failure(self._metrics, error)
            if handshake.is_in_the_clear:
                tell(stream, refusal(error.reason))
        except Unreachable:
            self._metrics.add("handshakes_failed_total", Reason.CONNECTION_LOST.value)
        return None, b""

    # --- links -------------------------------------------------------------------------------------------------------

    def _handshake_aside(self, stream: ByteStream, initiator: bool, expected: NodeId | None) -> Handshake:
        return self._handshake(stream, initiator, expected, (ASIDE,))

    def _handshake(
        self, stream: ByteStream, initiator: bool, expected: NodeId | None, more_features: tuple[str, ...] = ()
    ) -> Handshake:
        return self._handshakes(
            self._introduction(more_features),
            initiator=initiator,
            ephemeral=self._environment.entropy.token(32),
            seen_address=stream.remote_address,
            suite=self._suite,
            expected=expected,
            message_bytes_max=self._limits.handshake_message_bytes_max,
        )

    def _introduction(self, more_features: tuple[str, ...]) -> Introduction:
        """Give what this node says of itself, made anew only when its addresses have changed."""
        settings, addresses = self._settings, self.addresses[:8]
        introduction = self._introductions.get(more_features)
        if introduction is None or introduction.addresses != addresses:
            introduction = self._introductions[more_features] = Introduction(
                identity=self._identity,
                network_id=self._network_id,
                instance=self._instance,
                versions=settings.versions,
                features=(*settings.features, *more_features),
                agent=settings.agent,
                addresses=addresses,
                puzzle_bits=settings.puzzle_bits,
            )
        return introduction

    def _adopt(self, link: Link) -> None:
        """Enter a new link and settle it with one that is there already."""
        self._all[link] = None
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

    def _make_room(self, only_inbound: bool) -> bool:
        """Close the link that has been idle longest and that nobody keeps, and give its place away at once."""
        latest = self._environment.clock.monotonic() - self._limits.evict_idle_seconds
        victim = self._idle_order.take(self._all, latest, only_inbound)
        if victim is None or self._gate is None:
            return False
        self._leaving[victim] = None
        if victim.peer.inbound:
            self._gate.leave(victim.peer.seen_address)
        else:
            self._gate.hang_up()
        self._metrics.add("limit_hits_total", "evict_idle_seconds")
        victim.close(Reason.IDLE)
        return True

    def _has_left(self, link: Link) -> bool:
        """Say whether a link's place was given away before its end."""
        if link in self._leaving:
            del self._leaving[link]
            return True
        return False

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
            self._all.pop(link, None)
            self._idle_order.forget(link)
            self._metrics.set("connections_open", len(self._all))
            self._down(link, link.closed or Reason.CONNECTION_LOST)

    async def _keep_time(self) -> None:
        pause = _TICK_SECONDS
        while True:
            await trio.sleep(pause)
            now = self._environment.clock.monotonic()
            pause = _CALM_SECONDS
            in_flight = 0
            for link in list(self._all):
                if link.due_at <= now:
                    link.tick(now)
                    in_flight += link.answering
                    if link.is_busy:
                        pause = _TICK_SECONDS
            self._metrics.set("requests_in_flight", in_flight)
