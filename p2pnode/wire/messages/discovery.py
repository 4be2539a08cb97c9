"""Who is where: what peers tell each other about addresses."""

from msgspec import Struct

from p2pnode.wire.messages.fields import Addresses, Hash32, Label
from p2pnode.wire.registry import message


@message(20)
class WhoAreYou(Struct, frozen=True):
    """Ask a peer about itself. Answered by Introduction."""


@message(21)
class Introduction(Struct, frozen=True):
    """A peer's own word about itself and the address it sees us at."""

    node_id: Hash32
    addresses: Addresses
    seen_address: Label
    role: Label
