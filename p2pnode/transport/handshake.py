"""The handshake: a pure machine from raw bytes to two ciphers and a verified peer.

On the wire: the initiator's preamble (suite, oldest and newest version it speaks, a zero, four bytes that tell networks
apart), then three Noise XX messages, each behind a 2-byte size. The preamble and the whole network id are the prologue, so
whoever changes a byte of them breaks the handshake. A responder that cannot go on before keys exist answers with a size of
zero and a reason as text: a hint for people, believed by nobody.

Messages 2 and 3 carry a HandshakePayload, in which the Ed25519 identity signs the X25519 static key that Noise has just
proven. Nothing outside this file sees a peer before that signature, the expected node id and the version have been checked.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, Protocol

from p2pnode.crypto.hashing import document_hash
from p2pnode.crypto.keys import Identity, check_puzzle, node_id_of
from p2pnode.crypto.noise import SUITES, HandshakeState
from p2pnode.crypto.signing import verify
from p2pnode.environment import Buffer
from p2pnode.errors import ProtocolViolation
from p2pnode.ids import NodeId
from p2pnode.reasons import Reason
from p2pnode.transport.frames import ReceiveCipher, SendCipher
from p2pnode.wire.codec import decode, encode
from p2pnode.wire.messages.session import HandshakePayload
from p2pnode.wire.version import SPOKEN, VersionRange, agree

DOMAIN: Final = "session-static"
PREAMBLE_SIZE: Final = 8
_LABEL: Final = b"p2pnode session"
_REFUSAL_SIZE_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as the handshake has proven (identity) or as the peer says (the rest).

    version: the one both sides use. seen_address: where its bytes come from. inbound: the peer opened the connection.
    instance: a new value each time the peer's process starts.
    """

    node_id: NodeId
    public_key: bytes
    version: int
    features: tuple[str, ...]
    agent: str
    addresses: tuple[str, ...]
    seen_address: str
    instance: str
    inbound: bool


@dataclass(frozen=True, slots=True)
class Introduction:
    """What one side says of itself: its identity, and what goes into its HandshakePayload.

    encoded: the payload, once it was made. It is the same in every handshake, and its signature costs as much as the rest.
    """

    identity: Identity
    network_id: bytes
    instance: str
    versions: VersionRange = SPOKEN
    features: tuple[str, ...] = ()
    agent: str = ""
    addresses: tuple[str, ...] = ()
    puzzle_bits: int = 0
    encoded: list[bytes] = field(default_factory=list, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Established:
    """The handshake is complete: the ciphers for sending and receiving, and the verified peer."""

    peer: Peer
    sender: SendCipher
    receiver: ReceiveCipher


class NoiseState(Protocol):
    """The cryptographic side of a handshake, as `crypto.noise.HandshakeState` gives it."""

    remote_static: bytes

    def write_message(self, payload: bytes) -> bytes:
        """Give the next message."""
        ...

    def read_message(self, message: Buffer) -> bytes:
        """Take the peer's next message and give its payload. Raises ProtocolViolation."""
        ...

    def split(self) -> tuple[SendCipher, ReceiveCipher]:
        """Give the ciphers for sending and for receiving."""
        ...


class Handshake:
    """One side of one handshake. `receive` takes bytes and gives bytes; `established` is set at the end.

    introduction: our own. expected: the node id that was dialled, if it is known. ephemeral: 32 fresh random bytes.
    A simulation that does without cryptography replaces `suites`, `noise_state`, `signature`, `check_signature` and
    `establish`; everything else is the same there.
    """

    suites: Collection[int] = SUITES

    def __init__(
        self,
        introduction: Introduction,
        *,
        initiator: bool,
        ephemeral: bytes,
        seen_address: str,
        suite: int = 1,
        expected: NodeId | None = None,
        message_bytes_max: int = 4096,
    ) -> None:
        self.established: Established | None = None
        self.introduction = introduction
        self._initiator = initiator
        self._ephemeral = ephemeral
        self._seen_address = seen_address
        self._expected = expected
        self._message_bytes_max = message_bytes_max
        self._buffer = bytearray()
        self._noise: NoiseState | None = None
        self._peer_versions: VersionRange | None = None
        if initiator:
            versions = introduction.versions
            tag = network_tag(introduction.network_id)
            self._preamble = bytes((suite, versions.oldest, versions.newest, 0)) + tag
            self._noise = self.noise_state(self._preamble)
        self._read = 0

    def start(self) -> bytes:
        """Give the initiator's first bytes; nothing for a responder."""
        if not self._initiator or self._noise is None:
            return b""
        return self._preamble + _sized(self._noise.write_message(b""))

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take bytes in any pieces and give what to send, possibly nothing.

        After `established` is set, `leftover` holds what came behind the handshake. Raises ProtocolViolation, once; its
        reason may be told to the peer with `refusal`.
        """
        self._buffer += data
        answer = b""
        while self.established is None:
            if self._noise is None:
                if len(self._buffer) < PREAMBLE_SIZE:
                    break
                self._noise = self._accept_preamble(self._pop(PREAMBLE_SIZE))
            message = self._pop_message()
            if message is None:
                break
            answer += self._step(self._noise, message)
        return answer

    @property
    def leftover(self) -> bytes:
        """The bytes that followed the handshake: the start of the session."""
        return bytes(self._buffer)

    @property
    def is_in_the_clear(self) -> bool:
        """True for a responder that has not answered yet: it may say why it refuses, with `refusal`."""
        return not self._initiator and self._read == 0

    def _step(self, noise: NoiseState, message: bytes) -> bytes:
        payload = noise.read_message(message)
        self._read += 1
        if not self._initiator and self._read == 1:
            if payload:
                raise ProtocolViolation(Reason.BAD_HANDSHAKE, "the first message carries no payload")
            return _sized(noise.write_message(self._payload()))
        peer = self._verify(noise, payload)
        answer = b"" if not self._initiator else _sized(noise.write_message(self._payload()))
        self.established = self.establish(peer, noise)
        return answer

    def noise_state(self, preamble: bytes) -> NoiseState:
        """Give the cryptographic side of this handshake."""
        prologue = _LABEL + preamble + self.introduction.network_id
        static = self.introduction.identity.static_key()
        return HandshakeState(SUITES[preamble[0]], self._initiator, prologue, static, self._ephemeral)

    def signature(self) -> bytes:
        """Give the identity's signature of its static key."""
        identity = self.introduction.identity
        return identity.sign(DOMAIN, self.introduction.network_id, identity.static_public_key)

    def check_signature(self, noise: NoiseState, payload: HandshakePayload) -> None:
        """Check that the peer's identity owns the static key that Noise has proven. Raises ProtocolViolation."""
        verify(DOMAIN, self.introduction.network_id, noise.remote_static, payload.identity, payload.signature)

    def establish(self, peer: Peer, noise: NoiseState) -> Established:
        """Give the two ciphers of a handshake whose messages have all passed."""
        sender, receiver = noise.split()
        return Established(peer, sender, receiver)

    def _accept_preamble(self, preamble: bytes) -> NoiseState:
        suite, oldest, newest, zero = preamble[:4]
        if suite not in self.suites or zero != 0:
            raise ProtocolViolation(Reason.BAD_HANDSHAKE, "this is no p2pnode, or one with a cipher we do not know")
        if preamble[4:] != network_tag(self.introduction.network_id):
            raise ProtocolViolation(Reason.WRONG_NETWORK, "the peer is in another network")
        self._peer_versions = VersionRange(oldest, newest)
        agree(self.introduction.versions, self._peer_versions)
        return self.noise_state(preamble)

    def _payload(self) -> bytes:
        own = self.introduction
        if not own.encoded:
            payload = HandshakePayload(
                identity=own.identity.public_key,
                signature=self.signature(),
                version=own.versions.newest,
                features=own.features,
                agent=own.agent,
                addresses=own.addresses,
                instance=own.instance,
            )
            own.encoded.append(encode(payload))
        return own.encoded[0]

    def _verify(self, noise: NoiseState, data: bytes) -> Peer:
        payload = decode(HandshakePayload, data, self._message_bytes_max)
        own = self.introduction
        self.check_signature(noise, payload)
        node_id = node_id_of(payload.identity)
        if node_id == own.identity.node_id:
            if payload.instance == own.instance:
                raise ProtocolViolation(Reason.SELF_DIAL, "this address leads back to this node")
            raise ProtocolViolation(Reason.DUPLICATE_IDENTITY, "another daemon runs with this node's identity")
        if self._expected is not None and node_id != self._expected:
            raise ProtocolViolation(Reason.WRONG_PEER, "another node answers at this address")
        if not check_puzzle(node_id, own.puzzle_bits):
            raise ProtocolViolation(Reason.BAD_HANDSHAKE, "the peer's identity does not solve this network's key puzzle")
        peer_versions = self._peer_versions or VersionRange(max(1, payload.version - 1), payload.version)
        return Peer(
            node_id=node_id,
            public_key=payload.identity,
            version=agree(own.versions, peer_versions),
            features=payload.features,
            agent=payload.agent,
            addresses=payload.addresses,
            seen_address=self._seen_address,
            instance=payload.instance,
            inbound=not self._initiator,
        )

    def _pop_message(self) -> bytes | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        size = (buffer[0] << 8) | buffer[1]
        if size == 0 and self._initiator:
            self._check_refusal()
            return None
        if size > self._message_bytes_max:
            raise ProtocolViolation(Reason.TOO_LARGE, f"a handshake message of {size} bytes")
        if size == 0:
            raise ProtocolViolation(Reason.BAD_HANDSHAKE, "an empty handshake message")
        if len(buffer) < 2 + size:
            return None
        return self._pop(2 + size)[2:]

    def _check_refusal(self) -> None:
        """The responder gave a reason in the clear. Raises once it is complete."""
        if len(self._buffer) < 3 or len(self._buffer) < 3 + self._buffer[2]:
            return
        text = bytes(self._buffer[3 : 3 + min(self._buffer[2], _REFUSAL_SIZE_MAX)])
        try:
            reason = Reason(text.decode("ascii", "replace"))
        except ValueError:
            reason = Reason.BAD_HANDSHAKE
        raise ProtocolViolation(reason, "said the peer, before any key")

    def _pop(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def refusal(reason: Reason) -> bytes:
    """Give the bytes by which a responder says, in the clear, why it will not go on."""
    text = reason.value.encode()[:_REFUSAL_SIZE_MAX]
    return b"\0\0" + bytes((len(text),)) + text


def network_tag(network_id: bytes) -> bytes:
    """Give the four bytes that let nodes of different networks part with a clear reason."""
    return document_hash(network_id)[:4]


def _sized(message: bytes) -> bytes:
    return len(message).to_bytes(2, "big") + message
