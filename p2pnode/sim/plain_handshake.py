"""Handshakes of a simulated network: the real one with a tap behind it, or one in the clear for large worlds.

The plain one is the same machine with the same three messages, checks and round trips, but the static keys, the signature, and
the two Diffie-Hellman operations of each side are left out, and the session behind it is not encrypted: it costs a tenth. Its
suite number is one that real nodes do not know, so that no real node ever talks to it.
"""

from typing import TYPE_CHECKING, Any, Final

from p2pnode.environment import Buffer
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.sim.frame_tap import FrameTap, PlainCipher
from p2pnode.transport.frames import ReceiveCipher, SendCipher
from p2pnode.transport.handshake import Established, Handshake, Introduction, NoiseState, Peer
from p2pnode.wire.messages.session import HandshakePayload

if TYPE_CHECKING:
    from p2pnode.sim.network import MemoryNetwork

PLAIN_SUITE: Final = 254
_NO_SIGNATURE: Final = bytes(64)


class SimulatedHandshakes:
    """Makes the handshakes of one network's nodes. is_plain: in the clear."""

    def __init__(self, network: "MemoryNetwork", *, is_plain: bool) -> None:
        self.network = network
        self._is_plain = is_plain
        self._kind = PlainHandshake if is_plain else TappedHandshake

    @property
    def cipher(self) -> str:
        """What protects the sessions: `noise`, or `plain` for nothing."""
        return "plain" if self._is_plain else "noise"

    def __call__(self, introduction: Introduction, **options: Any) -> Handshake:
        """Give one side of a handshake; options as of `Handshake`."""
        if self._is_plain:
            options["suite"] = PLAIN_SUITE
        handshake = self._kind(introduction, **options)
        handshake.network = self.network
        return handshake


class TappedHandshake(Handshake):
    """The real handshake; the network sees the frames of its session when they have been opened."""

    network: "MemoryNetwork"

    def establish(self, peer: Peer, noise: NoiseState) -> Established:
        """Give the two ciphers, the receiving one behind a tap."""
        established = super().establish(peer, noise)
        network = self.network
        own = network.labels.get(self.introduction.identity.node_id, "?")
        other = network.labels.get(peer.node_id, "?")
        tap = FrameTap(established.receiver, network, other, own, network.next_tap())
        return Established(peer, established.sender, tap)


class PlainHandshake(TappedHandshake):
    """The handshake in the clear: identities are only claimed."""

    suites = (PLAIN_SUITE,)

    def noise_state(self, preamble: bytes) -> NoiseState:
        """Give a state without keys."""
        return _PlainState()

    def signature(self) -> bytes:
        """Give the room of a signature."""
        return _NO_SIGNATURE

    def check_signature(self, noise: NoiseState, payload: HandshakePayload) -> None:
        """Believe the peer."""


class _PlainState:
    """Noise's part with nothing in it: messages are their payloads behind one byte."""

    def __init__(self) -> None:
        self.remote_static = bytes(32)

    def write_message(self, payload: bytes) -> bytes:
        return b"\0" + payload

    def read_message(self, message: Buffer) -> bytes:
        if not message or message[0] != 0:
            raise ProtocolViolation(Reason.BAD_HANDSHAKE, "not a message in the clear")
        return bytes(message[1:])

    def split(self) -> tuple[SendCipher, ReceiveCipher]:
        return PlainCipher(), PlainCipher()
