"""Opens verified sessions to a peer that may be at several addresses: happy eyeballs (RFC 8305), through the handshake.

Only the handshake says who is there, so the race runs to its end: an address where somebody else answers loses. The winner's
last handshake message is left to the caller; a loser's is never sent, so a peer sees one session however many addresses it
has.
"""

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import trio

from p2pnode.environment import ByteStream, Network
from p2pnode.errors import PeerError, ProtocolViolation, Refused, Unreachable
from p2pnode.ids import NodeId
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.handshake import Established, Handshake
from p2pnode.transport.limits import ConnectionGate, Limits

MakeHandshake = Callable[[ByteStream, bool, NodeId | None], Handshake]


@dataclass(frozen=True, slots=True)
class Opened:
    """A verified peer at the other end of a stream, and what still has to be sent and was already received.

    last: the handshake's last message; unsent, so far, the peer knows of no session. leftover: the session's first bytes.
    """

    stream: ByteStream
    established: Established
    last: bytes
    leftover: bytes


class _Race:
    """What the attempts at one peer know of each other. ended: set when the next of the running ones ends."""

    __slots__ = ("ended", "failures", "opened", "running", "violation")

    def __init__(self) -> None:
        self.opened: Opened | None = None
        self.violation: ProtocolViolation | None = None
        self.failures: list[str] = []
        self.running = 0
        self.ended = trio.Event()

    def lost(self) -> PeerError:
        """Give the error that says most about why nothing was opened."""
        return self.violation or Unreachable("; ".join(self.failures) or "no address is known for this peer")

    def end(self) -> None:
        """Note that an attempt has ended."""
        self.running -= 1
        ended, self.ended = self.ended, trio.Event()
        ended.set()


class Dialler:
    """Dials for one node. Every session it opens holds one outbound place of the gate, which the caller gives back.

    make_handshake: gives the initiator's side for a stream and the expected peer.
    """

    def __init__(
        self, network: Network, gate: ConnectionGate, limits: Limits, metrics: Metrics, make_handshake: MakeHandshake
    ) -> None:
        self._network = network
        self._gate = gate
        self._limits = limits
        self._metrics = metrics
        self._make_handshake = make_handshake

    async def open(
        self, addresses: Sequence[str], expected: NodeId | None, is_moot: Callable[[], bool] = lambda: False
    ) -> Opened | None:
        """Give the first session that opens: the next address is tried when one fails, or has not answered within the stagger.

        is_moot: asked after each failure whether a session is still wanted; if not, None is given. Raises Refused when our own
        limit of connections allows no attempt at all, and when nothing opens the last ProtocolViolation, else Unreachable with
        each failure. Cancelled: nothing stays open.
        """
        race = _Race()
        order = dial_order(addresses)
        if order:
            self._gate.dial()
        if len(order) == 1:
            await self._attempt(race, order[0], expected)
        elif order:
            try:
                await self._run(race, order, expected, is_moot)
            except BaseException:  # cancelled at the very moment of success: nobody will take what was opened
                if race.opened is not None:
                    self.close(race.opened.stream)
                raise
        if race.opened is None and not is_moot():
            raise race.lost()
        return race.opened

    async def _run(self, race: _Race, order: list[str], expected: NodeId | None, is_moot: Callable[[], bool]) -> None:
        async with trio.open_nursery() as nursery:

            async def compete(address: str, ended: trio.Event) -> None:
                await self._attempt(race, address, expected)
                if race.opened is not None or is_moot():
                    nursery.cancel_scope.cancel()
                race.end()
                ended.set()

            for address in order:
                while address != order[0] and not self._has_place():
                    if race.running == 0:
                        return
                    await race.ended.wait()
                ended = trio.Event()
                race.running += 1
                nursery.start_soon(compete, address, ended)
                with trio.move_on_after(self._limits.dial_stagger_seconds):
                    await ended.wait()

    def _has_place(self) -> bool:
        """Take a place for one more attempt. It closes no idle session: a peer with eight dead addresses is not worth eight."""
        try:
            self._gate.dial(may_make_room=False)
        except Refused:
            return False
        return True

    async def _attempt(self, race: _Race, address: str, expected: NodeId | None) -> None:
        """Try one address from a place that was taken; the outcome goes into the race, unless another has won meanwhile."""
        stream: ByteStream | None = None
        limits = self._limits
        try:
            with trio.move_on_after(limits.dial_seconds) as patience:
                stream = await self._network.dial(address)
                patience.deadline = trio.current_time() + limits.handshake_seconds
                opened = await self._shake(stream, expected)
                if race.opened is None:
                    race.opened = opened
            if stream is None:
                self._metrics.add("limit_hits_total", "dial_seconds")
                raise Unreachable(f"{address}: no answer within {limits.dial_seconds:g} s")
            if patience.cancelled_caught:
                self._metrics.add("limit_hits_total", "handshake_seconds")
                raise Unreachable(f"{address}: the handshake took longer than {limits.handshake_seconds:g} s")
        except ProtocolViolation as error:
            race.violation = error
            count_failure(self._metrics, error)
        except Unreachable as error:
            race.failures.append(str(error))
        finally:
            if race.opened is None or race.opened.stream is not stream:
                self.close(stream)

    def close(self, stream: ByteStream | None) -> None:
        """Give back the place of a session that nobody takes, and close its stream."""
        self._gate.hang_up()
        if stream is not None:
            stream.close()

    async def _shake(self, stream: ByteStream, expected: NodeId | None) -> Opened:
        """Shake hands up to the last message, which stays unsent."""
        handshake = self._make_handshake(stream, True, expected)
        await send_all(stream, handshake.start())
        last = await receive_handshake(stream, handshake)
        assert handshake.established is not None, "receiving goes on until it is"
        return Opened(stream, handshake.established, last, handshake.leftover)


def dial_order(addresses: Sequence[str]) -> list[str]:
    """Give the addresses, each once, in the order in which to try them.

    The caller's first stays first: the peer book puts there where the peer was last reached. Behind it the families take
    turns, IPv6 before IPv4 (RFC 8305 section 4), so that one broken family costs one stagger and not one for each address.
    """
    first, *others = dict.fromkeys(addresses) or [""]
    if not first:
        return []
    if not others:
        return [first]
    six = [address for address in others if _is_six(address)]
    four = [address for address in others if not _is_six(address)]
    pairs = zip_longest(four, six) if _is_six(first) else zip_longest(six, four)
    return [first, *(address for pair in pairs for address in pair if address)]


def _is_six(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def count_failure(metrics: Metrics, error: ProtocolViolation) -> None:
    """Count a handshake that broke the protocol."""
    metrics.add("handshakes_failed_total", error.reason.value)
    if error.reason is Reason.TOO_LARGE:
        metrics.add("limit_hits_total", "handshake_message_bytes_max")


def tell(stream: ByteStream, text: bytes) -> None:
    """Say a last word, if the other side still listens."""
    try:
        stream.send_nowait((text,))
    except Unreachable:
        return


async def send_all(stream: ByteStream, data: bytes) -> None:
    """Send a few hundred bytes during the handshake."""
    view = memoryview(data)
    while view:
        view = view[stream.send_nowait((view,)) :]
        if view:
            await stream.wait_writable()


async def receive_handshake(stream: ByteStream, handshake: Handshake) -> bytes:
    """Receive until the handshake is established; give what it wants to send last. Raises Unreachable at an early end."""
    buffer = bytearray(2048)
    answer = b""
    while handshake.established is None:
        if answer:
            await send_all(stream, answer)
        count = await stream.receive_into(memoryview(buffer))
        if count == 0:
            raise Unreachable("the peer closed the connection during the handshake")
        answer = handshake.receive(buffer[:count])
    return answer
