"""Where a simulation sees, counts and loses single messages: between a session and the cipher it receives with.

The network's streams are reliable, so a lost request or reply cannot be lost bytes: it is a frame that the receiving session
never gets to see. The tap walks the frames of each record just opened and turns the kind of a lost one into one of those that
every session ignores. So nothing in the transport knows of it, and it works the same with real ciphers and with none.

A cancel of a lost request is lost too: the session would rightly refuse to cancel what never came. Messages with a streamed
attachment are not lost: they are many packets, which a real network would repeat.
"""

from typing import TYPE_CHECKING, Final

from p2pnode.crypto.noise import TAG_SIZE
from p2pnode.environment import Buffer
from p2pnode.sim.streams import Draws
from p2pnode.transport import frames
from p2pnode.transport.frames import ReceiveCipher
from p2pnode.wire.registry import class_of

if TYPE_CHECKING:
    from p2pnode.sim.network import MemoryNetwork

LOST: Final = 255
_OPENING_SIZE: Final = frames.OPENING.size
_KINDS: Final = {frames.REQUEST: "q", frames.REPLY: "r"}
_names: Final[dict[int, str]] = {}


class FrameTap:
    """A receiving cipher that shows the network what it opens. sender and receiver: the labels of both machines.

    seed: of what it draws, which it does only where something is lost.
    """

    __slots__ = ("_cipher", "_draws", "_lost", "_network", "_raw", "_receiver", "_seed", "_sender")

    def __init__(self, cipher: ReceiveCipher, network: "MemoryNetwork", sender: str, receiver: str, seed: int) -> None:
        self._cipher = cipher
        self._network = network
        self._sender = sender
        self._receiver = receiver
        self._seed = seed
        self._draws: Draws | None = None
        # Bytes of an attachment that the next records bring without frames.
        self._raw = 0
        # Requests lost here whose cancel may come; the session bounds how many are open.
        self._lost: dict[int, None] = {}

    @property
    def records(self) -> int:
        """How many records were opened under the present key."""
        return self._cipher.records

    def rekey(self) -> None:
        """Replace the key."""
        self._cipher.rekey()

    def open_into(self, sealed: memoryview, out: memoryview) -> int:
        """Open to the start of `out`, and take out what the network loses. Raises ProtocolViolation."""
        size = self._cipher.open_into(sealed, out)
        if self._raw:
            self._raw -= size
            return size
        position = 0
        while size - position >= 8:
            kind, _, length, number = frames.HEADER.unpack_from(out, position)
            end = position + 8 + length
            if end > size:
                break
            if kind <= frames.REFUSAL:
                self._message(kind, number, out, position, end)
            elif kind == frames.DATA and length == 4:
                self._raw = frames.FOUR_BYTES.unpack_from(out, position + 8)[0]
            elif kind == frames.CANCEL and number in self._lost:
                del self._lost[number]
                out[position] = LOST
            position = end
        return size

    def _message(self, kind: int, number: int, out: memoryview, position: int, end: int) -> None:
        network = self._network
        stats = network.stats
        body = position + 8
        if kind == frames.REFUSAL:
            stats.messages["Refusal"] += 1
            stats.bytes["Refusal"] += end - position
            if network.trace.has_messages:
                network.trace.add(network.now(), "n", self._sender, self._receiver, f"Refusal {number}")
            return
        if end - body < _OPENING_SIZE + 2:
            return
        at = body + _OPENING_SIZE
        name = message_name(out[at] << 8 | out[at + 1])
        stats.messages[name] += 1
        stats.bytes[name] += end - position
        is_lost = network.loss > 0 and self._is_lost(kind, out, body, end)
        if network.trace.has_messages:
            letter = "l" if is_lost else _KINDS[kind]
            network.trace.add(network.now(), letter, self._sender, self._receiver, f"{name} {number} {end - body}")
        if is_lost:
            stats.lost += 1
            out[position] = LOST
            if kind == frames.REQUEST:
                self._lost[number] = None

    def _is_lost(self, kind: int, out: memoryview, body: int, end: int) -> bool:
        message_size, _, attachment_size = frames.OPENING.unpack_from(out, body)
        is_whole: bool = end - body - _OPENING_SIZE == message_size + attachment_size
        if is_whole and self._draws is None:
            self._draws = Draws(self._seed)
        return self._draws is not None and is_whole and self._draws.uniform() < self._network.loss


class PlainCipher:
    """No encryption, in either direction, with room for the tag that the session's records have. It counts as a cipher does."""

    __slots__ = ("records",)

    def __init__(self) -> None:
        self.records = 0

    def seal_into(self, plain: Buffer, out: memoryview) -> int:
        """Copy `plain` to the start of `out`, with 16 bytes behind it; give the size."""
        size = len(plain)
        out[:size] = plain
        self.records += 1
        return size + TAG_SIZE

    def open_into(self, sealed: memoryview, out: memoryview) -> int:
        """Copy to the start of `out`, unless it is there already; give the size without the tag's room."""
        size = max(0, len(sealed) - TAG_SIZE)
        if out is not sealed:
            out[:size] = sealed[:size]
        self.records += 1
        return size

    def rekey(self) -> None:
        """Begin to count again."""
        self.records = 0


def message_name(number: int) -> str:
    """Give the name of a message class for counts and traces."""
    name = _names.get(number)
    if name is None:
        cls = class_of(number)
        if cls is None:
            return "unknown"
        name = _names[number] = cls.__name__
    return name
